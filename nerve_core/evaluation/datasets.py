"""Labelled folders -> images and mask labels: the sets of the protocol, and any folder in the layout of VOC.

What is in a folder is looked at before any model is loaded: the parts that must be there, every file of the split, and
in a sample of the label files which of the encodings that go by the same name they hold. Nothing is downloaded.
"""

from __future__ import annotations

import codecs
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFile

from ..text.vocabulary import Vocabulary, VocabularyError
from .metric import IGNORED

_CLASSES = Path(__file__).with_name("classes")
_REFUSED = -1
_SAMPLED = 64  # label files that are read when a set is opened, spread over the split
_SURE = 20.0  # nats between the likelihoods of two encodings; 64 files of Pascal Context give some 270
_MOSTLY = 0.75  # of the labels 0 to n - 1 occur and n, of n lines, never does: they may as well count from 0
_SAME = tuple(range(256))
_Item = TypeVar("_Item")


class DatasetError(ValueError):
    """A folder or a file that is not what the set needs; the message names it, and says what to do."""


@dataclass(frozen=True)
class Sample:
    """One image and its truth. id: as the split names it, unique in the set."""

    id: str
    image: Path
    labels: Path


@dataclass(frozen=True)
class Dataset:
    """A labelled set, as `open_dataset` found it.

    names: the classes as `Vocabulary` takes them, synonyms by "|"; mask label k is names[k - 1]. background: the words
    whose win means label 0; None takes the model pair's own negatives, () has none. templates: a set of `templates.py`,
    threshold: least probability of a label; None for both takes the pair's own. notes: what was found in the folder,
    for a reader of the scores to know. values: the mask label of each of the 256 values that a label file can hold, -1
    for one that it must not hold.
    """

    name: str
    title: str
    root: Path
    names: tuple[str, ...]
    background: tuple[str, ...] | None
    templates: str | None
    threshold: float | None
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    values: tuple[int, ...] = field(default=_SAME, repr=False)

    @property
    def vocabulary(self) -> Vocabulary:
        """What to look for in every image."""
        return Vocabulary(self.names, negatives=self.background)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the mask labels 0, 1, ...: the rows of the confusion matrix."""
        return ("background", *self.vocabulary.names)

    @property
    def settings(self) -> dict[str, Any]:
        """What the set's protocol overrides of `Settings`, by flat name.

        A set that lists its background words is asked for those and its classes alone, without the mean of the names
        as one more.
        """
        asked = {"templates": self.templates, "threshold": self.threshold}
        exact = {} if self.background is None else {"mean_negative": False}
        return {name: value for name, value in asked.items() if value is not None} | exact

    def first(self, limit: int | None) -> Dataset:
        """The set with the first `limit` images alone; None takes all. Raises DatasetError for a limit below 1, and
        where no class of the list occurs in those images."""
        if limit is None or limit >= len(self.samples):
            return self
        if limit < 1:
            raise DatasetError(f"the limit is {limit}; it must be 1 or more images")
        taken = self.samples[:limit]
        classes = {raw for raw, label in enumerate(self.values) if 0 < label != IGNORED}
        if not any(classes & _values(sample.labels) for sample in taken):
            raise DatasetError(
                f"no class of {self.name} occurs in the first {limit} of {len(self.samples)} images: scores would be "
                "of the background alone; take more images"
            )
        return replace(self, samples=taken)

    def load(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """One image and its truth, turned as the image's EXIF says, as `nerve segment` does it.

        Labels know no orientation. Where theirs is the size of the image as it is stored and not of the turned one,
        they were drawn on the stored pixels, and the image stays so.
        Returns uint8 [H, W, 3] RGB (a grey image three times) and uint8 [H, W] mask labels, 0 the background, 255
        ignored. Raises DatasetError for a file that is missing, cannot be decoded, is of another size than the other,
        or holds a value that the set's encoding has not.
        """
        stored, orientation = _read_image(sample.image)
        raw = _read_labels(sample.labels)
        turn = _turn(orientation, stored.shape[:2], raw.shape)
        image = stored if turn is None else np.array(Image.fromarray(stored).transpose(turn))
        if image.shape[:2] != raw.shape:
            raise DatasetError(
                f"{sample.labels} is {raw.shape[1]} x {raw.shape[0]} pixels, {sample.image.name} "
                f"{image.shape[1]} x {image.shape[0]}: they must be equal, so one of them was resized or is another's"
            )
        labels = np.array(self.values, np.int16)[raw]
        wrong = (labels == _REFUSED) | ((labels > len(self.names)) & (labels != IGNORED))
        if wrong.any():
            accepted = [k for k, label in enumerate(self.values) if label == IGNORED or 0 <= label <= len(self.names)]
            raise DatasetError(
                f"{sample.labels} holds the value {raw[wrong][0]} ({int(wrong.sum())} pixels are out of range): "
                f"{self.name} has {_ranges(accepted)}"
            )
        return image, labels.astype(np.uint8)


def open_dataset(name: str, root: Path | str, *, limit: int | None = None) -> Dataset:
    """The set of a name (one of `DATASETS`) that is in the folder `root`.

    limit: the first N images of the split alone; the folder is checked for all of them.
    Raises DatasetError for an unknown name, a part or a file that is missing, or labels in an encoding that the set
    does not know or that cannot be distinguished from another.
    """
    if name not in _SETS:
        raise DatasetError(f"data set {name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if limit is not None and limit < 1:
        raise DatasetError(f"the limit is {limit}; it must be 1 or more images")
    layout, root = _SETS[name], Path(root)
    place = _find_place(name, layout, root)
    classes = _read_classes(_CLASSES / layout.classes if layout.classes else place / "classes.txt")
    ids = _read_split(layout, place)
    images = _files(place, layout.images, ids, "images")
    encodings, labels = _label_files(name, layout, place, ids, len(classes.names))
    background, threshold = classes.background, layout.threshold
    if layout.classes:
        encoding, seen, notes = _find_encoding(name, encodings, labels)
    else:
        palettes = _palette_notes(classes, labels)
        encoding, seen, notes = _find_reading(classes, labels)
        notes = (*notes, *palettes)
        if 0 not in encoding.labels.values() and background is None:
            background, threshold = (), 0.0  # every pixel has a class, as in the sets whose background does not count
    _check_classes_occur(name, classes, encoding, labels, seen)
    if layout.has_ignored and not any(IGNORED in values for values in seen):
        notes = (*notes, f"none of {len(seen)} label files has ignored pixels, as the published ones have")
    if layout.images_in_split not in (None, len(ids)):
        notes = (*notes, f"{len(ids)} images, where the protocol's split has {layout.images_in_split}")
    values = [encoding.labels.get(raw, _REFUSED) for raw in range(256)]
    if not layout.background_counts:
        values = [IGNORED if label == 0 else label for label in values]
    samples = tuple(map(Sample, ids, images, labels))
    return Dataset(
        name=name,
        title=layout.title,
        root=root,
        names=classes.names,
        background=background if layout.background_counts else (),
        templates=layout.templates,
        threshold=threshold,
        samples=samples,
        notes=(*notes, *_orientation_notes(samples)),
        values=tuple(values),
    ).first(limit)


# --- the sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoding:
    """One way in which a set's label files are written.

    name: in words. files: their path, "{}" for the id. labels: mask label by raw value; no other value may occur.
    shares: of the set's images that show a raw value, where two encodings have to be distinguished by that.
    """

    name: str
    files: str
    labels: Mapping[int, int]
    shares: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """A set as it is published: where its files are, what they hold, and how it is asked for.

    classes: file in classes/; "" for the folder's own classes.txt. places: where below the root it may be.
    images: patterns, the first that is there. split: the list of ids; "" takes all images in the order of their names.
    encodings: of (number of classes), those named first are looked for first. has_ignored: whether nearly every
    published label file has pixels of 255. background_counts: whether label 0 is a class, or ignored. look_alikes:
    glob -> what it means that this is there and the set is not.
    """

    title: str
    classes: str
    places: tuple[str, ...]
    images: tuple[str, ...]
    split: str
    encodings: Callable[[int], tuple[_Encoding, ...]]
    images_in_split: int | None
    has_ignored: bool
    background_counts: bool
    templates: str | None
    threshold: float | None
    get: str
    look_alikes: Mapping[str, str] = field(default_factory=dict)


def _voc_encodings(classes: int) -> tuple[_Encoding, ...]:
    labels = {raw: raw for raw in (*range(classes + 1), IGNORED)}
    return (_Encoding(f"indices 0 to {classes}, 255 ignored", "SegmentationClass/{}.png", labels),)


def _context_encodings(classes: int) -> tuple[_Encoding, ...]:
    """Both are 0 to 59 with 0 for everything else: alphabetical as mmsegmentation writes them, or in the order of the
    authors' own 59_labels.txt. Which classes an image shows together distinguishes them."""
    lines = [line.rsplit(" ", 1) for line in _lines(_CLASSES / "pascal-context-voc-first.txt")]
    shares = {name: int(count) / 5105 for name, count in lines}
    alphabetical, voc_first = sorted(shares), list(shares)
    return tuple(
        _Encoding(
            name,
            "SegmentationClassContext/{}.png",
            {0: 0} | {raw: alphabetical.index(word) + 1 for raw, word in enumerate(order, 1)},
            {raw: shares[word] for raw, word in enumerate(order, 1)},
        )
        for name, order in (("alphabetical order", alphabetical), ("VOC-first order", voc_first))
    )


