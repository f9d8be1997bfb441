"""Q and K of the taps, and the latent, against hooks on untouched diffusers networks, to rounding."""

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

import nerve_core
from nerve_core.networks.diffusion import (
    DiffusionConfig,
    DiffusionTaps,
    cut_encoder,
    cut_unet,
    encode,
    fix_unet,
    noise_levels,
    tapped_projections,
)
from nerve_core.networks.layers import pack_weights
from small_models import (
    POSITIONS,
    WIDTH,
    byte_tokenizer,
    narrow_sd15_unet,
    narrow_sd21_unet,
    outputs_of,
    picture,
    sd_scheduler,
    small_taesd,
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


def tapped(unet, latent, timestep, prompt, taps):
    """Q, K of a copy that is cut down and packed as `DiffusionTaps` does."""
    ours = copy.deepcopy(unet)
    cut_unet(ours, taps)
    fix_unet(ours, timestep, prompt)
    pack_weights(ours)
    with torch.inference_mode():
        return tapped_projections(ours, latent, taps)


def front(vae, unet, prompt, **config):
    """Over copies of the networks: `DiffusionTaps` takes them over."""
    scheduler = dict(sd_scheduler().config)
    return DiffusionTaps(copy.deepcopy(vae), copy.deepcopy(unet), scheduler, prompt, DiffusionConfig(**config))


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert other.std() > 0.1  # a reference of zeros would prove nothing
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", SD_TAPS, ids=str)
def test_taps_of_the_sd21_architecture_equal_hooks_on_an_untouched_forward(sd21, prompt, taps):
    latent = torch.randn((1, 4, 16, 24), generator=torch.Generator().manual_seed(1))
    ours = tapped(sd21, latent, 100, prompt, taps)
    assert_same(ours, hooked(sd21, latent, 100, prompt, taps))
    if taps[0][0] == 3:
        assert ours[0].shape == (1, 5 * len(taps), 16 * 24, 4)


@pytest.mark.parametrize("taps", SD_TAPS[:2], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 16), (8, 40)])
def test_taps_of_the_sd15_architecture_equal_hooks_on_an_untouched_forward(sd15, prompt, taps, rows, columns):
    latent = torch.randn((1, 4, rows, columns), generator=torch.Generator().manual_seed(2))
    ours = tapped(sd15, latent, 321, prompt, taps)
    assert_same(ours, hooked(sd15, latent, 321, prompt, taps))
    assert ours[0].shape == (1, 8 * len(taps), rows * columns, 2)


def test_every_image_of_a_batch_has_the_taps_it_has_alone(sd15, prompt):
    latents = torch.randn((2, 4, 8, 16), generator=torch.Generator().manual_seed(3))
    ours = tapped(sd15, latents, 7, prompt, ((3, 1), (3, 2)))
    assert_same(ours, hooked(sd15, latents, 7, prompt, ((3, 1), (3, 2))))


def test_taps_of_the_embedded_pair_equal_hooks_on_an_untouched_forward():
    chosen = json.loads((EMBEDDED / "pair.json").read_text())["settings"]
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "diffusion/unet", torch_dtype=torch.float32).eval()
    taps = tuple(map(tuple, chosen["taps"]))
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    latent = torch.randn((1, unet.config.in_channels, 2 * step, 3 * step), generator=torch.Generator().manual_seed(4))
    prompt = torch.randn((1, 32, unet.config.cross_attention_dim), generator=torch.Generator().manual_seed(5))
    ours = tapped(unet, latent, chosen["timestep"], prompt, taps)
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
    taps = DiffusionTaps(copy.deepcopy(vae), copy.deepcopy(sd21), dict(scheduler.config), prompt, config)
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
    taps = DiffusionTaps(copy.deepcopy(vae), unet, dict(scheduler.config), prompt, config)
    image = picture(*config.input_size)
    with torch.inference_mode():
        mean = vae.encode(2 * image - 1).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=torch.Generator("cpu").manual_seed(config.noise_seed))
        noisy = scheduler.add_noise(mean, noise, torch.tensor([42]))
    torch.testing.assert_close(taps.noisy_latent(image), noisy, rtol=1e-5, atol=1e-5)


