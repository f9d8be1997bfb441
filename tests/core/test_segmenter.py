"""The Segmenter on the embedded pair and drawn scenes: results for every input, and errors for wrong ones.

How good the masks are is measured elsewhere; nothing here depends on what the weights have learnt.
"""

import dataclasses
import gc
import json
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from nerve_core import ClassConfidence, OutOfMemory, Segmentation, Segmenter, Vocabulary
from nerve_core import segmenter as module
from nerve_core.embedded.scenes import NAMES, draw_scene
from nerve_core.models.pairs import find_pair
from nerve_core.readout import carry_labels, describe_classes, read_out
from nerve_core.segmenter import STAGES
from nerve_core.text.encoder import exhaust, vocabulary_steps
from nerve_core.walk.edges import pixel_transition

# a fraction of the pair's tokens and templates: the same path in a fraction of the time
SMALL = {"input_size": (64, 96), "short_side": 72, "templates": ("a {}.",)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def segmenter(cache):
    return Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=SMALL)


@pytest.fixture(scope="module")
def scene():
    return draw_scene(7, size=(120, 160))


def same(one: Segmentation, other: Segmentation) -> bool:
    masks = (one.labels == other.labels).all() and (one.confidence_u8 == other.confidence_u8).all()
    return bool(masks) and one.class_confidence == other.class_confidence


def assert_sound(found, size, names):
    """Everything the interface promises of one segmented image."""
    assert found.names == tuple(names)
    for array in (found.labels, found.confidence_u8):
        assert array.shape == size
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
    assert found.labels.max() <= len(names)
    assert found.confidence.dtype == np.float32
    assert found.confidence.min() >= 0
    assert found.confidence.max() <= 1
    assert (found.confidence == found.confidence_u8.astype(np.float32) / 255).all()
    assert [item.name for item in found.class_confidence] == list(names)
    for label, item in enumerate(found.class_confidence, 1):
        assert isinstance(item, ClassConfidence)
        assert item.label == label
        assert item.area == (found.labels == label).sum()
        assert (item.box is None) == (item.centroid is None) == (item.area == 0)
        for value in (item.presence, item.mean_probability, item.peak_probability):
            assert 0 <= value <= 1
        if item.area:
            assert item.mean_probability == pytest.approx(found.confidence[found.labels == label].mean(), abs=1e-6)
            assert item.peak_probability >= found.confidence[found.labels == label].max() - 1 / 255
    assert set(found.timings) == {*STAGES, "total"}
    assert found.timings["total"] == pytest.approx(sum(found.timings[stage] for stage in STAGES))


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (7, 5), (5, 301), (401, 3), (119, 161), (480, 640), (1080, 1920)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_an_image_of_any_size_has_a_mask_of_its_size(segmenter, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert_sound(segmenter(image, Vocabulary(["ball", "mug|cup"])), size, ["ball", "mug"])


def test_a_frame_is_its_rooms_one_after_the_other(segmenter, scene):
    vocabulary = Vocabulary(["ball", "cube|box", "door"])
    found = segmenter(scene.image, vocabulary)
    queries = segmenter.embed(vocabulary)
    G, Q, K = segmenter.frame(scene.image, queries)
    rows, columns = segmenter.grid
    assert G.shape == (rows * columns, len(queries.embeddings))
    assert Q.shape == K.shape
    assert Q.shape[1] == rows * columns
    torch.testing.assert_close(G.sum(-1), torch.ones(len(G)), rtol=0, atol=1e-5)
    P = segmenter.refine(Q, K, G).P
    torch.testing.assert_close(P.sum(-1), torch.ones(len(P)), rtol=0, atol=1e-4)
    pixels = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255
    edges = pixel_transition(pixels, segmenter.settings.edges)
    stages, config = (G, P, queries.classes, 3, (rows, columns)), segmenter.settings.readout
    read = read_out(*stages, (120, 160), config, drawn=carry_labels(*stages, config, edges))
    assert (found.labels == read.labels.numpy()).all()
    assert (found.confidence_u8 == read.confidence.numpy()).all()
    assert found.class_confidence == describe_classes(queries.names, read)
    assert found.operator == "dense fused"


def test_the_walk_changes_what_clip_alone_says(segmenter, scene):
    queries = segmenter.embed(Vocabulary(NAMES))
    G, Q, K = segmenter.frame(scene.image, queries)
    assert (segmenter.refine(Q, K, G).P - G).abs().max() > 0.01


def test_the_same_frame_has_the_same_mask_whatever_came_between(segmenter, cache, scene):
    vocabulary = Vocabulary(["ball", "cube", "door"])
    first = segmenter(scene.image, vocabulary)
    assert same(segmenter(scene.image, vocabulary), first)
    segmenter(draw_scene(8, size=(90, 50)).image, Vocabulary(["star"]))
    segmenter(draw_scene(9, size=(33, 200)).image, vocabulary)
    torch.manual_seed(99)
    segmenter(draw_scene(9, size=(64, 64)).image, Vocabulary([]))
    assert same(segmenter(scene.image, vocabulary), first)
    fresh = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=SMALL)
    assert same(fresh(scene.image, vocabulary), first)


