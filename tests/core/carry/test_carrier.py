"""Masks carried from keyframes to later images: exact where that can be, honest where it cannot, bounded always."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from films import SIZE, STEP, noisy, view
from nerve_core.carry.carrier import Carrier, CarrySettings, Seen, Taken
from nerve_core.carry.fade import Fade
from nerve_core.carry.flow import Flow

SURE = np.full(SIZE, 200, np.uint8)


def carried(images, labels, at=0, step=STEP):
    """What each image sees, then the mask of the last, of a keyframe at image `at` that was ready at once."""
    carrier = Carrier()
    seen = []
    for number, image in enumerate(images):
        seen.append(carrier.see(image, number * step + 1))
        if number == at:
            assert carrier.keyframe(number * step + 1, labels, np.full(labels.shape, 200, np.uint8)) is Taken.KEYFRAME
    return seen, carrier.mask()


def right(mask, truth):
    """Share of the known pixels that carry the true label."""
    known = mask.labels != 255
    return (mask.labels == truth)[known].mean()


# --- exactness ---


def test_the_keyframes_own_image_has_its_mask_to_the_byte():
    carrier = Carrier()
    carrier.see(view(500)[0], 7)
    labels, confidence = view(500)[1], np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    carrier.keyframe(7, labels, confidence)
    mask = carrier.mask()
    np.testing.assert_array_equal(mask.labels, labels)
    np.testing.assert_array_equal(mask.confidence, confidence)
    assert (mask.keyframe, mask.stamp, mask.age, mask.coverage, mask.reason) == (7, 7, 0.0, 1.0, "")


@settings(max_examples=25)
@given(across=st.integers(-9, 9), down=st.integers(-9, 9), images=st.integers(1, 4))
def test_a_whole_translation_moves_the_mask_to_the_pixel(across, down, images):
    """The arithmetic alone: the flow is given, and is right."""
    carrier = Carrier()
    rows, columns = SIZE
    grid_rows, grid_columns = carrier_grid = Flow((120, 160)).grid
    step = np.array([across * grid_columns / columns, down * grid_rows / rows], np.float32)
    labels = np.random.default_rng(1).integers(0, 15, SIZE, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nerve_core.carry.carrier.unchanged", lambda one, other: np.zeros(carrier_grid, bool))
        # What `between` finds from an image to its keyframe is told by where the search begins.
        patch.setattr(
            Flow,
            "between",
            lambda self, newer, older, start=None: (
                np.full((*carrier_grid, 2), step, np.float32) if start is None else start
            ),
        )
        for number in range(images + 1):
            carrier.see(np.zeros((*SIZE, 3), np.uint8), number + 1)
            if number == 0:
                carrier.keyframe(1, labels, SURE)
    mask = carrier.mask()
    x, y = images * across, images * down
    inside = np.full(SIZE, 255, np.uint8)
    source = labels[max(0, y) : rows + min(0, y), max(0, x) : columns + min(0, x)]
    inside[max(0, -y) : rows - max(0, y), max(0, -x) : columns - max(0, x)] = source
    known = mask.labels != 255
    np.testing.assert_array_equal(mask.labels[known], inside[known])
    # The grid is half as fine as the image: at the edge of the view a pixel more may be unknown.
    assert (known ^ (inside != 255)).mean() < 0.02 * images
    np.testing.assert_array_equal(mask.confidence > 0, known)


@pytest.mark.parametrize(("sigma", "images"), [(0.0, 100), (2.5, 1000), (4.0, 100)])
def test_a_still_scene_keeps_its_mask_to_the_pixel(sigma, images):
    image, labels = view(500)
    carrier = Carrier(CarrySettings(limit=1000.0))
    carrier.see(noisy(image, 0, sigma), 1)
    carrier.keyframe(1, labels, SURE)
    for number in range(1, images):
        assert carrier.see(noisy(image, number, sigma), number * STEP + 1) is Seen.FOLLOWED
        if number % 33 == 0:
            mask = carrier.mask()
            assert mask.coverage == 1
            np.testing.assert_array_equal(mask.labels, labels)


# --- what cameras do: each with a figure ---------------------------------------------------------------------------

FILMS = {
    "pan": ([view(400 + 7 * t) for t in range(9)], 0.97, 0.78),
    "slow pan": ([view(400 + 0.7 * t) for t in range(9)], 0.99, 0.95),
    "zoom in": ([view(500, scale=1.3 * 0.98**t) for t in range(9)], 0.96, 0.9),
    "zoom out": ([view(500, scale=0.9 * 1.02**t) for t in range(9)], 0.97, 0.65),
    "roll": ([view(500, roll=0.02 * t) for t in range(9)], 0.96, 0.85),
    "rolling exposure": ([view(400 + 7 * t, skew=0.05 * np.sin(1.7 * t)) for t in range(9)], 0.97, 0.75),
    "flicker": (
        [(noisy(view(400 + 7 * t)[0], t, gain=(1.0, 0.7)[t % 2]), view(400 + 7 * t)[1]) for t in range(9)],
        0.97,
        0.75,
    ),
    "blur": (
        [
            (
                np.mean([view(400 + 7 * t + x)[0] for x in np.linspace(-3, 3, 7)], 0).astype(np.uint8),
                view(400 + 7 * t)[1],
            )
            for t in range(9)
        ],
        0.97,
        0.75,
    ),
}


@pytest.mark.parametrize("film", FILMS)
def test_the_mask_follows_the_camera(film):
    frames, least_right, least_coverage = FILMS[film]
    seen, mask = carried([noisy(image, t) for t, (image, _) in enumerate(frames)], frames[0][1])
    assert set(seen[1:]) == {Seen.FOLLOWED}
    truth = frames[-1][1]
    assert right(mask, truth) >= least_right
    assert mask.coverage >= least_coverage
    stays = (frames[0][1] == truth).mean()
    assert film == "slow pan" or right(mask, truth) > stays + 0.02  # better than the mask as it was


def moving_object(step, images=7):
    """A textured square that crosses a still scene, label 14 (which the scene has not there)."""
    image, labels = view(500)
    patch = view(900, 200, seed=6)[0][:80, :80]
    frames = []
    for t in range(images):
        now, truth = image.copy(), labels.copy()
        left = 30 + step * t
        now[100:180, left : left + 80] = patch
        truth[100:180, left : left + 80] = 14
        frames.append((noisy(now, t), truth))
    return frames


@pytest.mark.parametrize(("step", "least"), [(3, 0.97), (8, 0.95)])
def test_an_object_that_moves_on_its_own_takes_its_label_along(step, least):
    frames = moving_object(step)
    _, mask = carried([image for image, _ in frames], frames[0][1])
    truth = frames[-1][1]
    assert right(mask, truth) >= least
    on_object = (truth == 14) & (mask.labels != 255)
    assert (mask.labels == 14)[on_object].mean() >= 0.85


def test_what_was_hidden_is_unknown():
    """Disocclusion: what an object uncovers was never seen. No place of this scene looks like another."""
    rng = np.random.default_rng(3)
    image = cv2.resize(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    patch = view(900, 200, seed=6)[0][:80, :80]
    frames = []
    for t in range(9):
        now, truth = image.copy(), np.zeros(SIZE, np.uint8)
        left = 30 + 10 * t
        now[100:180, left : left + 80] = patch
        truth[100:180, left : left + 80] = 14
        frames.append((now, truth))
    _, mask = carried([image for image, _ in frames], frames[0][1])
    uncovered = (frames[0][1] == 14) & (frames[-1][1] != 14)
    inner = cv2.erode(uncovered.astype(np.uint8), np.ones((9, 9))) > 0
    assert (mask.labels[inner] == 255).mean() >= 0.8
    assert (mask.labels[inner] == 14).mean() <= 0.1
    assert (mask.confidence[mask.labels == 255] == 0).all()
    assert (mask.labels != 255)[:80].mean() >= 0.97  # far from it all is known


def test_what_hid_a_wall_leaves_no_label_behind():
    """An even wall says nothing of motion: it may be known, and is then not taken for what stood before it."""
    frames = moving_object(10, images=9)
    _, mask = carried([image for image, _ in frames], frames[0][1])
    uncovered = (frames[0][1] == 14) & (frames[-1][1] != 14)
    inner = cv2.erode(uncovered.astype(np.uint8), np.ones((9, 9))) > 0
    assert (mask.labels[inner] == 14).mean() <= 0.1
    wrong = (mask.labels != 255) & (mask.labels != frames[-1][1])
    assert wrong[inner].mean() <= 0.3


def test_what_came_into_view_is_unknown():
    frames = [view(400 + 12 * t) for t in range(6)]
    _, mask = carried([image for image, _ in frames], frames[0][1])
    assert (mask.labels[:, -52:] == 255).mean() >= 0.97  # 60 columns are new
    assert (mask.confidence[:, -52:][mask.labels[:, -52:] == 255] == 0).all()
    assert (mask.labels[:, : SIZE[1] - 80] != 255).mean() >= 0.9


# --- what ends the carrying -------------------------------------------------------------------------------------------


def running(chosen=None):
    """A carrier with a keyframe, at stamp 1 and 1 + STEP."""
    carrier = Carrier(chosen)
    carrier.see(view(500)[0], 1)
    carrier.keyframe(1, view(500)[1], SURE)
    assert carrier.see(view(503)[0], 1 + STEP) is Seen.FOLLOWED
    assert carrier.mask().keyframe == 1
    return carrier


ENDS = {
    "a cut": (view(300, seed=7)[0], 1 + 2 * STEP, Seen.CUT),
    "another size": (view(503)[0][:, :300], 1 + 2 * STEP, Seen.SIZE),
    "a jump back": (view(503)[0], 0, Seen.BACK),
    "a long gap": (view(503)[0], 1 + 10 * STEP, Seen.GAP),
}


@pytest.mark.parametrize("end", ENDS)
def test_carrying_ends_until_the_next_keyframe(end):
    image, stamp, expected = ENDS[end]
    carrier = running()
    assert carrier.see(image, stamp) is expected
    assert expected.ends
    mask = carrier.mask()
    assert mask.labels.shape == image.shape[:2]
    assert (mask.labels == 255).all()
    assert not mask.confidence.any()
    assert (mask.coverage, mask.keyframe, mask.age, mask.reason) == (0.0, None, None, expected.value)
    assert carrier.see(image, stamp + STEP) is Seen.FOLLOWED
    assert carrier.mask().reason == expected.value
    # Results for images before the end are of no use any more; one for an image after it is.
    before = np.zeros(SIZE, np.uint8)
    assert carrier.keyframe(1 + STEP, before, before) is Taken.UNKNOWN
    labels = np.full(image.shape[:2], 3, np.uint8)
    assert carrier.keyframe(stamp, labels, labels) is Taken.KEYFRAME
    assert carrier.mask().keyframe == stamp


def test_a_missing_image_is_followed_across_where_the_flow_explains_it():
    carrier = running()
    assert carrier.see(view(511)[0], 1 + 4 * STEP) is Seen.FOLLOWED
    assert right(carrier.mask(), view(511)[1]) > 0.95


def test_an_image_that_comes_twice_changes_nothing():
    carrier = running()
    before = carrier.mask()
    assert carrier.see(view(503)[0], 1 + STEP) is Seen.REPEATED
    assert not Seen.REPEATED.ends
    np.testing.assert_array_equal(carrier.mask().labels, before.labels)


def test_a_keyframe_older_than_the_limit_says_nothing():
    carrier = running(CarrySettings(limit=0.25))
    carrier.see(view(506)[0], 1 + 2 * STEP)
    assert carrier.mask().keyframe == 1
    carrier.see(view(509)[0], 1 + 3 * STEP)
    mask = carrier.mask()
    assert (mask.labels == 255).all()
    assert mask.reason == "the keyframe is older than 0.25 s"
    assert carrier.keyframe(1, SURE, SURE) is Taken.LATE


def test_forget_says_why():
    carrier = running()
    carrier.forget("another vocabulary")
    with pytest.raises(RuntimeError, match="another vocabulary"):
        carrier.mask()
    assert carrier.see(view(506)[0], 1 + 2 * STEP) is Seen.FIRST
    assert carrier.mask().reason == "another vocabulary"


# --- results come late ---


@pytest.mark.parametrize("delay", [1, 4, 8])
def test_a_result_that_comes_late_is_carried_as_far_as_one_that_came_at_once(delay):
    frames = [view(400 + 5 * t) for t in range(delay + 1)]
    _, at_once = carried([image for image, _ in frames], frames[0][1])
    carrier = Carrier()
    for t, (image, _) in enumerate(frames):
        carrier.see(image, t * STEP + 1)
    assert carrier.keyframe(1, frames[0][1], SURE) is Taken.KEYFRAME
    late = carrier.mask()
    assert right(late, frames[-1][1]) > 0.96
    assert abs(late.coverage - at_once.coverage) < 0.05
    assert late.age == pytest.approx(delay / 10)


def test_the_newest_keyframe_counts():
    carrier = running()
    assert carrier.keyframe(1 + STEP, np.full(SIZE, 4, np.uint8), SURE) is Taken.KEYFRAME
    assert carrier.keyframe(1, np.full(SIZE, 5, np.uint8), SURE) is Taken.OLDER
    assert (carrier.mask().labels == 4).all()
    assert carrier.keyframe(1 + STEP, np.full(SIZE, 6, np.uint8), SURE) is Taken.KEYFRAME  # another vocabulary
    assert (carrier.mask().labels == 6).all()


def test_a_result_for_an_image_that_was_never_seen_is_refused():
    carrier = running()
    assert carrier.keyframe(2, SURE, SURE) is Taken.UNKNOWN


@pytest.mark.parametrize("bad", [np.zeros((240, 319), np.uint8), np.zeros(SIZE, np.float32)])
def test_results_of_another_size_or_type_are_an_error(bad):
    with pytest.raises(ValueError, match="must be uint8"):
        running().keyframe(1, bad, SURE)


@pytest.mark.parametrize("bad", [np.zeros(SIZE, np.uint8), np.zeros((*SIZE, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_other_arrays_than_images_are_an_error(bad):
    with pytest.raises(ValueError, match="uint8 array"):
        Carrier().see(bad, 1)


def test_without_an_image_there_is_no_mask():
    with pytest.raises(RuntimeError, match="call see first"):
        Carrier().mask()


# --- confidence, memory, settings -----------------------------------------------------------------------------------


def test_confidence_fades_with_age_and_never_rises():
    fade = Fade(tau=1.0)
    carrier = Carrier(CarrySettings(fade=fade))
    image, labels = view(500)
    confidence = []
    for t in range(6):
        carrier.see(noisy(image, t), t * STEP + 1)
        if t == 0:
            carrier.keyframe(1, labels, SURE)
        confidence.append(int(np.median(carrier.mask().confidence)))
    assert confidence == sorted(confidence, reverse=True)
    assert len(set(confidence)) == 6
    assert confidence == [round(200 * fade.left(t / 10)) for t in range(6)]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 100), st.floats(0, 1))
def test_what_is_left_of_confidence_lies_between_floor_and_all(one, other, tau, floor):
    fade = Fade(tau, floor)
    assert fade.left(0) == 1
    assert floor <= fade.left(max(one, other)) <= fade.left(min(one, other)) <= 1
    assert (np.diff(fade.table(one).astype(int)) >= 0).all()


def test_memory_is_bounded():
    carrier = Carrier(CarrySettings(history=16, limit=1000.0))
    image, labels = view(500)
    for t in range(40):
        carrier.see(noisy(image, t), t * STEP + 1)
        if t % 7 == 0:
            carrier.keyframe(t * STEP + 1, labels, SURE)
        if t == 20:
            after = carrier.nbytes
    assert carrier.nbytes <= after
    assert carrier.nbytes < 17 * 0.4e6 + SIZE[0] * SIZE[1] * 4


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["see", "cut", "back", "key", "late"]), st.integers(1, 3)), max_size=12))
def test_whatever_comes_masks_are_well_formed(events):
    carrier, stamp, stamps = Carrier(CarrySettings(history=4)), 10 * STEP, []
    for number, (event, steps) in enumerate(events):
        if event in ("key", "late") and stamps:
            chosen = stamps[-1] if event == "key" else stamps[max(0, len(stamps) - 1 - steps)]
            carrier.keyframe(chosen, view(500)[1], SURE)
        else:
            stamp += -STEP if event == "back" else steps * STEP
            carrier.see(view(300, seed=7)[0] if event == "cut" else view(500 + 2 * number)[0], stamp)
            stamps.append(stamp)
        if not stamps:
            continue
        mask = carrier.mask()
        assert mask.labels.shape == mask.confidence.shape == SIZE
        assert mask.stamp == stamps[-1]
        assert (mask.confidence[mask.labels == 255] == 0).all()
        assert mask.coverage == pytest.approx((mask.labels != 255).mean())
        assert (mask.keyframe is None) == bool(mask.reason) == (mask.age is None)
        if mask.keyframe is not None:
            assert 0 <= mask.age <= carrier.settings.limit
            assert mask.stamp - mask.keyframe == pytest.approx(mask.age * 1e9, abs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("limit", "longest_gap"), (0.0, -1.0, float("nan"), float("inf"))),
        *itertools.product(("size",), (63, 641, 100.0)),
        *itertools.product(("history",), (0, 1001, True)),
        *itertools.product(("cut",), (0.0, 1.1, float("nan"))),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        CarrySettings(**{name: value})


@pytest.mark.parametrize(("tau", "floor"), [(0, 0.5), (float("nan"), 0.5), (1, -0.1), (1, 1.1), (1, float("nan"))])
def test_a_fade_out_of_range_is_refused(tau, floor):
    with pytest.raises(ValueError, match=r"tau is|floor is"):
        Fade(tau, floor)
