"""Write drawn scenes and their true labels as a labelled folder that `nerve eval` reads.

    python tools/scene_dataset.py --out build/scenes --seed 7 --count 20

The folder has the VOC layout: JPEGImages/ (PNG all the same, so that scores equal those of the scenes in memory to the
digit), SegmentationClass/ with a palette, ImageSets/Segmentation/val.txt, and classes.txt. The same options give the
same folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.progress import track

from nerve_core.console import PlainConsole, tell
from nerve_core.embedded.scenes import NAMES, Scene, draw_scenes
from nerve_core.images.visualize import palette

console = PlainConsole(stderr=True)


def write_folder(root: Path, scenes: Iterable[Scene]) -> Path:
    """Write scenes as a labelled folder, image k as scene_000k. Raises OSError, for a folder that is not empty too."""
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; give a new folder, so that no old image is counted")
    images, labels, lists = root / "JPEGImages", root / "SegmentationClass", root / "ImageSets" / "Segmentation"
    for folder in (images, labels, lists):
        folder.mkdir(parents=True)
    colours = palette().tobytes()
    ids = []
    for k, scene in enumerate(scenes):
        ids.append(f"scene_{k:04d}")
        Image.fromarray(scene.image).save(images / f"{ids[-1]}.png")
        indices = Image.fromarray(scene.labels)
        indices.putpalette(colours)
        indices.save(labels / f"{ids[-1]}.png")
    (root / "classes.txt").write_text("".join(f"{line}\n" for line in ("labels: from 1", *NAMES)))
    # Last: the folder is whole once it has a split.
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in ids))
    return root


def main(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    seed: Annotated[int, typer.Option(help="Scenes of one seed are always the same.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="How many scenes.", min=1)] = 20,
) -> None:
    """Write drawn scenes and their truth as a labelled folder."""
    scenes = track(draw_scenes(seed, count), total=count, description="drawing", console=console, transient=True)
    try:
        write_folder(out, scenes)
    except OSError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise typer.Exit(1) from None
    tell(f"{count} scenes of seed {seed} in {out}")


if __name__ == "__main__":
    typer.run(main)
