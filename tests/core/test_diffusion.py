"""Image -> latent -> Q, K: against untouched diffusers forwards with hooks, to rounding."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import nerve_core
from nerve_core.diffusion import DiffusionConfig, DiffusionTaps, noise_levels, tapped_projections
from small_models import (
    POSITIONS,
    WIDTH,
    byte_tokenizer,
    narrow_sd15_unet,
    narrow_sd21_unet,
    outputs_of,
    picture,
    sd_scheduler,
    small_text_encoder,
    small_vae,
)

EMBEDDED = Path(nerve_core.__file__).parent / "embedded"
SD_TAPS = (((3, 1), (3, 2)), ((3, 0), (3, 1)), ((3, 2),), ((1, 0), (1, 2)), ((2, 1),))


@pytest.fixture(scope="module")
def sd21():
    return narrow_sd21_unet()


@pytest.fixture(scope="module")
def sd15():
    return narrow_sd15_unet()


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture(scope="module")
def prompt():
    return torch.randn((1, POSITIONS, WIDTH), generator=torch.Generator().manual_seed(9))


def hooked(unet, latent, timestep, prompt, taps):
    """Q, K [B, heads, N, D] that `attn1.to_q` and `to_k` return during the network's own, whole forward."""
    attentions = [unet.up_blocks[block].attentions[place].transformer_blocks[0].attn1 for block, place in taps]
    watched = {f"{name} {k}": getattr(attn, name) for k, attn in enumerate(attentions) for name in ("to_q", "to_k")}
    with torch.inference_mode(), outputs_of(watched) as seen:
        unet(latent, timestep, encoder_hidden_states=prompt.expand(len(latent), -1, -1))

    def heads_of(name):
        parts = []
        for k, attn in enumerate(attentions):
            batch, tokens, width = seen[f"{name} {k}"].shape
            parts.append(seen[f"{name} {k}"].view(batch, tokens, attn.heads, width // attn.heads).transpose(1, 2))
        return torch.cat(parts, 1)

    return heads_of("to_q"), heads_of("to_k")


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert other.std() > 0.1  # a reference of zeros would prove nothing
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", SD_TAPS, ids=str)
def test_taps_of_the_sd21_architecture_equal_hooks_on_an_untouched_forward(sd21, prompt, taps):
    latent = torch.randn((1, 4, 16, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = tapped_projections(sd21, latent, torch.tensor([100]), prompt, taps)
    assert_same(ours, hooked(sd21, latent, 100, prompt, taps))
    if taps[0][0] == 3:
        assert ours[0].shape == (1, 5 * len(taps), 16 * 24, 4)


@pytest.mark.parametrize("taps", SD_TAPS[:2], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 16), (8, 40)])
def test_taps_of_the_sd15_architecture_equal_hooks_on_an_untouched_forward(sd15, prompt, taps, rows, columns):
    latent = torch.randn((1, 4, rows, columns), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours = tapped_projections(sd15, latent, torch.tensor([321]), prompt, taps)
    assert_same(ours, hooked(sd15, latent, 321, prompt, taps))
    assert ours[0].shape == (1, 8 * len(taps), rows * columns, 2)


def test_every_image_of_a_batch_has_the_taps_it_has_alone(sd15, prompt):
    latents = torch.randn((2, 4, 8, 16), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours = tapped_projections(sd15, latents, torch.tensor([7]), prompt, ((3, 1), (3, 2)))
    assert_same(ours, hooked(sd15, latents, 7, prompt, ((3, 1), (3, 2))))


def test_taps_of_the_embedded_pair_equal_hooks_on_an_untouched_forward():
    chosen = json.loads((EMBEDDED / "pair.json").read_text())["settings"]
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "diffusion/unet", torch_dtype=torch.float32).eval()
    taps = tuple(map(tuple, chosen["taps"]))
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    latent = torch.randn((1, unet.config.in_channels, 2 * step, 3 * step), generator=torch.Generator().manual_seed(4))
    prompt = torch.randn((1, 32, unet.config.cross_attention_dim), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        ours = tapped_projections(unet, latent, torch.tensor([chosen["timestep"]]), prompt, taps)
    assert_same(ours, hooked(unet, latent, chosen["timestep"], prompt, taps))


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler])
def test_the_front_equals_a_diffusers_pipeline_made_of_the_same_parts(sd21, vae, scheduler_class):
    scheduler = scheduler_class.from_config(sd_scheduler().config)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=small_text_encoder(),
        tokenizer=byte_tokenizer(),
        unet=sd21,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompt = pipeline.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)[0]
    config = DiffusionConfig(input_size=(64, 128), timestep=100, noise_seed=11)
    taps = DiffusionTaps(vae, sd21, dict(scheduler.config), prompt, config)
    image = picture(64, 128)  # of the input size: nothing is resized

    pixels = pipeline.image_processor.preprocess(image)  # to -1..1
    with torch.inference_mode():
        mean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=torch.Generator("cpu").manual_seed(11))
        noisy = scheduler.add_noise(mean, noise, torch.tensor([100]))
    torch.testing.assert_close(taps.noisy_latent(image), noisy, rtol=1e-5, atol=1e-6)
    Q, K = taps(image)
    assert taps.grid == (8, 16)
    assert_same((Q[None], K[None]), hooked(sd21, noisy, torch.tensor([100]), prompt, config.taps))


