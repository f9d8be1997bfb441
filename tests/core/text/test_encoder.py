"""Names -> text embeddings -> queries: equal to one text at a time, remembered, and in steps that end soon."""

import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from nerve_core.text import encoder as text_encoder
from nerve_core.text.cache import EmbeddingCache
from nerve_core.text.encoder import QueryEmbeddings, TextEncoder, exhaust, vocabulary_steps
from nerve_core.text.templates import TEMPLATE_SETS, template_set
from nerve_core.text.vocabulary import Vocabulary
from small_models import byte_tokenizer, small_clip

TEMPLATES = ("a photo of a {}.", "the {}", "{} in a room")


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
        self.model_max_length, self.eos_token_id = tokenizer.model_max_length, tokenizer.eos_token_id
        self.backend_tokenizer = tokenizer.backend_tokenizer

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


@pytest.mark.parametrize("most", [1, 30, 100, 10**6])
def test_the_size_of_a_step_changes_no_embedding(clip, tokenizer, monkeypatch, most):
    words = [f"{'long ' * (k % 4)}thing {k}" for k in range(23)]
    alone = torch.cat([TextEncoder(clip, tokenizer, TEMPLATES, identity="x")([word]) for word in words])
    monkeypatch.setitem(text_encoder._TOKENS_PER_STEP, "cpu", most)  # 1: every text by itself
    found = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(words)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


class Watched:
    """A CLIP that notes the shape of every input of its text model."""

    def __init__(self, clip):
        self.config, self.device, self.dtype, self.shapes = clip.config, clip.device, clip.dtype, []
        self.clip, self.text_projection = clip, clip.text_projection

    def text_model(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        return self.clip.text_model(input_ids=input_ids)


def test_a_step_is_one_pass_of_bounded_size_with_little_padding(clip, tokenizer):
    watched = Watched(clip)
    words = ["ball", "cup", "box", "a rather longer name of a thing", "x" * 128]
    steps = TextEncoder(watched, tokenizer, TEMPLATE_SETS["imagenet80"], identity="x").steps(words)
    passes = [len(watched.shapes) for _ in steps]
    assert passes == list(range(len(passes)))  # before each pass one yield, and none without a pass
    assert len(watched.shapes) == len(passes) > len(words)
    padded = sum(texts * length for texts, length in watched.shapes)
    assert max(texts * length for texts, length in watched.shapes) <= text_encoder._TOKENS_PER_STEP["cpu"]
    texts = [template.replace("{}", word) for word in words for template in TEMPLATE_SETS["imagenet80"]]
    whole = sum(min(77, len(tokenizer(each)["input_ids"])) for each in texts)
    assert sum(texts for texts, _ in watched.shapes) == len(texts)
    assert padded < 1.15 * whole


def test_short_words_of_few_templates_share_a_pass(clip, tokenizer):
    watched = Watched(clip)
    TextEncoder(watched, tokenizer, ("{}",), identity="x")([f"k{k}" for k in range(100, 200)])
    assert len(watched.shapes) == 1 + 100 * 6 // text_encoder._TOKENS_PER_STEP["cpu"]


@pytest.mark.parametrize("tokens", [1, 40, 256])
def test_words_that_were_finished_outlive_a_generator_that_is_given_up(clip, tokenizer, tmp_path, monkeypatch, tokens):
    monkeypatch.setitem(text_encoder._TOKENS_PER_STEP, "cpu", tokens)
    words = [f"thing {k}" for k in range(8)]
    total = sum(1 for _ in TextEncoder(clip, tokenizer, TEMPLATES, identity="x").steps(words))
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=EmbeddingCache(tmp_path))
    steps = encoder.steps(words)
    for _ in range(1 + total * 2 // 3):
        next(steps)
    steps.close()
    known = set(encoder._known)
    assert EmbeddingCache(tmp_path).get(encoder._space, words).keys() == known
    done = (total * 2 // 3) * len(words) // total
    assert done - len(words) // 3 - 1 <= len(known) < len(words)
    rest = encoder(words)  # nothing is half-done for those that come later
    torch.testing.assert_close(rest, TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(words), rtol=0, atol=1e-6)


def test_two_generators_at_once_do_not_disturb_each_other(clip, tokenizer, monkeypatch):
    monkeypatch.setitem(text_encoder._TOKENS_PER_STEP, "cpu", 1)
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")
    one, other = encoder.steps(["ball", "cube"]), encoder.steps(["cube", "cone"])
    for _ in range(4):
        next(one), next(other)
    first, second = exhaust(one), exhaust(other)
    torch.testing.assert_close(first[1], second[0], rtol=0, atol=1e-6)
    alone = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(["ball", "cube", "cone"])
    torch.testing.assert_close(torch.cat([first, second[1:]]), alone, rtol=0, atol=1e-6)


def test_known_words_take_no_step(clip, tokenizer):
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")
    encoder(WORDS)
    assert list(encoder.steps(WORDS)) == []
    assert encoder([]).shape == (0, 16)


def test_memory_is_bounded_and_the_words_in_use_stay(clip, tokenizer, monkeypatch):
    monkeypatch.setattr(text_encoder, "_WORDS_KEPT", 5)
    counted = Counted(tokenizer)
    encoder = TextEncoder(clip, counted, ("{}",), identity="x")
    many = [f"thing {k}" for k in range(12)]
    assert encoder(many).shape == (12, 16)  # more than are kept are served all the same
    assert len(encoder._known) == 5
    for k in range(20, 30):
        encoder(["ball", f"thing {k}"])
    assert len(encoder._known) == 5
    assert counted.texts.count("ball") == 1


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float32, "not finite in float32: a weight is damaged; nerve models verify --deep"),
        (torch.bfloat16, "overflow in bfloat16; use precision bf16 or fp32"),
    ],
)
def test_values_that_are_not_finite_are_said_and_not_remembered(tokenizer, tmp_path, dtype, said):
    clip = small_clip().to(dtype)
    clip.text_projection.weight.data[0] = torch.inf
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=EmbeddingCache(tmp_path))
    with pytest.raises(RuntimeError, match=said):
        encoder(["ball"])
    assert not encoder._known
    assert not list(tmp_path.iterdir())