_FROM_0, _FROM_1, _BINARY = _READINGS = ("from 0", "from 1", "0 and 255")
"""What a folder's classes.txt may say after "labels:", of how its lines are numbered in the label files."""
_UNASKED = {"background": 0} | dict.fromkeys(("ignore", "ignored", "void", "unlabelled", "unlabeled"), IGNORED)
"""Lines of a class list that name no class -> their mask label. Outer "_" do not count: labelme has _background_."""


@dataclass(frozen=True)
class _ClassList:
    """A class list as it is written.

    path: the file. lines: those that have a number in the label files, in its order. unnumbered: a first line
    __ignore__, which labelme counts as -1 and writes as 255. background: words of the line "background:", None without
    one. reading: one of `_READINGS` from the line "labels:", None without one.
    """

    path: Path
    lines: tuple[str, ...]
    unnumbered: tuple[str, ...]
    background: tuple[str, ...] | None
    reading: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The lines that name a class; mask label k is names[k - 1]."""
        return tuple(line for line in self.lines if _unasked(line) is None)

    @property
    def unasked(self) -> tuple[str, ...]:
        """The numbered lines that name none."""
        return tuple(line for line in self.lines if _unasked(line) is not None)

    def encoding(self, reading: str) -> _Encoding:
        """How label files are written, by one of `_READINGS`."""
        if reading == _BINARY:
            return _Encoding(f"'labels: {_BINARY}', 0 the background", "", {0: 0, IGNORED: 1})
        numbers = {line: number for number, line in enumerate(self.names, 1)}
        labels = [numbers.get(line, _unasked(line) or 0) for line in self.lines]
        if reading == _FROM_0:
            return _Encoding(f"'labels: {_FROM_0}', 255 ignored", "", {**dict(enumerate(labels)), IGNORED: IGNORED})
        return _Encoding(
            f"indices 0 to {len(labels)}, 255 ignored", "", {0: 0, **dict(enumerate(labels, 1)), IGNORED: IGNORED}
        )


def _unasked(line: str) -> int | None:
    """The mask label of a line that names no class; None for a class."""
    return _UNASKED.get(line.strip("_ ").casefold())


_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # raw ids of COCO-Stuff that no class has


def _stuff_encodings(classes: int) -> tuple[_Encoding, ...]:
    """Train ids 0 to 170, or COCO-Stuff's own ids 0 to 181 with gaps. Under the plain name a file may hold either."""
    train = {raw: raw + 1 for raw in range(classes)} | {IGNORED: IGNORED}
    used = [raw for raw in range(182) if raw not in _COCO_UNUSED]
    own = {raw: label for label, raw in enumerate(used, 1)} | {IGNORED: IGNORED}
    return (
        _Encoding("train ids 0 to 170", "annotations/val2017/{}_labelTrainIds.png", train),
        _Encoding("COCO-Stuff's own ids 0 to 181", "annotations/val2017/{}.png", own),
        _Encoding("train ids 0 to 170", "annotations/val2017/{}.png", train),
    )


