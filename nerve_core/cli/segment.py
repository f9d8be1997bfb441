"""`nerve segment`: image files in; masks, overlays and per-class confidences out."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cv2
import numpy as np
import typer
from PIL import Image
from rich.progress import track
from rich.table import Table

from ..console import console, say
from ..models.pairs import find_pair
from ..output import OutputError, claim, first_of, made_here, marked, write
from ..text.parsing import read_names
from ..text.vocabulary import Vocabulary
from .options import NAMES_HELP, AsJson, Device, Model, Overwrite, Precision, Preset, Set, load

if TYPE_CHECKING:
    from ..segmenter import Segmentation

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_PARTS = ("mask.png", "overlay.png", "confidence.json")


def segment(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    names: Annotated[str, typer.Option(help=NAMES_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("nerve_out"),
    model: Model = "embedded",
    device: Device = "auto",
    precision: Precision = None,
    preset: Preset = "pair",
    set_: Set = None,
    negatives: Annotated[
        str | None, typer.Option(help="What a pixel may be instead; by default the pair's own list.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a mask (PNG with a palette), an overlay and the per-class confidence of every image.

    What cannot be read or written is left out and listed at the end; the exit code is 2 then, also where all the others
    are done. What nerve segment wrote itself is not segmented again.
    """
    from ..text.encoder import exhaust

    vocabulary = Vocabulary(read_names(names), negatives=None if negatives is None else read_names(negatives))
    for remark in vocabulary.remarks:
        say(remark)
    if not vocabulary.names:
        raise ValueError('--names is empty; give what to look for, as in --names "ball, ladder"')
    found_files, left_out = _image_files(images)
    own = dict.fromkeys(path for path in found_files if made_here(path))
    if own:
        say(f"{len(own)} pictures that nerve wrote itself are not segmented: {first_of(list(own))}")
    targets = _targets((path for path in found_files if path not in own), out)
    for path, target in list(targets.items()):
        if not _fits(target):
            left_out[path] = f"has a name that is too long to add _{_PARTS[-1]} to it in {out}"
            del targets[path]
    if not targets:
        reasons = "; ".join(f"{path} {reason}" for path, reason in left_out.items())
        raise ValueError(f"there is no image to segment: {reasons or 'all that is here, nerve wrote itself'}")
    claim((_file(target, part) for target in targets.values() for part in _PARTS), overwrite)
    segmenter = load(model, device, precision, preset, set_)
    doubts = segmenter.doubts(vocabulary)
    for doubt in doubts:
        say(doubt.text, style="bold red" if doubt.grave else "yellow")
    said = [doubt.text for doubt in doubts]
    limits = find_pair(model).limits(vocabulary.words)
    more = [limits] if limits and limits not in said else []
    queries = exhaust(segmenter.embed_steps(vocabulary))
    results: list[dict[str, Any]] = []
    full = ""
    for path in track(targets, "segmenting", console=console, disable=len(targets) < 2):
        if full:
            left_out[path] = full
            continue
        try:
            image = _read(path)
            result = _write(image, segmenter(image, queries), targets[path])
        except (_Unreadable, OutputError) as error:
            left_out[path] = str(error) if isinstance(error, _Unreadable) else f"has no results: {error}"
            full = "comes after the disk was full" if isinstance(error, OutputError) and error.full else ""
            continue
        results.append({"image": str(path), **result})
    if as_json:
        unread = [{"image": str(path), "reason": reason} for path, reason in left_out.items()]
        described = {"unread": unread, "own": [str(path) for path in own], "model": segmenter.description}
        print(json.dumps({"images": results, **described, "notes": [*vocabulary.remarks, *said, *more]}))
    else:
        for result in results:
            say(f"{result['image']}  ({result['timings']['total']:.0f} ms)")
            console.print(_found_table(result))
        say(f"masks, overlays and confidence of {len(results)} images are in {out}")
    for sentence in more:
        say(sentence)
    for path, reason in left_out.items():
        say(f"left out: {path} {reason}")
    if left_out:
        raise ValueError(f"{len(left_out)} of {len(left_out) + len(results)} are left out, see above")


class _Unreadable(ValueError):
    """An image that cannot be read; the message follows on its path."""


