"""Train the embedded pair's diffusion branch: an encoder by principal components, a U-Net by noise and by affinity.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python tools/embedded/train_diffusion.py --data
    build/embedded --out build/embedded

Beside the noise loss, three of the five heads at each tap learn that a token's affinity should fall on tokens of its
own class:
-log of that mass, under the very kernel of inference. The other heads see the noise loss alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from generate import SIZE
from nerve_core.embedded.scenes import NAMES
from schedule import Scenes, Training, fractions
from words import train_tokenizer

LATENTS, CELL = 8, 4
TAU = 0.05
SUPERVISED_HEADS = 3
CUT = (128, 128)


def principal_encoder(images: torch.Tensor) -> AutoencoderKL:
    """An AutoencoderKL whose encoder is a projection of 4 x 4 patches onto their first principal components, exactly.

    images: float32 [B, 3, h, w] in -1..1, from which the components are taken. Residual branches end in zero weights,
    the strided
    convolutions gather pixels, and the last non-linearity cancels between channels of opposite sign: silu(z) -
    silu(-z) = z.
    The decoder keeps its random weights: nothing here decodes.
    """
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(16, 48, 2 * LATENTS),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=LATENTS,
        sample_size=SIZE[0],
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encoder = vae.encoder
    patches = F.pixel_unshuffle(F.pixel_unshuffle(images, 2), 2).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    components = vectors.flip(1)[:, :LATENTS].T  # [L, 48], strongest first
    signed = torch.stack([components, -components], 1).flatten(0, 1)

    def clear(layer: nn.Module) -> None:
        """Set a layer's weights and biases to zero."""
        for parameter in layer.parameters():
            parameter.zero_()

    def gather(convolution: nn.Conv2d, channels: int) -> None:
        """Turn a strided convolution into pixel_unshuffle of its first `channels` channels."""
        clear(convolution)
        for channel in range(channels):
            for place in range(4):
                convolution.weight[channel * 4 + place, channel, place // 2, place % 2] = 1

    with torch.no_grad():
        for module in encoder.modules():
            if hasattr(module, "conv2"):
                clear(module.conv2)
            if hasattr(module, "to_out"):
                clear(module.to_out[0])
        clear(encoder.conv_in)
        for channel in range(3):
            encoder.conv_in.weight[channel, channel, 1, 1] = 1
        down = encoder.down_blocks
        gather(down[0].downsamplers[0].conv, 3)
        down[1].resnets[0].conv_shortcut.weight.copy_(torch.eye(48, 16)[:, :, None, None])
        down[1].resnets[0].conv_shortcut.bias.zero_()
        gather(down[1].downsamplers[0].conv, 12)
        down[2].resnets[0].conv_shortcut.weight.copy_(signed[:, :, None, None])
        down[2].resnets[0].conv_shortcut.bias.copy_(-signed @ mean)
        encoder.conv_out.weight.zero_()
        encoder.conv_out.bias.copy_(torch.tensor([0.0] * LATENTS + [-30.0] * LATENTS))
        for latent in range(LATENTS):
            encoder.conv_out.weight[latent, 2 * latent, 1, 1] = 1
            encoder.conv_out.weight[latent, 2 * latent + 1, 1, 1] = -1
    return vae.eval().requires_grad_(False)


def new_unet() -> UNet2DConditionModel:
    """The real U-Net class, small: five heads of size 16 at full resolution, and cross-attention."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=SIZE[0] // CELL,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(80, 80, 160),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(5, 5, 10),
        cross_attention_dim=64,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder with random weights: the U-Net only ever sees the empty prompt."""
    torch.manual_seed(3)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=64,
            **special,
        )
    ).eval()


