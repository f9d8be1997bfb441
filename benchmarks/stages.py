"""Where a frame's time goes: arithmetic, weights and measured time of every stage, and its share of the device's best.

`python -m nerve_benchmarks.stages PAIR [DEVICE]`, or `python -m benchmarks.stages` in a clone's top folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from nerve_core import Segmenter, Vocabulary
from nerve_core.models.loading import quiet_libraries
from nerve_core.models.pairs import ModelPair, find_pair
from nerve_core.networks.dense_clip import DenseClip
from nerve_core.networks.diffusion import DiffusionTaps, tapped_projections
from nerve_core.networks.parts import as_unet
from nerve_core.readout import carry_labels, read_out
from nerve_core.settings import Settings
from nerve_core.walk.edges import pixel_transition

from .ceiling import ceiling, least_seconds
from .task import names, picture

SIZE = (480, 640)
FLOAT32 = ("walk", "which pixels are alike", "edges", "readout")


def stages(name: str, device: str, count: int = 21) -> list[dict[str, float | str]]:
    """Each stage's GFLOP (2 x multiply and add), MB of weights, least ms of seven, and GFLOP/s over the ceiling of its
    precision. The networks run one after the other."""
    pair = find_pair(name)
    segmenter = Segmenter.from_pretrained(
        name, device=device, offline=True, overlap=False, settings={"templates": ("a photo of a {}.",)}
    )
    queries = segmenter.embed(Vocabulary(names(count)))
    part, image = segmenter.frame_part, picture(SIZE)
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        latent, features = part.taps.noisy_latent(pixels), part(image)
        G = segmenter.frame(image, queries)[0]
        P = segmenter.refine(features.Q, features.K, G).P
        known, config = (G, P, queries.classes, count, segmenter.grid), segmenter.settings.readout
        along = features.edges
        drawn = None if along is None else carry_labels(*known, config, along)
    unet = as_unet(part.taps.unet)
    work: dict[str, Callable[[], object]] = {
        "VAE encoder": lambda: part.taps.noisy_latent(pixels),
        "U-Net to the last keys": lambda: tapped_projections(unet, latent, part.taps.config.taps),
        "CLIP, patch by patch": lambda: part.clip.features(pixels),
        "walk": lambda: segmenter.refine(features.Q, features.K, G),
        "which pixels are alike": lambda: pixel_transition(pixels, segmenter.settings.edges),
        "edges": lambda: along and carry_labels(*known, config, along),
        "readout": lambda: read_out(*known, SIZE, config, drawn=drawn).to_host(),
    }
    gflop = network_gflop(pair, segmenter.settings)
    heads, tokens, size = features.Q.shape
    gflop["walk"] = walk_gflop(heads, tokens, size, G.shape[1], segmenter.settings.walk.steps)
    weights = {
        "VAE encoder": part.taps.vae,
        "U-Net to the last keys": part.taps.unet,
        "CLIP, patch by patch": part.clip,
    }
    best = ceiling(device)
    rows: list[dict[str, float | str]] = []
    for stage, run in work.items():
        precision = "float32" if stage in FLOAT32 else str(segmenter.dtype).removeprefix("torch.")
        with torch.inference_mode():
            seconds = least_seconds(run, torch.device(device).type)
        rate = gflop.get(stage, 0.0) / seconds
        rows.append(
            {
                "stage": stage,
                "precision": precision,
                "GFLOP": gflop.get(stage, 0.0),
                "weights MB": megabytes(weights[stage]) if stage in weights else 0.0,
                "ms": 1e3 * seconds,
                "GFLOP/s": rate,
                "of the ceiling": rate / best[f"{precision} GFLOP/s"],
            }
        )
    return rows


def network_gflop(pair: ModelPair, settings: Settings) -> dict[str, float]:
    """Products and convolutions of the networks as far as they are run, counted without running them."""
    folder, clip = Path(pair.diffusion.location), Path(pair.clip.location)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads((folder / "vae/config.json").read_text()))
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))
        vision = CLIPModel(CLIPConfig.from_pretrained(clip))
        vision.set_attn_implementation("sdpa")
        prompt = torch.zeros(1, 77, unet.config.cross_attention_dim)
        pixels = torch.zeros(1, 3, *SIZE)
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    taps = DiffusionTaps(vae, unet, scheduler, prompt, settings.diffusion)
    dense = DenseClip(vision, settings.clip)
    latent = taps.noisy_latent(pixels)
    return {
        "VAE encoder": _counted(lambda: taps.noisy_latent(pixels)),
        "U-Net to the last keys": _counted(lambda: tapped_projections(unet, latent, taps.config.taps)),
        "CLIP, patch by patch": _counted(lambda: dense.features(pixels)),
    }


def _counted(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def walk_gflop(heads: int, tokens: int, size: int, queries: int, steps: int) -> float:
    """Q K^T twice, one step of every head for its entropy, the heads' weighted sum, and the steps with a dense S."""
    pairs = tokens * tokens
    return 2 * pairs * (2 * size * heads + queries * heads + heads + queries * steps) / 1e9


def megabytes(owner: nn.Module | DenseClip) -> float:
    """Weights of a network that stay in memory."""
    modules = [owner] if isinstance(owner, nn.Module) else [owner.vision, owner.projection]
    tensors = {
        id(tensor): tensor
        for module in modules
        for child in module.modules()
        for tensor in [*child.parameters(False), *child.buffers(False), getattr(child, "_weight", None)]
        if tensor is not None
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


if __name__ == "__main__":
    quiet_libraries()
    print("| stage | precision | GFLOP | weights MB | ms | GFLOP/s | of the ceiling |\n|---|---|---|---|---|---|---|")
    for row in stages(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu"):
        figures = [f"{row[key]:.0f}" for key in ("GFLOP", "weights MB", "ms", "GFLOP/s")]
        print(f"| {row['stage']} | {row['precision']} | {' | '.join(figures)} | {row['of the ceiling']:.2f} |")