def test_the_order_of_names_only_renumbers_the_labels(segmenter, scene):
    names = list(NAMES[:6])
    order = [3, 0, 5, 1, 4, 2]
    one = segmenter(scene.image, Vocabulary(names))
    other = segmenter(scene.image, Vocabulary([names[k] for k in order]))
    renumbered = np.zeros(7, np.uint8)
    for new, old in enumerate(order, 1):
        renumbered[old + 1] = new
    agree = renumbered[one.labels] == other.labels
    assert agree.mean() > 0.9999  # sums in another order may tip a tie
    assert np.abs(one.confidence_u8.astype(int) - other.confidence_u8).max() <= 1
    for new, old in enumerate(order):
        assert other.class_confidence[new].presence == pytest.approx(one.class_confidence[old].presence, abs=1e-4)


def test_the_image_is_read_as_rgb_the_right_way_up(segmenter, scene):
    vocabulary = Vocabulary(NAMES)
    queries = segmenter.embed(vocabulary)
    G = segmenter.frame(scene.image, queries)[0]
    swapped = segmenter.frame(scene.image[:, :, ::-1], queries)[0]
    flipped = segmenter.frame(scene.image[::-1], queries)[0]
    assert (G - swapped).abs().max() > 0.01
    assert (G - flipped).abs().max() > 0.01


def test_an_empty_vocabulary_leaves_every_pixel_unlabelled_without_running_a_network(segmenter, scene, monkeypatch):
    monkeypatch.setattr(segmenter, "frame_part", None)
    for vocabulary in (Vocabulary([]), segmenter.embed(Vocabulary())):
        found = segmenter(scene.image, vocabulary)
        assert (found.labels == 255).all()
        assert (found.confidence == 0).all()
        assert found.labels.shape == found.confidence.shape == (120, 160)
        assert found.labels.dtype == found.confidence_u8.dtype == np.uint8
        assert found.names == found.class_confidence == ()
        assert set(found.timings) == {*STAGES, "total"}


@pytest.mark.parametrize("negatives", [None, ()])
def test_one_name_is_enough(segmenter, scene, negatives):
    found = segmenter(scene.image, Vocabulary(["ball"], negatives=negatives))
    assert_sound(found, (120, 160), ["ball"])
    if negatives == ():  # nothing else to be
        assert (found.labels == 1).all()
        assert (found.confidence_u8 == 255).all()


def test_names_may_be_given_as_a_list_or_a_text(segmenter, scene):
    wanted = segmenter(scene.image, Vocabulary(["ball", "mug|cup"]))
    for given in (["ball", "mug|cup"], ("ball", "mug|cup"), "ball, mug|cup", segmenter.embed(["ball", "mug|cup"])):
        assert same(segmenter(scene.image, given), wanted)
    assert segmenter(scene.image, []).names == ()


@pytest.mark.parametrize("given", [3, None, {"ball"}, ["ball", 3], b"ball"], ids=repr)
def test_what_is_no_vocabulary_is_a_type_error(segmenter, scene, given):
    with pytest.raises(TypeError, match="a vocabulary must be a Vocabulary, a list of names or one text; got a"):
        segmenter(scene.image, given)
    with pytest.raises(TypeError, match="segment takes what embed returns"):
        segmenter.segment(segmenter.encode(scene.image), ["ball"])