def _object_encodings(classes: int) -> tuple[_Encoding, ...]:
    """Things 1 to 80 over a background; or COCO-Stuff's files, of which stuff and the unlabelled become background, as
    the converter that writes the former does."""
    things = {raw: raw for raw in (*range(classes + 1), IGNORED)}
    stuff = [
        replace(
            encoding,
            name=f"{encoding.name}, stuff and unlabelled as background",
            labels={raw: label if label <= classes else 0 for raw, label in encoding.labels.items()},
        )
        for encoding in _stuff_encodings(171)
    ]
    return (_Encoding("indices 0 to 80", "annotations/val2017/{}_instanceTrainIds.png", things), *stuff)


def _ade_encodings(classes: int) -> tuple[_Encoding, ...]:
    labels = {raw: raw for raw in range(classes + 1)}
    return (_Encoding("indices 0 to 150", "annotations/validation/{}.png", labels),)


_VOC = _Layout(
    title="Pascal VOC 2012 val with background (V21)",
    classes="voc.txt",
    places=("", "VOC2012", "VOCdevkit/VOC2012"),
    images=("JPEGImages/{}.jpg",),
    split="ImageSets/Segmentation/val.txt",
    encodings=_voc_encodings,
    images_in_split=1449,
    has_ignored=True,
    background_counts=True,
    templates="cliper15",
    threshold=0.1,
    get="get VOCtrainval_11-May-2012.tar from the Pascal VOC 2012 site and unpack it",
    look_alikes={
        "SegmentationClassAug": "SegmentationClassAug holds labels of another origin (SBD), without ignored borders",
    },
)
_CONTEXT = _Layout(
    title="Pascal Context 59 val with background (PC60)",
    classes="pascal-context.txt",
    places=("", "VOC2010", "VOCdevkit/VOC2010"),
    images=("JPEGImages/{}.jpg",),
    split="ImageSets/SegmentationContext/val.txt",
    encodings=_context_encodings,
    images_in_split=5105,
    has_ignored=False,
    background_counts=True,
    templates="imagenet80",
    threshold=0.1,
    get="get VOCtrainval_03-May-2010.tar from the Pascal VOC 2010 site and trainval_merged.json of the detail API, "
    "then run mmsegmentation's tools/dataset_converters/pascal_context.py on them",
    look_alikes={
        "annotations_detectron2": "annotations_detectron2 holds the labels in another form (0 to 58, 255 for the rest)",
        "59_context_labels": "59_context_labels may be renamed to SegmentationClassContext, its order is recognised",
    },
)
_STUFF = _Layout(
    title="COCO-Stuff val2017, 171 classes (C-Stf)",
    classes="coco-stuff.txt",
    places=("", "coco_stuff164k"),
    images=("images/val2017/{}.jpg",),
    split="",
    encodings=_stuff_encodings,
    images_in_split=5000,
    has_ignored=False,
    background_counts=False,
    templates="imagenet80",
    threshold=0.0,
    get="get val2017.zip from the COCO site into images/ and stuffthingmaps_trainval2017.zip from the COCO-Stuff "
    "repository (nightrome/cocostuff) into annotations/; converting the labels is not needed",
    look_alikes={
        "val2014": "val2014 holds other images than val2017",
        "annotations/instances_val2017.json": "instances_val2017.json holds outlines and no label images",
    },
)

