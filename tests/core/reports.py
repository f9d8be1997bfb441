"""Reports of any size as values, for tests: nothing in them was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nerve_core.report import (
    Camera,
    Curve,
    Live,
    Picture,
    Presence,
    Published,
    Report,
    Score,
    SetScores,
    save_picture,
)

HOSTILE = (
    '<script>alert("1")</script>',
    "<img src=x onerror=alert(2)>",
    "'\"&amp;{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$",
    "</style></title></textarea><b>",
    "كرسي أحمر",
    "椅子と机のある部屋",
    "a name that goes on " * 12,
    "unbroken" * 40,
    "\u202egnp.exe",
    "nul\x00 and \ud800 half a pair",
)
PLAIN = {"command": "nerve eval …", "created": "2026-01-02T03:04:05+00:00", "device": "cpu, 2 threads"}
VERSIONS = {"nerve_ros": "0.1.0", "python": "3.11.7", "torch": "2.9.0", "numpy": "2.2.6"}
SETTINGS = {"head": "vanilla", "kernel": "exp", "tau": 0.05, "alpha": 0.9, "taps": ((2, 0), (2, 1)), "preset": None}


def scene(seed: int, labels: int, size=(120, 160)) -> tuple[np.ndarray, np.ndarray]:
    """An image of discs and its labels, of which label 255 is a corner."""
    generator = np.random.default_rng(seed)
    image = np.full((*size, 3), generator.integers(90, 200, 3), np.uint8)
    truth = np.zeros(size, np.uint8)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for label in generator.integers(1, labels, 4):
        row, column, radius = generator.integers(0, size[0]), generator.integers(0, size[1]), size[0] // 5
        disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        truth[disc] = label
        image[disc] = generator.integers(0, 256, 3)
    truth[: size[0] // 8, : size[1] // 6] = 255
    return image, truth


def score(variant: str, labels: tuple[str, ...], images: int, *, seed: int = 0, **settings) -> Score:
    """A score with a made-up confusion."""
    generator = np.random.default_rng(seed)
    count = len(labels)
    counts = np.zeros((count, count), np.int64)
    for _ in range(6 * count):
        counts[tuple(generator.integers(0, count, 2))] += generator.integers(1, 900)
    counts[np.diag_indices(count)] += generator.integers(0, 9000, count)
    if count > 3:
        counts[3] = 0  # a label that the truth does not show
    hits, truth, found = np.diag(counts), counts.sum(1), counts.sum(0)
    iou = [float(h / (t + f - h)) if t else None for h, t, f in zip(hits, truth, found, strict=True)]
    miou = float(np.mean([value for value in iou if value is not None]))
    return Score(
        variant,
        settings,
        images,
        images / 2.7,
        miou,
        (miou - 0.02, miou + 0.015),
        float(hits.sum() / counts.sum()),
        dict(zip(labels, iou, strict=True)),
        tuple((int(t), int(p), int(counts[t, p])) for t, p in zip(*np.nonzero(counts), strict=True)),
        {f"image {index}": float(value) for index, value in enumerate(generator.random(min(images, 40)))},
    )


def pictures(folder: Path, names: tuple[str, ...], variants: tuple[str, ...], *, size=(120, 160)) -> list[Picture]:
    """The worst and the best two images of every variant, as files in the folder."""
    found = []
    for index, variant in enumerate(variants):
        for rank, number in (("worst", 0), ("worst", 1), ("best", 2), ("best", 3)):
            image, truth = scene(number, len(names) + 1, size)
            labels = np.roll(np.where(truth == 255, 0, truth), 7 + index, axis=1)
            found.append(
                save_picture(
                    folder,
                    image,
                    labels,
                    names,
                    image_id=f"2008_00{number:04d}",
                    variant=variant,
                    rank=rank,
                    miou=0.1 + 0.2 * number,
                    truth=truth,
                )
            )
    return found


def evaluation(folder: Path, classes: int = 21, variants: int = 2, **changes) -> Report:
    """One set of so many labels, with pictures in the folder."""
    names = tuple(f"class {index} of a set" if index % 3 else f"name{index}" for index in range(1, classes))
    if changes.pop("hostile", False):
        names = (*HOSTILE, *names)[: classes - 1]
    labels = ("background", *names)
    words = tuple(("nerve", "none", "head naclip, refine nerve", "head cliper, refine sfsa, post pamr")[:variants])
    scored = SetScores(
        "voc21",
        "Pascal VOC 2012 with background (V21)",
        "data/voc",
        1449,
        labels,
        tuple(
            score(word, labels, changes.get("images", 1449), seed=index, refine=word.split()[0])
            for index, word in enumerate(words)
        ),
        (Published("NERVE", 69.7, "arXiv 2511.08248, Table 1"), Published("CLIPer", 71.6, "arXiv 2411.13836")),
        tuple(pictures(folder, names, words)),
        ("label files hold palette indices",),
    )
    values = {
        "kind": "evaluation",
        "title": "Table 1: NERVE and others on one set",
        "model": "sd21 on cuda in float16, 64 x 64 tokens",
        "versions": VERSIONS,
        "settings": SETTINGS,
        "defaults": {**SETTINGS, "alpha": 0.8},
        "sets": (scored,),
        "curves": evaluation_curves(),
        "notes": ("Parameters that the paper does not give are ours, untuned on real data.",),
        **PLAIN,
    }
    changes.pop("images", None)
    return Report(**{**values, **changes})


def evaluation_curves() -> tuple[Curve, ...]:
    """mIoU over L on three sets."""
    gains = (0.0, 0.02, 0.031, 0.034, 0.033)
    return tuple(
        Curve(
            title="mIoU over L",
            set_name=name,
            x_label="steps L",
            x=(0.0, 5.0, 10.0, 20.0, 40.0),
            y=tuple(base + gain for gain in gains),
            interval=tuple((base + gain - 0.01, base + gain + 0.012) for gain in gains),
        )
        for name, base in (("voc21", 0.61), ("pc60", 0.34), ("coco-object", 0.41))
    )


def camera_of(times: Sequence[float], presence: Sequence[float]) -> Camera:
    """One name on one camera, by its frames' times and presence."""
    shares = tuple(map(float, presence))
    name = Presence("ball", 1, shares, shares, shares, (0,) * 32)
    seen = tuple(map(float, times))
    return Camera("/camera", (64, 48), len(seen), {}, seen, (name,), None, None, None, 1.0, {})