def test_doubts_about_a_vocabulary_are_logged_once_the_gravest_as_an_error(segmenter, scene, caplog):
    long = "the thing that stands on the left of the long brown table beside the window in the hall, which is "
    vocabulary = Vocabulary([f"{long}red", f"{long}blue", "ball"])
    for _ in range(2):
        segmenter(scene.image, vocabulary)
    assert [record.message for record in caplog.records] == [doubt.text for doubt in segmenter.doubts(vocabulary)]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING", "WARNING"]
    assert "does not know" in caplog.records[-1].message
    caplog.clear()
    segmenter.warm_up((60, 80))
    segmenter(scene.image, ["ball", "Cardboard Box"])
    assert not caplog.records


def test_254_names_are_segmented_at_once(segmenter, scene):
    names = [*NAMES, *(f"thing {k}" for k in range(254 - len(NAMES)))]
    assert_sound(segmenter(scene.image, Vocabulary(names)), (120, 160), names)


def test_names_in_any_script_are_segmented(segmenter, scene):
    names = ["球", "كرة", "👩\u200d🚀", "é" * 128]
    assert_sound(segmenter(scene.image, Vocabulary(names)), (120, 160), names)


@pytest.mark.parametrize(
    "image",
    [
        None,
        [[[0, 0, 0]]],
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), bool),
        torch.zeros((4, 4, 3), dtype=torch.uint8),
    ],
    ids=lambda image: f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', []))}",
)
def test_what_is_no_image_is_refused_with_what_is(segmenter, image):
    for vocabulary in (Vocabulary(["ball"]), Vocabulary([])):
        with pytest.raises(ValueError, match=r"uint8 array \[rows, columns, 3\] in RGB order") as error:
            segmenter(image, vocabulary)
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    assert got in str(error.value)
    with pytest.raises(ValueError, match="RGB order"):
        segmenter.frame(image, segmenter.embed(Vocabulary(["ball"])))


@pytest.mark.parametrize("layout", ["reversed", "sliced", "read-only", "transposed"])
def test_any_memory_layout_is_read_as_the_same_image_without_a_warning(segmenter, scene, layout):
    vocabulary = Vocabulary(["ball", "cube"])
    expected = segmenter(scene.image, vocabulary)
    image = {
        "reversed": scene.image[:, :, ::-1].copy()[:, :, ::-1],
        "sliced": np.pad(scene.image, ((0, 0), (0, 9), (0, 0)))[:, :160],
        "read-only": np.frombuffer(scene.image.tobytes(), np.uint8).reshape(scene.image.shape),
        "transposed": np.asfortranarray(scene.image),
    }[layout]
    before = image.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(segmenter(image, vocabulary), expected)
    assert (image == before).all()


def test_a_vocabulary_is_embedded_once_and_its_embeddings_serve_in_its_place(segmenter, scene, monkeypatch):
    vocabulary = Vocabulary(["ball", "something that nobody asked for yet"])
    texts = []
    original = segmenter.text._embed
    monkeypatch.setattr(segmenter.text, "_embed", lambda batch: (texts.extend(batch), original(batch))[1])
    queries = segmenter.embed(vocabulary)
    assert len(texts) >= len(segmenter.text.templates)  # the new name, and negatives that no test asked for yet
    texts.clear()
    assert segmenter.embed(vocabulary) is queries
    assert segmenter.embed(Vocabulary(["ball", "something that nobody asked for yet"])) is queries
    one, other = segmenter(scene.image, vocabulary), segmenter(scene.image, queries)
    assert same(one, other)
    assert one.names == other.names == vocabulary.names
    segmenter.embed(Vocabulary(["something that nobody asked for yet", "ball"]))  # known words, another order
    assert not texts


def test_frames_can_be_segmented_between_the_steps_of_a_new_vocabulary(segmenter, scene):
    vocabulary = Vocabulary([f"gadget {number}" for number in range(200)], negatives=())
    before = segmenter(scene.image, Vocabulary(["ball"]))
    steps, count = segmenter.embed_steps(vocabulary), 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            queries = done.value
            break
        assert vocabulary not in segmenter._vocabularies
        count += 1
        if count == 2:
            assert same(segmenter(scene.image, Vocabulary(["ball"])), before)
    assert count >= 2
    assert segmenter.embed(vocabulary) is queries
    for word, row in ((0, "gadget 0"), (199, "gadget 199")):
        alone = segmenter.embed(Vocabulary([row], negatives=()))
        torch.testing.assert_close(queries.embeddings[word], alone.embeddings[0], rtol=0, atol=1e-5)


