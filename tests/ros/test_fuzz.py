"""A small share of tools/fuzz.py, the same each time: mutated messages, taken by a real node in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import harness

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
COUNT = 3000


@pytest.fixture(scope="module")
def figures(environment, tmp_path_factory):
    """What the tool found and counted."""
    file = tmp_path_factory.mktemp("fuzz") / "figures.json"
    # One message may wait for the processor on a busy machine; a hang does not end.
    command = [sys.executable, str(TOOL), "--count", str(COUNT), "--bound", "60", "--json", str(file)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=harness.LOADING + 300)
    assert file.exists(), ended.stderr[-3000:]
    return json.loads(file.read_text())


def test_no_message_is_a_finding(figures):
    assert figures["findings"] == []


def test_every_message_has_an_outcome(figures):
    outcomes = {name: count for name, count in figures["outcomes"].items() if ": " in name}
    assert sum(outcomes.values()) == COUNT


def test_messages_are_good_and_bad_in_every_way(figures):
    """Otherwise nothing is proven by them."""
    expected = {f"Image: rejected for {kind}" for kind in ("header", "encoding", "size", "step", "data")}
    expected |= {f"CompressedImage: rejected for {kind}" for kind in ("header", "encoding", "size", "data", "decode")}
    expected |= {f"{kind}: read" for kind in ("Image", "CompressedImage")}
    names = ("Vocabulary", "vocabulary_text", "SetVocabulary")
    expected |= {f"{kind}: {end}" for kind in names for end in ("accepted", "rejected")}
    expected |= {f"{kind}: bytes that are no message" for kind in ("Image", "CompressedImage", "Locate", *names)}
    expected |= {"Locate: searched", "Locate: refused"}
    assert expected <= set(figures["outcomes"])