def _image_files(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Files as given and the images inside folders, sorted; and what is not an image that can be read, and why not."""
    files: dict[Path, None] = {}
    odd: dict[Path, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            reason = _odd(path)
            if reason:
                odd[path] = reason
            else:
                files[path] = None
            continue
        inside = sorted(_inside(path, odd))
        if not inside:
            odd[path] = f"is a folder that holds no image; accepted are {' '.join(_IMAGES)}"
        for item in inside:
            reason = _odd(item)
            if reason:
                odd[item] = reason
            else:
                files[item] = None
    return list(files), odd


def _inside(folder: Path, odd: dict[Path, str]) -> Iterator[Path]:
    """Everything below a folder that has an image's ending, but for folders that hold something."""

    def unreadable(error: OSError) -> None:
        odd[Path(error.filename)] = f"cannot be looked into: {error.strerror}"

    for place, folders, names in os.walk(folder, onerror=unreadable):
        for name in (*names, *(name for name in folders if _is_empty(os.path.join(place, name)))):
            if name.lower().endswith(_IMAGES):
                yield Path(place, name)


def _is_empty(folder: str) -> bool:
    try:
        return not os.listdir(folder)
    except OSError:
        return False  # it is reported where it is looked into


def _odd(path: Path) -> str:
    """Why a path is no file that can be an image, to follow on it; empty where it is one."""
    try:
        path.stat()
    except OSError as error:
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which cannot be read: {error.strerror}"
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return "is neither a file nor a folder" if missing else f"cannot be read: {error.strerror}"
    if path.is_dir():
        return "is an empty folder"
    if not path.is_file():
        return "is no plain file"
    return "is what macOS keeps about another file" if path.name.startswith("._") else ""


def _targets(files: Iterable[Path], out: Path) -> dict[Path, Path]:
    """Where each image's results go, without an ending: its stem, or its stem and a number where two are alike."""
    taken: set[Path] = set()
    targets = {}
    for path in files:
        target, number = out / path.stem, 2
        while target in taken:
            target, number = out / f"{path.stem}_{number}", number + 1
        taken.add(target)
        targets[path] = target
    return targets


def _file(target: Path, part: str) -> Path:
    """Where one part of an image's results goes."""
    return target.with_name(f"{target.name}_{part}")


def _fits(target: Path) -> bool:
    """Whether the disk has names as long as those of an image's results."""
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    return max(len(os.fsencode(_file(target, part).name)) for part in _PARTS) <= os.pathconf(folder, "PC_NAME_MAX")


def _read(path: Path) -> np.ndarray:
    """An image as uint8 [H, W, 3] RGB. Raises _Unreadable."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from None
    if not data:
        raise _Unreadable("is empty")
    if data.startswith(b"version https://git-lfs"):
        raise _Unreadable("is a pointer of git-lfs, not the image; get it by git lfs pull")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if _is_cut_short(data):
        raise _Unreadable("is cut short: the end of the image is missing")
    if image is None:
        raise _Unreadable(f"is nothing that OpenCV can decode; accepted are {' '.join(_IMAGES)}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_cut_short(data: bytes) -> bool:
    """Whether Pillow misses the end of an image; OpenCV fills what is missing with grey."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except OSError as error:
        return "truncated" in str(error)
    except (ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # a kind that OpenCV alone reads
    return False


def _write(image: np.ndarray, found: Segmentation, target: Path) -> dict[str, Any]:
    """Write one image's files and return what they say. Raises OutputError."""
    from ..images.visualize import overlay, palette

    mask = Image.fromarray(found.labels, "P")
    mask.putpalette(palette().tobytes())
    png = io.BytesIO()
    mask.save(png, "PNG")
    drawn = cv2.imencode(".png", overlay(image, found.labels, found.names)[:, :, ::-1])[1].tobytes()
    classes = [dataclasses.asdict(item) for item in found.class_confidence]
    result = {"classes": classes, "timings": found.timings, "size": [image.shape[1], image.shape[0]]}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    contents: tuple[bytes | str, ...] = (marked(png.getvalue()), marked(drawn), text)
    paths = [write(_file(target, part), content) for part, content in zip(_PARTS, contents, strict=True)]
    return {**result, "mask": str(paths[0]), "overlay": str(paths[1])}


def _found_table(result: dict[str, Any]) -> Table:
    """What was found in one image."""
    table = Table()
    for column in ("name", "presence", "confidence", "area", "box"):
        table.add_column(column, justify="left" if column == "name" else "right")
    pixels = result["size"][0] * result["size"][1]
    for item in sorted(result["classes"], key=lambda item: -item["area"]):
        box = "-" if item["box"] is None else "{} {} {} x {}".format(*item["box"])
        table.add_row(
            item["name"],
            f"{item['presence']:.2f}",
            f"{item['mean_probability']:.2f}",
            f"{item['area'] / pixels:.1%}",
            box,
        )
    return table
