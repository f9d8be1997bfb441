"""Names -> queries -> text embeddings: the rules for names, templates, the disk cache, negatives."""

import dataclasses
import logging
import multiprocessing
import types
import unicodedata
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.templates import TEMPLATE_SETS, template_set
from nerve_core.text import QueryEmbeddings, TextEncoder, embed_vocabulary
from nerve_core.vocabulary import MAX_NAMES, Vocabulary, VocabularyError
from small_models import byte_tokenizer, small_clip

TEMPLATES = ("a photo of a {}.", "the {}", "{} in a room")

# --- the rules for names ------------------------------------------------------------------------------------

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


# --- text embeddings ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Counted:
    """A tokenizer that remembers which texts it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, texts, **options):
        self.texts += texts
        return self.tokenizer(texts, **options)


def silent_clip(clip):
    """A CLIP with the same sizes whose text tower must not be used."""

    def refuse(*_, **__):
        raise AssertionError("the text model was called")

    return types.SimpleNamespace(
        config=clip.config, device=clip.device, dtype=clip.dtype, text_model=refuse, text_projection=refuse
    )


def plain_embedding(clip, tokenizer, word, templates):
    """One text at a time, unpadded, through transformers' own text features: normalise, average, normalise."""
    total = torch.zeros(clip.config.projection_dim, dtype=torch.float64)
    for template in templates:
        before, after = template.split("{}")
        tokens = tokenizer([before + word + after], truncation=True, max_length=77, return_tensors="pt")
        with torch.inference_mode():
            features = clip.get_text_features(**tokens)
        vector = getattr(features, "pooler_output", features)[0].double()
        total += vector / vector.square().sum().sqrt()
    mean = total / len(templates)
    return mean / mean.square().sum().sqrt()


WORDS = ["ball", "a much longer name of a thing", "é 机器人 👩‍🚀", "{}", "x" * 128, "ball"]


@pytest.mark.parametrize("templates", [TEMPLATES, ("{}",), TEMPLATE_SETS["imagenet80"]], ids=len)
def test_a_word_is_the_normalised_mean_of_its_normalised_templates(clip, tokenizer, templates):
    encoder = TextEncoder(clip, tokenizer, templates, identity="x")
    words = WORDS if len(templates) < 10 else WORDS[:2]
    found = encoder(words)
    assert found.shape == (len(words), 16)
    assert found.dtype == torch.float32
    for word, vector in zip(words, found, strict=True):
        expected = plain_embedding(clip, tokenizer, word, templates)
        torch.testing.assert_close(vector.double(), expected, rtol=0, atol=1e-5)
        assert vector.norm() == pytest.approx(1, abs=1e-5)


def test_the_embedding_of_a_word_does_not_depend_on_its_company(clip, tokenizer):
    together = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(WORDS)
    for word, vector in zip(WORDS, together, strict=True):
        alone = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")([word])[0]
        torch.testing.assert_close(alone, vector, rtol=0, atol=1e-6)


def test_many_words_are_embedded_in_batches(clip, tokenizer, monkeypatch):
    words = [f"thing {k}" for k in range(23)]
    whole = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(words)
    monkeypatch.setattr("nerve_core.text._TEXT_BATCH", 10)  # cuts words apart
    torch.testing.assert_close(TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(words), whole, rtol=0, atol=1e-6)


def test_a_tokenizer_that_states_no_length_is_cut_to_the_models_positions(clip):
    boundless = byte_tokenizer(10**30)
    found = TextEncoder(clip, boundless, TEMPLATES, identity="x")(["x" * 128])[0]
    torch.testing.assert_close(
        found.double(), plain_embedding(clip, byte_tokenizer(), "x" * 128, TEMPLATES), rtol=0, atol=1e-5
    )


def test_each_word_is_embedded_once_whatever_is_asked_for_again(clip, tokenizer):
    counted = Counted(tokenizer)
    encoder = TextEncoder(clip, counted, TEMPLATES, identity="x")
    first = encoder(["ball", "cube", "ball"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder(["cube", "ball"]), first[[1, 0]])
    encoder(["cube", "cone"])
    assert sorted(counted.texts) == sorted(
        t.replace("{}", word) for word in ("ball", "cube", "cone") for t in TEMPLATES
    )


@pytest.mark.parametrize("templates", [(), ("no place",), ("two {} and {}",), ("{}", "none")])
def test_a_template_without_exactly_one_place_is_refused(clip, tokenizer, templates):
    with pytest.raises(ValueError, match="exactly one"):
        TextEncoder(clip, tokenizer, templates, identity="x")


def test_the_template_sets_are_what_their_names_say():
    assert len(TEMPLATE_SETS["imagenet80"]) == len(set(TEMPLATE_SETS["imagenet80"])) == 80
    for templates in TEMPLATE_SETS.values():
        assert all(template.count("{}") == 1 for template in templates)
    assert template_set("photo") == ("a photo of a {}.",)
    assert template_set(["the {}", "a {}"]) == ("the {}", "a {}")
    with pytest.raises(ValueError, match="imagenet80"):
        template_set("imagenet")


# --- the disk cache -----------------------------------------------------------------------------------------


def entries(cache):
    return sorted(cache.rglob("*.safetensors"))


def test_a_second_encoder_reads_from_disk_and_calls_no_model(clip, tokenizer, tmp_path):
    written = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)(WORDS)
    assert len(entries(tmp_path)) == len(set(WORDS))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}
    second = TextEncoder(silent_clip(clip), tokenizer, TEMPLATES, identity="x", cache=tmp_path)
    assert torch.equal(second(WORDS), written)
    with pytest.raises(AssertionError, match="was called"):
        second(["unheard of"])


