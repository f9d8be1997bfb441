"""Models that are published as pickles alone: converted once, in another process; refused where they are no weights.

The pickles are made of the small pair's own weights, so that what is loaded in the end can be compared.
"""

import fcntl
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors import safe_open
from safetensors.torch import load, load_file

from hub import NAMES
from nerve_core import ModelError, Segmenter, Vocabulary
from nerve_core.models import conversion, weights
from nerve_core.models.conversion import converted_bytes, converted_cache
from nerve_core.models.pairs import Source
from nerve_core.models.unpickle import Refused, read_pickles
from nerve_core.models.verify import verify
from nerve_core.models.weights import (
    CLIP_FILES,
    cached_folder,
    check_space,
    fetch,
    identity,
    local_folder,
    plan,
)
from unprivileged import without_privileges

CLIP, DIFFUSION = Source(NAMES["clip"]), Source(NAMES["diffusion"])
pytestmark = pytest.mark.usefixtures("no_user")


def saved(content, tmp_path, **options) -> bytes:
    """What torch.save makes of it."""
    torch.save(content, tmp_path / "saved", **options)
    return (tmp_path / "saved").read_bytes()


@pytest.fixture
def clip(hub):
    """The files of the CLIP on the hub, which has no safetensors, and its tensors."""
    files = hub.repositories[NAMES["clip"]]
    tensors = load(files.pop("model.safetensors"))
    return files, tensors


@pytest.fixture
def pickled(clip, tmp_path):
    """The CLIP published as openai's are: a pickle with a buffer of positions, as old releases wrote them."""
    files, tensors = clip
    tensors["text_model.embeddings.position_ids"] = torch.arange(77).expand(1, -1)
    files["pytorch_model.bin"] = saved(tensors, tmp_path)
    return tensors


def pull(source, files, cache, **options):
    return fetch(plan(source, files, cache_dir=cache, **options))


def same(folder, tensors, name="model.safetensors") -> bool:
    """Whether a file holds these tensors, to the bit."""
    stored = load_file(folder / name)
    return stored.keys() == tensors.keys() and all(
        torch.equal(stored[key], tensors[key]) and stored[key].dtype == tensors[key].dtype for key in tensors
    )


def leftovers() -> list[Path]:
    """Files of the cache of copies that belong to no whole copy."""
    return [
        path for path in converted_cache().rglob("*") if path.is_file() and path.suffix in (".part", ".safetensors")
    ]


def test_a_model_that_is_a_pickle_alone_is_fetched_converted_and_the_same_to_the_bit(hub, pickled, cache, caplog):
    with caplog.at_level(logging.INFO, "nerve_core"):
        folder = pull(CLIP, CLIP_FILES, cache)
    assert same(folder, pickled)
    assert f"{NAMES['clip']} is published as a pickle: converting pytorch_model.bin to safetensors" in caplog.messages
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    assert [finding.text for finding in verify(str(folder), deep=True) if finding.kind != "fact"] == []
    assert not list(Path(cache).rglob("*.bin")), "the pickle was fetched for this alone"
    assert folder == converted_cache() / "models--someone--small-clip/snapshots" / hub.commit(NAMES["clip"])
    assert identity(folder, "model.safetensors") == f"models--someone--small-clip/{folder.name}/model.safetensors"