def affinity_loss(queries: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean of -log of the affinity mass that a token sends to its own class, itself left out; objects weigh three
    times.

    queries, keys: [B, h, N, D] of the supervised heads. shares: [B, N, classes], the last column is the background.
    """
    batch, _, tokens, _ = queries.shape
    chosen = torch.randint(tokens, (batch, 192))
    rows = torch.gather(queries, 2, chosen[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
    cosine = F.normalize(rows.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).transpose(-1, -2)
    own = F.one_hot(chosen, tokens).bool()[:, None]
    affinity = ((cosine - 1) / TAU).masked_fill(own, -torch.inf).softmax(-1)
    own_shares = torch.gather(shares, 1, chosen[:, :, None].expand(-1, -1, shares.shape[2]))
    mass = (affinity * (own_shares @ shares.transpose(1, 2))[:, None]).sum(-1)
    weight = 1 + 4 * (1 - own_shares[..., -1])
    loss = -(mass + 1e-4).log() * weight[:, None]
    return loss.mean() / weight.mean()


def main(
    data: Path = Path("build/embedded"),
    out: Path = Path("build/embedded"),
    seconds: float = 3600,
    batch: int = 8,
    rate: float = 8e-4,
    threads: int = 1,
    affinity: bool = True,
) -> None:
    """affinity: also teach some heads; without it the noise loss is alone."""
    torch.set_num_threads(threads)
    folder = out / "diffusion"
    tokenizer = train_tokenizer(folder / "tokenizer")
    text_encoder = new_text_encoder(tokenizer)
    scenes = Scenes(data, seed=12)
    vae = principal_encoder(scenes.batch(64, SIZE, 1.0)[0] * 2 - 1)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text_encoder.half().save_pretrained(folder / "text_encoder")
    vae.half().save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    vae.float()
    empty = tokenizer("", padding="max_length", return_tensors="pt")
    with torch.no_grad():
        prompt = text_encoder.float()(input_ids=empty.input_ids).last_hidden_state
    unet = new_unet()
    nn.utils.convert_conv2d_weight_memory_format(unet, torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # on a CPU its products in bfloat16 train faster than the fused kernel
    training = Training(unet, out / "unet.pt", seconds, rate)
    tapped: list[torch.Tensor] = []
    for transformer in unet.up_blocks[-1].get_submodule("attentions").children():
        attention = transformer.get_submodule("transformer_blocks.0.attn1")
        for projection in ("to_q", "to_k"):
            attention.get_submodule(projection).register_forward_hook(
                lambda module, inputs, output: tapped.append(output)
            )
    mean_noise = mean_affinity = 1.0
    while training.running():
        images, labels, _ = scenes.batch(batch, SIZE, 0.7, window=CUT)
        labels = labels.clamp(max=len(NAMES))  # one background
        shares = fractions(labels, len(NAMES) + 1, CELL)
        tapped.clear()
        with torch.no_grad():
            latent = vae.encode(images * 2 - 1).latent_dist.mean
        noise = torch.randn_like(latent)
        times = torch.randint(0, 300, (batch,))
        times[0] = torch.randint(300, 1000, ())  # one of the batch sees the rest of the schedule
        noisy = scheduler.add_noise(latent, noise, times).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, times, prompt.expand(batch, -1, -1)).sample
        noise_loss = F.mse_loss(predicted.float(), noise)
        loss = noise_loss
        if affinity:
            heads = [tensor[1:].unflatten(-1, (5, -1)).transpose(1, 2)[:, :SUPERVISED_HEADS] for tensor in tapped]
            first, second = (affinity_loss(heads[k], heads[k + 1], shares[1:]) for k in (0, 2))
            loss = loss + (first + second)
            mean_affinity += 0.02 * (float((first + second).detach()) / 2 - mean_affinity)
        training.update(loss)
        mean_noise += 0.02 * (float(noise_loss.detach()) - mean_noise)
        if training.step % 100 == 0:
            print(
                f"{training.step} {training.spent:.0f}s noise {mean_noise:.3f} affinity {mean_affinity:.3f}",
                flush=True,
            )
    training.save()
    training.averaged.half().save_pretrained(folder / "unet")


if __name__ == "__main__":
    typer.run(main)