_SETS: dict[str, _Layout] = {
    "voc21": _VOC,
    "voc20": replace(
        _VOC, title="Pascal VOC 2012 val, background ignored (V20)", background_counts=False, threshold=0.0
    ),
    "pc60": _CONTEXT,
    "pc59": replace(
        _CONTEXT,
        title="Pascal Context 59 val, background ignored (PC59)",
        background_counts=False,
        templates="cliper15",
        threshold=0.0,
    ),
    "coco-object": replace(
        _STUFF,
        title="COCO val2017, 80 things with background (C-Obj)",
        classes="coco-object.txt",
        encodings=_object_encodings,
        background_counts=True,
        threshold=0.1,
    ),
    "coco-stuff": _STUFF,
    "ade20k": _Layout(
        title="ADE20K validation, 150 classes (ADE)",
        classes="ade20k.txt",
        places=("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        images=("images/validation/{}.jpg",),
        split="",
        encodings=_ade_encodings,
        images_in_split=2000,
        has_ignored=False,
        background_counts=False,
        templates="imagenet80",
        threshold=0.0,
        get="get ADEChallengeData2016.zip from the MIT Scene Parsing site and unpack it",
        look_alikes={
            "images/ADE": "this is the full ADE20K (thousands of classes), not the challenge's 150",
            "annotations_detectron2": "annotations_detectron2 holds the labels in another form (0 to 149, 255)",
        },
    ),
    "folder": _Layout(
        title="labelled folder",
        classes="",
        places=("",),
        images=("JPEGImages/{}.jpg", "JPEGImages/{}.jpeg", "JPEGImages/{}.png"),
        split="ImageSets/Segmentation/val.txt",
        encodings=_voc_encodings,
        images_in_split=None,
        has_ignored=False,
        background_counts=True,
        templates=None,
        threshold=None,
        get="a labelled folder has classes.txt with one class a line, JPEGImages/ID.jpg, .jpeg or .png, "
        "SegmentationClass/ID.png with the class's line number from 1 (0 background, 255 ignored), and the IDs in "
        "ImageSets/Segmentation/val.txt",
        look_alikes={
            "class_names.txt": "class_names.txt, as labelme writes it, may be copied to classes.txt: its first line, "
            "_background_, is label 0",
            "SegmentationClassPNG": "SegmentationClassPNG, as labelme writes it, may be renamed to SegmentationClass",
            "labelmap.txt": "CVAT's masks are in the colours of labelmap.txt: replace every colour by its class's line "
            "number in classes.txt, background by 0, and rename ImageSets/Segmentation/default.txt to val.txt",
            "img_dir": "img_dir and ann_dir, as mmsegmentation has them, hold a split's images and labels: move "
            "those to JPEGImages and SegmentationClass, and list their names without ending in val.txt",
            "annotations/*.json": "annotations/*.json, as COCO has it, holds outlines and no label images: draw "
            "them into PNG, each class by its line number",
        },
    ),
}
DATASETS: tuple[str, ...] = tuple(_SETS)
"""The names that `open_dataset` knows."""


# --- what is in the folder -------------------------------------------------------------------------------------------


def _find_place(name: str, layout: _Layout, root: Path) -> Path:
    """The folder below `root` that has all parts of the set, or DatasetError with what the best one lacks."""
    if not root.is_dir():
        raise DatasetError(f"{root} is no folder; give the folder that holds {name}: {layout.get}")
    parts = {str(Path(pattern).parent): None for pattern in layout.images} | {layout.split: None}
    if not layout.classes:
        parts["classes.txt"] = None
    labels = dict.fromkeys(str(Path(encoding.files).parent) for encoding in layout.encodings(0))
    needed = [part for part in (*parts, *labels) if part]
    lacks = {place: [part for part in needed if not (root / place / part).exists()] for place in layout.places}
    best = min(layout.places, key=lambda place: len(lacks[place]))
    if not lacks[best]:
        return root / best
    places = [place for place in layout.places if place]
    also = f" (nor is it in {' or '.join(places)} there)" if places and not best else ""
    hints = [hint for glob, hint in layout.look_alikes.items() if any((root / best).glob(glob))]
    raise DatasetError(
        f"{root / best} lacks {', '.join(lacks[best])}{also}: {layout.get}. "
        + "".join(f"Note that {hint}. " for hint in hints)
        + "Nothing is downloaded."
    )


def _read_split(layout: _Layout, place: Path) -> tuple[str, ...]:
    """The ids of the split in its own order."""
    if layout.split:
        path = place / layout.split
        ids = _lines(path)
        folders: dict[Path, dict[str, list[Path]]] = {}
        bad = [
            line
            for line in ids
            if len(line.split()) != 1
            and not any(_cased(place / image.format(line), folders) for image in layout.images)
        ]
        if bad:
            raise DatasetError(
                f"{path} has the line {bad[0]!r}; it must list one id a line, and no image is called so as a whole"
            )
        named = [line for line in ids if Path(line).suffix.lower() in _ENDINGS]
        if named and not (place / layout.images[0].format(named[0])).is_file():
            raise DatasetError(
                f"{path} has the line {named[0]!r}; it must list ids, the names of the images without folder and "
                f"ending, as {Path(named[0]).stem!r}"
            )
    else:
        path, ending = (place / layout.images[0]).parent, Path(layout.images[0]).suffix
        ids = sorted(file.stem for file in path.iterdir() if file.suffix.lower() == ending)
    repeated = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if repeated:
        raise DatasetError(f"{path} names {repeated[0]} more than once; every image counts once")
    if not ids:
        raise DatasetError(f"{path} names no image; {layout.get}")
    return tuple(ids)


def _files(place: Path, patterns: Sequence[str], ids: Sequence[str], what: str) -> list[Path]:
    """The file of every id by any of the patterns, their endings in any case. DatasetError with how many are missing,
    or where an id has several."""
    folders: dict[Path, dict[str, list[Path]]] = {}
    found = [[path for p in patterns for path in _cased(place / p.format(name), folders)] for name in ids]
    missing = [name for name, paths in zip(ids, found, strict=True) if not paths]
    if missing:
        wanted = " or ".join(str(place / pattern.format(missing[0])) for pattern in patterns)
        raise DatasetError(f"{len(missing)} of {len(ids)} {what} are missing, the first is {wanted}")
    for name, paths in zip(ids, found, strict=True):
        if len(paths) > 1:
            files = " and ".join(path.name for path in paths)
            raise DatasetError(f"{paths[0].parent} holds {files}, so that {name} is not one file; leave one of them")
    return [path for path, *_ in found]


def _cased(path: Path, folders: dict[Path, dict[str, list[Path]]]) -> list[Path]:
    """The files of that path with its ending in any case. folders: what is in folders looked into before."""
    if path.parent not in folders:
        inside = folders[path.parent] = {}
        for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
            inside.setdefault(file.stem + file.suffix.lower(), []).append(file)
    return [file for file in folders[path.parent].get(path.name, ()) if file.is_file()]


def _label_files(
    name: str, layout: _Layout, place: Path, ids: Sequence[str], classes: int
) -> tuple[list[_Encoding], list[Path]]:
    """The label files of the first pattern under which there are any, and the encodings that go by it."""
    encodings = layout.encodings(classes)
    patterns = list(dict.fromkeys(encoding.files for encoding in encodings))
    folders: dict[Path, dict[str, list[Path]]] = {}
    pattern = next((p for p in patterns if any(_cased(place / p.format(id), folders) for id in ids)), None)
    if pattern is None:
        hints = [hint for glob, hint in layout.look_alikes.items() if any(place.glob(glob))]
        folder, stems = (place / patterns[0]).parent, {Path(id).name for id in ids}
        others = [file.name for file in sorted(folder.iterdir()) if file.stem in stems] if folder.is_dir() else []
        if others:
            hints.append(
                f"it holds {others[0]}: labels must be PNG; JPEG changes their values, so convert what it was made of"
            )
        raise DatasetError(
            f"{folder} has no label file of {name}, such as "
            f"{' or '.join(Path(p).name.format(ids[0]) for p in patterns)}: {layout.get}"
            + "".join(f". Note that {hint}" for hint in hints)
        )
    return [e for e in encodings if e.files == pattern], _files(place, [pattern], ids, "label files")


def _find_encoding(
    name: str, encodings: Sequence[_Encoding], files: Sequence[Path]
) -> tuple[_Encoding, list[frozenset[int]], tuple[str, ...]]:
    """Which encoding the label files are in, by the values in a sample of them; those values; and what a reader
    has to know of it."""
    sampled = _spread(files)
    seen = [_values(path) for path in sampled]
    fitting = [encoding for encoding in encodings if all(encoding.labels.keys() >= values for values in seen)]
    if not fitting:
        path, strange = next(
            (path, sorted(values - encodings[0].labels.keys()))
            for path, values in zip(sampled, seen, strict=True)
            if values - encodings[0].labels.keys()
        )
        known = "; or ".join(f"{encoding.name}: {_ranges(encoding.labels)}" for encoding in encodings)
        raise DatasetError(f"{path} holds {_ranges(strange)}, which {name} has not ({known})")
    if len(fitting) == 1 and len(encodings) == 1:
        return fitting[0], seen, ()
    if len(fitting) == 1:
        return fitting[0], seen, (f"labels are in {fitting[0].name}, told by {len(sampled)} of the files",)
    scores = [_log_likelihood(seen, encoding) for encoding in fitting]
    likely = sorted(zip(scores, fitting, strict=True), key=lambda pair: -pair[0])
    sure = likely[0][0] - likely[1][0]
    if not sure >= _SURE:
        raise DatasetError(
            f"the label files in {files[0].parent} fit {' and '.join(e.name for e in fitting)} alike, and "
            f"{len(sampled)} of them do not tell which it is: scores would be meaningless. Write them anew with the "
            f"converter that docs/evaluation.md names for {name}"
        )
    how = f"told from {likely[1][1].name} by which classes {len(sampled)} of the files show"
    note = f"labels are in {likely[0][1].name}, {how} (log likelihood ratio {sure:.0f})"
    return likely[0][1], seen, (note,)


def _find_reading(
    classes: _ClassList, files: Sequence[Path]
) -> tuple[_Encoding, list[frozenset[int]], tuple[str, ...]]:
    """How the lines of a folder's own class list are numbered in its label files: as it says by "labels:", or by the
    values that occur. All files are read where a sample does not show the last line's.

    Returns the encoding, the values of the files that were read, and what a reader of the scores has to know. Raises
    DatasetError for a value that has no meaning, and where two meanings fit alike.
    """
    lines, last = classes.lines, len(classes.lines)
    first, final = lines[0], lines[-1]
    reading = classes.reading or (_FROM_0 if _unasked(first) is not None else None)
    encoding = classes.encoding(reading or _FROM_1)
    seen: list[frozenset[int]] = []
    there: frozenset[int] = frozenset()
    sampled = _spread(files)
    for number, path in enumerate((*sampled, *sorted(set(files) - set(sampled)))):
        known = classes.reading or (there - {0, IGNORED} and (reading or last in there))
        if number >= len(sampled) and known:
            break
        seen.append(_values(path))
        there |= seen[-1]
        strange = sorted(seen[-1] - encoding.labels.keys())
        if strange:
            why = "" if reading == classes.reading else f", since its first line is {first}"
            raise DatasetError(
                f"{path} holds {_ranges(strange)}, which folder has not ({encoding.name}{why}: "
                f"{_ranges(encoding.labels)})"
            )
    notes = _unasked_notes(classes)
    if classes.reading:
        return encoding, seen, notes
    if there == {0, IGNORED} and len(classes.names) == 1 and not notes:
        note = f"label files hold 0 and 255 alone: 255 is read as {classes.names[0]}, as by 'labels: {_BINARY}'"
        return classes.encoding(_BINARY), seen, (f"{note} in classes.txt",)
    if reading:
        return encoding, seen, (f"line 1 of classes.txt, {first}, is label 0: labels are read from 0", *notes)
    if 0 not in there or not there - {0, IGNORED}:
        return encoding, seen, notes
    if last in there:
        note = (
            f"labels are read from 1: 0 the background, 1 {first}, {last} {final}; where 0 is {first} and {last} is "
            f"unlabelled, write a first line 'labels: {_FROM_0}' and a last line 'void' into classes.txt"
        )
    elif len(there - {IGNORED}) >= _MOSTLY * last or classes.unasked or classes.unnumbered:
        raise DatasetError(
            f"the label files in {files[0].parent} hold {_ranges(sorted(there))} and never {last}, so that two "
            f"readings fit: 'labels: {_FROM_1}', where 0 is the background, 1 is {first} and {last}, {final}, does "
            f"not occur, and 'labels: {_FROM_0}', where 0 is {first} and {last - 1} is {final}. Write the one that is "
            f"meant as the first line of {classes.path}"
        )
    else:
        note = (
            f"label {last} ({final}) never occurs while 0 does: labels are read from 1, 0 the background, 1 {first}; "
            f"where 0 is {first}, write a first line 'labels: {_FROM_0}' into classes.txt"
        )
    return encoding, seen, (note, *notes)


def _palette_notes(classes: _ClassList, files: Sequence[Path]) -> tuple[str, ...]:
    """Raise DatasetError where an index has one colour in one label file and another in another: the files were written
    with palettes of their own, by which the same index is another class. A note where classes.txt says by "labels:"
    that the indices are meant all the same."""
    colours: dict[int, tuple[tuple[int, ...], Path]] = {}
    for path in _spread(files):
        for index, colour in _colours(path).items():
            first, where = colours.setdefault(index, (colour, path))
            if first == colour:
                continue
            said = (
                f"label files have palettes of their own: {index} is the colour {first} in {where.name} and "
                f"{colour} in {path.name}"
            )
            if classes.reading:
                return (f"{said}; the indices are taken, as 'labels: {classes.reading}' says",)
            raise DatasetError(
                f"{path.parent}: {said}, so that one index is not one class. Write all of them with one palette, in "
                f"the order of classes.txt; where the indices are right whatever their colours, write a first line "
                f"'labels: {_FROM_1}' or 'labels: {_FROM_0}' into {classes.path}"
            )
    return ()


def _unasked_notes(classes: _ClassList) -> tuple[str, ...]:
    """Which lines of a class list are not looked for."""
    ignored = [*classes.unnumbered, *(line for line in classes.unasked if _unasked(line) == IGNORED)]
    return tuple(f"{line} of classes.txt is no class: its pixels are ignored" for line in ignored)


def _check_classes_occur(
    name: str, classes: _ClassList, encoding: _Encoding, files: Sequence[Path], seen: Sequence[frozenset[int]]
) -> None:
    """Raise DatasetError where no label file shows a class. Those that were not read are, until one does."""
    meant = {raw for raw, label in encoding.labels.items() if 0 < label != IGNORED}
    if any(meant & values for values in seen) or any(meant & _values(path) for path in files):
        return
    held = _ranges(sorted(frozenset().union(*seen)))
    own = ""
    if name == "folder":
        line = classes.lines[0]
        own = (
            f". {classes.path} may say by a first line what is meant: 'labels: {_FROM_1}' (0 is the background, 1 is "
            f"{line}, 255 is ignored), 'labels: {_FROM_0}' (0 is {line}, 255 is ignored) or, for a single class, "
            f"'labels: {_BINARY}' (255 is the class)"
        )
    raise DatasetError(
        f"no class of {name} occurs in the {len(files)} label files in {files[0].parent}, which hold {held} alone "
        f"(read as {encoding.name}): scores would be of the background alone{own}"
    )


def _orientation_notes(samples: Sequence[Sample]) -> tuple[str, ...]:
    """What was done with an orientation in EXIF, by a sample of the images."""
    looked, turned, stored = _spread(samples), 0, 0
    for sample in looked:
        try:
            with _opened(sample.image) as image, _opened(sample.labels) as labels:
                orientation, sizes = _orientation(image), [(file.height, file.width) for file in (image, labels)]
                turn = _turn(orientation, *sizes)
                turned += turn is not None
                stored += turn is None and orientation in _TURNS
        except DatasetError:
            continue  # it is named when it is read, and may be left out then
    if not turned + stored:
        return ()
    note = (
        f"{turned + stored} of {len(looked)} images have an orientation in EXIF: {turned} are turned by it, {stored} "
    )
    return (note + "stay as stored, since that is the size of their labels",)


def _spread(items: Sequence[_Item]) -> Sequence[_Item]:
    """At most `_SAMPLED` of the items, spread over them."""
    return items[:: max(1, len(items) // _SAMPLED)][:_SAMPLED]


def _log_likelihood(seen: Sequence[frozenset[int]], encoding: _Encoding) -> float:
    """Of which raw values each file shows, every value by itself; nats. Encodings without shares are all alike."""
    return sum(
        math.log(share if raw in values else 1 - share) for values in seen for raw, share in encoding.shares.items()
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """The lines of a text file that say something: without outer blanks, empty lines and comments (#). UTF-8, or
    UTF-16 with its mark."""
    try:
        content = path.read_bytes()
        if content.startswith(_POINTER):
            raise _pointer(path)
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = [line.strip() for line in content.decode("utf-16" if utf16 else "utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; it must be text in UTF-8") from error
    return [line for line in lines if line and not line.startswith("#")]


def _read_classes(path: Path) -> _ClassList:
    """A class list: one class a line, synonyms by "|"; before them, both optional, "background: word, word" (no word:
    none) and "labels: " with one of `_READINGS`."""
    lines, background, reading = _lines(path), None, None
    while lines and (header := lines[0].partition(":"))[0].strip().lower() in ("background", "labels") and header[1]:
        if header[0].strip().lower() == "background":
            background = tuple(word.strip() for word in header[2].split(",") if word.strip())
        else:
            reading = " ".join(header[2].lower().split())
            if reading not in _READINGS:
                raise DatasetError(f"{path} has the line {lines[0]!r}; after labels: may stand {', '.join(_READINGS)}")
        del lines[0]
    unnumbered = lines[:1] if lines and lines[0].lower() == "__ignore__" else []
    _check_form(path, lines)
    classes = _ClassList(path, tuple(lines[len(unnumbered) :]), tuple(unnumbered), background, reading)
    try:
        vocabulary = Vocabulary(classes.names, negatives=background)
    except VocabularyError as error:
        raise DatasetError(f"{path}: {error}") from error
    if vocabulary.dropped:
        raise DatasetError(f"{path} has {vocabulary.dropped[0]!r} twice; every word must stand once")
    if not classes.names:
        raise DatasetError(f"{path} names no class; it must have one class a line, synonyms by |")
    mixed = [line for line in classes.names if any(_unasked(word) is not None for word in line.split("|"))]
    if mixed:
        raise DatasetError(
            f"{path} has the line {mixed[0]!r}, with a word that names no class; give it a line of its own"
        )
    if reading == _BINARY and len(classes.names) > 1:
        raise DatasetError(
            f"{path} says 'labels: {_BINARY}' and has {len(classes.names)} classes; 255 can be one class alone"
        )
    return classes


_ODD_LISTS: tuple[tuple[str, Callable[[list[bool]], bool], str], ...] = (
    (r"[\[{]\s*([\"'\[{].*)?|\[[^\[\]]*,[^\[\]]*\]", any, "it reads as JSON"),  # but not the name '[red] ball'
    (r"-\s.*|[\w\s-]+:", any, "it reads as YAML"),
    (r"(['\"]).*\1", all, "it has quotes"),
    (r"\d+\s*[\s:.,;)].*", all, "it has numbers before the names"),
    (r"[^,]+(,[^,]+){2,}", lambda lines: len(lines) == 1 and any(lines), "it has all names in one line"),
)
"""What a class list looks like that is written in another form: an expression for a line, for how many, in words."""


def _check_form(path: Path, lines: Sequence[str]) -> None:
    """Raise DatasetError where a class list is plainly in another form, whose signs would become part of the names."""
    for expression, quantity, said in _ODD_LISTS:
        found = [re.fullmatch(expression, line) is not None for line in lines]
        if lines and quantity(found):
            raise DatasetError(
                f"{path} has the line {lines[found.index(True)]!r}: {said}; it must have one class a line, the name "
                "alone, synonyms by |"
            )


def _values(path: Path) -> frozenset[int]:
    """The raw values that occur in a label file."""
    return frozenset(np.flatnonzero(np.bincount(_read_labels(path).ravel(), minlength=256)).tolist())


def _colours(path: Path) -> dict[int, tuple[int, ...]]:
    """The colour of each index that occurs in a label file with a palette, but for 255, which is no class."""
    with _opened(path) as image:
        palette = (image.getpalette() or []) if image.mode == "P" else []
    triples = list(zip(palette[::3], palette[1::3], palette[2::3], strict=True))
    return {index: triples[index] for index in _values(path) - {IGNORED} if index < len(triples)} if triples else {}


def _read_labels(path: Path) -> np.ndarray:
    """The indices of a PNG as they are stored, uint8 [H, W]; DatasetError for anything else."""
    with _opened(path) as image:
        if image.format != "PNG":
            raise DatasetError(f"{path} is {image.format}; labels must be PNG, which loses nothing")
        # Pillow stretches grey of 1, 2 and 4 bits to 0..255 and calls it "L" all the same; its decoder's mode shows it.
        mode = image.mode if image.mode != "L" else image.tile[0][3]
        if mode in ("RGB", "RGBA"):
            raise DatasetError(
                f"{path} is a PNG in {mode}; labels must be indices of 8 bits: take the original files, whose colours "
                "are a palette over the indices, or replace every colour by its index"
            )
        if mode not in ("P", "L"):
            raise DatasetError(f"{path} is a PNG of mode {mode}; labels must be 8 bits, grey or with a palette")
        return _decoded(path, image)


def _read_image(path: Path) -> tuple[np.ndarray, int]:
    """An image of 8 bits, grey or in colour, as it is stored: uint8 [H, W, 3] RGB, and its orientation in EXIF."""
    with _opened(path) as image:
        if image.mode not in ("RGB", "L", "P"):
            raise DatasetError(f"{path} is of mode {image.mode}; images must be RGB or grey of 8 bits")
        return _decoded(path, image, "RGB"), _orientation(image)


_ORIENTATION = 0x0112  # EXIF's number of the orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows an image of each orientation upright; 1 is upright as it is."""


def _orientation(image: Image.Image) -> int:
    """An image's orientation in EXIF; 1 without one, or with EXIF that is damaged, as OpenCV takes it."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*_DECODING, TypeError, LookupError, struct.error):
        return 1


def _turn(orientation: int, stored: tuple[int, ...], labels: tuple[int, ...]) -> Image.Transpose | None:
    """How an image is turned that is stored with the size (H, W), and whose labels have another or the same; None for
    not at all."""
    across = orientation >= 5 and stored != stored[::-1]
    return None if across and labels == stored else _TURNS.get(orientation)


_DECODING = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is damaged, of another kind, or not there."""


_POINTER = b"version https://git-lfs"
_ENDINGS = (".jpg", ".jpeg", ".png")


def _pointer(path: Path) -> DatasetError:
    return DatasetError(f"{path} is a pointer of git-lfs, not the file itself; get the files by git lfs pull")


def _opened(path: Path) -> ImageFile.ImageFile:
    try:
        return Image.open(path)
    except _DECODING as error:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise _pointer(path) from None
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _decoded(path: Path, image: Image.Image, mode: str | None = None) -> np.ndarray:
    try:
        return np.array(image if mode is None else image.convert(mode))
    except _DECODING as error:
        raise DatasetError(f"{path} cannot be decoded: {error}") from error


def _ranges(values: Mapping[int, Any] | Sequence[int]) -> str:
    """Whole numbers in words: "0..20, 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
