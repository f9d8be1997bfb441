"""Measure the embedded pair on scenes it never saw and write its card: nerve_core/embedded/CARD.md and card.json.

    python tools/embedded/card.py --seed 20261122 --count 200

Every row runs on the same scenes and the same G; only what stands in the row differs from the pair's settings.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from nerve_core import Segmenter, Vocabulary
from nerve_core.embedded.scenes import NAMES, draw_scenes
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.evaluation.protocols import STEPS, table_variants
from nerve_core.evaluation.refinements import Refine
from nerve_core.evaluation.variants import Variant, Variants
from nerve_core.models.loading import load_diffusion, quiet_libraries
from nerve_core.models.pairs import find_pair
from nerve_core.networks.diffusion import DiffusionTaps
from nerve_core.settings import PRESETS, Settings
from nerve_core.walk.affinity import KERNELS
from nerve_core.walk.edges import EDGES as TRANSITIONS

EMBEDDED = Path(__file__).resolve().parents[2] / "nerve_core" / "embedded"
EDGES = "Parts of the method|full NERVE + edges"
FULL, ALONE = "Parts of the method|global + local + walk (full NERVE)", "Parts of the method|CLIP alone (G)"
NO_EDGES = {"edges": "none"}
"""Rows are about the walk: but for those that say so, they are measured as the paper is, without the image's edges."""
CONTROL = "Controls|U-Net with random weights, full walk"