def test_models_that_pool_at_the_highest_token_are_padded_with_none_that_is_higher(tokenizer):
    clip = small_clip()
    clip.text_model.eos_token_id = 2  # as the configurations of CLIP's first release have it
    found = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(WORDS)
    for word, vector in zip(WORDS, found, strict=True):
        torch.testing.assert_close(
            vector.double(), plain_embedding(clip, tokenizer, word, TEMPLATES), rtol=0, atol=1e-5
        )


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


def test_a_second_encoder_reads_from_disk_and_calls_no_model(clip, tokenizer, tmp_path):
    written = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=EmbeddingCache(tmp_path))(WORDS)
    second = TextEncoder(silent_clip(clip), tokenizer, TEMPLATES, identity="x", cache=EmbeddingCache(tmp_path))
    assert torch.equal(second(WORDS), written)
    shutil.rmtree(tmp_path)
    assert torch.equal(second(WORDS), written)  # from memory
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
    cache = EmbeddingCache(tmp_path)
    TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=cache)(["ball"])
    other = TextEncoder(silent_clip(clip), tokenizer, templates, identity=identity, cache=cache)
    with pytest.raises(AssertionError, match="was called"):
        other(["ball"])


@pytest.mark.parametrize("shape", [(15,), (1, 16), (), (16, 1)], ids=str)
def test_an_entry_of_another_shape_is_worked_out_again_and_mended(clip, tokenizer, tmp_path, shape):
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x")
    right = encoder(["ball", "cube"])
    cache = EmbeddingCache(tmp_path)
    cache.put(encoder._space, {"ball": np.ones(shape, np.float32)})
    found = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=cache)(["ball", "cube"])
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
    mended = TextEncoder(silent_clip(clip), tokenizer, TEMPLATES, identity="x", cache=cache)(["ball", "cube"])
    assert torch.equal(mended, found)


def test_a_cache_that_cannot_be_written_costs_no_embedding(clip, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    encoder = TextEncoder(clip, tokenizer, TEMPLATES, identity="x", cache=EmbeddingCache(tmp_path / "file"))
    found = encoder(["ball", "cube"])
    encoder(["cone"])
    assert torch.equal(found, TextEncoder(clip, tokenizer, TEMPLATES, identity="x")(["ball", "cube"]))
    assert len(caplog.records) == 1


# --- what needs no model libraries --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["text.vocabulary", "images.visualize", "models.pairs", "cli.app", "text.cache", "text.templates"]
)
def test_names_colours_and_the_command_do_without_the_model_libraries(module):
    code = (
        f"import sys, nerve_core.{module}\n"
        "from nerve_core import Vocabulary\n"
        "print({'torch', 'transformers', 'diffusers'} & {name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "set()\n"


# --- names, synonyms and negatives as queries ---------------------------------------------------------------


class Planned:
    """An encoder whose embeddings are given: angle in degrees on a circle, by word."""

    def __init__(self, **angles):
        self.angles, self.asked, self.size = angles, [], 2

    def __call__(self, words):
        return exhaust(self.steps(words))

    def steps(self, words):
        self.asked += words
        yield
        turns = torch.deg2rad(torch.tensor([float(self.angles[word]) for word in words]))
        return torch.stack([turns.cos(), turns.sin()], 1)


def embed(vocabulary, encoder, defaults=(), **options):
    found = exhaust(vocabulary_steps(vocabulary, encoder, defaults, **options))
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


def test_the_words_of_the_background_are_negatives_beside_the_others():
    encoder = Planned(ball=0, background=90, wall=120, sky=200, near=5)
    given = Vocabulary(["background|near", "ball"], negatives=["sky"])
    assert angles_of(embed(given, encoder, ["wall"])) == [0, 200, 90]  # near has the meaning of ball
    found = embed(Vocabulary(["background|wall", "ball"]), encoder, ["wall"])
    assert angles_of(found) == [0, 120, 90]
    assert found.classes.tolist() == [1, 0, 0]


def test_a_negative_that_was_asked_for_is_dropped_by_name_synonyms_and_case_too():
    encoder = Planned(ball=0, mug=90, cup=100, Cup=180, BALL=200, wall=270)
    found = embed(Vocabulary(["ball", "mug|cup"]), encoder, ["Cup", "wall", "BALL", "mug"])
    assert angles_of(found) == [0, 90, 100, 270]
    assert not {"Cup", "BALL"} & set(encoder.asked)


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


def test_a_vocabulary_in_steps_is_the_vocabulary_in_one_go(clip, tokenizer, monkeypatch):
    monkeypatch.setitem(text_encoder._TOKENS_PER_STEP, "cpu", 100)
    vocabulary = Vocabulary(["mug|cup", "ball", "a longer name"])
    steps = vocabulary_steps(vocabulary, TextEncoder(clip, tokenizer, TEMPLATES, identity="x"), ["wall", "sky"])
    taken = 0
    while True:
        try:
            next(steps)
            taken += 1
        except StopIteration as done:
            found = done.value
            break
    assert taken >= 3
    whole = embed(vocabulary, TextEncoder(clip, tokenizer, TEMPLATES, identity="x"), ["wall", "sky"])
    assert torch.equal(found.embeddings, whole.embeddings)
    assert torch.equal(found.classes, whole.classes)
    assert found.vocabulary is vocabulary