@pytest.mark.parametrize(
    ("identity", "templates"),
    [
        ("y", TEMPLATES),
        ("x", TEMPLATES[:2]),
        ("x", TEMPLATES[::-1]),
        ("x\0" + TEMPLATES[0], TEMPLATES[1:]),
        ("", ("x{}", *TEMPLATES)),
    ],
)
def test_other_weights_or_templates_never_share_an_entry(clip, tokenizer, tmp_path, identity, templates):
    TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)(["ball"])
    other = TextEncoder(silent_clip(clip), tokenizer, templates, identity=identity, cache=tmp_path)
    with pytest.raises(AssertionError, match="was called"):
        other(["ball"])


def test_words_that_look_alike_never_share_an_entry(clip, tokenizer, tmp_path):
    words = ["ball", "Ball", "ball ", "b/all", "../ball", "é", "e\u0301"]
    TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)(words)
    assert len(entries(tmp_path)) == len(words)
    assert {path.parent for path in entries(tmp_path)} == {entries(tmp_path)[0].parent}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def other_tensor(**tensors):
    return lambda path: safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 300),
        truncate,
        other_tensor(something=torch.ones(16)),
        other_tensor(embedding=torch.ones(15)),
        other_tensor(embedding=torch.ones(16, dtype=torch.float64)),
    ],
    ids=["empty", "garbage", "cut off", "no embedding", "wrong size", "wrong type"],
)
def test_a_damaged_entry_is_worked_out_again_and_mended(clip, tokenizer, tmp_path, damage):
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)
    right = encoder(["ball", "cube"])
    for path in entries(tmp_path):
        damage(path)
    again = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)(["ball", "cube"])
    torch.testing.assert_close(again, right, rtol=0, atol=1e-6)
    mended = TextEncoder(silent_clip(clip), tokenizer, TEMPLATES, identity="x", cache=tmp_path)(["ball", "cube"])
    torch.testing.assert_close(mended, right, rtol=0, atol=1e-6)