def test_the_embedded_pairs_latent_equals_its_own_vae_and_scheduler():
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "diffusion/vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "diffusion/unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(EMBEDDED / "diffusion/scheduler")
    chosen = json.loads((EMBEDDED / "pair.json").read_text())["settings"]
    config = DiffusionConfig(
        input_size=tuple(chosen["input_size"]), timestep=42, taps=tuple(map(tuple, chosen["taps"]))
    )
    prompt = torch.zeros((1, 8, unet.config.cross_attention_dim))
    taps = DiffusionTaps(vae, unet, dict(scheduler.config), prompt, config)
    image = picture(*config.input_size)
    with torch.inference_mode():
        mean = vae.encode(2 * image - 1).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=torch.Generator("cpu").manual_seed(config.noise_seed))
        noisy = scheduler.add_noise(mean, noise, torch.tensor([42]))
    torch.testing.assert_close(taps.noisy_latent(image), noisy, rtol=1e-5, atol=1e-5)


class MustNotRun(nn.Module):
    """A module whose forward is a failure; attributes that the code around it may read are passed on."""

    def forward(self, *_, **__):
        raise AssertionError("a module after the last tap ran")


def test_nothing_after_the_last_key_projection_runs(sd21, vae, prompt):
    taps = ((3, 0), (3, 1))
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        whole = tapped_projections(sd21, latent, torch.tensor([100]), prompt, taps)
    cut = copy.deepcopy(sd21)
    last = cut.up_blocks[3].attentions[1]
    block = last.transformer_blocks[0]
    after = [(cut, "conv_norm_out"), (cut, "conv_act"), (cut, "conv_out"), (last, "proj_out")]
    after += [(block, name) for name in ("attn2", "norm2", "norm3", "ff")]
    after += [(block.attn1, "to_v"), (block.attn1, "to_out")]
    for parent, name in after:
        assert hasattr(parent, name)
        setattr(parent, name, MustNotRun())
    cut.up_blocks[3].resnets[2] = MustNotRun()
    cut.up_blocks[3].attentions[2] = MustNotRun()
    with torch.inference_mode():
        ours = tapped_projections(cut, latent, torch.tensor([100]), prompt, taps)
        assert torch.equal(ours[0], whole[0])
        assert torch.equal(ours[1], whole[1])
        with pytest.raises(AssertionError, match="after the last tap"):
            tapped_projections(cut, latent, torch.tensor([100]), prompt, ((3, 1), (3, 2)))


def test_the_decoder_and_the_sampling_are_not_needed(sd21, vae, prompt):
    bare = copy.deepcopy(vae)
    bare.decoder = bare.post_quant_conv = None
    config = DiffusionConfig(input_size=(64, 64))
    image = picture(64, 64)
    ours = DiffusionTaps(bare, sd21, dict(sd_scheduler().config), prompt, config)(image)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, DiffusionTaps(vae, sd21, dict(sd_scheduler().config), prompt, config)(image), strict=True)
    )


def front(vae, unet, prompt, **config):
    return DiffusionTaps(vae, unet, dict(sd_scheduler().config), prompt, DiffusionConfig(**config))


def test_the_same_image_gives_the_same_taps_and_only_the_seed_changes_the_noise(sd15, vae, prompt):
    taps = front(vae, sd15, prompt, input_size=(64, 64))
    image, other = picture(48, 80), picture(31, 17, seed=1)
    first = taps(image)
    torch.manual_seed(5)
    taps(other)
    again, anew = taps(image), front(vae, sd15, prompt, input_size=(64, 64))(image)
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    reseeded = front(vae, sd15, prompt, input_size=(64, 64), noise_seed=1)
    assert not torch.equal(reseeded.noisy_latent(image), taps.noisy_latent(image))


