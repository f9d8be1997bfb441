"""What is said of names that a tokenizer cuts off or reads alike, at 32 and at 77 tokens."""

import re

import pytest
import torch

from nerve_core.text.encoder import TextEncoder
from nerve_core.text.vocabulary import Vocabulary
from small_models import byte_tokenizer, small_clip

TEMPLATES = ("a {}.", "a photo of a {}.", "{} in a room")  # before the name: 1, 10 and 0 bytes, each a token


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module", params=[32, 77])
def encoder(request, clip):
    return TextEncoder(clip, byte_tokenizer(request.param), TEMPLATES, identity="x")


def cosine(encoder, one, other):
    return float(torch.dot(*encoder([one, other])))


def test_room_is_what_the_templates_and_the_ends_leave(encoder):
    length = encoder.limit.length
    assert length in (32, 77)
    assert encoder.limit.most == length - 2
    assert encoder.limit.least == length - 2 - len("aphotoofa")


def test_a_name_that_fits_is_no_matter_of_doubt_and_one_token_more_is(encoder):
    room = encoder.limit.least
    assert encoder.limit.doubts(Vocabulary(["x" * room, "mug|cup", "y" * (room - 1)])) == ()
    (doubt,) = encoder.limit.doubts(Vocabulary([f"cup|{'x' * room}yz"]))
    assert not doubt.grave
    assert f"has {room + 2} tokens, and {room} fit into the model's {encoder.limit.length}" in doubt.text
    assert "'yz' is not read" in doubt.text


@pytest.mark.parametrize(
    ("start", "one", "other"),
    [
        ("the thing on the left of the long brown table beside the window that is ", "red", "blue"),
        ("赤い箱" * 30, "赤", "青"),
        ("🚀" * 25, "🚀", "🍎"),
        ("e\u0301" * 60, "a", "b"),
        ("A  b\u3000" * 24, "c", "d"),
    ],
)
def test_names_that_differ_only_behind_the_cut_are_one_to_the_model_and_that_is_said_first(encoder, start, one, other):
    start = Vocabulary([start]).names[0]
    first, second = f"{start} {one}", f"{start} {other}"
    doubts = encoder.limit.doubts(Vocabulary([first, second, "ball"]))
    tokens = len(encoder._tokenizer(first, add_special_tokens=False)["input_ids"])
    if tokens <= encoder.limit.most:  # what differs is read in some template
        assert cosine(encoder, first, second) < 1 - 1e-4
        assert not any(doubt.grave for doubt in doubts)
        return
    assert cosine(encoder, first, second) == pytest.approx(1, abs=1e-5)
    assert [doubt.grave for doubt in doubts] == [True, False, False]
    assert repr(first) in doubts[0].text
    assert repr(second) in doubts[0].text
    for doubt, name, end in zip(doubts[1:], (first, second), (one, other), strict=True):
        assert int(re.search(r"has (\d+) tokens", doubt.text)[1]) > encoder.limit.least
        lost = re.search(r"words: '(.*)' is not read", doubt.text)[1]
        assert repr(name)[1:-1].endswith(lost.rpartition("...")[2])
        assert lost.endswith(end)


def test_names_that_differ_before_the_cut_are_not_alike(encoder):
    long = "x" * 100
    doubts = encoder.limit.doubts(Vocabulary([f"a{long}", f"b{long}"]))
    assert [doubt.grave for doubt in doubts] == [False, False]
    assert cosine(encoder, f"a{long}", f"b{long}") < 1 - 1e-4


def test_names_that_the_tokenizer_reads_alike_are_told_uncut_too_and_synonyms_of_one_class_are_not(encoder):
    assert cosine(encoder, "red  ball", "red ball") == pytest.approx(1, abs=1e-6)
    (doubt,) = encoder.limit.doubts(Vocabulary(["red  ball", "red ball"]))
    assert doubt.grave
    assert encoder.limit.doubts(Vocabulary(["red  ball|red ball"])) == ()


def test_of_many_names_a_few_are_told_and_the_others_counted(encoder):
    doubts = encoder.limit.doubts(Vocabulary([f"{k:03d}{'x' * 100}" for k in range(254)]))
    assert len(doubts) == 6
    assert doubts[-1].text == "the same holds for 249 more names"


def test_the_models_own_tokenizer_is_left_as_it_is(encoder):
    encoder.limit.doubts(Vocabulary(["x" * 120]))
    ids = encoder._tokenizer(["x" * 120], truncation=True, max_length=encoder._length)["input_ids"][0]
    assert len(ids) == encoder._length
