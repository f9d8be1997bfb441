"""Train the embedded pair's CLIP: dense cross-entropy between patches and names, and a little image-caption contrast.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python tools/embedded/train_clip.py --data build/embedded
    --out build/embedded

The masks supervise every patch, so this CLIP is far better aligned in space than one trained on captions alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import typer
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from generate import ALL_NAMES, SIZE
from nerve_core.embedded.scenes import NAMES
from schedule import Scenes, Training, fractions
from words import DISTRACTORS, TEMPLATES, all_words, train_tokenizer

PATCH, WIDTH = 8, 192
STUFF_WEIGHT = 0.2


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The real CLIPModel class, small: 18 x 18 patches of 8 pixels, five layers of width 192."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=128,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=SIZE[0],
        patch_size=PATCH,
        projection_dim=128,
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=128,
        logit_scale_init_value=3.0,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config)
    clip.set_attn_implementation("eager")  # on a CPU its products in bfloat16 train faster than the fused kernel
    return clip


def prepare(clip: CLIPModel, images: torch.Tensor) -> None:
    """Start from whitened patch colours, sinusoidal positions and queries that match their keys: a head start, no
    more."""
    vision = clip.vision_model
    patches = F.unfold(normalise(images), PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    order = values.argsort(descending=True)[:WIDTH]
    whitening = vectors[:, order] / (values[order] + 0.01).sqrt()
    with torch.no_grad():
        vision.embeddings.patch_embedding.weight.copy_(whitening.T.reshape(WIDTH, 3, PATCH, PATCH) * 0.5)
        side = SIZE[0] // PATCH
        where = (
            torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
            .reshape(-1, 2)
            .float()
        )
        rates = 1 / 50 ** (torch.arange(WIDTH // 4) / (WIDTH // 4))
        phases = where[:, :, None] * rates
        waves = torch.cat([phases.sin(), phases.cos()], -1).flatten(1)
        vision.embeddings.position_embedding.weight[1:].copy_(waves * 0.3)
        for layer in vision.encoder.layers:
            torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """CLIP's own colour statistics: float [B, 3, h, w] in 0..1 to about zero mean and unit variance."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images - mean) / deviation


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors [texts, 128]."""
    tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    pooled = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


def embed_images(
    clip: CLIPModel, images: torch.Tensor, corners: np.ndarray, view: tuple[int, int] = SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the whole image [B, 128] and of its patches [B, tokens, 128].

    images: float [B, 3, h, w] in 0..1, windows whose top left corner is `corners` [B, 2] in a view of `view` pixels.
    """
    vision = clip.vision_model
    grid = [side // PATCH for side in view]
    learnt = vision.embeddings.position_embedding.weight
    side = SIZE[0] // PATCH
    plane = F.interpolate(learnt[1:].T.reshape(1, -1, side, side), grid, mode="bicubic")[0].permute(1, 2, 0)
    rows, columns = (side // PATCH for side in images.shape[-2:])
    positions = torch.stack([plane[r : r + rows, c : c + columns].flatten(0, 1) for r, c in corners // PATCH])
    patches = vision.embeddings.patch_embedding(normalise(images)).flatten(2).transpose(1, 2) + positions
    first = (vision.embeddings.class_embedding + learnt[0]).expand(len(images), 1, -1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(torch.cat([first, patches], 1))).last_hidden_state
    vectors = F.normalize(clip.visual_projection(vision.post_layernorm(hidden)).float(), dim=-1)
    return vectors[:, 0], vectors[:, 1:]


def captions(shares: torch.Tensor, rng: random.Random) -> list[str]:
    """What each image shows, in words: names that fill one percent or more, in random order."""
    found = []
    for share in shares.mean(1)[:, : len(NAMES)]:
        shown = [rng.choice(all_words(NAMES[k])) for k in (share > 0.01).nonzero().flatten().tolist()]
        rng.shuffle(shown)
        found.append("a photo of " + " and ".join(f"a {name}" for name in shown[:4]) if shown else "an empty room")
    return found


def main(
    data: Path = Path("build/embedded"),
    out: Path = Path("build/embedded"),
    seconds: float = 3000,
    batch: int = 32,
    rate: float = 1e-3,
    threads: int = 1,
    view: tuple[int, int] = SIZE,
    window: tuple[int, int] = (96, 96),
    start: Path | None = None,
    name: str = "clip.pt",
) -> None:
    """view: pixels of the input. window: of the part of it that is looked at. start: checkpoint whose weights to
    begin with."""
    torch.set_num_threads(threads)
    tokenizer = train_tokenizer(out / "clip")
    clip = new_clip(tokenizer)
    scenes, rng = Scenes(data, seed=11), random.Random(11)
    prepare(clip, scenes.batch(64, SIZE, 1.0)[0])
    if start is not None:
        clip.load_state_dict(torch.load(start, weights_only=True)["model"])
    training = Training(clip, out / name, seconds, rate, decay=0.03)
    weight = torch.tensor([1.0] * len(NAMES) + [STUFF_WEIGHT] * (len(ALL_NAMES) - len(NAMES)))
    mean_loss = 3.0
    while training.running():
        images, labels, corners = scenes.batch(batch, view, 0.7, window=window, cell=PATCH)
        shares = fractions(labels, len(ALL_NAMES), PATCH)
        words = [rng.choice(all_words(name)) if rng.random() < 0.5 else name for name in ALL_NAMES] + rng.sample(
            DISTRACTORS, 8
        )
        template = rng.choice(TEMPLATES)
        with torch.autocast("cpu", torch.bfloat16):
            texts = embed_texts(clip, tokenizer, [template.format(word) for word in words])
            captioned = embed_texts(clip, tokenizer, captions(shares, rng))
            whole, patches = embed_images(clip, images, corners, view)
        scale = clip.logit_scale.clamp(max=3.912).exp()
        logits = scale * patches @ texts.T
        wanted = F.pad(shares * weight, (0, len(DISTRACTORS[:8])))
        dense = -(wanted * logits.log_softmax(-1)).sum() / wanted.sum()
        pairs = scale * whole @ captioned.T
        target = torch.arange(batch)
        contrast = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
        training.update(dense + 0.1 * contrast)
        mean_loss += 0.02 * (float(dense.detach()) - mean_loss)
        if training.step % 100 == 0:
            full = shares[..., : len(NAMES)].amax(-1) > 0.5
            hit = (logits.argmax(-1) == shares.argmax(-1))[full].float().mean()
            print(
                f"{training.step} {training.spent:.0f}s dense {mean_loss:.3f} contrast {contrast.item():.3f} "
                f"object patches {hit:.3f}",
                flush=True,
            )
    training.save()
    training.averaged.half().save_pretrained(out / "clip")


if __name__ == "__main__":
    typer.run(main)