def test_the_walk_can_start_from_the_frame_before(cache, scene):
    settings = {**SMALL, "previous_frame_start": True, "steps": 2}
    warm = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=settings)
    cold = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings={**SMALL, "steps": 2})
    far = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings={**SMALL, "steps": 40})
    vocabulary, other = Vocabulary(["ball", "cube"]), Vocabulary(["door"])
    first, limit = cold(scene.image, vocabulary), far(scene.image, vocabulary)
    assert same(warm(scene.image, vocabulary), first)
    for _ in range(12):
        found = warm(scene.image, vocabulary)
    assert not same(found, first)
    assert np.abs(found.confidence - limit.confidence).max() < 0.02  # two steps a frame have become many
    for change in (lambda: warm(scene.image, other), lambda: warm(scene.image[1:], vocabulary)):
        change()
        assert same(warm(scene.image, vocabulary), first)  # another vocabulary or size: from G again


def test_the_pairs_negatives_are_taken_unless_the_vocabulary_has_its_own(segmenter):
    clip = segmenter.settings.clip
    for vocabulary in (
        Vocabulary(["ball"]),
        Vocabulary(["ball"], negatives=["sky"]),
        Vocabulary(["ball"], negatives=()),
    ):
        steps = vocabulary_steps(vocabulary, segmenter.text, clip.negatives, mean_negative=clip.mean_negative)
        expected = exhaust(steps)
        found = segmenter.embed(vocabulary)
        assert torch.equal(found.embeddings, expected.embeddings)
        assert torch.equal(found.classes, expected.classes)
    assert len(segmenter.embed(Vocabulary(["ball"], negatives=())).classes) == 1


def test_only_the_vocabularies_used_last_are_kept(segmenter, monkeypatch):
    monkeypatch.setattr(module, "_VOCABULARIES_KEPT", 3)
    monkeypatch.setattr(segmenter, "_vocabularies", type(segmenter._vocabularies)())
    first, second, third, fourth = (Vocabulary([name]) for name in NAMES[:4])
    for vocabulary in (first, second, third, first, fourth):  # the first is used again: the second is the oldest
        segmenter.embed(vocabulary)
    assert list(segmenter._vocabularies) == [third, first, fourth]


