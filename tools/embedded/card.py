"""Measure the embedded pair on scenes it never saw and write its card: nerve_core/embedded/CARD.md and card.json.

    python tools/embedded/card.py --seed 20261122 --count 200

Every row runs on the same scenes and the same G; only what stands in the row differs from the pair's settings.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from nerve_core import Segmenter
from nerve_core.affinity import KERNELS, AffinityConfig
from nerve_core.diffusion import DiffusionTaps
from nerve_core.evaluation.scenes import Refine, compare_on_scenes, nerve_refinement, no_refinement
from nerve_core.frame import FramePart
from nerve_core.fusion import FusionConfig, Transition, fuse
from nerve_core.models import load_diffusion, quiet_libraries
from nerve_core.pairs import find_pair
from nerve_core.random_walk import walk_from

EMBEDDED = Path(__file__).resolve().parents[2] / "nerve_core" / "embedded"


class Walks:
    """Walks with some of the pair's settings replaced; rows that differ in the walk alone share one S per frame."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self._frame: Tensor | None = None
        self._fused: dict[tuple[AffinityConfig, FusionConfig], Transition] = {}

    def __call__(self, **overrides: object) -> Refine:
        """The refinement with these settings."""
        s = self.segmenter.settings.replaced(overrides)

        def refined(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
            if self._frame is not Q:
                self._frame, self._fused = Q, {}
            key = (s.affinity, s.fusion)
            if key not in self._fused:
                grid = self.segmenter.grid
                self._fused[key] = fuse(Q.float(), K.float(), G, grid, s.affinity, s.fusion).transition
            return walk_from(self._fused[key], G, s.walk)

        return refined


def blur(grid: tuple[int, int], sigma: float) -> Refine:
    """The control without an image: an isotropic Gaussian over G, in tokens; rows stay distributions."""
    reach = int(3 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    line = line / line.sum()

    def smooth(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
        maps = F.pad(G.T.unflatten(-1, grid)[:, None], [reach] * 4, mode="replicate")
        maps = F.conv2d(F.conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return maps[:, 0].flatten(1).T

    return smooth


def rows(segmenter: Segmenter) -> dict[str, dict[str, Refine]]:
    """What is measured: title of each table -> its rows."""
    walk = Walks(segmenter)
    heads = len(segmenter.settings.diffusion.taps) * 5
    return {
        "Parts of the method": {
            "CLIP alone (G)": no_refinement,
            "local only (beta 0)": walk(beta=0.0),
            "global only (beta 1)": walk(beta=1.0),
            "global + local, one step": walk(steps=1),
            "global + local + walk (full NERVE)": nerve_refinement(segmenter),
            "preset paper": walk(kernel="relu", beta=0.3, alpha=0.85, c=10.0, method="truncated", steps=40),
        },
        "Heads": {
            **{f"single, head {head}": walk(head_weights=head) for head in range(heads)},
            "mean": walk(head_weights="mean"),
            "weighted by entropy": nerve_refinement(segmenter),
        },
        "Steps, truncated walk": {
            f"L = {steps}": walk(method="truncated", steps=steps) for steps in (0, 5, 10, 20, 40)
        },
        "Steps, fixed point": {f"L = {steps}": walk(steps=steps) for steps in (0, 5, 10, 20, 40)},
        "Kernels": {kernel: walk(kernel=kernel) for kernel, rule in KERNELS.items() if rule.positive},
        "Controls": {
            f"isotropic blur of G, sigma {sigma:g} tokens": blur(segmenter.grid, sigma) for sigma in (0.5, 1, 2, 4)
        },
    }


def with_random_unet(segmenter: Segmenter) -> FramePart:
    """The segmenter's own frame part, but for a U-Net of the same architecture that has learnt nothing."""
    part, diffusion = segmenter.frame_part, segmenter.settings.diffusion
    source = find_pair("embedded").diffusion
    loaded = load_diffusion(source, segmenter.device, segmenter.dtype, diffusion.taps, cache_dir=None, offline=True)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(loaded.unet.config).eval().requires_grad_(False)
    taps = DiffusionTaps(loaded.vae, unet, loaded.scheduler, loaded.prompt, diffusion)
    return FramePart(part.clip, taps, segmenter.device)


def main(
    seed: int = typer.Option(..., help="A seed chosen after training; 1 was trained on, 2 was tuned on."),
    count: int = 200,
    threads: int = 2,
    out: Path = EMBEDDED,
) -> None:
    """Measure and write the card."""
    quiet_libraries()
    torch.set_num_threads(threads)
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    tables = rows(segmenter)
    flat = {f"{title}|{row}": refinement for title, parts in tables.items() for row, refinement in parts.items()}
    scores = compare_on_scenes(segmenter, seed, count, flat, progress=shown(count))
    segmenter.frame_part = with_random_unet(segmenter)
    control = "U-Net with random weights, full walk"
    random = compare_on_scenes(segmenter, seed, count, {control: nerve_refinement(segmenter)}, progress=shown(count))
    scores[f"Controls|{control}"] = random[control]
    tables["Controls"][control] = no_refinement
    content = {
        "seed": seed,
        "count": count,
        "device": f"CPU {platform.machine()}, {threads} threads, torch {torch.__version__}, float32",
        "settings": {
            key: value for key, value in segmenter.settings.flat().items() if key not in ("templates", "negatives")
        },
        "miou": {
            title: {row: round(scores[f"{title}|{row}"].miou, 4) for row in parts} for title, parts in tables.items()
        },
        "per_class": scores["Parts of the method|global + local + walk (full NERVE)"].per_class,
        "per_class_clip_alone": scores["Parts of the method|CLIP alone (G)"].per_class,
    }
    (out / "card.json").write_text(json.dumps(content, indent=2) + "\n")
    text = (Path(__file__).parent / "card_text.md").read_text()
    text = text.replace("<!-- tables -->", markdown(content)).replace("<!-- remarks -->", remarks(content))
    (out / "CARD.md").write_text(text)


def shown(count: int) -> Callable:
    """A progress bar over `count` scenes."""
    return lambda drawn: track(drawn, "scenes", total=count)


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
    lines += ["", "### Per name", "", "| name | CLIP alone | full NERVE |", "|---|---|---|"]
    alone = content["per_class_clip_alone"]
    lines += [f"| {name} | {alone[name]:.3f} | {value:.3f} |" for name, value in content["per_class"].items()]
    lines += ["", f"Settings: `{json.dumps(content['settings'])}`"]
    return "\n".join(lines)


def remarks(content: dict) -> str:
    """What the numbers say, worked out from them: the parts in order, the heads, and whatever is below CLIP alone."""
    parts, heads = content["miou"]["Parts of the method"], content["miou"]["Heads"]
    alone, full = parts["CLIP alone (G)"], parts["global + local + walk (full NERVE)"]
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
        f"- The whole method adds {full - alone:.4f} to CLIP alone.",
        f"- The paper's ordering, CLIP alone < local < global < full, {ordering} here.",
        f"- Weighting by entropy {whether(weighted > mean, 'is')} above the mean of the heads.",
        f"- The best single head, known only afterwards, {whether(heads[best] > weighted, 'is')} above that: {best}.",
        f"- Below CLIP alone: {', '.join(dict.fromkeys(below))}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
