"""What to look for: the rules for names, synonyms and negatives."""

import dataclasses
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.text.vocabulary import MAX_NAMES, Vocabulary, VocabularyError

UNICODE = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)  # unpaired surrogates too
TRICKY = st.sampled_from(
    [
        *["ball", "BALL", " ball ", "Straße", "STRASSE", "é", "e\u0301", "Å", "\u212b", "ﬁ", "FI"],
        *["|", "a|b", "b|a", "a||b", "", " ", "\t", "\n", "a\nb", "a\x00b", "\x7f", "\x85", "\ud800"],
        *["x" * 128, "x" * 129, "é" * 128, "e\u0301" * 128],
        *["👩\u200d🚀", "منضدة", "机器人", "\u200b", "\u2028", "{}", "{0}", "%s", "<|endoftext|>"],
    ]
)


def expected(entries):
    """(names, synonyms, dropped) by the rules in words, or None for a set that is refused."""
    classes, dropped, taken = [], [], []
    for entry in entries:
        kept = []
        for part in entry.split("|"):
            word = part.strip()
            if word == "" or any(unicodedata.category(c) in {"Cc", "Cs"} for c in word):
                return None
            word = unicodedata.normalize("NFC", word)
            if len(word) > 128:
                return None
            if word.casefold() in taken:
                dropped.append(word)
            else:
                taken.append(word.casefold())
                kept.append(word)
        if kept:
            classes.append(tuple(kept))
    if len(classes) > 254:
        return None
    return tuple(c[0] for c in classes), tuple(classes), tuple(dropped)


@settings(max_examples=250)
@given(st.lists(TRICKY | UNICODE, max_size=8))
def test_any_unicode_is_taken_or_refused_by_the_rules_and_nothing_else(entries):
    rule = expected(entries)
    if rule is None:
        with pytest.raises(VocabularyError) as error:
            Vocabulary(entries)
        str(error.value).encode()  # a message can be printed and logged
        assert not any(unicodedata.category(c) in {"Cc", "Cs"} for c in str(error.value))
        return
    vocabulary = Vocabulary(entries)
    assert (vocabulary.names, vocabulary.synonyms, vocabulary.dropped) == rule
    assert len(vocabulary) == len(vocabulary.names)
    for word in (word for group in vocabulary.synonyms for word in group):
        assert word == unicodedata.normalize("NFC", word).strip() != ""
    again = Vocabulary(["|".join(group) for group in vocabulary.synonyms])
    assert again.synonyms == vocabulary.synonyms
    assert not again.dropped


@pytest.mark.parametrize("count", [0, 1, 253, 254])
def test_up_to_254_names_are_accepted(count):
    assert len(Vocabulary([f"thing {k}" for k in range(count)])) == count


@pytest.mark.parametrize("count", [255, 256, 1000])
def test_255_names_or_more_are_refused_whole_with_the_limit(count):
    with pytest.raises(VocabularyError, match=f"{count} names .* 254"):
        Vocabulary([f"thing {k}" for k in range(count)])


def test_what_counts_is_names_and_neither_duplicates_nor_synonyms():
    names = [f"thing {k}" for k in range(MAX_NAMES)]
    assert len(Vocabulary([*names, "THING 3"])) == MAX_NAMES
    assert len(Vocabulary([f"{name}|other {name}" for name in names])) == MAX_NAMES


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["ball", ""], "empty"),
        (["ball", "  \t "], "empty"),
        (["mug||cup"], "empty"),
        (["mug|"], "empty"),
        (["x" * 129], "129 characters: at most 128"),
        (["é" * 129], "129 characters"),
        (["ba\x00ll"], "control characters"),
        (["ba\nll"], "control characters"),
        (["ba\x1b[31mll"], "control characters"),
        (["ba\ud83dll"], "control characters"),
        ([b"ball"], "must be text"),
        ([3], "must be text"),
        ([None], "must be text"),
        ("ball", "Vocabulary.parse"),
    ],
    ids=repr,
)
def test_a_set_with_one_wrong_name_is_refused_with_the_rule(entries, said):
    with pytest.raises(VocabularyError, match=said):
        Vocabulary(entries)
    assert issubclass(VocabularyError, ValueError)


def test_length_is_counted_after_composition():
    assert Vocabulary(["e\u0301" * 128]).names == ("é" * 128,)
    with pytest.raises(VocabularyError):
        Vocabulary(["e\u0301" * 129])


def test_the_first_of_duplicates_wins_and_the_others_are_told():
    vocabulary = Vocabulary(["Ball", " ball", "cube", "BALL ", "Straße", "STRASSE", "e\u0301", "é"])
    assert vocabulary.names == ("Ball", "cube", "Straße", "é")
    assert vocabulary.dropped == ("ball", "BALL", "STRASSE", "é")