def test_a_user_without_a_home_gets_masks_and_no_cache(scene, no_home, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    assert segmenter(scene.image, ["ball", "cube"]).labels.shape == scene.labels.shape
    assert "text embeddings are not kept: this user has no home folder" in caplog.text
    assert not list(tmp_path.iterdir())  # no folder called ~


@pytest.mark.parametrize("broken", ["clip", "diffusion"])
def test_networks_that_overflow_are_an_error_and_not_a_mask(segmenter, scene, monkeypatch, broken):
    queries = segmenter.embed(Vocabulary(["ball", "cube"]))
    if broken == "diffusion":
        monkeypatch.setattr(segmenter.frame_part, "_run_taps", overflowing(segmenter.frame_part.taps.project))
    else:
        clip = segmenter.frame_part.clip
        monkeypatch.setattr(clip, "_mean", clip._mean * torch.nan)
    with pytest.raises(RuntimeError, match="not finite in float32: a weight is damaged; nerve models verify --deep"):
        segmenter(scene.image, queries)


def overflowing(project):
    """Taps of which one value is beyond the precision."""

    def broken(pixels):
        Q, K = project(pixels)
        Q[0, 0, 0] = torch.inf
        return Q, K

    return broken


def test_warming_up_runs_a_frame_of_the_size_asked_for(segmenter, monkeypatch):
    seen, part = [], segmenter.frame_part
    original = part.clip.prepared
    monkeypatch.setattr(part.clip, "prepared", lambda pixels: (seen.append(pixels.shape), original(pixels))[1])
    assert segmenter.warm_up((50, 70)) is None
    assert seen == [(1, 3, 50, 70)]


def test_a_segmenter_says_what_it_is(segmenter):
    assert segmenter.pair_name == "embedded"
    assert segmenter.device == torch.device("cpu")
    assert segmenter.dtype == torch.float32
    line = segmenter.description
    assert "\n" not in line
    for part in ("embedded", "cpu", "float32", f"{segmenter.grid[0]} x {segmenter.grid[1]} tokens"):
        assert part in line
    assert segmenter.settings.affinity.kernel in line
    with pytest.raises(dataclasses.FrozenInstanceError):
        segmenter.settings.walk.alpha = 0.1


def test_every_setting_reaches_its_room(cache, scene):
    changed = Segmenter.from_pretrained(
        "embedded",
        device="cpu",
        cache_dir=cache,
        settings={**SMALL, "threshold": 1.0, "timestep": 7, "noise_seed": 3, "logit_scale": 3.0, "head": "maskclip"},
    )
    assert changed.frame_part.taps.config.timestep == 7
    assert changed.frame_part.clip.config.head == "maskclip"
    found = changed(scene.image, Vocabulary(["ball", "cube"]))
    assert not found.labels.any()  # nothing is certain
    assert found.confidence_u8.any()


@pytest.mark.parametrize("faster", [True, False])
def test_a_pair_that_asks_for_bfloat16_gets_it_on_a_cpu_that_is_faster_with_it(cache, tmp_path, monkeypatch, faster):
    own = find_pair("embedded")
    description = {
        "name": "half",
        "cpu_precision": "bf16",
        "clip": {"location": own.clip.location},
        "diffusion": {"location": own.diffusion.location},
        "settings": own.settings,
    }
    (tmp_path / "pair.json").write_text(json.dumps(description))
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda *pair, **places: faster)
    made = {"device": "cpu", "cache_dir": cache, "settings": SMALL}
    segmenter = Segmenter.from_pretrained(str(tmp_path), **made)
    assert segmenter.dtype == (torch.bfloat16 if faster else torch.float32)
    assert Segmenter.from_pretrained(str(tmp_path), dtype="fp32", **made).dtype == torch.float32
    assert Segmenter.from_pretrained("embedded", **made).dtype == torch.float32


