"""A stand-in of the hub with the small pair on it, and nothing of whoever runs the tests."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

import hub as hubs
from hub import NAMES, point_at


@pytest.fixture
def pair_on_hub(whole_pair, tmp_path):
    """The small pair in a folder that a test may change, its parts named by hub ids."""
    folder = Path(shutil.copytree(whole_pair, tmp_path / "pair", copy_function=os.link))
    content = json.loads((folder / "pair.json").read_text())
    (folder / "pair.json").unlink()
    content |= {part: {"location": name} for part, name in NAMES.items()}
    (folder / "pair.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def no_user(monkeypatch, tmp_path):
    """No user's token, cache or waiting."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "nerve"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no tokens"))
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture
def hub(pair_on_hub, monkeypatch):
    """The stand-in, with the small pair and what a real repository also holds."""
    with hubs.serve() as served:
        point_at(served.endpoint, monkeypatch)
        others = {"README__md": b"# card", "picture.png": b"\x89PNG", "pytorch_model.bin": b"\x80pickle"}
        served.add(NAMES["clip"], pair_on_hub / "clip", **others)
        served.add(
            NAMES["diffusion"],
            pair_on_hub / "diffusion",
            **others,
            **{
                "model_index.json": b"{}",
                "v2-1_512-ema-pruned.safetensors": b"single file",
                "v2-1_512-ema-pruned.ckpt": b"pickle",
                "safety_checker__model.safetensors": b"judge",
                "safety_checker__config.json": b"{}",
                "feature_extractor__preprocessor_config.json": b"{}",
                "unet__diffusion_pytorch_model.bin": b"pickle",
                "unet__diffusion_pytorch_model.non_ema.safetensors": b"another",
            },
        )
        yield served


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "hub cache")