def test_a_whole_pair_of_pickles_segments_as_its_safetensors_do(hub, pair_on_hub, pickled, cache, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    vocabulary = Vocabulary(["mug", "chair"])
    local = json.loads((pair_on_hub / "pair.json").read_text())
    local |= {"clip": {"location": "clip"}, "diffusion": {"location": "diffusion"}}
    described = (pair_on_hub / "pair.json").read_text()
    (pair_on_hub / "pair.json").unlink()
    (pair_on_hub / "pair.json").write_text(json.dumps(local))
    right = Segmenter.from_pretrained(str(pair_on_hub))(image, vocabulary)
    (pair_on_hub / "pair.json").write_text(described)
    files = hub.repositories[NAMES["diffusion"]]
    for stem, name in (("text_encoder/model", "text_encoder/pytorch_model.bin"), ("vae/diffusion_pytorch_model",) * 2):
        content = load(files.pop(f"{stem}.safetensors"))
        files[name if name.endswith(".bin") else f"{name}.bin"] = saved(content, tmp_path)
    first = Segmenter.from_pretrained(str(pair_on_hub), cache_dir=cache)(image, vocabulary)
    hub.requests.clear()
    again = Segmenter.from_pretrained(str(pair_on_hub), cache_dir=cache, offline=True)(image, vocabulary)
    assert hub.requests == []
    for found in (first, again):
        assert (found.labels == right.labels).all()
        assert (found.confidence == right.confidence).all()
    unet = next(converted_cache().rglob("unet/*.safetensors"))
    assert unet.is_symlink(), "safetensors of the hub are not copied"
    assert unet.resolve().is_relative_to(Path(cache).resolve())


@pytest.mark.parametrize("kind", ["shards", "half", "before torch 1.6"])
def test_every_form_in_which_pickles_are_published_is_read(hub, clip, cache, tmp_path, kind):
    files, tensors = clip
    del files["pytorch_model.bin"]
    name = "model.safetensors"
    if kind == "shards":
        names = sorted(tensors)
        for k, part in enumerate((names[:20], names[20:]), 1):
            files[f"pytorch_model-0000{k}-of-00002.bin"] = saved({key: tensors[key] for key in part}, tmp_path)
        files["pytorch_model.bin.index.json"] = b"{}"
    elif kind == "half":
        files["pytorch_model.bin"] = saved(tensors, tmp_path)
        tensors, name = {key: tensor.half() for key, tensor in tensors.items()}, "model.fp16.safetensors"
        files["pytorch_model.fp16.bin"] = saved(tensors, tmp_path)
    else:
        files["pytorch_model.bin"] = saved(tensors, tmp_path, _use_new_zipfile_serialization=False)
    folder = pull(CLIP, CLIP_FILES, cache)
    assert same(folder, tensors, name)
    if kind == "half":
        assert hub.fetched("pytorch_model.bin") == []
        assert cached_folder(CLIP, CLIP_FILES, cache, half=False) is None
        assert (pull(CLIP, CLIP_FILES, cache, half=False) / "model.safetensors").is_file()


def test_tensors_that_share_memory_are_written_once_each(hub, clip, cache, tmp_path):
    files, tensors = clip
    tied = dict(tensors)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    tied["tied"], tied["turned"] = tensors[name], tensors[name].T
    tied["parameter"] = torch.nn.Parameter(tensors[name])
    tied["nan"], tied["nothing"] = torch.tensor([float("nan")]), torch.zeros(0)
    files["pytorch_model.bin"] = saved(tied, tmp_path)
    stored = load_file(pull(CLIP, CLIP_FILES, cache) / "model.safetensors")
    assert stored.keys() == tied.keys()
    for key in ("tied", "turned", "parameter", "nothing"):
        assert torch.equal(stored[key], tied[key])
    assert stored["nan"].isnan().all()


# --- what is refused ----------------------------------------------------------------------------------------


class Bomb:
    """What is unpickled leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch '{self.mark}'",))


@pytest.mark.parametrize("form", ["archive", "before torch 1.6", "plain pickle", "renamed safetensors"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(hub, clip, cache, tmp_path, form):
    files, tensors = clip
    mark = tmp_path / "mark"
    content = tensors | {"bomb": Bomb(mark)}
    if form == "plain pickle":
        files["pytorch_model.bin"] = pickle.dumps({"bomb": Bomb(mark)}, protocol=2)
    else:
        files["pytorch_model.bin"] = saved(content, tmp_path, _use_new_zipfile_serialization=form == "archive")
    if form == "renamed safetensors":
        files["model.safetensors"] = files["pytorch_model.bin"]
        folder = pull(CLIP, CLIP_FILES, cache)
        assert any("is a pickle" in finding.text for finding in verify(str(folder)))
    else:
        with pytest.raises(ModelError, match=r"asks for \w+\.system, which is no tensor.*another place"):
            pull(CLIP, CLIP_FILES, cache)
        assert cached_folder(CLIP, CLIP_FILES, cache) is None
    assert not mark.exists()
    assert leftovers() == []
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is none"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda tensors: [1, 2], "holds no dictionary of tensors but list"),
        (lambda tensors: {}, "holds no dictionary of tensors but dict"),
        (lambda tensors: {"state_dict": tensors}, "an entry 'state_dict' that is no plain tensor but dict"),
        (lambda tensors: tensors | {3: torch.zeros(1)}, "an entry 3, which is no name of a tensor"),
        (lambda tensors: {"a": torch.zeros(3).to_sparse()}, "'a' that is no plain tensor"),
        (lambda tensors: {"a": torch.zeros(1).expand(1 << 40)}, "would take 4398046511104 bytes where its files have"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, made, said):
    saved(made({"a": torch.ones(1)}), tmp_path)
    with pytest.raises(Refused) as raised:
        read_pickles([tmp_path / "saved"])
    assert said in str(raised.value)


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"<html>" + c, lambda c: b""])
def test_what_is_damaged_is_refused(tmp_path, damage):
    content = saved({"a": torch.ones(1000)}, tmp_path)
    (tmp_path / "saved").write_bytes(damage(content))
    with pytest.raises(Refused, match="saved is damaged or no file of weights"):
        read_pickles([tmp_path / "saved"])


def test_two_shards_with_one_name_are_refused(tmp_path):
    saved({"a": torch.ones(1)}, tmp_path)
    with pytest.raises(Refused, match="saved has 'a', which another file of the same model has too"):
        read_pickles([tmp_path / "saved"] * 2)


def test_a_torch_whose_unpickler_can_be_got_around_opens_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(Refused, match=r"torch 2\.9\.1\+cpu is installed.*upgrade to torch 2\.10 or later"):
        read_pickles([tmp_path / "never opened"])


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_what_a_killed_process_left_half_done_is_never_taken_for_whole(hub, pickled, cache, monkeypatch):
    program = "import os, sys; open(sys.argv[1], 'w').write('half'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(conversion, "_PROGRAM", (sys.executable, "-c", program))
    with pytest.raises(ModelError, match="the process that converts it was ended by SIGKILL"):
        pull(CLIP, CLIP_FILES, cache)
    assert cached_folder(CLIP, CLIP_FILES, cache) is None
    assert leftovers() == []


def test_a_pull_goes_on_after_one_that_was_killed(hub, pickled, cache):
    stale = converted_cache() / "models--someone--small-clip/of another.part"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_text("half")
    (converted_cache() / "models--someone--small-clip/snapshots" / hub.commit(NAMES["clip"])).mkdir(parents=True)
    assert cached_folder(CLIP, CLIP_FILES, cache) is None
    folder = pull(CLIP, CLIP_FILES, cache)
    assert same(folder, pickled)
    assert not stale.exists()


def test_the_process_that_converts_does_not_outlive_the_one_that_started_it(tmp_path):
    pipe = tmp_path / "never.bin"
    os.mkfifo(pipe)  # opening it waits for a writer that never comes
    program = (
        "import pathlib, nerve_core.models.conversion as c; "
        f"c._rewrite([pathlib.Path({str(pipe)!r})], pathlib.Path({str(tmp_path / 'made.safetensors')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = until(lambda: children.read_text().split())[0]
    until(lambda: "nerve_core.models.unpickle" in Path(f"/proc/{child}/cmdline").read_text())
    until(lambda: len(list(Path(f"/proc/{child}/task").iterdir())) > 1)
    parent.kill()
    parent.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_disk_that_fills_up_is_said_and_nothing_half_written_stays(hub, pickled, cache, monkeypatch):
    program = (
        "import errno, os, sys; from nerve_core.models import unpickle\n"
        "def full(tensors, target, metadata):\n"
        "    target.write_text('half'); raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "unpickle.save_file = full; unpickle.main()"
    )
    monkeypatch.setattr(conversion, "_PROGRAM", (sys.executable, "-c", program))
    with pytest.raises(ModelError, match=r"cannot be written into .* \(No space left on device\); make room"):
        pull(CLIP, CLIP_FILES, cache)
    assert leftovers() == []
    assert cached_folder(CLIP, CLIP_FILES, cache) is None


def test_a_disk_without_room_for_the_copy_is_said_before_anything_is_transferred(hub, pickled, cache, monkeypatch):
    download = plan(CLIP, CLIP_FILES, cache_dir=cache)
    room = download.bytes_absent + weights._SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    with pytest.raises(ModelError, match=r"are to be fetched and converted; free some"):
        check_space([download])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room + download.bytes_converted))
    check_space([download])
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written_is_said(hub, pickled, cache, tmp_path, monkeypatch):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    monkeypatch.setenv("NERVE_CACHE", str(shut / "nerve"))

    def job():
        with pytest.raises(ModelError, match=r"cannot be written into .*Permission denied.*NERVE_CACHE"):
            pull(CLIP, CLIP_FILES, cache)

    without_privileges(job)


def test_pulls_at_once_convert_once(hub, pickled, cache, caplog):
    found = []
    threads = [threading.Thread(target=lambda: found.append(pull(CLIP, CLIP_FILES, cache))) for _ in range(2)]
    (converted_cache() / "models--someone--small-clip").mkdir(parents=True)
    with caplog.at_level(logging.INFO, "nerve_core"):
        with (converted_cache() / "models--someone--small-clip/lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for thread in threads:
                thread.start()
            until(lambda: len(hub.fetched("pytorch_model.bin")) >= 1 and not list(Path(cache).rglob("*.incomplete")))
        for thread in threads:
            thread.join(120)
    assert len(found) == 2
    assert all(same(folder, pickled) for folder in found)
    assert sum("converting" in message for message in caplog.messages) == 1


# --- what knows the copy ------------------------------------------------------------------------------------


def test_the_copy_serves_offline_without_the_hubs_cache_and_read_only(hub, pickled, cache, tmp_path):
    folder = pull(CLIP, CLIP_FILES, cache)
    shutil.rmtree(cache)
    folders = [path for path in (converted_cache(), *converted_cache().rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    hub.requests.clear()

    def job():
        assert local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=True) == folder
        assert pull(CLIP, CLIP_FILES, cache) == folder

    try:
        without_privileges(job)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert hub.fetched() == []


def test_a_pickle_that_another_program_left_in_the_cache_is_converted_offline_and_kept(hub, pickled, cache):
    snapshot_download(NAMES["clip"], cache_dir=cache)
    hub.requests.clear()
    folder = local_folder(CLIP, CLIP_FILES, cache_dir=cache, offline=True)
    assert same(folder, pickled)
    assert hub.requests == []
    assert len([path for path in Path(cache).rglob("*.bin") if path.is_file()]) == 1


def test_a_revision_has_its_own_copy_and_a_changed_repository_a_new_one(hub, clip, pickled, cache, tmp_path):
    files, _ = clip
    pinned = Source(NAMES["clip"], "v1")
    first = pull(pinned, CLIP_FILES, cache)
    assert cached_folder(pinned, CLIP_FILES, cache) == first
    assert cached_folder(CLIP, CLIP_FILES, cache) is None
    by_commit = Source(NAMES["clip"], hub.commit(NAMES["clip"]))
    assert cached_folder(by_commit, CLIP_FILES, cache) == first
    assert pull(CLIP, CLIP_FILES, cache) == first
    changed = {name: tensor + 1 for name, tensor in pickled.items()}
    files["pytorch_model.bin"] = saved(changed, tmp_path)
    second = pull(CLIP, CLIP_FILES, cache)
    assert second != first
    assert same(second, changed)
    assert cached_folder(pinned, CLIP_FILES, cache) == first


def test_the_commands_know_the_copy(hub, clip, pickled, pair_on_hub, nerve, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    code, out, _ = nerve("models", "pull", pair_on_hub, "--dry-run")
    assert code == 0
    assert "is published as a pickle alone" in out
    assert "fetch, convert" in out
    assert hub.fetched() == []
    code, out, _ = nerve("models", "pull", pair_on_hub)
    assert code == 0
    assert "is whole" in out
    folders = json.loads(nerve("models", "path", pair_on_hub, "--json")[1])
    assert folders["converted"] == str(converted_cache())
    assert folders["clip"].startswith(folders["converted"])
    assert nerve("models", "verify", pair_on_hub)[0] == 0
    hub.requests.clear()
    code, out, _ = nerve("models", "pull", pair_on_hub)
    assert "nothing to fetch" in out
    assert hub.fetched() == []
    assert converted_bytes() > 0
    out = nerve("models", "clear-cache")[1]
    assert f"of converted weights stay in {converted_cache()}; --converted removes them" in out
    assert nerve("models", "clear-cache", "--converted")[0] == 0
    assert converted_bytes() == 0
    assert json.loads(nerve("models", "path", pair_on_hub, "--json")[1])["clip"] is None


def test_pull_ends_with_1_where_what_was_converted_belongs_to_another_model(hub, clip, pair_on_hub, nerve, tmp_path):
    files, tensors = clip
    tensors["visual_projection.weight"] = torch.zeros(3, 3)
    files["pytorch_model.bin"] = saved(tensors, tmp_path)
    code, out, _ = nerve("models", "pull", pair_on_hub, "--cache-dir", tmp_path / "hub")
    assert code == 1
    assert "have another shape than its configuration says" in out
