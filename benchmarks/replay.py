"""How much of an offline replay's time is segmenting: decoding, measuring, drawing and writing are to overlap it.

`python -m nerve_benchmarks.replay BAG`, or `python -m benchmarks.replay BAG` in a clone's top folder;
tools/sample_bag.py makes a bag. The baseline is the same images, decoded beforehand, segmented one after the other with
nothing else running; measured in the same process, before and after the replay.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nerve_core.console import PlainConsole

TARGET = 0.9
"""Share of the replay's time that the baseline takes, at least."""


def measure(bag: Path, topic: str, names: str, model: str, device: str, images: int) -> dict[str, Any]:
    """Replay the first `images` of a bag with everything that can be written, and segment the same ones alone.

    share: the mean of both baselines over the replay's wall time. inside: the share of the replay's wall time that was
    spent in the segmenter, which may take longer there.
    """
    import torch

    from nerve_core.models.loading import quiet_libraries
    from nerve_core.replay.frames import Losses, Selection, read_frames
    from nerve_core.replay.reading import Bag
    from nerve_core.replay.run import replay
    from nerve_core.segmenter import Segmenter
    from nerve_core.text.vocabulary import Vocabulary

    quiet_libraries()
    selection, vocabulary = Selection((topic,), limit=images), Vocabulary.parse(names)
    with Bag(bag) as opened:
        pictures = [frame.image for frame in read_frames(opened, selection, [Losses()], None)]
    segmenter = Segmenter.from_pretrained(model, device=device)
    queries = segmenter.embed(vocabulary)
    segmenter.warm_up(pictures[0].shape[:2])

    def alone() -> float:
        begun = time.perf_counter()
        for picture in pictures:
            segmenter(picture, queries)
        return time.perf_counter() - begun

    before = alone()
    with tempfile.TemporaryDirectory() as out:
        replayed = replay(bag, selection, segmenter, vocabulary, Path(out) / "out")
    after = alone()
    return {
        "images": len(pictures),
        "size": list(pictures[0].shape[1::-1]),
        "model": segmenter.description,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "replay_s": replayed.wall_seconds,
        "alone_before_s": before,
        "alone_after_s": after,
        "inside": replayed.inference_seconds / replayed.wall_seconds,
        "share": (before + after) / 2 / replayed.wall_seconds,
    }


def main(
    bag: Annotated[Path, typer.Argument(help="A recording.")] = Path("build/sample_bag"),
    topic: Annotated[str, typer.Option(help="Its images.")] = "/camera/image/compressed",
    names: Annotated[str, typer.Option(help="What to look for.")] = "ball, mug|cup, ladder, chair, cone",
    model: Annotated[str, typer.Option(help="A model pair's name, or its folder.")] = "embedded",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    images: Annotated[int, typer.Option(min=1, help="How many of them.")] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Measure it, and end with 1 where the share is below TARGET."""
    found = measure(bag, topic, names, model, device, images)
    PlainConsole(stderr=True).print(
        f"{found['images']} images of {' x '.join(map(str, found['size']))}, {found['model']}, {found['cores']} cores: "
        f"replayed in {found['replay_s']:.1f} s, segmented alone in {found['alone_before_s']:.1f} s before and "
        f"{found['alone_after_s']:.1f} s after: {found['share']:.1%} (at least {TARGET:.0%}); "
        f"{found['inside']:.1%} of the replay was spent in the segmenter"
    )
    if as_json:
        print(json.dumps(found))
    raise typer.Exit(0 if found["share"] >= TARGET else 1)


if __name__ == "__main__":
    typer.run(main)
