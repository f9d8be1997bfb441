"""The sets of the protocol: every remap by an exact confusion matrix, and the error for a wrong folder or file."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from generated_sets import (
    voc_colours,
    write_ade,
    write_coco,
    write_context,
    write_files,
    write_folder,
    write_voc,
)
from nerve_core.embedded.scenes import NAMES, draw_scenes
from nerve_core.evaluation.datasets import DATASETS, Dataset, DatasetError, open_dataset
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.settings import Settings
from nerve_core.text.templates import template_set

# What the raw values mean, written out here once more: (first raw value, last one, mask label of the first).
PLAIN_20 = [(0, 20, 0), (255, 255, 255)]
COCO_OWN_THINGS = [
    (0, 10, 1), (12, 24, 12), (26, 27, 25), (30, 43, 27), (45, 64, 41), (66, 66, 61), (69, 69, 62), (71, 81, 63),
    (83, 89, 74),
]  # fmt: skip
# The alphabetical number of each class in the order of 59_labels.txt: aeroplane, bicycle, ..., window, wood.
VOC_FIRST = [
    1, 6, 7, 8, 10, 12, 14, 15, 17, 20, 50, 23, 31, 34, 37, 40, 43, 49, 52, 55, 2, 3, 5, 9, 11, 13, 16, 18, 19, 21, 24,
    25, 26, 27, 28, 29, 30, 32, 33, 35, 36, 22, 39, 46, 38, 41, 42, 44, 45, 47, 48, 4, 51, 53, 54, 56, 57, 58, 59,
]  # fmt: skip
CONTEXT_ALPHABETICAL = [(0, 59, 0)]
CONTEXT_VOC_FIRST = [(0, 0, 0), *((raw, raw, label) for raw, label in enumerate(VOC_FIRST, 1))]
VOC_FILES = {
    "images": "JPEGImages/{}.jpg",
    "labels": "SegmentationClass/{}.png",
    "split": "ImageSets/Segmentation/val.txt",
}
CONTEXT_FILES = {
    "images": "JPEGImages/{}.jpg",
    "labels": "SegmentationClassContext/{}.png",
    "split": "ImageSets/SegmentationContext/val.txt",
}
ADE_FILES = {"images": "images/validation/{}.jpg", "labels": "annotations/validation/{}.png"}


def coco_files(suffix: str) -> dict[str, str]:
    return {"images": "images/val2017/{}.jpg", "labels": f"annotations/val2017/{{}}{suffix}.png"}


# set -> (files, table, whether a palette, files with known values that show the encoding)
ENCODINGS = {
    "voc21": ("voc21", VOC_FILES, PLAIN_20, True),
    "voc20": ("voc20", VOC_FILES, [(0, 0, 255), (1, 20, 1), (255, 255, 255)], True),
    "pc60 alphabetical": ("pc60", CONTEXT_FILES, CONTEXT_ALPHABETICAL, False),
    "pc60 VOC first": ("pc60", CONTEXT_FILES, CONTEXT_VOC_FIRST, False),
    "pc59 alphabetical": ("pc59", CONTEXT_FILES, [(0, 0, 255), (1, 59, 1)], False),
    "pc59 VOC first": ("pc59", CONTEXT_FILES, [(0, 0, 255), *CONTEXT_VOC_FIRST[1:]], False),
    "coco-object": ("coco-object", coco_files("_instanceTrainIds"), [(0, 80, 0), (255, 255, 255)], False),
    "coco-object own ids": (
        "coco-object",
        coco_files(""),
        [*COCO_OWN_THINGS, *((raw, raw, 0) for raw in (*range(91, 182), 255))],
        False,
    ),
    "coco-object train ids": (
        "coco-object",
        coco_files("_labelTrainIds"),
        [(0, 79, 1), *((raw, raw, 0) for raw in (*range(80, 171), 255))],
        False,
    ),
    "coco-stuff": ("coco-stuff", coco_files("_labelTrainIds"), [(0, 170, 1), (255, 255, 255)], False),
    "coco-stuff own ids": ("coco-stuff", coco_files(""), [*COCO_OWN_THINGS, (91, 181, 81), (255, 255, 255)], False),
    "coco-stuff train ids under the plain name": (
        "coco-stuff",
        coco_files(""),
        [(0, 170, 1), (255, 255, 255)],
        False,
    ),
    "ade20k": ("ade20k", ADE_FILES, [(0, 0, 255), (1, 150, 1)], False),
}
SIZES = [(97, 61), (61, 97), (1, 700), (700, 1), (64, 64)]
"""(rows, columns)"""
# Classes that Pascal Context shows together, by their alphabetical numbers: person, building, sky, tree, ground, ...
USUAL = [
    {0, 37, 11, 47, 53, 30}, {0, 47, 53, 29}, {37, 56, 26, 17, 50}, {11, 41, 14, 47, 53}, {0, 23, 29}, {15, 56, 49, 18},
    {0, 29, 43, 47, 53}, {37, 34, 41, 11, 53}, {7, 47}, {37, 56, 10, 50, 38}, {57, 8, 47, 53}, {0, 31, 37, 29, 25},
]  # fmt: skip


def table_of(runs: list[tuple[int, int, int]]) -> dict[int, int]:
    return {raw: label + raw - first for first, last, label in runs for raw in range(first, last + 1)}


def noise(shape: tuple[int, int], values: list[int], rng: np.random.Generator) -> np.ndarray:
    """Every value at least once, the rest at random."""
    chosen = np.concatenate([values, rng.choice(values, shape[0] * shape[1] - len(values))])
    return rng.permutation(chosen).astype(np.uint8).reshape(shape)


def picture(shape: tuple[int, int]) -> np.ndarray:
    return np.full((*shape, 3), 90, np.uint8)


def usual_context(table: dict[int, int]) -> list[np.ndarray]:
    """Label files of usual images in the encoding of `table`, raw value -> alphabetical number."""
    raw_of = {0: 0} | {label: raw for raw, label in table.items() if label not in (0, 255)}
    return [np.array([[raw_of[label] for label in sorted(classes)]], np.uint8) for classes in USUAL]


@pytest.mark.parametrize("case", ENCODINGS)
def test_every_remap_gives_exactly_the_confusion_matrix_of_its_table(case, tmp_path):
    name, files, runs, palette = ENCODINGS[case]
    table, rng = table_of(runs), np.random.default_rng(len(case))
    raws = [noise(shape, sorted(table), rng) for shape in SIZES]
    if files is CONTEXT_FILES:
        raws += usual_context(table)
    write_files(tmp_path, [(picture(raw.shape), raw) for raw in raws], palette=palette, **files)

    found = open_dataset(name, tmp_path)
    measured = ConfusionMatrix.of(len(found.labels))
    expected: dict[tuple[int, int], int] = {}
    for sample, raw in zip(found.samples, raws, strict=True):
        _, truth = found.load(sample)
        predicted = rng.integers(0, len(found.labels), raw.shape, dtype=np.uint8)
        measured.add(truth, predicted)
        for value, guess in zip(raw.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if table[value] != 255:
                expected[table[value], guess] = expected.get((table[value], guess), 0) + 1

    rows, columns = np.nonzero(measured.counts)
    counted = {
        (row, column): int(measured.counts[row, column])
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    }
    assert counted == expected


def test_the_order_of_both_context_encodings_is_that_of_the_published_lists(tmp_path):
    found = open_dataset("pc60", write_context(tmp_path, draw_scenes(0, 12, size=(97, 61))))
    assert found.labels[37] == "person"
    assert found.labels[47] == "sky"
    assert sorted(found.labels[1:]) == list(found.labels[1:])
    assert [VOC_FIRST[raw - 1] for raw in (1, 15, 20, 21, 50, 59)] == [
        found.labels.index(word) for word in ("aeroplane", "person", "tvmonitor", "bag", "sky", "wood")
    ]


@pytest.mark.parametrize(
    ("name", "classes", "queries", "templates", "threshold"),
    [
        ("voc21", 20, 56, "cliper15", 0.1),
        ("voc20", 20, 30, "cliper15", 0.0),
        ("pc60", 59, 60, "imagenet80", 0.1),
        ("pc59", 59, 59, "cliper15", 0.0),
        ("coco-object", 80, 113, "imagenet80", 0.1),
        ("coco-stuff", 171, 171, "imagenet80", 0.0),
        ("ade20k", 150, 150, "imagenet80", 0.0),
    ],
)
def test_every_set_is_asked_for_as_its_protocol_says(name, classes, queries, templates, threshold, tmp_path):
    write = {"v": write_voc, "p": write_context, "c": write_coco, "a": write_ade}[name[0]]
    found = open_dataset(name, write(tmp_path, draw_scenes(0, 16, size=(48, 64))))
    vocabulary = found.vocabulary
    assert len(vocabulary) == classes == len(found.labels) - 1
    assert sum(map(len, vocabulary.synonyms)) + len(vocabulary.negatives) == queries
    assert found.settings == {"templates": templates, "threshold": threshold, "mean_negative": False}
    assert Settings().replaced(found.settings).clip.templates == templates
    assert len(set(template_set(templates))) == int(templates[-2:])


def test_context_is_told_apart_from_either_encoding_of_the_same_scenes(tmp_path):
    scenes = list(draw_scenes(5, 12, size=(97, 61)))
    sets = {
        order: open_dataset("pc60", write_context(tmp_path / order, scenes, order=order))
        for order in ("alphabetical", "voc-first")
    }
    assert "alphabetical order, told from VOC-first" in sets["alphabetical"].notes[0]
    assert "VOC-first order, told from alphabetical" in sets["voc-first"].notes[0]
    for one, other in zip(sets["alphabetical"].samples, sets["voc-first"].samples, strict=True):
        first, second = sets["alphabetical"].load(one)[1], sets["voc-first"].load(other)[1]
        assert np.array_equal(first, second)
        assert first.any()


def test_coco_scores_the_same_from_any_of_its_files(tmp_path):
    scenes = list(draw_scenes(3, 16, size=(61, 97)))
    roots = {files: write_coco(tmp_path / files, scenes, files=files) for files in ("own", "train", "things")}
    things = [open_dataset("coco-object", root) for root in roots.values()]
    stuff = [open_dataset("coco-stuff", roots[files]) for files in ("own", "train")]
    for sets in (things, stuff):
        truths = [[found.load(sample)[1] for sample in found.samples] for found in sets]
        assert all(np.array_equal(a, b) for a, b in zip(truths[0], truths[-1], strict=True))
    assert "COCO-Stuff's own ids" in stuff[0].notes[0]
    with pytest.raises(DatasetError, match=r"has no label file of coco-stuff.*_labelTrainIds.png or .*\.png"):
        open_dataset("coco-stuff", roots["things"])


def test_a_folder_of_scenes_gives_them_back(tmp_path):
    scenes = list(draw_scenes(1, 3, size=(97, 61)))
    found = open_dataset("folder", write_folder(tmp_path, scenes))
    assert found.labels == ("background", *NAMES)
    assert (found.background, found.templates, found.threshold, found.settings) == (None, None, None, {})
    for sample, scene in zip(found.samples, scenes, strict=True):
        image, labels = found.load(sample)
        assert np.array_equal(image, scene.image)
        assert np.array_equal(labels, scene.labels)


def test_a_class_that_no_image_shows_has_no_score(tmp_path):
    found = open_dataset("voc21", write_voc(tmp_path, draw_scenes(2, 3, size=(60, 80), names=("person", "bottle"))))
    matrix = ConfusionMatrix.of(21)
    for sample in found.samples:
        _, truth = found.load(sample)
        assert (truth == 255).any()
        matrix.add(truth, np.where(truth == 255, 0, truth))
    shown = np.flatnonzero(~np.isnan(matrix.iou()))
    assert [found.labels[k] for k in shown] == ["background", "bottle", "person"]
    assert matrix.mean_iou() == 1


def test_classes_may_have_synonyms_and_background_words_of_their_own(tmp_path):
    scenes = list(draw_scenes(0, 1, size=(32, 32), names=("ball",)))
    classes = ["# mine", "", *NAMES[:-1], "cross|red cross"]
    words = open_dataset("folder", write_folder(tmp_path / "a", scenes, classes=classes, background="wall, brick wall"))
    assert words.vocabulary.negatives == ("wall", "brick wall")
    assert words.vocabulary.synonyms[-1] == ("cross", "red cross")
    assert words.settings == {"mean_negative": False}
    none = open_dataset("folder", write_folder(tmp_path / "b", scenes, background=""))
    assert none.vocabulary.negatives == ()


def test_images_may_be_grey_or_turned_and_stay_as_they_are_stored(tmp_path):
    root = write_folder(tmp_path, draw_scenes(0, 2, size=(40, 60)))
    first, second = sorted((root / "JPEGImages").iterdir())
    grey = np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8)
    Image.fromarray(grey).save(first.with_suffix(".png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    second.unlink()
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(second.with_suffix(".jpg"), exif=exif, quality=100)
    found = open_dataset("folder", root)
    image, _ = found.load(found.samples[0])
    assert np.array_equal(image, np.repeat(grey[..., None], 3, 2))
    turned, _ = found.load(found.samples[1])
    assert turned.shape == (40, 60, 3)
    assert np.abs(turned[..., 0].astype(int) - grey).max() < 16


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_with_a_palette_are_read_as_they_are_at_any_depth(bits, tmp_path):
    root = write_folder(tmp_path, draw_scenes(0, 1, size=(32, 33)))
    raw = np.random.default_rng(bits).integers(0, min(2**bits, 15), (32, 33), np.uint8)
    indices = Image.fromarray(raw)
    indices.putpalette(voc_colours()[: 3 * 2**bits])
    path = next((root / "SegmentationClass").iterdir())
    indices.save(path, bits=bits)
    assert path.read_bytes()[24] == bits
    found = open_dataset("folder", root)
    assert np.array_equal(found.load(found.samples[0])[1], raw)


def test_the_split_keeps_its_own_order_and_the_limit_takes_its_first(tmp_path):
    root = write_voc(tmp_path, draw_scenes(0, 5, size=(32, 32)))
    ids = [f"2008_{k:06d}" for k in (3, 0, 4, 1, 2)]
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids) + "\n\n")
    assert [sample.id for sample in open_dataset("voc20", root).samples] == ids
    found = open_dataset("voc20", root, limit=2)
    assert [sample.id for sample in found.samples] == ids[:2]
    assert "5 images, where the protocol's split has 1449" in found.notes


@pytest.mark.parametrize("depth", ["VOCdevkit", "VOC2012"])
def test_a_set_is_found_where_its_archive_unpacks_it(depth, tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", draw_scenes(0, 1, size=(32, 32), names=("person",)))
    root = tmp_path if depth == "VOCdevkit" else tmp_path / "VOCdevkit"
    assert len(open_dataset("voc21", root).samples) == 1


def test_labels_of_voc_without_ignored_borders_are_noted(tmp_path):
    scenes = list(draw_scenes(0, 2, size=(48, 48)))
    assert not any("ignored pixels" in note for note in open_dataset("voc21", write_voc(tmp_path / "a", scenes)).notes)
    write_files(tmp_path / "b", [(picture((4, 4)), np.ones((4, 4), np.uint8))], palette=True, **VOC_FILES)
    notes = open_dataset("voc21", tmp_path / "b").notes
    assert "none of 1 label files has ignored pixels, as the published ones have" in notes


def test_opening_a_set_loads_no_model_library(tmp_path):
    write_folder(tmp_path, draw_scenes(0, 1, size=(32, 32)))
    script = (
        "import sys; from nerve_core.evaluation.datasets import open_dataset; "
        f"open_dataset('folder', {str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == 0


# --- what is wrong, and what is said of it ---------------------------------------------------------------------------


def damaged_folder(root: Path, damage) -> Path:
    """A labelled folder with two images, the first of which something was done to: damage(image file, label file)."""
    write_folder(root, draw_scenes(0, 2, size=(32, 48)))
    damage(root / "JPEGImages/2008_000000.png", root / "SegmentationClass/2008_000000.png")
    return root


def save(array: np.ndarray, **options):
    return lambda image, labels: Image.fromarray(array).save(labels, **options)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def break_chunk(path: Path) -> None:
    """A grey PNG whose pixels are said to end before they do."""
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    assert content[37:41] == b"IDAT"
    content[36] = 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (save(np.zeros((32, 48, 3), np.uint8)), r"2008_000000\.png is a PNG in RGB.*indices.*palette"),
        (save(np.zeros((32, 48, 4), np.uint8)), r"PNG in RGBA"),
        (save(np.zeros((32, 48), np.uint16)), r"PNG of mode I.*8 bits"),
        (save(np.zeros((32, 48), bool)), r"PNG of mode 1;"),
        # Pillow reads these as 8 bits, stretched to 0..255, so that index 1 would become 17.
        (save(np.ones((32, 48), np.uint8), bits=4), r"PNG of mode L;4.*8 bits"),
        (save(np.zeros((32, 48), np.uint8), format="JPEG"), r"is JPEG; labels must be PNG"),
        (save(np.full((32, 48), 15, np.uint8)), r"2008_000000\.png holds 15, which folder has not .*0\.\.14, 255"),
        (save(np.full((32, 48), 254, np.uint8)), r"holds 254"),
        (lambda image, labels: cut(labels), r"SegmentationClass.*2008_000000\.png cannot be (read|decoded)"),
        (lambda image, labels: labels.unlink(), r"1 of 2 label files are missing, the first is .*2008_000000\.png"),
        (lambda image, labels: image.unlink(), r"1 of 2 images are missing, .*000000\.jpg or .*000000\.png"),
        (lambda image, labels: labels.write_bytes(b""), r"2008_000000\.png cannot be read"),
        (lambda image, labels: break_chunk(labels), r"2008_000000\.png cannot be decoded"),
    ],
    ids=[
        "rgb",
        "rgba",
        "16 bit",
        "1 bit",
        "4 bit",
        "jpeg",
        "class",
        "254",
        "cut",
        "no labels",
        "no image",
        "empty",
        "chunk",
    ],
)
def test_a_wrong_file_is_named_when_the_set_is_opened(damage, said, tmp_path):
    root = damaged_folder(tmp_path, damage)
    with pytest.raises(DatasetError, match=said):
        open_dataset("folder", root)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda image, labels: save(np.zeros((32, 47), np.uint8))(image, labels), r"is 47 x 32 pixels.* 48 x 32"),
        (lambda image, labels: cut(image), r"JPEGImages.*2008_000000\.png cannot be decoded"),
        (
            lambda image, labels: Image.fromarray(np.zeros((32, 48), np.uint16)).save(image),
            r"is of mode I.*; images must be",
        ),
        (lambda image, labels: image.write_bytes(b"text"), r"2008_000000\.png cannot be read"),
    ],
    ids=["size", "cut", "16 bit", "text"],
)
def test_a_wrong_file_is_named_when_it_is_read(damage, said, tmp_path):
    found = open_dataset("folder", damaged_folder(tmp_path, damage))
    with pytest.raises(DatasetError, match=said):
        found.load(found.samples[0])
    found.load(found.samples[1])


def test_a_value_that_the_sample_of_files_did_not_show_is_refused_when_read(tmp_path):
    found = open_dataset("folder", write_folder(tmp_path, draw_scenes(0, 1, size=(32, 48))))
    changed = np.zeros((32, 48), np.uint8)
    changed[3, 4:9] = 77
    Image.fromarray(changed).save(found.samples[0].labels)
    with pytest.raises(DatasetError, match=r"holds the value 77 \(5 pixels .*folder has 0\.\.14, 255"):
        found.load(found.samples[0])


def test_an_image_that_claims_to_be_huge_is_refused_like_a_damaged_one(tmp_path, monkeypatch):
    found = open_dataset("folder", write_folder(tmp_path, draw_scenes(0, 1, size=(32, 48))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DatasetError, match=r"JPEGImages.*2008_000000\.png cannot be read"):
        found.load(found.samples[0])


def test_a_set_made_by_hand_takes_labels_as_they_are_and_no_more_than_it_has_names(tmp_path):
    root = write_folder(tmp_path, draw_scenes(0, 2, size=(32, 48)))
    Image.fromarray(np.full((32, 48), 3, np.uint8)).save(root / "SegmentationClass/2008_000001.png")
    samples = open_dataset("folder", root).samples
    names = ("one", "two|deux")
    mine = Dataset("mine", "Mine", root, names, None, None, None, samples)
    with pytest.raises(DatasetError, match=r"holds the value 3 \(1536 pixels .*mine has 0\.\.2, 255"):
        mine.load(samples[1])
    Image.fromarray(np.array([[0, 1, 2, 255]] * 4, np.uint8)).save(samples[1].labels)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(samples[1].image)
    assert mine.load(samples[1])[1].tolist() == [[0, 1, 2, 255]] * 4
    assert mine.labels == ("background", "one", "two")


@pytest.mark.parametrize(
    ("name", "files", "raws", "said"),
    [
        ("voc21", VOC_FILES, [[[0, 21]]], r"holds 21, which voc21 has not"),
        ("pc60", CONTEXT_FILES, [[[0, 60]]], r"holds 60"),
        ("pc59", CONTEXT_FILES, [[[3, 255]]], r"holds 255, which pc59 has not .*alphabetical.*VOC-first"),
        ("pc60", CONTEXT_FILES, [[[0, 1]]], r"fit alphabetical order and VOC-first order alike.*do not tell"),
        ("coco-object", coco_files("_instanceTrainIds"), [[[0, 81]]], r"holds 81"),
        ("coco-stuff", coco_files("_labelTrainIds"), [[[0, 171]]], r"holds 171, which coco-stuff has not"),
        ("coco-stuff", coco_files(""), [[[0, 5, 255]]], r"fit COCO-Stuff's own ids.* and train ids.* do not tell"),
        ("coco-stuff", coco_files(""), [[[11, 181]]], r"holds 11, which"),
        ("ade20k", ADE_FILES, [[[0, 149, 255]]], r"holds 255, which ade20k has not"),
    ],
)
def test_an_encoding_that_is_another_or_cannot_be_told_is_refused(name, files, raws, said, tmp_path):
    pairs = [(picture(np.shape(raw)), np.array(raw, np.uint8)) for raw in raws]
    write_files(tmp_path, pairs, **files)
    with pytest.raises(DatasetError, match=said):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_folder_is_told_what_is_missing_and_where_to_get_it(name, tmp_path):
    with pytest.raises(DatasetError, match=r"lacks .*(Images|images).*: .*Nothing is downloaded"):
        open_dataset(name, tmp_path)
    with pytest.raises(DatasetError, match="is no folder; give the folder that holds"):
        open_dataset(name, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "there", "said"),
    [
        ("ade20k", "images/ADE/validation", "full ADE20K"),
        ("voc21", "SegmentationClassAug", "SBD"),
        ("pc60", "annotations_detectron2/pc59_val", "0 to 58"),
        ("coco-stuff", "val2014", "val2017"),
        ("coco-object", "annotations/instances_val2017.json", "outlines and no label images"),
        ("folder", "annotations/instances.json", "outlines and no label images"),
        ("folder", "labelmap.txt", "CVAT's masks are in the colours of labelmap.txt"),
        ("folder", "img_dir/val", "as mmsegmentation has them"),
    ],
)
def test_a_look_alike_of_a_set_is_named(name, there, said, tmp_path):
    (tmp_path / there).mkdir(parents=True)
    with pytest.raises(DatasetError, match=f"lacks.*Note that .*{said}"):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("classes.txt", "", r"classes\.txt names no class"),
        ("classes.txt", "ball\nmug|ball\n", r"classes\.txt has 'ball' twice"),
        ("classes.txt", "\n".join(f"thing {k}" for k in range(255)), r"classes\.txt: 255 names are too many"),
        ("classes.txt", b"\xff\xfe\x00", r"classes\.txt cannot be read"),
        ("ImageSets/Segmentation/val.txt", "", r"val\.txt names no image"),
        ("ImageSets/Segmentation/val.txt", "2008_000000\n2008_000000", r"names 2008_000000 more than once"),
        ("ImageSets/Segmentation/val.txt", "2008_000000 1", r"has the line '2008_000000 1'"),
    ],
)
def test_a_wrong_list_is_named(path, content, said, tmp_path):
    root = write_folder(tmp_path, draw_scenes(0, 1, size=(32, 32)))
    (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DatasetError, match=said):
        open_dataset("folder", root)


def test_unknown_names_and_limits_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=re.escape(f"choose one of {', '.join(DATASETS)}")):
        open_dataset("voc", tmp_path)
    root = write_folder(tmp_path, draw_scenes(0, 1, size=(32, 32)))
    with pytest.raises(DatasetError, match="limit is 0"):
        open_dataset("folder", root, limit=0)


# --- folders of one's own, as tools leave them ------------------------------------------------------------------------


def own_folder(root: Path, classes: str, raws: list[list[int]], *, ending: str = ".png") -> Path:
    """A labelled folder whose label files hold the values of `raws`, a row each."""
    pairs = [(picture((1, len(raw))), np.array([raw], np.uint8)) for raw in raws]
    write_files(root, pairs, **{**VOC_FILES, "images": f"JPEGImages/{{}}{ending}"})
    (root / "classes.txt").write_text(classes)
    return root


def truth_of(found: Dataset, number: int = 0) -> list[int]:
    return found.load(found.samples[number])[1][0].tolist()


def test_masks_of_0_and_255_are_one_class_over_the_background(tmp_path):
    """They scored 100 % before: 255 was ignored, and the background was all that counted."""
    found = open_dataset("folder", own_folder(tmp_path, "cat\n", [[0, 255, 255], [0, 0, 0]]))
    assert truth_of(found) == [0, 1, 1]
    assert truth_of(found, 1) == [0, 0, 0]
    assert "255 is read as cat" in found.notes[0]
    matrix = ConfusionMatrix.of(2)
    matrix.add(found.load(found.samples[0])[1], np.zeros((1, 3), np.uint8))
    assert matrix.mean_iou() < 0.5
    named = open_dataset("folder", own_folder(tmp_path / "named", "background\ncat\n", [[0, 255]]))
    assert truth_of(named) == [0, 1]


def test_one_class_with_ignored_borders_is_no_mask_of_0_and_255(tmp_path):
    """The file that shows it is none of those that are looked at first."""
    rows = [[0, 255]] * 200
    rows[131] = [1, 255]
    found = open_dataset("folder", own_folder(tmp_path, "cat\n", rows))
    assert truth_of(found, 131) == [1, 255]
    assert truth_of(found, 0) == [0, 255]


@pytest.mark.parametrize(
    ("classes", "raws"),
    [
        ("cat\ndog\n", [[0, 255]]),
        ("cat\n", [[0, 0]]),
        ("cat\n", [[255, 255]]),
        ("__ignore__\n_background_\ncat\n", [[0, 255]]),
        ("labels: from 1\ncat\n", [[0, 255]]),
        ("labels: from 0\nvoid\ncat\n", [[0, 255]]),
    ],
)
def test_a_folder_in_which_no_class_occurs_is_refused(classes, raws, tmp_path):
    with pytest.raises(
        DatasetError, match=r"no class of folder occurs.*'labels: from 1'.*from 0'.*'labels: 0 and 255'"
    ):
        open_dataset("folder", own_folder(tmp_path, classes, raws))


def test_a_published_set_in_which_no_class_occurs_is_refused(tmp_path):
    write_files(tmp_path, [(picture((2, 2)), np.array([[0, 255]] * 2, np.uint8))], palette=True, **VOC_FILES)
    with pytest.raises(DatasetError, match=r"no class of voc21 occurs in the 1 label files .* hold 0, 255 alone"):
        open_dataset("voc21", tmp_path)


def test_first_images_in_which_no_class_occurs_are_refused(tmp_path):
    root = own_folder(tmp_path, "cat\ndog\n", [[0, 0], [0, 255], [0, 2]])
    with pytest.raises(DatasetError, match=r"no class of folder occurs in the first 2 of 3 images"):
        open_dataset("folder", root, limit=2)
    assert len(open_dataset("folder", root, limit=3).samples) == 3
    with pytest.raises(DatasetError, match=r"first 1 of 3 images"):
        open_dataset("folder", root).first(1)


def test_a_class_that_only_a_late_file_shows_is_found(tmp_path):
    rows = [[0, 0]] * 200
    rows[131] = [0, 1]
    assert "never occurs" in open_dataset("folder", own_folder(tmp_path, "cat\ndog\ncow\n", rows)).notes[0]


@pytest.mark.parametrize("first", ["background", "_background_", "Background", "__ignore__\n_background_"])
def test_a_class_list_that_begins_with_the_background_is_numbered_from_it(first, tmp_path):
    """Every name was shifted by one."""
    found = open_dataset("folder", own_folder(tmp_path, f"{first}\ncat\ndog|hound\n", [[0, 1, 2, 255]]))
    assert found.labels == ("background", "cat", "dog")
    assert truth_of(found) == [0, 1, 2, 255]
    assert (found.background, found.threshold) == (None, None)
    assert any("is label 0: labels are read from 0" in note for note in found.notes)
    assert any("__ignore__ of classes.txt is no class" in note for note in found.notes) == ("ignore" in first)


def test_a_value_behind_a_list_that_begins_with_the_background_is_refused(tmp_path):
    with pytest.raises(
        DatasetError, match=r"holds 3, which folder has not .*its first line is background: 0\.\.2, 255"
    ):
        open_dataset("folder", own_folder(tmp_path, "background\ncat\ndog\n", [[0, 3]]))
    said = open_dataset("folder", own_folder(tmp_path / "b", "labels: from 1\nbackground\ncat\ndog\n", [[0, 1, 2, 3]]))
    assert truth_of(said) == [0, 0, 1, 2]


def read_first(root: Path) -> None:
    found = open_dataset("folder", root)
    found.load(found.samples[0])


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


@pytest.mark.parametrize(
    ("classes", "raws"),
    [
        ("\n".join((*CAMVID, "unlabelled")), [[0, 1, 2, 3], [8, 11]]),
        ("\n".join(CAMVID), [list(range(6)), list(range(5, 11))]),
        ("__ignore__\nsky\nroad\ntree", [[0, 1]]),
        ("sky\nroad\nbackground", [[0, 1]]),
        ("sky\nroad", [[0, 1]]),
        ("\n".join(("sky", *(f"thing {k}" for k in range(18)))), [[0, 1, 255, *range(3, 16), 17]]),
    ],
)
def test_labels_that_may_count_from_0_or_from_1_are_refused_with_both_readings(classes, raws, tmp_path):
    """The sky, label 0, counted as background."""
    root = own_folder(tmp_path, classes, raws)
    said = r"two readings fit: 'labels: from 1', where 0 is the background, 1 is sky .*'labels: from 0', where 0 is sky"
    with pytest.raises(DatasetError, match=said):
        open_dataset("folder", root)
    (root / "classes.txt").write_text(f"labels: from 1\n{classes}")
    assert truth_of(open_dataset("folder", root))[:2] == [0, 1]
    (root / "classes.txt").write_text(f"labels: from 0\n{classes}")
    assert truth_of(open_dataset("folder", root))[:2] == [1, 2]


def test_labels_from_0_ignore_what_is_void_and_have_no_background(tmp_path):
    lines = "\n".join(("labels: from 0", *CAMVID, "void"))
    found = open_dataset("folder", own_folder(tmp_path, lines, [list(range(12)), [255, 0]]))
    assert found.names == CAMVID
    assert truth_of(found) == [*range(1, 12), 255]
    assert truth_of(found, 1) == [255, 1]
    assert (found.background, found.threshold) == ((), 0.0)
    assert found.notes == ("void of classes.txt is no class: its pixels are ignored",)


def test_how_labels_were_read_is_noted_where_nothing_says_it(tmp_path):
    full = open_dataset("folder", own_folder(tmp_path / "a", "\n".join(CAMVID), [list(range(12))]))
    assert full.notes[0].startswith("labels are read from 1: 0 the background, 1 sky, 11 bicyclist; where 0 is sky")
    gaps = open_dataset("folder", own_folder(tmp_path / "b", "\n".join(CAMVID), [[0, 3, 5]]))
    assert gaps.notes[0].startswith("label 11 (bicyclist) never occurs while 0 does: labels are read from 1")
    assert open_dataset("folder", own_folder(tmp_path / "c", "\n".join(CAMVID), [[1, 3, 5]])).notes == ()
    said = open_dataset("folder", own_folder(tmp_path / "d", "\n".join(("labels: from 1", *CAMVID)), [[0, 3, 5]]))
    assert said.notes == ()
    both = "background: wall\nLabels:  0 AND 255\ncat\n"
    binary = open_dataset("folder", own_folder(tmp_path / "e", both, [[0, 255]]))
    assert (binary.notes, binary.background, truth_of(binary)) == ((), ("wall",), [0, 1])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("labels: from 2\ncat", r"line 'labels: from 2'; after labels: may stand from 0, from 1, 0 and 255"),
        ("labels: 0 and 255\ncat\ndog", r"'labels: 0 and 255' and has 2 classes"),
        (
            "cat\nwall|background",
            r"'background' is the name of label 0, the background, and cannot be a synonym of 'wall'",
        ),
        ("cat\nwall|void", r"line 'wall\|void', with a word that names no class"),
        ("_background_\nvoid", r"names no class"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"classes\.txt is a pointer of git-lfs"),
    ],
)
def test_a_wrong_class_list_is_named(classes, said, tmp_path):
    with pytest.raises(DatasetError, match=said):
        open_dataset("folder", own_folder(tmp_path, classes, [[0, 1]]))


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".JPEG", ".Png"])
def test_the_endings_of_images_and_labels_may_be_written_in_any_case(ending, tmp_path):
    root = own_folder(tmp_path, "cat\n", [[0, 1]], ending=ending)
    labels = root / "SegmentationClass/2008_000000.png"
    labels.rename(labels.with_suffix(ending.upper().replace("JPEG", "PNG").replace("JPG", "PNG")))
    found = open_dataset("folder", root)
    assert found.samples[0].image.suffix == ending
    assert truth_of(found) == [0, 1]


def test_a_set_without_a_split_has_the_images_of_every_case(tmp_path):
    root = write_ade(tmp_path, draw_scenes(0, 3, size=(60, 80)))
    image = next((root / "images/validation").iterdir())
    image.rename(image.with_suffix(".JPG"))
    assert len(open_dataset("ade20k", root).samples) == 3


def test_two_images_of_one_id_are_refused(tmp_path):
    root = own_folder(tmp_path, "cat\n", [[0, 1]])
    Image.fromarray(picture((1, 2))).save(root / "JPEGImages/2008_000000.JPG")
    with pytest.raises(DatasetError, match=r"holds 2008_000000\.JPG and 2008_000000\.png, so that"):
        open_dataset("folder", root)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_is_turned_as_nerve_segment_turns_it(orientation, tmp_path):
    """Labels are drawn on what a viewer shows."""
    stored = np.random.default_rng(3).integers(0, 255, (24, 40, 3), np.uint8)
    stored = cv2.GaussianBlur(stored, (0, 0), 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shape = (24, 40) if orientation < 5 else (40, 24)
    root = own_folder(tmp_path, "cat\n", [[0, 1]])
    (root / "JPEGImages/2008_000000.png").unlink()
    Image.fromarray(stored).save(root / "JPEGImages/2008_000000.jpg", exif=exif, quality=100)
    Image.fromarray(np.ones(shape, np.uint8)).save(root / "SegmentationClass/2008_000000.png")
    found = open_dataset("folder", root)
    image, _ = found.load(found.samples[0])
    shown = cv2.imread(str(root / "JPEGImages/2008_000000.jpg"), cv2.IMREAD_COLOR)[..., ::-1]  # as nerve segment does
    assert image.shape == shown.shape == (*shape, 3)
    assert np.abs(image.astype(int) - shown).max() < 8
    assert "1 of 1 images have an orientation in EXIF: 1 are turned by it, 0 stay as stored" in found.notes[-1]


def test_an_image_stays_as_stored_where_that_is_the_size_of_its_labels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = own_folder(tmp_path, "cat\n", [[0, 1, 1]])
    Image.fromarray(picture((1, 3))).save(root / "JPEGImages/2008_000000.png", exif=exif)
    found = open_dataset("folder", root)
    assert found.load(found.samples[0])[0].shape == (1, 3, 3)
    assert "0 are turned by it, 1 stay as stored" in found.notes[-1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_are_read_as_editors_leave_them(encoding, end, tmp_path):
    root = own_folder(tmp_path, "", [[0, 1, 2]])
    (root / "classes.txt").write_bytes(end.join(["café", "cat", ""]).encode(encoding))
    (root / "ImageSets/Segmentation/val.txt").write_bytes(f"2008_000000{end}".encode(encoding))
    found = open_dataset("folder", root)
    assert found.names == ("café", "cat")
    assert truth_of(found) == [0, 1, 2]


def own_palettes(root: Path, colours: np.ndarray) -> None:
    """Write the label files of a folder anew, each with the colours that occur in it alone, in their order there."""
    for path in sorted((root / "SegmentationClass").glob("*.png")):
        indices = np.array(Image.open(path))
        used = np.unique(indices)
        picture = Image.fromarray(np.searchsorted(used, indices).astype(np.uint8))
        picture.putpalette(colours[used].tobytes())
        picture.save(path)


def test_label_files_with_palettes_of_their_own_are_refused_unless_their_indices_are_said_to_be_meant(tmp_path):
    root = own_folder(tmp_path, "cat\ndog\ncow\n", [[0, 1, 3], [0, 2, 3], [0, 1, 2]])
    colours = np.frombuffer(voc_colours(), np.uint8).reshape(-1, 3)
    own_palettes(root, colours)
    with pytest.raises(
        DatasetError, match=r"palettes of their own: 1 is the colour \(128, 0, 0\) in .*'labels: from 1'"
    ):
        open_dataset("folder", root)
    (root / "classes.txt").write_text("labels: from 1\ncat\ndog\ncow\n")
    (note,) = open_dataset("folder", root).notes
    assert "the indices are taken, as 'labels: from 1' says" in note


def test_label_files_with_and_without_palettes_and_with_shorter_ones_are_read(tmp_path):
    root = own_folder(tmp_path, "labels: from 1\ncat\ndog\n", [[0, 1, 2], [0, 1, 2], [0, 1, 255]])
    colours = voc_colours()
    for path, length in zip(sorted((root / "SegmentationClass").glob("*.png")), (256, 3, 0), strict=True):
        picture = Image.open(path)
        if length:
            picture.putpalette(colours[: 3 * length])
        picture.save(path)
    assert open_dataset("folder", root).notes == ()


def test_ids_may_have_blanks_where_an_image_is_called_so(tmp_path):
    ids = ["front camera 0", "front camera 1 (copy)"]
    (tmp_path / "classes.txt").write_text("cat\n")
    pairs = [(np.zeros((1, 2, 3), np.uint8), np.array([[0, 1]], np.uint8)) for _ in ids]
    root = write_files(tmp_path, pairs, **VOC_FILES, ids=ids)
    assert [sample.id for sample in open_dataset("folder", root).samples] == ids
    (root / "ImageSets/Segmentation/val.txt").write_text("front camera 0  1\n")
    with pytest.raises(
        DatasetError, match="'front camera 0  1'; it must list one id a line, and no image is called so"
    ):
        open_dataset("folder", root)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ('["cat", "dog"]', "reads as JSON"),
        ("[cat, dog]", "reads as JSON"),
        ('[\n"cat"\n]', "reads as JSON"),
        ('{"names": 2}', "reads as JSON"),
        ("names:\n  - cat\n  - dog", "reads as YAML"),
        ("- cat\n- dog", "reads as YAML"),
        ("'cat'\n'dog'", "has quotes"),
        ("1: cat\n2: dog", "has numbers before the names"),
        ("0 cat\n1 dog", "has numbers before the names"),
        ("1\tcat\n2\tdog", "has numbers before the names"),
        ("cat, dog, cow", "has all names in one line"),
    ],
)
def test_a_class_list_in_another_form_is_refused(classes, said, tmp_path):
    with pytest.raises(DatasetError, match=rf"classes\.txt has the line .*: it {said}; it must have one class a line"):
        open_dataset("folder", own_folder(tmp_path, classes, [[0, 1, 2]]))


def test_names_with_numbers_hyphens_and_commas_are_names(tmp_path):
    names = ("7 up", "t-shirt", "traffic light, red", 'the "big" one')
    assert open_dataset("folder", own_folder(tmp_path, "\n".join(names), [[0, 1, 4]])).names == names


@pytest.mark.parametrize("ending", [".jpg", ".bmp", ".tif"])
def test_labels_that_are_no_png_are_named(ending, tmp_path):
    root = own_folder(tmp_path, "cat\n", [[0, 1]])
    (path,) = (root / "SegmentationClass").glob("*.png")
    Image.open(path).save(path.with_suffix(ending))
    path.unlink()
    with pytest.raises(
        DatasetError, match=rf"holds 2008_000000\{ending}: labels must be PNG; JPEG changes their values"
    ):
        open_dataset("folder", root)


@pytest.mark.parametrize("line", ["2008_000000.png", "2008_000000.JPG", "JPEGImages/2008_000000.png"])
def test_a_list_of_files_in_place_of_ids_is_named(line, tmp_path):
    root = own_folder(tmp_path, "cat\n", [[0, 1]])
    (root / "ImageSets/Segmentation/val.txt").write_text(line)
    with pytest.raises(DatasetError, match=r"must list ids, .* without folder and ending, as '2008_000000'"):
        open_dataset("folder", root)


@pytest.mark.parametrize("part", ["JPEGImages", "SegmentationClass"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(part, tmp_path):
    root = own_folder(tmp_path, "cat\n", [[0, 1]])
    (root / part / "2008_000000.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DatasetError, match=r"2008_000000\.png is a pointer of git-lfs"):
        read_first(root)


def test_what_labelme_leaves_is_recognised(tmp_path):
    root = own_folder(tmp_path, "_background_\ncat\n", [[0, 1]])
    (root / "classes.txt").rename(root / "class_names.txt")
    with pytest.raises(DatasetError, match=r"lacks classes\.txt.*Note that class_names\.txt.* may be copied"):
        open_dataset("folder", root)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Dataset, dict[Path, bytes]]:
    root = write_folder(tmp_path_factory.mktemp("small"), draw_scenes(0, 1, size=(32, 40)))
    found = open_dataset("folder", root)
    return found, {path: path.read_bytes() for path in (found.samples[0].image, found.samples[0].labels)}


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 1), changes=st.integers(1, 12), keep=st.floats(0, 1))
def test_a_damaged_file_is_refused_or_read_but_nothing_else(small, seed, which, changes, keep):
    found, originals = small
    path, content = list(originals.items())[which]
    random_ = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(changes):
        damaged[random_.randrange(len(damaged))] = random_.randrange(256)
    path.write_bytes(damaged[: int(keep * len(damaged)) if seed % 2 else None])
    try:
        image, labels = found.load(found.samples[0])
    except DatasetError as error:
        said = str(error)
    else:
        said = path.name
        assert image.shape == (*labels.shape, 3)
        assert image.dtype == labels.dtype == np.uint8
    finally:
        path.write_bytes(content)
    assert path.name in said