def test_results_are_frozen(segmenter, scene):
    found = segmenter(scene.image, Vocabulary(["ball"]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.labels = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.class_confidence[0].area = 3
    assert not isinstance(found.labels, Tensor)


@pytest.mark.parametrize("walk", [{"method": "truncated", "steps": 4}, {"method": "exact", "kernel": "relu"}])
@pytest.mark.parametrize("head", ["vanilla", "cliper"])
def test_other_heads_and_walks_run_on_the_same_pair(segmenter, cache, scene, walk, head):
    other = Segmenter.from_pretrained(
        "embedded", device="cpu", cache_dir=cache, settings={**SMALL, **walk, "head": head}
    )
    assert_sound(other(scene.image, Vocabulary(["ball", "cube"])), (120, 160), ["ball", "cube"])


def test_close_lets_the_models_go():
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    unet = weakref.ref(segmenter.frame_part.taps.unet)
    segmenter.warm_up((48, 64))
    segmenter.close()
    gc.collect()
    assert unet() is None


# One image, several vocabularies.


def test_an_encoded_image_gives_for_each_vocabulary_what_a_frame_of_its_own_gives(segmenter, scene):
    encoded = segmenter.encode(scene.image)
    for names in (["ball", "ladder|steps"], ["chair"], [], list(NAMES), ["ball", "ladder|steps"]):
        vocabulary = Vocabulary(names)
        again = segmenter.segment(encoded, segmenter.embed(vocabulary))
        assert same(again, segmenter(scene.image, vocabulary))
        encoded = segmenter.encode(scene.image)


def test_the_maps_that_are_asked_for_are_those_of_the_names_with_their_synonyms(segmenter, scene):
    queries = segmenter.embed(Vocabulary(["ball|sphere", "ladder", "chair|seat|stool"]))
    encoded = segmenter.encode(scene.image)
    found = segmenter.segment(encoded, queries, maps=(3, 1))
    assert same(found, segmenter.segment(encoded, queries))
    assert found.maps.dtype == np.uint8
    assert found.maps.shape == (2, *scene.image.shape[:2])
    for plane, label in zip(found.maps, (3, 1), strict=True):
        here = found.labels == label
        assert (plane[here] == found.confidence_u8[here]).all()
        assert (plane <= found.confidence_u8.max()).all()
        peak = found.class_confidence[label - 1].peak_probability
        assert plane.max() <= round(peak * 255) + 1


def test_a_question_beside_the_stream_does_not_move_where_its_next_walk_starts(cache, scene):
    settings = SMALL | {"previous_frame_start": True, "steps": 2}
    other = Vocabulary(["lamp"])
    results = []
    for asked in (False, True):
        segmenter = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=settings)
        queries = segmenter.embed(Vocabulary(["ball", "chair"]))
        encoded = segmenter.encode(scene.image)
        segmenter.segment(encoded, queries)
        if asked:
            segmenter.segment(encoded, segmenter.embed(other), follow=False)
        results.append(segmenter.segment(segmenter.encode(scene.image[::-1].copy()), queries))
    assert same(*results)


# Out of memory.

STAGES_THAT_ALLOCATE = {
    "preprocess": ("nerve_core.networks.frame._pixels", lambda s, image, queries: s.encode(image)),
    "clip": ("nerve_core.networks.dense_clip.DenseClip.embed", lambda s, image, queries: s.encode(image)),
    "diffusion": ("nerve_core.networks.diffusion.tapped_projections", lambda s, image, queries: s.encode(image)),
    "probabilities": (
        "nerve_core.networks.dense_clip.DenseClip.probabilities",
        lambda s, image, queries: s(image, queries),
    ),
    "refine": ("nerve_core.segmenter.refine", lambda s, image, queries: s(image, queries)),
    "edges": ("nerve_core.segmenter.carry_labels", lambda s, image, queries: s(image, queries)),
    "pixels": ("nerve_core.networks.frame.pixel_transition", lambda s, image, queries: s.encode(image)),
    "readout": ("nerve_core.segmenter.read_out", lambda s, image, queries: s(image, queries)),
    "text": ("nerve_core.segmenter.vocabulary_steps", lambda s, image, queries: s.embed(Vocabulary(["new name"]))),
    "warm_up": ("nerve_core.segmenter.refine", lambda s, image, queries: s.warm_up()),
}
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("stage", STAGES_THAT_ALLOCATE)
@pytest.mark.parametrize("lack", LACKS, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_at_any_stage_is_told_and_the_next_image_is_segmented(cache, scene, monkeypatch, stage, lack):
    segmenter = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=SMALL)
    queries = segmenter.embed(Vocabulary(["ball", "chair"]))
    before = segmenter(scene.image, queries)
    place, act = STAGES_THAT_ALLOCATE[stage]

    def lacking(*arguments, **named):
        raise lack

    with monkeypatch.context() as patch:
        patch.setattr(place, lacking)
        if stage == "clip":
            patch.setattr(segmenter.frame_part, "_run_clip", lacking)
        with pytest.raises(OutOfMemory, match="out of memory on cpu: ") as caught:
            act(segmenter, scene.image, queries)
    assert "\n" not in str(caught.value)
    assert same(segmenter(scene.image, queries), before)


def test_what_took_the_memory_is_gone_by_the_time_it_is_told(cache, scene, monkeypatch):
    segmenter = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=SMALL)
    held = []

    def lacking(*arguments, **named):
        big = torch.empty(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nerve_core.segmenter.refine", lacking)
    forgotten = segmenter.frame_part.forget
    alive = []
    monkeypatch.setattr(segmenter.frame_part, "forget", lambda: (alive.append(held[0]() is not None), forgotten()))
    with pytest.raises(OutOfMemory):
        segmenter(scene.image, Vocabulary(["ball"]))
    assert alive == [False]


def test_other_errors_are_not_taken_for_a_lack_of_memory(cache, scene, monkeypatch):
    segmenter = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=cache, settings=SMALL)
    monkeypatch.setattr("nerve_core.segmenter.refine", lambda *arguments, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segmenter(scene.image, Vocabulary(["ball"]))


def test_on_the_cpu_there_is_no_device_memory_to_tell_of(segmenter):
    assert segmenter.device_memory is None