def test_a_cache_that_cannot_be_written_is_said_once_and_costs_no_frame(clip, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        found = encoder(["ball", "cube"])
        encoder(["cone"])
    assert torch.equal(found, TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(["ball", "cube"]))
    assert len(caplog.records) == 1
    assert str(tmp_path / "file") in caplog.text


def test_a_write_that_breaks_off_leaves_nothing_behind(clip, tokenizer, tmp_path, monkeypatch, caplog):
    def disk_full(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=tmp_path)(["ball"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "no space left" in caplog.text


def _write_over_and_over(barrier, cache):
    torch.set_num_threads(1)
    clip, tokenizer = small_clip(), byte_tokenizer()
    barrier.wait()
    for _ in range(5):
        encoder = TextEncoder(clip, tokenizer, ("{}",), identity="x", cache=cache)
        for k, vector in enumerate(encoder._embed([f"thing {k}" for k in range(12)])):
            encoder._remember(f"thing {k}", vector)
            assert encoder._recall(f"thing {k}")  # whole at any moment


def test_two_processes_that_write_the_same_words_at_once_do_no_harm(clip, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write_over_and_over, args=(barrier, tmp_path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(entries(tmp_path)) == 12
    assert not list(tmp_path.rglob("*.partial"))
    words = [f"thing {k}" for k in range(12)]
    read = TextEncoder(silent_clip(clip), tokenizer, ("{}",), identity="x", cache=tmp_path)(words)
    torch.testing.assert_close(read, TextEncoder(clip, tokenizer, ("{}",), identity="x")(words), rtol=0, atol=1e-6)


# --- names, synonyms and negatives as queries ---------------------------------------------------------------


class Planned:
    """An encoder whose embeddings are given: angle in degrees on a circle, by word."""

    def __init__(self, **angles):
        self.angles, self.calls = angles, []
        self._clip = types.SimpleNamespace(config=types.SimpleNamespace(projection_dim=2))

    def __call__(self, words):
        self.calls.append(list(words))
        turns = torch.deg2rad(torch.tensor([float(self.angles[word]) for word in words]))
        return torch.stack([turns.cos(), turns.sin()], 1)


def embed(vocabulary, encoder, defaults=(), **options):
    found = embed_vocabulary(vocabulary, encoder, defaults, **options)
    assert isinstance(found, QueryEmbeddings)
    assert found.names == vocabulary.names
    assert found.classes.dtype == torch.int64
    assert len(found.embeddings) == len(found.classes)
    return found


def angles_of(found):
    return [round(float(torch.rad2deg(torch.atan2(y, x))), 1) % 360 for x, y in found.embeddings]


def test_queries_are_the_words_of_each_class_in_order_then_the_negatives():
    encoder = Planned(mug=0, cup=10, ball=90, wall=180, sky=270)
    found = embed(Vocabulary(["mug|cup", "ball"]), encoder, ["wall", "sky"])
    assert found.classes.tolist() == [1, 1, 2, 0, 0]
    assert angles_of(found) == [0, 10, 90, 180, 270]


def test_the_vocabularys_negatives_take_the_place_of_the_pairs():
    encoder = Planned(ball=0, wall=120, sky=200)
    assert angles_of(embed(Vocabulary(["ball"], negatives=["sky"]), encoder, ["wall"])) == [0, 200]
    assert angles_of(embed(Vocabulary(["ball"], negatives=()), encoder, ["wall"])) == [0]
    assert angles_of(embed(Vocabulary(["ball"]), encoder, ["wall"])) == [0, 120]


def test_a_negative_that_was_asked_for_is_dropped_by_name_synonyms_and_case_too():
    encoder = Planned(ball=0, mug=90, cup=100, Cup=180, BALL=200, wall=270)
    found = embed(Vocabulary(["ball", "mug|cup"]), encoder, ["Cup", "wall", "BALL", "mug"])
    assert angles_of(found) == [0, 90, 100, 270]
    assert ["Cup", "BALL"] not in encoder.calls


def test_a_negative_given_twice_is_one_query():
    encoder = Planned(ball=0, wall=120, Wall=120)
    assert angles_of(embed(Vocabulary(["ball"], negatives=["wall", "Wall", "wall"]), encoder)) == [0, 120]


def test_a_negative_of_nearly_the_same_meaning_is_dropped():
    # cos 25.84 deg = 0.9000: one side of it stays, the other goes
    encoder = Planned(ball=0, cube=100, far=25.9, near=25.8, close=-20, beyond=120, opposite=180)
    found = embed(Vocabulary(["ball", "cube"]), encoder, ["far", "near", "close", "beyond", "opposite"])
    assert angles_of(found) == [0, 100, 25.9, 180]


@pytest.mark.parametrize(("names", "added"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_three_names_or_more_add_their_mean_as_a_negative(names, added):
    encoder = Planned(a=0, b=30, c=100, d=210, wall=300)
    words = ["a", "b", "c", "d"][:names]
    found = embed(Vocabulary(words), encoder, ["wall"])
    assert found.classes.tolist() == [*range(1, names + 1), 0, *[0] * added]
    if added:
        mean = encoder(words).mean(0)
        torch.testing.assert_close(found.embeddings[-1], mean / mean.norm())
    without = embed(Vocabulary(words), encoder, ["wall"], mean_negative=False)
    assert without.classes.tolist() == [*range(1, names + 1), 0]


def test_the_mean_counts_every_synonym_and_three_synonyms_are_not_three_names():
    encoder = Planned(a=0, b=30, c=100, d=210)
    found = embed(Vocabulary(["a|b", "c", "d"]), encoder)
    mean = encoder(["a", "b", "c", "d"]).mean(0)
    torch.testing.assert_close(found.embeddings[-1], mean / mean.norm())
    assert embed(Vocabulary(["a|b|c", "d"]), encoder).classes.tolist() == [1, 1, 1, 2]


def test_no_names_are_no_queries():
    found = embed(Vocabulary([]), Planned(wall=0), ["wall"])
    assert found.embeddings.shape == (0, 2)
    assert found.classes.shape == (0,)


def test_254_names_with_the_real_encoder(clip, tokenizer):
    vocabulary = Vocabulary([f"thing {k}" for k in range(254)])
    encoder = TextEncoder(clip, tokenizer, ("{}",), identity="x")
    found = embed(vocabulary, encoder, ())
    assert found.classes.tolist() == [*range(1, 255), 0]
    torch.testing.assert_close(found.embeddings.norm(dim=-1), torch.ones(255), rtol=0, atol=1e-5)