def blur(sigma: float, grid: tuple[int, int]) -> Refine:
    """The control without an image: an isotropic Gaussian over G, in tokens; rows stay distributions."""
    reach = int(3 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    line = line / line.sum()

    def smooth(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
        maps = F.pad(G.T.unflatten(-1, grid)[:, None], [reach] * 4, mode="replicate")
        maps = F.conv2d(F.conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return maps[:, 0].flatten(1).T

    return smooth


def rows(settings: Settings, grid: tuple[int, int]) -> tuple[Variant, ...]:
    """What is measured, each named by its table and its row."""
    sigmas = (0.5, 1, 2, 4)
    tables = {
        "Parts of the method": (
            *table_variants("table4", "embedded", settings, {}),
            # at the timestep that this U-Net was taught at: the row is about the walk
            Variant("preset paper", {name: value for name, value in PRESETS["paper"].items() if name != "timestep"}),
        ),
        "Heads": table_variants("table3", "embedded", settings, {}),
        "Steps, truncated walk": table_variants("fig2", "embedded", settings, {}),
        "Steps, fixed point": tuple(Variant(f"L = {steps}", {"steps": steps, **NO_EDGES}) for steps in STEPS),
        "Kernels": tuple(
            Variant(kernel, {"kernel": kernel, **NO_EDGES}) for kernel, rule in KERNELS.items() if rule.positive
        ),
        "Edges": (
            *(Variant(edges, {"edges": edges}) for edges in TRANSITIONS),
            Variant("pixels, without the walk", {"edges": "pixels"}, refine="none"),
        ),
        "Controls": tuple(
            Variant(f"isotropic blur of G, sigma {sigma:g} tokens", NO_EDGES, refine=blur(sigma, grid))
            for sigma in sigmas
        ),
    }
    return tuple(
        Variant(f"{title}|{row.name}", row.settings, row.refine) for title, part in tables.items() for row in part
    )


def forget_unet(segmenter: Segmenter) -> None:
    """Give a segmenter a U-Net of the same architecture that has learnt nothing."""
    diffusion = segmenter.settings.diffusion
    source = find_pair("embedded").diffusion
    loaded = load_diffusion(source, segmenter.device, segmenter.dtype, diffusion.taps, cache_dir=None, offline=True)
    torch.manual_seed(0)
    unet = type(loaded.unet)(**loaded.unet.config).eval().requires_grad_(False)
    segmenter.frame_part.taps = DiffusionTaps(loaded.vae, unet, loaded.scheduler, loaded.prompt, diffusion)


def measure(seed: int, count: int) -> dict[str, ConfusionMatrix]:
    """Every row on the same scenes."""
    settings = Settings.of_pair(find_pair("embedded"))
    untrained = Variants("embedded", [Variant(CONTROL, NO_EDGES)], device="cpu")
    trained = Variants("embedded", rows(settings, untrained.segmenters[CONTROL].grid), device="cpu")
    forget_unet(untrained.segmenters[CONTROL])
    matrices = {name: ConfusionMatrix.of(len(NAMES) + 1) for name in (*trained.segmenters, CONTROL)}
    for scene in track(draw_scenes(seed, count), "scenes", total=count):
        for variants in (trained, untrained):
            for name, mask in variants(scene.image, Vocabulary(NAMES)).items():
                matrices[name].add(scene.labels, mask.labels)
    return matrices


def main(
    seed: int = typer.Option(..., help="A seed chosen after training; 1 was trained on, 2 was tuned on."),
    count: int = 200,
    threads: int = 2,
    out: Path = EMBEDDED,
) -> None:
    """Measure and write the card."""
    quiet_libraries()
    torch.set_num_threads(threads)
    matrices = measure(seed, count)
    miou: dict[str, dict[str, float]] = {}
    for name, matrix in matrices.items():
        title, _, row = name.partition("|")
        miou.setdefault(title, {})[row] = round(matrix.mean_iou(), 4)
    settings = Settings.of_pair(find_pair("embedded"))
    content = {
        "seed": seed,
        "count": count,
        "device": f"CPU {platform.machine()}, {threads} threads, torch {torch.__version__}, float32",
        "settings": {key: value for key, value in settings.flat().items() if key not in ("templates", "negatives")},
        "miou": miou,
        "per_class": per_class(matrices[FULL]),
        "per_class_with_edges": per_class(matrices[EDGES]),
        "per_class_clip_alone": per_class(matrices[ALONE]),
    }
    (out / "card.json").write_text(json.dumps(content, indent=2) + "\n")
    text = (Path(__file__).parent / "card_text.md").read_text()
    text = text.replace("<!-- tables -->", markdown(content)).replace("<!-- remarks -->", remarks(content))
    (out / "CARD.md").write_text(text)


def per_class(matrix: ConfusionMatrix) -> dict[str, float]:
    """IoU by name."""
    return {name: round(float(iou), 6) for name, iou in zip(("background", *NAMES), matrix.iou(), strict=True)}


def markdown(content: dict) -> str:
    """The card's tables."""
    lines = [
        (
            f"{content['count']} scenes of seed {content['seed']}, mean IoU of 14 names and the background, "
            f"{content['device']}."
        )
    ]
    for title, parts in content["miou"].items():
        lines += [
            "",
            f"### {title}",
            "",
            "| | mean IoU |",
            "|---|---|",
            *(f"| {row} | {value:.4f} |" for row, value in parts.items()),
        ]
    lines += ["", "### Per name", "", "| name | CLIP alone | full NERVE | with edges |", "|---|---|---|---|"]
    alone, edges = content["per_class_clip_alone"], content["per_class_with_edges"]
    lines += [
        f"| {name} | {alone[name]:.3f} | {value:.3f} | {edges[name]:.3f} |"
        for name, value in content["per_class"].items()
    ]
    lines += ["", f"Settings: `{json.dumps(content['settings'])}`"]
    return "\n".join(lines)


def remarks(content: dict) -> str:
    """What the numbers say, computed from them: the parts in order, the heads, and whatever is below CLIP alone."""
    parts, heads = content["miou"]["Parts of the method"], content["miou"]["Heads"]
    alone, full = parts["CLIP alone (G)"], parts["global + local + walk (full NERVE)"]
    with_edges = parts["full NERVE + edges"]
    local, global_ = parts["local only (beta 0)"], parts["global only (beta 1)"]
    best = max((row for row in heads if row.startswith("single")), key=heads.__getitem__)
    ordered = alone < local < global_ < full
    below = [
        f"{row} ({value:.4f})" for table in content["miou"].values() for row, value in table.items() if value < alone
    ]

    def whether(holds: bool, verb: str) -> str:
        return verb if holds else f"{verb} not"

    weighted, mean = heads["weighted by entropy"], heads["mean"]
    ordering = "holds" if ordered else "does not hold"
    lines = [
        f"- The whole method adds {full - alone:.4f} to CLIP alone; the image's edges add {with_edges - full:.4f}.",
        "- Only rows that name edges have them: the others are about the walk.",
        f"- The paper's ordering, CLIP alone < local < global < full, {ordering} here.",
        f"- Weighting by entropy {whether(weighted > mean, 'is')} above the mean of the heads.",
        f"- The best single head, known only afterwards, {whether(heads[best] > weighted, 'is')} above that: {best}.",
        f"- Below CLIP alone: {', '.join(dict.fromkeys(below))}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
