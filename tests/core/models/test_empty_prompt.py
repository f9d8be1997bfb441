"""The empty prompt's hidden state: equal to the text encoder's, kept on disk, anew whenever what made it changes."""

import json
import os

import pytest
import torch
from transformers import CLIPTextModel

from nerve_core.models.loading import empty_prompt, load_tokenizer
from nerve_core.text.cache import EmbeddingCache
from small_models import byte_tokenizer, save_pair, small_text_encoder

CPU = torch.device("cpu")


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path / "pair") / "diffusion"


def no_loading(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_empty_prompt_is_the_encoders_last_hidden_state(pair, dtype):
    tokens = byte_tokenizer()("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = small_text_encoder().to(dtype)(input_ids=tokens).last_hidden_state
    found = empty_prompt(pair, device=CPU, dtype=dtype, cache=None)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_the_second_start_the_text_encoder_is_not_read(pair, tmp_path, monkeypatch, dtype):
    first = empty_prompt(pair, device=CPU, dtype=dtype, cache=EmbeddingCache(tmp_path / "cache"))
    weights = pair / "text_encoder/model.safetensors"
    status = weights.stat()
    weights.write_bytes(b"\0" * status.st_size)  # of the same size and time, but nothing that could be loaded
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = empty_prompt(pair, device=CPU, dtype=dtype, cache=EmbeddingCache(tmp_path / "cache"))
    assert second.dtype == dtype
    assert torch.equal(second, first)
    with pytest.raises(Exception, match="eader"):  # safetensors: no header
        empty_prompt(pair, device=CPU, dtype=dtype, cache=None)


def change_precision(pair):
    return {"dtype": torch.bfloat16}


def change_weights(pair):
    small_text_encoder(seed=9).save_pretrained(pair / "text_encoder")
    os.utime(pair / "text_encoder/model.safetensors", (1, 1))
    return {}


def change_tokenizer(pair):
    path = pair / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))
    return {}


@pytest.mark.parametrize("change", [change_precision, change_weights, change_tokenizer])
def test_whatever_changes_the_empty_prompt_has_it_worked_out_anew(pair, tmp_path, monkeypatch, change):
    cache = EmbeddingCache(tmp_path / "cache")
    options = {"device": CPU, "dtype": torch.float32, "cache": cache}
    empty_prompt(pair, **options)
    changed = options | change(pair)
    found = empty_prompt(pair, **changed)
    assert torch.equal(found, empty_prompt(pair, **(changed | {"cache": None})))
    no_loading(monkeypatch)
    assert torch.equal(empty_prompt(pair, **changed), found)


def test_half_precision_files_serve_half_precision_and_alone_both(pair):
    small_text_encoder(seed=7).half().save_pretrained(pair / "text_encoder", variant="fp16")
    whole, half = (empty_prompt(pair, device=CPU, dtype=dtype, cache=None) for dtype in (torch.float32, torch.bfloat16))
    assert (whole - half.float()).abs().max() > 1  # two files with different weights
    (pair / "text_encoder/model.safetensors").unlink()
    alone = empty_prompt(pair, device=CPU, dtype=torch.float32, cache=None)
    torch.testing.assert_close(half.float(), alone, rtol=0.05, atol=0.2)


def test_a_text_encoder_that_lacks_weights_is_refused_and_nothing_is_kept(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = pair / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    del tensors[next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as .*fc1\.weight"):
        empty_prompt(pair, device=CPU, dtype=torch.float32, cache=EmbeddingCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_a_tokenizer_is_said_to_have_none(pair):
    for path in (pair / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(pair / "tokenizer")
