"""Names in one text or a file: what is plainly meant is read, the rest refused, and nothing is opened or evaluated."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerve_core.text.parsing import MAX_TEXT, VocabularyError, read_names, split_names
from nerve_core.text.vocabulary import Vocabulary

LISTS = [
    '["ball", "mug|cup"]',
    "['ball', 'mug|cup']",
    "[ball, mug|cup]",
    ' [ "ball" ,mug|cup ] \n',
    '[\n  "ball",\n  "mug|cup"\n]',
    "ball, mug|cup",
    "ball; mug|cup",
    "ball\nmug|cup",
    "ball\r\nmug|cup\r\n",
    "'ball', 'mug|cup'",
    '"ball", "mug|cup"',
    "\u201cball\u201d, \u201cmug|cup\u201d",
    "\u2018ball\u2019; \u2018mug|cup\u2019",
    "'ball, mug|cup'",
    '"ball; mug|cup"',
    "- ball\n- mug|cup",
    "  * ball\n\n  * mug|cup\n",
    "- 'ball'\n- \"mug|cup\"",
    "ball,,\n\n ;, mug|cup,",
]


@pytest.mark.parametrize("text", LISTS, ids=repr)
def test_the_usual_ways_of_writing_a_list_are_read(text):
    assert split_names(text) == ["ball", "mug|cup"]
    assert Vocabulary.parse(text).synonyms == (("ball",), ("mug", "cup"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        (" \n,;", []),
        ("[]", []),
        ("['']", []),
        ('""', []),
        ("traffic cone", ["traffic cone"]),
        ("ball.mug", ["ball.mug"]),
        ("1, true, null, 2.5", ["1", "true", "null", "2.5"]),
        ("[1, true]", ["1", "true"]),
        ('["a, b", "caf\\u00e9"]', ["a, b", "café"]),
        ("\"a, b\", 'it''s; so'", ["a, b", "it's; so"]),
        ("driver's seat, men's shoe", ["driver's seat", "men's shoe"]),
        ('[driver seat, "driver\'s seat"]', ["driver seat", "driver's seat"]),
        ('screen 5"', ['screen 5"']),
        ("[red] ball, [blue] cube", ["[red] ball", "[blue] cube"]),
        ("[bold]mug[/bold]", ["[bold]mug[/bold]"]),
        ("[/mug], ball", ["[/mug]", "ball"]),
        ("赤い箱、青い箱；球", ["赤い箱", "青い箱", "球"]),
        ("كرة، كوب", ["كرة", "كوب"]),
        ("t-shirt, - , x-ray", ["t-shirt", "-", "x-ray"]),
        ("@home", ["@home"]),
        ("__import__('os').abort()", ["__import__('os').abort()"]),
    ],
    ids=repr,
)
def test_names_are_taken_as_they_are(text, names):
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["ball", "cube"', "bracket without its partner"),
        ("[ball, cube", "bracket without its partner"),
        ('"ball", "cube"]', "quotation mark that is not closed"),
        ("ball, cube]", "bracket without its partner"),
        ("'ball, cube", "quotation mark that is not closed"),
        ('"mug"|"cup"', "quotes go around a whole entry"),
        ("{data: 'ball'}", "a mapping, not a list"),
        ('{"names": ["ball"]}', "a mapping, not a list"),
        ("data: ball", "a key and not a name"),
        ("labels: from 0\nball", "a key and not a name"),
        ('[["ball"], ["mug", "cup"]]', "synonyms are written"),
        ('["ball"], ["mug"]', "a list among names"),
        ("ball\n- mug", "a line of a list"),
        ("names.txt", "no file is opened here"),
        ("/etc/names.yaml", "no file is opened here"),
    ],
    ids=repr,
)
def test_what_is_no_list_of_names_is_refused_with_what_is_accepted(text, said):
    with pytest.raises(VocabularyError, match=said) as error:
        split_names(text)
    assert "mug|cup" in str(error.value)


@given(st.lists(st.text("ab '\",;[]|-{}\\é箱", max_size=6).filter(str.strip), max_size=5))
def test_a_json_list_is_read_as_json_reads_it_and_any_text_is_read_or_refused(names):
    assert split_names(json.dumps(names)) == names
    assert split_names(json.dumps(names, ensure_ascii=False)) == names
    try:
        found = split_names(",".join(names))
    except VocabularyError:
        return
    assert all(name.strip() for name in found)


HOSTILE = [
    *("[" * 200_000, "[" * 100_000 + "]" * 100_000, "[" + "'" * 300_001 + "]", " " * 500_000 + "'", "- " * 200_000),
    *("'" * 400_001, "'a,'a" * 60_000, "''a" * 100_000 + ",", '"' * 99_999, ",'" * 2000, "," * 5000),
    "x" * (MAX_TEXT + 1),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:4]!r} x {len(text)}")
def test_hostile_texts_end_soon(text):
    began = time.process_time()
    try:
        Vocabulary.parse(text)
    except VocabularyError as error:
        assert len(str(error)) < 400  # noqa: PT017
    assert time.process_time() - began < 2


# --- a file of names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*LISTS, "# of mine\nball\n  # and\nmug|cup\n", "\ufeffball\nmug|cup"], ids=repr)
def test_a_file_holds_what_a_text_does_and_comments(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    assert read_names(str(path)) == read_names(f" @{path} ") == ["ball", "mug|cup"]
    path.write_text(text.removeprefix("\ufeff"), encoding="utf-16")
    assert read_names(str(path)) == ["ball", "mug|cup"]


def test_a_file_is_meant_by_an_ending_a_folder_or_an_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.json").write_text('["ball"]')
    (tmp_path / "ball").write_text("cube")
    (tmp_path / "mug").mkdir()
    assert read_names("names.json") == ["ball"]
    assert read_names("ball") == ["ball"]
    assert read_names("@ball") == read_names(str(tmp_path / "ball")) == ["cube"]
    assert read_names("mug") == ["mug"]
    assert read_names("ball, cube") == ["ball", "cube"]
    assert read_names("x" * 5000) == ["x" * 5000]


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(VocabularyError, match="there is no such file"):
        read_names(str(tmp_path / "gone.txt"))
    with pytest.raises(OSError, match="gone"):
        read_names(f"@{tmp_path}/gone")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"x" * (MAX_TEXT + 1))
    (tmp_path / "d.txt").write_text('["ball"')
    for name in "abcd":
        with pytest.raises(VocabularyError, match=f"{name}.txt"):
            read_names(str(tmp_path / f"{name}.txt"))