def test_only_what_lies_before_the_last_key_projection_is_kept(sd21, prompt):
    cut = copy.deepcopy(sd21)
    cut_unet(cut, ((3, 0), (3, 1)))
    block = cut.up_blocks[3]
    inner = block.attentions[1].transformer_blocks[0]
    assert [len(block.resnets), len(block.attentions), len(cut.up_blocks)] == [2, 2, 4]
    assert {name.rsplit(".", 1)[0] for name, _ in inner.named_parameters()} == {"norm1", "attn1.to_q", "attn1.to_k"}
    kept = {name for name, _ in cut.named_parameters()}
    assert not [
        name for name in kept if name.startswith(("conv_out", "conv_norm_out", "up_blocks.3.attentions.1.proj_o"))
    ]
    fix_unet(cut, 100, prompt)
    left = {name for name, _ in cut.named_parameters()}
    assert {name for name in kept - left if "attn2" not in name} == {
        name for name in kept if "time_emb" in name
    }  # nothing else goes
    assert not [name for name in left if "attn2.to_k" in name or "attn2.to_v" in name or "time_emb" in name]
    cut_unet(cut, ((3, 0), (3, 1)))  # again does no harm


@pytest.mark.parametrize("taps", [((3, 1), (3, 2)), ((2, 0),), ((1, 1), (1, 2))], ids=str)
def test_every_parameter_that_is_kept_has_a_part_in_the_taps(sd15, prompt, taps):
    """A parameter without a part would have no gradient."""
    ours = copy.deepcopy(sd15)
    cut_unet(ours, taps)
    fix_unet(ours, 100, prompt)
    ours.requires_grad_(True)
    latent = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(6))
    Q, K = tapped_projections(ours, latent, taps)
    (Q.square().sum() + K.square().sum()).backward()
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is None] == []


def test_the_encoder_gives_the_mean_alone(vae):
    pixels = 2 * picture(64, 128) - 1
    for quant in (True, False):
        whole = copy.deepcopy(vae)
        if not quant:
            whole.quant_conv = None
        ours = copy.deepcopy(whole)
        cut_encoder(ours)
        cut_encoder(ours)  # again does no harm
        assert not [name for name in ours.state_dict() if name.startswith(("decoder", "post_quant"))]
        pack_weights(ours)
        with torch.inference_mode():
            mean = whole.encode(pixels).latent_dist.mean
            assert mean.std() > 0.1
            torch.testing.assert_close(encode(ours, pixels), mean, rtol=1e-5, atol=1e-5)


def test_networks_are_taken_over_once(sd15, vae, prompt):
    unet = copy.deepcopy(sd15)
    for expected in (None, "taken over before"):
        arguments = (
            copy.deepcopy(vae),
            unet,
            dict(sd_scheduler().config),
            prompt,
            DiffusionConfig(input_size=(64, 64)),
        )
        if expected is None:
            DiffusionTaps(*arguments)
        else:
            with pytest.raises(ValueError, match=expected):
                DiffusionTaps(*arguments)


