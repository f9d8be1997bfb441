"""Model pairs: what loads, what is refused, and that every refusal says where it looked and what to do."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderTiny

import nerve_core
from nerve_core import ModelError, Segmenter, Vocabulary
from nerve_core.models import loading
from nerve_core.models.loading import load_clip, load_diffusion, quiet_libraries
from nerve_core.models.pairs import Source
from nerve_core.networks.diffusion import DiffusionConfig, DiffusionTaps, noise_levels
from nerve_core.settings import Settings
from small_models import (
    PAIR_SETTINGS,
    byte_tokenizer,
    picture,
    replace,
    small_clip,
    small_taesd,
    small_text_encoder,
    small_vae,
)

CPU = torch.device("cpu")
WEIGHTS = {
    "clip": "clip/model.safetensors",
    "unet": "diffusion/unet/diffusion_pytorch_model.safetensors",
    "vae": "diffusion/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "diffusion/text_encoder/model.safetensors",
}


def load(folder, **options):
    return Segmenter.from_pretrained(str(folder), device="cpu", **options)


TAPS = ((1, 0),)


def load_parts(pair, part, dtype=torch.float32, taps=((1, 0), (1, 1)), **options):
    places = {"cache_dir": None, "offline": True}
    if part == "clip":
        return load_clip(Source(str(pair / part)), CPU, dtype, **places)
    return load_diffusion(Source(str(pair / part)), CPU, dtype, taps, **places, **options)


# --- tokens -------------------------------------------------------------------------------------------------


def with_text_settings(pair, **changes):
    """Change what CLIP's config.json says of the text model; None takes an entry away."""
    path = pair / "clip/config.json"
    content = json.loads(path.read_text())
    text = content["text_config"] | changes
    content["text_config"] = {name: value for name, value in text.items() if value is not None}
    replace(path, json.dumps(content).encode())


@pytest.mark.parametrize("end", [None, 5], ids=["none, so that it is the library's own", "another"])
def test_a_clip_that_looks_for_another_end_of_text_than_its_tokenizer_writes_is_refused(pair, end):
    """It would read every name's meaning at its first token, so that all names were one."""
    with_text_settings(pair, eos_token_id=end)
    with pytest.raises(ModelError, match=r"so that all names would be one.*correct eos_token_id in config.json"):
        load(pair)