@pytest.mark.parametrize("block", [1, 2])
def test_a_tap_of_a_coarser_block_has_that_blocks_grid(sd15, vae, prompt, block):
    taps = front(vae, sd15, prompt, input_size=(64, 128), taps=((block, 0), (block, 1)))
    Q, _ = taps(picture(20, 30))
    side = 2 ** (3 - block)
    assert taps.grid == (8 // side, 16 // side)
    assert Q.shape[1] == taps.grid[0] * taps.grid[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_taps_are_in_the_networks_dtype(sd15, vae, prompt, dtype):
    half = front(copy.deepcopy(vae).to(dtype), copy.deepcopy(sd15).to(dtype), prompt.to(dtype), input_size=(64, 64))
    full = front(vae, sd15, prompt, input_size=(64, 64))
    image = picture(40, 40)
    for a, b in zip(half(image), full(image), strict=True):
        assert a.dtype == dtype
        assert a.isfinite().all()
        assert (a.float() - b).abs().mean() < 0.1 * b.abs().mean()


@pytest.mark.parametrize("size", [(200, 300), (30, 45), (1, 1), (1, 90)])
def test_an_image_is_resized_whole_antialiased_and_scaled_to_minus_one_to_one(sd15, vae, prompt, size):
    taps = front(vae, sd15, prompt, input_size=(64, 128))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with outputs_of({"pixels": taps.vae.encoder.conv_in}) as seen:
        handle = taps.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.update(input=inputs[0]))
        taps.noisy_latent(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        handle.remove()
    planes = [
        np.asarray(Image.fromarray(image[:, :, k].astype(np.float32), "F").resize((128, 64), Image.Resampling.BILINEAR))
        for k in range(3)
    ]
    expected = torch.from_numpy(np.stack(planes)) / 255 * 2 - 1
    torch.testing.assert_close(seen["input"][0], expected, rtol=0, atol=2e-5)


@settings(max_examples=20)
@given(
    st.integers(0, 999),
    st.sampled_from(["linear", "scaled_linear"]),
    st.floats(1e-5, 0.01),
    st.floats(0.0101, 0.03),
)
def test_noise_levels_are_the_official_schedulers(timestep, schedule, start, end):
    scheduler = DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=schedule)
    signal, noise = noise_levels(dict(scheduler.config), timestep)
    official = scheduler.alphas_cumprod[timestep].item()
    assert signal**2 == pytest.approx(official, rel=1e-3)  # the official product is in float32
    assert noise**2 == pytest.approx(1 - official, rel=1e-3, abs=1e-6)
    kept = 1.0
    for step in range(timestep + 1):
        part = step / 999
        beta = (
            start + (end - start) * part
            if schedule == "linear"
            else (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * part) ** 2
        )
        kept *= 1 - beta
    assert signal == pytest.approx(math.sqrt(kept), rel=1e-9)
    assert noise == pytest.approx(math.sqrt(1 - kept), rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2]},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 50},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_schedule_that_is_not_understood_is_refused(change):
    known = dict(EulerDiscreteScheduler.from_config(sd_scheduler().config).config)
    noise_levels(known, 100)
    with pytest.raises(ValueError, match=next(iter(change))):
        noise_levels({**known, **change}, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": (0, 64)},
        {"input_size": (64,)},
        {"input_size": (64, 64, 3)},
        {"input_size": 512},
        {"input_size": (64.5, 64)},
        {"timestep": -1},
        {"timestep": 1000},
        {"timestep": 50.5},
        {"taps": ()},
        {"taps": ((3, 2), (3, 1))},
        {"taps": ((3, 1), (3, 1))},
        {"taps": ((3,),)},
        {"taps": (3, 1)},
        {"taps": ((-1, 0),)},
        {"taps": ((3, -1),)},
        {"noise_seed": "x"},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DiffusionConfig(**change)


@pytest.mark.parametrize("taps", [((0, 0),), ((3, 3),), ((4, 0),), ((3, 1), (3, 7))], ids=str)
def test_a_tap_that_the_network_lacks_is_refused_at_once_with_what_there_is(sd15, vae, prompt, taps):
    with pytest.raises(ValueError, match="0, 3, 3, 3"):
        front(vae, sd15, prompt, input_size=(64, 64), taps=taps)


def test_taps_of_different_grids_are_refused_at_once(sd15, vae, prompt):
    with pytest.raises(ValueError, match="one up block"):
        front(vae, sd15, prompt, input_size=(64, 64), taps=((2, 1), (3, 1)))


def test_asking_for_taps_that_are_not_met_is_an_error_and_not_a_shorter_answer(sd15, prompt):
    with pytest.raises(ValueError, match="are not all in this U-Net"), torch.inference_mode():
        tapped_projections(sd15, torch.zeros(1, 4, 8, 8), torch.tensor([1]), prompt, ((3, 1), (9, 0)))


@pytest.mark.parametrize("size", [(65, 64), (64, 72), (512, 100)])
def test_an_input_size_that_does_not_divide_is_refused_with_the_step(sd15, vae, prompt, size):
    with pytest.raises(ValueError, match="multiples of 64"):
        front(vae, sd15, prompt, input_size=size)


@pytest.mark.parametrize(
    "options",
    [
        {"addition_embed_type": "text", "encoder_hid_dim": None},
        {"class_embed_type": "timestep"},
        {"encoder_hid_dim": 16},
        {"center_input_sample": True},
        {"time_embedding_act_fn": "silu"},
        {"only_cross_attention": True},
        {"dual_cross_attention": True, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
        {"up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_unet_whose_own_forward_does_more_is_refused_instead_of_read_wrongly(vae, prompt, options):
    base = {
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    front(vae, UNet2DConditionModel(**base), prompt, input_size=(64, 64), taps=((1, 0),))
    with pytest.raises(ValueError, match="U-Net"):
        front(vae, UNet2DConditionModel(**base | options), prompt, input_size=(64, 64), taps=((1, 0),))


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionConfig().timestep = 3
