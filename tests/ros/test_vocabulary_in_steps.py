"""A vocabulary that takes long to embed, over real DDS: masks go on meanwhile, and a newer vocabulary overtakes it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import nerve_core
from nerve_core.text.cache import EmbeddingCache

PICTURE = {"width": 120, "height": 90}
START = ["ball", "ladder"]
LARGE = [f"thing {number}" for number in range(200)]


@pytest.fixture(scope="module")
def rig(new_rig, tmp_path_factory):
    """The embedded pair, which embeds a word at once, with so many templates that 200 names take minutes."""
    folder = tmp_path_factory.mktemp("slow")
    embedded = Path(nerve_core.__file__).parent / "embedded"
    pair = json.loads((embedded / "pair.json").read_text())
    pair["name"] = "slow"
    pair["settings"] |= {"templates": [f"a photo number {k} of a {{}}." for k in range(500)], "negatives": []}
    for part in ("clip", "diffusion"):
        pair[part]["location"] = str(embedded / part)
    (folder / "pair.json").write_text(json.dumps(pair))
    rig = new_rig(vocabulary=START, model=str(folder), cache_dir=str(folder / "cache"))
    rig.node.wait_active()
    rig.listen("label_info", "mask", "class_confidence")
    rig.listener.wait("label_info")
    return rig


def names_of(event):
    return [seen["name"] for seen in event["classes"]]


def words_kept(rig):
    """Words of the large vocabulary that are in the cache on disk."""
    folder = Path(rig.talker.do("get_parameter", name="cache_dir")["value"])
    with closing(sqlite3.connect(EmbeddingCache(folder).path)) as db:
        return db.execute("SELECT count(*) FROM embeddings WHERE name LIKE 'thing %'").fetchone()[0]


def test_masks_go_on_while_a_large_vocabulary_is_embedded_and_a_newer_one_overtakes_it(rig):
    rig.talker.do("advertise", topic="image")
    rig.talker.do("advertise", topic="vocabulary")
    rig.talker.do("stream", picture=PICTURE, rate=10.0)
    try:
        rig.listener.wait("class_confidence")
        since = rig.listener.mark()
        rig.talker.do("vocabulary", names=LARGE)
        rig.node.wait_log("vocabulary of 200")
        place = rig.listener.mark()
        rig.listener.until(lambda: len(rig.listener.seen("mask", place)) >= 20, "20 masks meanwhile")
        meanwhile = rig.listener.seen("class_confidence", place)
        assert {tuple(names_of(event)) for event in meanwhile} == {tuple(START)}, "the large one was embedded too soon"
        while not words_kept(rig):  # words that are finished are kept, whatever becomes of the vocabulary
            rig.listener.wait("mask", since=rig.listener.mark())
        rig.talker.do("vocabulary", names=["cone"])
        rig.listener.wait("class_confidence", lambda event: names_of(event) == ["cone"], since=place)
    finally:
        rig.talker.do("stop_stream")
    told = [sorted(event["classes"].values()) for event in rig.listener.seen("label_info", since)]
    assert told == [["background", "cone"]]
    assert words_kept(rig) < len(LARGE) / 2
    assert not [line for line in rig.node.lines if "could not be embedded" in line or "Traceback" in line]