def test_the_end_of_text_of_old_configurations_is_the_largest_token(pair):
    with_text_settings(pair, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    with pytest.raises(ModelError, match="so that all names would be one"):
        load(pair)  # this tokenizer's end of text has the number 1
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    embedded = Path(nerve_core.__file__).parent / "embedded"
    copy = Path(shutil.copytree(embedded, pair.parent / "copy"))
    with_text_settings(copy, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    wanted = Vocabulary(["ball", "cube"])
    found = load(copy, remember=False).embed(wanted).embeddings
    torch.testing.assert_close(found, segmenter.embed(wanted).embeddings)


def test_a_tokenizer_whose_tokens_the_text_model_does_not_know_is_refused(pair):
    with_text_settings(pair, vocab_size=100)
    path = pair / WEIGHTS["clip"]
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    tensors[name] = tensors[name][:100].contiguous()
    path.unlink()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its text model knows 100; take the tokenizer that belongs to the model"):
        load(pair)


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_refused_with_the_folder(pair, part):
    (pair / WEIGHTS[part]).unlink()
    with pytest.raises(ModelError) as error:
        load(pair)
    assert str(pair / WEIGHTS[part].split("/")[0]) in str(error.value)


class Bomb:
    """What is unpickled leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickled_weights_are_refused_and_never_opened(pair, part, tmp_path):
    safe = pair / WEIGHTS[part]
    safe.unlink()
    mark = tmp_path / "unpickled"
    stem = "pytorch_model" if safe.name == "model.safetensors" else "diffusion_pytorch_model"
    for ending in ("bin", "ckpt", "pt"):
        with (safe.parent / f"{stem}.{ending}").open("wb") as file:
            pickle.dump(Bomb(mark), file)
    torch.save(Bomb(mark), safe.parent / "model.ckpt")
    with pytest.raises(ModelError) as error:
        load(pair)
    assert not mark.exists()
    assert "only safetensors weights are loaded, and" in str(error.value)
    assert f"{stem}.bin" in str(error.value)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["cut off", "empty", "garbage"])
def test_damaged_weights_are_refused_with_the_folder_and_the_remedy(pair, part, damage):
    path = pair / WEIGHTS[part]
    content = path.read_bytes()
    replace(path, {"cut off": content[: len(content) // 2], "empty": b"", "garbage": b"\x07" * 4096}[damage])
    with pytest.raises(
        ModelError, match=r"cannot be loaded: .*; fetch it again .* \(nerve models verify .* says which"
    ) as error:
        load(pair)
    assert str(pair / WEIGHTS[part].split("/")[0]) in str(error.value)


def rewrite(path, change):
    """Store what `change` makes of a file's tensors in its place."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    path.unlink()
    safetensors.torch.save_file(change(tensors), path, metadata={"format": "pt"})


def needed(tensors):
    """The first of a file's tensors, by name, that every pair reads."""
    return next(name for name in sorted(tensors) if name.endswith("weight") and not name.startswith(UNUSED))


UNUSED = ("decoder", "post_quant", "conv_out", "conv_norm_out")


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(pair, part):
    path = pair / WEIGHTS[part]
    lost = needed(safetensors.torch.load_file(path))
    rewrite(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, such as|has no tensor") as error:
        load(pair)
    assert str(path) in str(error.value)
    assert lost.removeprefix("text_model.") in str(error.value)
    assert "fetch it again" in str(error.value)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_of_another_size_are_refused(pair, part):
    path = pair / WEIGHTS[part]
    rewrite(path, lambda tensors: tensors | {needed(tensors): torch.zeros(3, 5)})
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load(pair)
    if part in ("unet", "vae"):
        assert "of shape [3, 5] where config.json asks for [" in str(error.value)
        assert str(path) in str(error.value)


UNREAD = (*UNUSED, "up_blocks.1.resnets.1", "up_blocks.1.attentions.1")


def test_only_what_the_taps_need_is_read(pair):
    """Files without the rest load, and give the taps of the untouched networks."""
    untouched = load_parts(pair, "diffusion")
    late = "up_blocks.1.attentions.0."
    inner = f"{late}transformer_blocks.0."
    after = (*UNREAD, f"{late}proj_out", f"{inner}attn2", f"{inner}norm2", f"{inner}norm3", f"{inner}ff")
    after += (f"{inner}attn1.to_v", f"{inner}attn1.to_out")
    for part in ("unet", "vae"):
        rewrite(
            pair / WEIGHTS[part], lambda t: {name: value for name, value in t.items() if not name.startswith(after)}
        )
    cut = load_parts(pair, "diffusion", taps=TAPS)
    for whole, less in ((untouched.vae, cut.vae), (untouched.unet, cut.unet)):
        kept = dict(less.named_parameters())
        assert kept
        assert not [name for name in kept if name.startswith(after)]
        for name, parameter in whole.named_parameters():
            assert name in kept or name.startswith(after)
            assert name not in kept or torch.equal(parameter, kept[name])
    config = DiffusionConfig(input_size=(64, 128), taps=TAPS)
    results = [DiffusionTaps(part.vae, part.unet, part.scheduler, part.prompt, config) for part in (untouched, cut)]
    for a, b in zip(*(taps(picture(50, 70)) for taps in results), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"tap \(9, 0\) does not exist"):
        load_parts(pair, "diffusion", taps=((9, 0),))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 2.0), (torch.bfloat16, 1.0), (torch.float32, 1.0)])
