"""NERVE as one would first write it from diffusers and transformers: the baseline that a frame is measured against.

Whole pipeline in memory, whole U-Net run, self-attention maps kept by an attention processor, CLIP with eager attention
that returns every layer's maps, one dense transition per head, the paper's truncated walk. Nothing is made slow on
purpose: layers that are not tapped use the libraries' own fast attention.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from nerve_core.models.pairs import ModelPair

STEPS = 40
"""L of the paper."""
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class KeepMaps:
    """An attention processor that writes its maps out, [heads, N, N], as map-collecting code does."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (attn.head_to_batch_dim(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        maps = attn.get_attention_scores(q, k)
        self.kept.append(maps)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps @ v)))


class PlainNerve:
    """The method on a pair's folder, with the kernel `softmax` and the CLIP head `cliper`."""

    def __init__(self, pair: ModelPair, device: torch.device, dtype: torch.dtype) -> None:
        """pair: of a whole StableDiffusionPipeline and a CLIP."""
        self.settings, self.device, self.dtype = pair.settings, device, dtype
        self.pipe = StableDiffusionPipeline.from_pretrained(
            pair.diffusion.location, revision=pair.diffusion.revision, dtype=dtype
        ).to(device)
        self.clip = CLIPModel.from_pretrained(
            pair.clip.location, revision=pair.clip.revision or "main", dtype=dtype, attn_implementation="eager"
        ).eval()
        nn.Module.to(self.clip, device)
        self.maps: list[Tensor] = []
        for block, place in self.settings["taps"]:
            layer = self.pipe.unet.up_blocks[block].attentions[place].transformer_blocks[0].attn1
            layer.set_processor(KeepMaps(self.maps))
        with torch.inference_mode():
            self.prompt = self.pipe.encode_prompt("", device, 1, False)[0]

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, text: Tensor) -> np.ndarray:
        """image: uint8 [H, W, 3], RGB. text: unit rows [queries, D]. The best query of each pixel, int64 [H, W]."""
        P = self.walk(self.probabilities(image, text), self.transitions(image))
        maps = P.T.reshape(1, -1, *self.grid)
        return F.interpolate(maps, image.shape[:2], mode="bilinear")[0].argmax(0).cpu().numpy()

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the latent."""
        rows, columns = self.settings["input_size"]
        return rows // self.pipe.vae_scale_factor, columns // self.pipe.vae_scale_factor

    @torch.inference_mode()
    def transitions(self, image: np.ndarray) -> Tensor:
        """Each head's softmax attention, float32 [heads, N, N]."""
        pixels = F.interpolate(self._pixels(image), self.settings["input_size"], mode="bilinear", antialias=True)
        vae, scheduler = self.pipe.vae, self.pipe.scheduler
        latent = vae.encode((2 * pixels - 1).to(self.dtype)).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
        timestep = torch.tensor([self.settings["timestep"]], device=self.device)
        self.maps.clear()
        self.pipe.unet(scheduler.add_noise(latent, noise, timestep), timestep, self.prompt)
        return torch.cat(self.maps).float()

    @torch.inference_mode()
    def probabilities(self, image: np.ndarray, text: Tensor) -> Tensor:
        """G, float32 [N, queries]: CLIP's patches by the fused attention of its earlier layers (CLIPer)."""
        vision = self.clip.vision_model
        patch, short = vision.config.patch_size, min(image.shape[:2])
        rows, columns = (round(side * self.settings["short_side"] / short / patch) for side in image.shape[:2])
        size = (rows * patch, columns * patch)
        pixels = F.interpolate(self._pixels(image), size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
        seen = vision(
            pixel_values=((pixels - mean) / deviation).to(self.dtype),
            interpolate_pos_encoding=True,
            output_attentions=True,
            output_hidden_states=True,
        )
        layers, hidden = vision.encoder.layers, seen.hidden_states
        A = torch.stack([maps.float() for maps in seen.attentions[:-1]]).sum(0)  # [1, heads, T, T]
        A = A / A.sum(-2, keepdim=True)
        A = A / A.sum(-1, keepdim=True)
        A = (A + A.transpose(-1, -2)) / 2
        A = (A - A.mean(-2, keepdim=True)).clamp_min(0)
        A = A / A.sum(-1, keepdim=True).clamp_min(1e-12)
        last = layers[-1]
        inputs = [layer.layer_norm1(h) for layer, h in zip(layers[:-1], hidden[:-2], strict=True)] + [hidden[-2]]
        attention = last.self_attn
        values = attention.v_proj(last.layer_norm1(torch.cat(inputs))).unflatten(-1, (attention.num_heads, -1))
        attended = (A.to(self.dtype) @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
        patches = vision.post_layernorm(attention.out_proj(attended)[:, 1:])
        patches = F.normalize(self.clip.visual_projection(patches).float(), dim=-1)
        along = A.mean((0, 1))[1:, 1:]
        along = along / along.sum(-1, keepdim=True).clamp_min(1e-12)
        maps = (self.settings["logit_scale"] * patches @ text.T).softmax(-1)
        G = (maps[:-1].mean(0) + along @ maps[-1]) / 2
        G = F.interpolate(G.T.reshape(1, -1, rows, columns), self.grid, mode="bilinear")
        return G[0].flatten(1).T

    @torch.inference_mode()
    def walk(self, G: Tensor, A: Tensor) -> Tensor:
        """P, float32 [N, queries], from G and every head's global transition A [heads, N, N]."""
        alpha, beta = self.settings["alpha"], self.settings["beta"]
        P1 = A @ G
        entropy = -(P1 * P1.clamp_min(1e-12).log()).sum(-1).mean(-1)
        weights = torch.softmax(-self.settings["c"] * entropy, 0)[:, None, None]
        place = torch.cartesian_prod(*(torch.arange(side, device=self.device) for side in self.grid))
        apart = (place[:, None] - place[None]).abs().amax(-1)
        local = A * (apart == 1)  # of a softmax over all tokens, the softmax over the neighbours
        local = local / local.sum(-1, keepdim=True).clamp_min(1e-30)
        local = local + 0.1 * torch.eye(len(place), device=self.device)
        S = beta * A + (1 - beta) * local / local.sum(-1, keepdim=True)
        P = restart = (1 - alpha) * G
        for _ in range(STEPS):
            P = restart + alpha * (weights * (S @ P)).sum(0)
        return P / P.sum(-1, keepdim=True)

    def _pixels(self, image: np.ndarray) -> Tensor:
        return torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255
