"""`nerve segment`: image files in; masks, overlays and per-class confidences out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cv2
import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from ..text.vocabulary import Vocabulary
from .options import AsJson, Device, Model, Precision, Preset, Set, console, load, words

if TYPE_CHECKING:
    from ..segmenter import Segmentation

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def segment(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    names: Annotated[str, typer.Option(help='What to look for: "ball, ladder"; synonyms as "mug|cup".')],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("nerve_out"),
    model: Model = "embedded",
    device: Device = "auto",
    precision: Precision = None,
    preset: Preset = "pair",
    set_: Set = None,
    negatives: Annotated[
        str | None, typer.Option(help="What a pixel may be instead; by default the pair's own list.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a mask (PNG with a palette), an overlay and the per-class confidence of every image."""
    vocabulary = Vocabulary.parse(names, negatives=None if negatives is None else words(negatives))
    if not vocabulary.names:
        raise ValueError('--names is empty; give what to look for, as in --names "ball, ladder"')
    for word in vocabulary.dropped:
        console.print(f"{word!r} is named twice; the first is kept")
    files = _image_files(images)
    segmenter = load(model, device, precision, preset, set_)
    segmenter.embed(vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    results, unread = [], []
    targets = _targets(files, out)
    for path in track(files, "segmenting", console=console, disable=len(files) < 2):
        image = _read(path)
        if image is None:
            unread.append(path)
            continue
        found = segmenter(image, vocabulary)
        results.append({"image": str(path), **_write(image, found, targets[path])})
    if as_json:
        print(json.dumps({"images": results, "unread": [str(path) for path in unread], "model": segmenter.description}))
    else:
        for result in results:
            console.print(_found_table(result))
        console.print(f"masks, overlays and confidence of {len(results)} images are in {out}")
    if unread:
        raise ValueError(f"OpenCV cannot read {', '.join(map(str, unread))}; accepted are {' '.join(_IMAGES)}")


def _image_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and the images inside folders, sorted. Raises ValueError where nothing is found."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in _IMAGES)
            if not inside:
                raise ValueError(f"folder {path} holds no image; accepted are {' '.join(_IMAGES)}")
            files.extend(inside)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} is neither a file nor a folder")
    return list(dict.fromkeys(files))


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


def _read(path: Path) -> np.ndarray | None:
    """An image as uint8 [H, W, 3] RGB, or None where OpenCV cannot read it."""
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _write(image: np.ndarray, found: Segmentation, target: Path) -> dict[str, Any]:
    """Write one image's files and return what they say."""
    from PIL import Image

    from ..images.visualize import overlay, palette

    mask = Image.fromarray(found.labels, "P")
    mask.putpalette(palette().tobytes())
    paths = {part: target.with_name(f"{target.name}_{part}") for part in ("mask.png", "overlay.png", "confidence.json")}
    mask.save(paths["mask.png"])
    cv2.imencode(".png", overlay(image, found.labels, found.names)[:, :, ::-1])[1].tofile(paths["overlay.png"])
    classes = [dataclasses.asdict(item) for item in found.class_confidence]
    result = {"classes": classes, "timings": found.timings, "size": [image.shape[1], image.shape[0]]}
    paths["confidence.json"].write_text(json.dumps(result, indent=2, ensure_ascii=False))
    return {**result, "mask": str(paths["mask.png"]), "overlay": str(paths["overlay.png"])}


def _found_table(result: dict[str, Any]) -> Table:
    """What was found in one image."""
    table = Table(title=f"{result['image']}  ({result['timings']['total']:.0f} ms)", title_justify="left")
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