def test_half_precision_files_are_read_for_half_precision_alone_and_where_there_is_no_other(pair, dtype, expected):
    for part in ("unet", "vae"):
        path = pair / WEIGHTS[part]
        rewrite(path, lambda tensors: {name: torch.ones_like(tensor) for name, tensor in tensors.items()})
        halves = {name: 2 * torch.ones_like(t).half() for name, t in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(halves, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    for network in ("unet", "vae"):
        parameters = list(getattr(load_parts(pair, "diffusion", dtype), network).parameters())
        assert {parameter.dtype for parameter in parameters} == {dtype}
        assert {parameter.unique().item() for parameter in parameters} == {expected}
    for part in ("unet", "vae"):
        (pair / WEIGHTS[part]).unlink()
    assert load_parts(pair, "diffusion", dtype).unet.conv_in.bias[0] == 2


def test_a_tiny_encoder_is_read_in_the_vaes_place(pair, tmp_path):
    tiny = small_taesd()
    tiny.save_pretrained(tmp_path / "tiny")
    (pair / WEIGHTS["vae"]).unlink()  # the model's own is not read
    loaded = load_parts(pair, "diffusion", taesd=Source(str(tmp_path / "tiny")))
    config = DiffusionConfig(input_size=(64, 128), taps=TAPS, encoder="taesd")
    assert not [name for name, _ in loaded.vae.named_parameters() if name.startswith("decoder")]
    latent = DiffusionTaps(loaded.vae, loaded.unet, loaded.scheduler, loaded.prompt, config).noisy_latent(
        picture(64, 128)
    )
    with torch.inference_mode():
        clean = tiny.encode(2 * picture(64, 128) - 1).latents
    signal, noise = noise_levels(loaded.scheduler, config.timestep)
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latent, signal * clean + noise * drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("half", "whole", "faster"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_bfloat16_is_chosen_where_the_networks_own_layers_are_faster_in_it(pair, monkeypatch, half, whole, faster):
    clock = [0.0]
    ran = []

    def layer(module, x):
        ran.append((type(module).__name__, tuple(x.shape), x.dtype))
        clock[0] += half if x.dtype == torch.bfloat16 else whole

    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loading, "run_resnet", layer)
    monkeypatch.setattr(loading, "run_layer", layer)
    arguments = (Source(str(pair / "clip")), Source(str(pair / "diffusion")), Settings().replaced(PAIR_SETTINGS))
    monkeypatch.setattr(loading, "bfloat16_kernels", lambda: True)
    assert loading.bfloat16_is_faster(*arguments, cache_dir=None, offline=True) is faster
    assert {(name, shape) for name, shape, _ in ran} == {
        ("ResnetBlock2D", (1, 8, 4, 128)),
        ("ResnetBlock2D", (1, 8, 8, 16)),
        ("CLIPEncoderLayer", (1, 1 + 6 * 8, 24)),
    }
    ran.clear()
    monkeypatch.setattr(loading, "bfloat16_kernels", lambda: False)
    assert loading.bfloat16_is_faster(*arguments, cache_dir=None, offline=True) is False
    assert ran == []


@pytest.mark.skipif(not loading.bfloat16_kernels(), reason="PyTorch has no bfloat16 kernels for this processor")
def test_the_layers_that_are_timed_run_in_both_precisions(pair):
    settings = Settings().replaced(PAIR_SETTINGS)
    sources = (Source(str(pair / "clip")), Source(str(pair / "diffusion")))
    assert loading.bfloat16_is_faster(*sources, settings, cache_dir=None, offline=True) in (True, False)


@pytest.mark.parametrize(
    "file",
    [
        "clip/config.json",
        "clip/tokenizer.json",
        "diffusion/tokenizer/tokenizer.json",
        "diffusion/scheduler/scheduler_config.json",
        "diffusion/vae/config.json",
        "diffusion/text_encoder/config.json",
    ],
)
@pytest.mark.parametrize("content", [None, b"{"], ids=["missing", "broken"])
def test_missing_or_broken_descriptions_are_refused(pair, file, content):
    (pair / file).unlink()
    if content is not None:
        (pair / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load(pair)
    assert str(pair / file.split("/")[0]) in str(error.value)


@pytest.mark.parametrize("lost", [None, "vocab.json", "merges.txt"])
def test_a_tokenizer_of_a_vocabulary_and_merges_will_do_but_never_half_of_one(pair, lost):
    """As published with Stable Diffusion: no tokenizer.json, and "!" as padding."""
    folder = pair / "diffusion/tokenizer"
    shutil.rmtree(folder)
    folder.mkdir()
    vocabulary = byte_tokenizer().get_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    described = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if lost is not None:
        (folder / lost).unlink()
        with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
            load(pair)
        return
    with torch.inference_mode():
        ids = torch.tensor([[0, 1] + [vocabulary["!"]] * 75])
        expected = small_text_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(load_parts(pair, "diffusion").prompt, expected)


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["linear", "convolutions"])
def test_weights_with_the_names_of_the_published_files_are_complete(pair, shape):
    """Older files name the text tower `text_model.` and the VAE's attention query, key, value and proj_attn, which some
    store as convolutions of one pixel."""

    def older(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            old = name
            for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                old = old.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
            changed = old != name and name.endswith("weight")
            renamed[old] = tensor.reshape(*tensor.shape, *shape) if changed else tensor
        assert set(renamed) != set(tensors)
        return renamed

    rewrite(pair / WEIGHTS["vae"], older)
    rewrite(
        pair / WEIGHTS["text_encoder"],
        lambda tensors: {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()},
    )
    loaded = load_parts(pair, "diffusion")
    assert loaded.prompt.shape == (1, 77, 32)
    attention, expected = loaded.vae.encoder.mid_block.attentions[0], small_vae().encoder.mid_block.attentions[0]
    assert attention.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_is_loaded_in_the_precision_asked_for_and_ready_to_run(pair, dtype):
    clip, diffusion = load_parts(pair, "clip", dtype), load_parts(pair, "diffusion", dtype)
    for model in (clip.model, diffusion.vae, diffusion.unet):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
    assert diffusion.prompt.dtype == dtype
    expected = small_clip().state_dict()
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


def test_the_vae_is_kept_without_its_decoder(pair):
    vae = load_parts(pair, "diffusion").vae
    assert vae.decoder is None
    assert not [name for name in vae.state_dict() if name.startswith("decoder")]
    assert [name for name in vae.state_dict() if name.startswith("encoder")]


def test_the_empty_prompt_is_the_text_encoders_last_hidden_state_padded_as_in_training(pair):
    ids = torch.tensor([[0, *[1] * 76]])  # start, then the end as padding
    with torch.inference_mode():
        expected = small_text_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(load_parts(pair, "diffusion").prompt, expected)


def test_the_identity_of_weights_changes_with_the_file_and_the_precision(pair):
    first = load_parts(pair, "clip").identity
    assert load_parts(pair, "clip").identity == first
    assert load_parts(pair, "clip", torch.bfloat16).identity != first
    content = (pair / WEIGHTS["clip"]).read_bytes()
    replace(pair / WEIGHTS["clip"], content)
    os.utime(pair / WEIGHTS["clip"], (1, 1))
    assert load_parts(pair, "clip").identity != first


# --- device and precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "tpu", "meta", "", "cuda:x", "mps"])
def test_an_unknown_device_is_refused_with_the_accepted_ones(device):
    with pytest.raises(ModelError, match="auto, cpu, cuda and cuda:N"):
        Segmenter.from_pretrained("embedded", device=device)


def test_a_device_that_is_not_there_is_refused_with_how_many_there_are():
    count = torch.cuda.device_count()
    with pytest.raises(ModelError, match=f"sees {count} CUDA devices; use device auto or cpu"):
        Segmenter.from_pretrained("embedded", device=f"cuda:{count}")


def test_auto_takes_the_cpu_where_there_is_no_gpu(pair, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    segmenter = Segmenter.from_pretrained(str(pair), device="auto")
    assert segmenter.device == CPU
    assert segmenter.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp8", "float64", torch.float64, torch.int8, 16, ""])
def test_an_unknown_precision_is_refused_with_the_accepted_ones(dtype):
    with pytest.raises(ValueError, match="fp16, bf16, fp32"):
        Segmenter.from_pretrained("embedded", device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_precision_may_be_given_by_either_name(pair, dtype):
    segmenter = load(pair, dtype=dtype)
    assert segmenter.dtype == torch.bfloat16
    assert "bfloat16" in segmenter.description


def test_the_libraries_are_quiet(capfd):
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (transformers.utils.logging, diffusers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    hub = logging.getLogger("huggingface_hub").level
    try:
        quiet_libraries()
        assert all(library.get_verbosity() == logging.ERROR for library in libraries)
        Segmenter.from_pretrained("embedded", device="cpu")
        assert capfd.readouterr() == ("", "")
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(hub)


def test_the_tiny_encoder_serves_a_whole_frame_where_the_settings_ask_for_it(pair):
    small_taesd().save_pretrained(pair / "tiny")
    description = json.loads((pair / "pair.json").read_text()) | {"taesd": {"location": "tiny"}}
    replace(pair / "pair.json", json.dumps(description).encode())
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    vocabulary = Vocabulary(["ball", "cube"])
    own, tiny = load(pair), load(pair, settings={"encoder": "taesd"})
    assert isinstance(tiny.frame_part.taps.vae, AutoencoderTiny)
    (_, Q, _), (_, other, _) = (segmenter.frame(image, segmenter.embed(vocabulary)) for segmenter in (own, tiny))
    assert (Q - other).abs().max() > 0.1  # another latent
    assert tiny(image, vocabulary).labels.shape == (20, 30)


def test_a_pair_without_a_tiny_encoder_says_so(pair):
    with pytest.raises(ModelError, match=r"pair\.json names no taesd; use encoder 'vae', or name one"):
        load(pair, settings={"encoder": "taesd"})