def camera(
    folder: Path, frames: int = 2000, names: tuple[str, ...] = ("ball", "ladder", "mug"), seed: int = 0
) -> Camera:
    """A recording of so many frames at 15 a second with a pause in it."""
    generator = np.random.default_rng(seed)
    times = np.arange(frames) / 15 + generator.random(frames) / 60
    times[frames // 2 :] += 9
    present = []
    for label, name in enumerate(names, 1):
        wave = np.clip(np.sin(np.arange(frames) / (40 + 13 * label) + label) * 1.2, 0, 1)
        area = np.where(wave > 0.5, 0.01 * label * wave, 0.0)
        present.append(
            Presence(
                name,
                label,
                tuple(map(float, wave * 0.98)),
                tuple(float(0.6 + 0.3 * w) if a > 0 else None for w, a in zip(wave, area, strict=True)),
                tuple(map(float, area)),
                tuple(int(count) for count in generator.integers(0, 4000, 32) * np.linspace(0, 1, 32) ** 2),
            )
        )
    image, truth = scene(1, len(names) + 1)
    labels = ("background", *names)
    return Camera(
        topic="/camera/image_raw",
        size=(640, 480),
        frames=frames,
        lost={"a JPEG that cannot be decoded": 3} if frames else {},
        times=tuple(map(float, times)),
        names=tuple(present),
        flicker_static=0.041 if frames else None,
        flicker_warped=0.12 if frames else None,
        static_share=0.87 if frames else None,
        frames_per_second=2.31 if frames else 0.0,
        stage_ms={"decode": 2.1, "segment": 431.0, "write": 6.5},
        score=score("nerve", labels, frames, seed=seed) if frames else None,
        pictures=(
            save_picture(folder, image, truth, names, image_id="frame 12", variant="nerve", rank="sample"),
            save_picture(folder, image, truth % 2, names, image_id="frame 600", variant="nerve", rank="sample"),
        ),
        video="overlay.webm",
        notes=("A pixel stands still where its grey changes by less than 4 of 255; the threshold is ours.",),
    )


def replay(
    folder: Path, frames: int = 2000, names: tuple[str, ...] = ("ball", "ladder", "mug"), seed: int = 0
) -> Report:
    """One camera, and what a running node did with it."""
    return Report(
        kind="replay",
        title="Replay of a drive",
        model="embedded on cpu in float32, 18 x 24 tokens",
        versions=VERSIONS,
        settings=SETTINGS,
        source="drive.mcap",
        bag="segmented",
        cameras=(camera(folder, frames, names, seed),),
        live=(
            Live(
                "/camera/image_raw", 1.0, 300, 290, 10, 610.0, 730.5, 912.0, 44.2, 1.83, 1210.0, 290, 288, ((7, 1e-4),)
            ),
            Live("/other", 0.5, 0, 0, 0, None, None, None, None, None, None, 0, 0),
        ),
        notes=("3 images could not be read.",),
        **PLAIN,
    )


def tune() -> Report:
    """A search: what was tried, and what was gained."""
    trials = tuple(
        {"trial": index, "alpha": 0.6 + index / 20, "kernel": "exp", "tuned on, mIoU": 0.5 + index / 90}
        for index in range(8)
    )
    labels = ("background", "ball", "ladder")
    held_out = SetScores(
        "folder",
        "Held-out images",
        "data/mine",
        40,
        labels,
        (score("pair's own", labels, 40), score("tuned", labels, 40, seed=1, alpha=0.95)),
    )
    return Report(
        kind="tune",
        title="Tuned on 60 images",
        model="embedded on cpu",
        versions=VERSIONS,
        settings=SETTINGS,
        sets=(held_out,),
        extra={
            "Gain on the held-out images": {
                "mIoU": 0.012,
                "interval": (-0.004, 0.03),
                "verdict": "not distinguishable",
            },
            "Trials": trials,
            "Left out": ("<b>x</b>", None, 3),
            "Seed": 7,
        },
        **PLAIN,
    )