def test_synonyms_are_words_of_one_class_named_by_the_first():
    vocabulary = Vocabulary(["mug | cup|coffee mug", "ball"])
    assert vocabulary.names == ("mug", "ball")
    assert vocabulary.synonyms == (("mug", "cup", "coffee mug"), ("ball",))
    assert Vocabulary(["mug|cup", "Cup", "ball|MUG"]).synonyms == (("mug", "cup"), ("ball",))


def test_an_entry_named_as_the_background_is_no_class_and_its_words_compete_for_label_0():
    vocabulary = Vocabulary(["ball", "Background |wall", "cube", " BACKGROUND"])
    assert vocabulary.names == ("ball", "cube")
    assert vocabulary.background == ("Background", "wall")
    assert vocabulary.dropped == ("BACKGROUND",)
    assert vocabulary.entries == ("ball", "cube", "Background|wall")
    assert Vocabulary(vocabulary.entries).background == vocabulary.background
    assert "'Background' is the name of label 0" in vocabulary.remarks[1]
    assert not Vocabulary(["background"]).names
    assert not Vocabulary(["ball"]).background


def test_the_background_is_whatever_it_is_called():
    rest = Vocabulary(["background", "Rest"], background_name="rest")
    assert (rest.names, rest.background) == (("background",), ("Rest",))
    assert rest != Vocabulary(["background", "Rest"])
    assert Vocabulary(["e\u0301"], background_name=" É").background == ("é",)


@pytest.mark.parametrize("entry", ["wall|background", "wall| BACKGROUND |sky"])
def test_the_backgrounds_name_as_a_synonym_of_a_class_is_refused(entry):
    with pytest.raises(VocabularyError, match="is the name of label 0, the background, and cannot be a synonym"):
        Vocabulary(["ball", entry])
    assert Vocabulary([entry], background_name="rest").names == ("wall",)


def test_of_takes_a_vocabulary_a_sequence_of_names_and_a_text():
    made = Vocabulary(["ball", "mug|cup"])
    assert Vocabulary.of(made) is made
    for written in (["ball", "mug|cup"], ("ball", "mug|cup"), "ball, mug|cup", '["ball", "mug|cup"]'):
        assert Vocabulary.of(written) == made


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (3, "an int"),
        (None, "a NoneType"),
        ({"ball"}, "a set"),
        ({"ball": 1}, "a dict"),
        (b"ball", "a bytes"),
        (iter(["ball"]), "a list_iterator"),
        (["ball", 3], "a list with int in it"),
        ((["ball"],), "a tuple with list in it"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_of_refuses_other_types_with_what_is_accepted(given, what):
    with pytest.raises(TypeError, match=f"a list of names or one text; got {what}. Write"):
        Vocabulary.of(given)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ball, ladder\nmug|cup", ("ball", "ladder", "mug")),
        ("ball,,\n\n , ladder,", ("ball", "ladder")),
        ("ball\r\nladder", ("ball", "ladder")),
        ("traffic cone", ("traffic cone",)),
        ("", ()),
        (" \n,", ()),
    ],
)
def test_parse_reads_what_a_person_types(text, names):
    assert Vocabulary.parse(text).names == names


def test_parse_passes_negatives_on_and_keeps_the_rules():
    assert Vocabulary.parse("ball", negatives=["wall"]).negatives == ("wall",)
    assert Vocabulary.parse("ball").negatives is None
    with pytest.raises(VocabularyError):
        Vocabulary.parse("ball, " + "x" * 200)
    with pytest.raises(VocabularyError, match="empty"):
        Vocabulary.parse("mug|")


def test_negatives_follow_the_rules_for_words():
    assert Vocabulary(["ball"], negatives=[" wall ", "e\u0301"]).negatives == ("wall", "é")
    assert Vocabulary(["ball"], negatives=()).negatives == ()
    for wrong in ([""], ["x" * 129], ["a\nb"], [3], "wall"):
        with pytest.raises(VocabularyError):
            Vocabulary(["ball"], negatives=wrong)


def test_vocabularies_are_values():
    one, same = Vocabulary(["ball", "mug|cup"]), Vocabulary((" ball", "mug|cup"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Vocabulary(["mug|cup", "ball"])
    assert one != Vocabulary(["ball", "mug|cup"], negatives=())
    assert one != Vocabulary(["ball", "mug"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.names = ()


def test_there_is_a_bound_on_all_words_together():
    entries = ["|".join(f"{letter}{number}" for number in range(64)) for letter in "abcdefghijklmnop"]
    assert len(Vocabulary(entries)) == 16
    with pytest.raises(VocabularyError, match="1025 names, synonyms and negatives are too many: at most 1024"):
        Vocabulary([*entries, "one more"])
    with pytest.raises(VocabularyError, match="1025 names, synonyms"):
        Vocabulary(entries, negatives=["wall"])


def test_a_word_of_a_megabyte_is_refused_without_a_look_at_its_letters():
    with pytest.raises(VocabularyError, match="has 1000000 characters"):
        Vocabulary(["\u0301" * 1_000_000])