SD21 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD15 = {**SD21, "attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def on_meta(kind, options):
    with torch.device("meta"):
        return kind(**options)


@pytest.mark.parametrize(
    ("options", "taps", "input_size", "heads", "size", "kept"),
    [
        (SD21, ((3, 1), (3, 2)), (512, 512), 10, 64, 0.9363),
        (SD21, ((3, 0), (3, 1)), (320, 448), 10, 64, 0.9305),
        (SD21, ((2, 1),), (512, 512), 10, 64, 0.8865),
        (SD15, ((3, 1), (3, 2)), (512, 512), 16, 40, 0.9432),
        (SD15, ((3, 1), (3, 2)), (384, 640), 16, 40, 0.9432),
        (SD15, ((1, 2),), (512, 768), 8, 160, 0.8001),
    ],
)
def test_the_true_architectures_have_their_heads_and_keep_a_stated_share(options, taps, input_size, heads, size, kept):
    """Without memory for weights: heads, tokens and their size, and the share of the U-Net's parameters that stays."""
    unet = on_meta(UNet2DConditionModel, options)
    vae = on_meta(AutoencoderKL, {**SD_VAE})
    whole = sum(parameter.numel() for parameter in unet.parameters())
    prompt = torch.empty((1, 77, options["cross_attention_dim"]), device="meta")
    config = DiffusionConfig(input_size=input_size, taps=taps)
    front = DiffusionTaps(vae, unet, dict(sd_scheduler().config), prompt, config)
    Q, K = front(torch.empty((1, 3, 480, 640), device="meta"))
    scale = 8 * 2 ** (3 - taps[0][0])
    assert front.grid == (input_size[0] // scale, input_size[1] // scale)
    assert Q.shape == K.shape == (heads, front.grid[0] * front.grid[1], size)
    assert sum(parameter.numel() for parameter in unet.parameters()) / whole == pytest.approx(kept, abs=5e-4)


def test_a_tiny_encoder_in_the_vaes_place_gives_its_own_latent(sd15, prompt):
    torch.manual_seed(0)
    tiny = small_taesd()
    taps = front(tiny, sd15, prompt, input_size=(64, 128), encoder="taesd")
    image = picture(64, 128)
    scheduler = sd_scheduler()
    with torch.inference_mode():
        latent = tiny.encode(2 * image - 1).latents * tiny.config.scaling_factor  # as diffusers' own pipelines do
        noise = torch.randn(latent.shape, generator=torch.Generator("cpu").manual_seed(0))
        noisy = scheduler.add_noise(latent, noise, torch.tensor([100]))
    assert latent.std() > 0.1
    torch.testing.assert_close(taps.noisy_latent(image), noisy, rtol=1e-5, atol=1e-5)
    assert taps(image)[0].shape == (16, 8 * 16, 2)


def test_the_encoder_that_is_set_and_the_one_that_is_loaded_must_be_the_same(sd15, vae, prompt):
    with pytest.raises(ValueError, match="encoder is 'taesd' and the network is a AutoencoderKL"):
        front(vae, sd15, prompt, input_size=(64, 64), encoder="taesd")
    with pytest.raises(ValueError, match="encoder is 'vae' and the network is a AutoencoderTiny"):
        front(small_taesd(), sd15, prompt, input_size=(64, 64))
    with pytest.raises(ValueError, match="latents of 8 channels and the U-Net takes 4"):
        front(small_taesd(latent_channels=8), sd15, prompt, input_size=(64, 64), encoder="taesd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["sd21", "sd15"])
def test_half_precision_stays_within_stated_bounds_of_the_untouched_network(request, network, vae, prompt, dtype):
    """Q and K against float32, relative in the Euclidean norm: 0.04 in bfloat16, 0.005 in float16."""
    unet = request.getfixturevalue(network)
    image = picture(128, 128)
    whole = front(vae, unet, prompt, input_size=(128, 128))
    reference = hooked(unet, whole.noisy_latent(image), 100, prompt, whole.config.taps)
    half = DiffusionTaps(
        copy.deepcopy(vae).to(dtype),
        copy.deepcopy(unet).to(dtype),
        dict(sd_scheduler().config),
        prompt.to(dtype),
        whole.config,
    )
    bound = {torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    for mine, other in zip(half(image), reference, strict=True):
        assert (mine.float() - other[0]).norm() < bound * other[0].norm()


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
    seen = []
    taps.vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    taps.noisy_latent(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    planes = [
        np.asarray(Image.fromarray(image[:, :, k].astype(np.float32), "F").resize((128, 64), Image.Resampling.BILINEAR))
        for k in range(3)
    ]
    expected = torch.from_numpy(np.stack(planes)) / 255 * 2 - 1
    torch.testing.assert_close(seen[0][0], expected, rtol=0, atol=2e-5)


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
        {"encoder": "vqvae"},
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
    unet = copy.deepcopy(sd15)
    fix_unet(unet, 1, prompt)
    with pytest.raises(ValueError, match="are not all in this U-Net"), torch.inference_mode():
        tapped_projections(unet, torch.zeros(1, 4, 8, 8), ((3, 1), (9, 0)))


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
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_out_scale_factor": 2.0},
        {"mid_block_scale_factor": 2.0},
        {"resnet_skip_time_act": True},
        {"act_fn": "mish"},
        {"cross_attention_norm": "layer_norm"},
        {"attention_type": "gated"},
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
