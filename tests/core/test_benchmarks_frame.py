"""The frame benchmark: its plain side computes the same masks, and its random pairs have the true architectures."""

import json

import numpy as np
import pytest
import torch

from nerve_benchmarks.frame import names, picture
from nerve_benchmarks.plain_frame import PlainNerve
from nerve_benchmarks.random_pair import ARCHITECTURES, Architecture, write_random_pair
from nerve_core import Segmenter, Vocabulary
from nerve_core.pairs import find_pair, pair_names

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
NARROW = Architecture(
    clip_text=_TOWER,
    clip_vision={**_TOWER, "patch_size": 14, "image_size": 56},
    projection=16,
    text=_TOWER,
    unet={
        **ARCHITECTURES["sd21-clipl14"].unet,
        "block_out_channels": (20, 40, 80, 80),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    },
    vae={**ARCHITECTURES["sd21-clipl14"].vae, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    write_random_pair("sd21-clipl14", folder, architecture=NARROW, dtype=torch.float32)
    description = json.loads((folder / "pair.json").read_text())
    description["settings"] |= {"input_size": [128, 192], "short_side": 112, "logit_scale": 300.0, "alpha": 0.5}
    (folder / "pair.json").write_text(json.dumps(description))
    return folder


def test_the_plain_side_computes_what_ours_does(pair, monkeypatch, tmp_path):
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path))
    image = picture((96, 128))
    walk = {"method": "truncated", "steps": 40}  # as the plain side walks
    segmenter = Segmenter.from_pretrained(str(pair), device="cpu", dtype="fp32", settings=walk)
    queries = segmenter.embed(Vocabulary(names(6)))
    plain = PlainNerve(find_pair(str(pair)), torch.device("cpu"), torch.float32)
    G, Q, K = segmenter.frame(image, queries)
    torch.testing.assert_close(plain.probabilities(image, queries.embeddings), G, atol=2e-5, rtol=0)
    P = segmenter.refine(Q, K, G).P
    torch.testing.assert_close(plain.walk(G, plain.transitions(image)), P, atol=2e-5, rtol=0)
    best = queries.classes.numpy()[plain(image, queries.embeddings)]
    assert (best == segmenter(image, queries).labels).mean() > 0.999
    assert len(np.unique(best)) > 2


def test_every_full_size_pair_has_an_architecture_to_time():
    assert set(ARCHITECTURES) == set(pair_names()) - {"embedded"}


@pytest.mark.parametrize("count", [1, 21, 60, 150])
def test_names_are_different(count):
    assert len(set(names(count))) == count
