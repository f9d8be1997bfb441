"""Drawn worlds and their films: depth and parallax as of a pinhole camera, exact truth, and what a sensor does."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from nerve_core.embedded.filming import Camera, Motion, Sensor, film, look, rotations, still, straight, wander
from nerve_core.embedded.scenes import NAMES
from nerve_core.embedded.world import Route, World, draw_world

SMALL = Camera(320, 240, 270.0)
LEVEL = {"pitch": 0.0}
PARTS = ("image", "labels", "instances", "depth", "K")


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(7, yard=False)


@pytest.fixture(scope="module")
def yard() -> World:
    return draw_world(8, yard=True)


def only(world: World, *routes: Route, name: str = "cube") -> World:
    """A world with one thing of a kind on each route, ids 1, 2, ..."""
    thing = next(thing for thing in world.things if thing.name == name)
    return World(
        world.surfaces,
        tuple(dataclasses.replace(thing, id=k, route=route, rolls=False) for k, route in enumerate(routes, 1)),
    )


def place(view, number: int = 1) -> tuple[float, float]:
    """The middle of an instance's box in the image: column and row."""
    rows, columns = np.nonzero(view.instances == number)
    return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, part), getattr(other, part), equal_nan=True) for part in PARTS)


# What belongs together


def test_a_view_has_the_sizes_and_types_that_it_says(world):
    view = look(world, wander(1), 2.5)
    assert view.image.shape == (480, 640, 3)
    assert view.labels.shape == view.instances.shape == view.depth.shape == (480, 640)
    assert (view.image.dtype, view.labels.dtype, view.instances.dtype, view.depth.dtype) == (
        np.uint8,
        np.uint8,
        np.uint16,
        np.float32,
    )
    assert view.stamp == 2_500_000_000
    assert view.image.std() > 10


def test_labels_instances_and_the_list_of_things_agree(world, yard):
    for one in (world, yard):
        for view in film(one, wander(3), 6, rate=0.5, camera=SMALL):
            names = {thing.id: thing.name for thing in view.things}
            for number in np.unique(view.instances):
                labels = np.unique(view.labels[view.instances == number])
                assert labels.tolist() == [NAMES.index(names[number]) + 1 if number else 0]
            for thing in view.things:
                assert thing.pixels == np.count_nonzero(view.instances == thing.id)
                assert 0 <= thing.occluded <= 1
                assert 0 <= thing.outside <= 1
            assert len(names) == len(view.things)


def test_the_same_seed_gives_the_same_film_and_another_one_another():
    def shot(seed: int, noise: int):
        sensor = Sensor(noise=3, exposure_stops=0.5)
        return list(film(draw_world(seed), wander(seed), 2, rate=2, camera=SMALL, sensor=sensor, seed=noise))[1]

    assert same(shot(4, 1), shot(4, 1))
    assert not same(shot(4, 1), shot(5, 1))
    assert not np.array_equal(shot(4, 1).image, shot(4, 2).image)
    assert np.array_equal(shot(4, 1).labels, shot(4, 2).labels)


def test_an_image_does_not_depend_on_how_many_are_filmed(world):
    short = list(film(world, wander(2), 2, camera=SMALL, sensor=Sensor(noise=2)))
    long = list(film(world, wander(2), 4, camera=SMALL, sensor=Sensor(noise=2)))
    assert same(short[1], long[1])
    assert [view.stamp for view in long] == [0, 10**8, 2 * 10**8, 3 * 10**8]


def test_every_kind_comes_before_any_comes_twice():
    names = [thing.name for thing in draw_world(2, standing=10, moving=4).things]
    assert sorted(names) == sorted(NAMES)
    assert [thing.id for thing in draw_world(2, standing=1, moving=1, first_id=40).things] == [40, 41]


# Geometry


@pytest.mark.parametrize("bearing", [-0.3, 0.0, 0.25])
def test_a_thing_is_where_the_pinhole_formula_says(world, bearing):
    one = only(world, Route(bearing, 3.0))
    view = look(one, still((0.2, -1.0, 0.1), **LEVEL), 0.0)
    (seen,) = view.things
    thing = one.things[0]
    expected = (3 * np.sin(bearing) - 0.2, 1.0 - thing.height / 2, 3 * np.cos(bearing) - 0.1)
    np.testing.assert_allclose(seen.centre, expected, atol=1e-9)
    projected = view.K @ np.array(seen.centre)
    np.testing.assert_allclose(place(view), projected[:2] / projected[2], atol=2.5)
    assert seen.size == (thing.width, thing.height)


def test_parallax_is_focal_length_times_shift_by_depth(world):
    one = only(world, Route(-0.2, 2.0), Route(0.12, 4.0))
    before, after = (look(one, still((x, -1.0, 0.0), **LEVEL), 0.0) for x in (0.0, 0.25))
    for number, seen in zip((1, 2), sorted(before.things, key=lambda thing: thing.id), strict=True):
        moved = place(before, number)[0] - place(after, number)[0]
        assert moved == pytest.approx(540 * 0.25 / seen.centre[2], abs=1.6)


def test_a_turn_moves_everything_by_the_focal_length_times_its_tangent(world):
    """150 degrees a second at 10 images a second: 145 pixels, whatever the depth."""
    one = only(world, Route(0.0, 2.0), Route(0.0, 4.0))
    turning = straight((0, -1.0, 0), yaw_rate=150.0, **LEVEL)
    before, after = film(one, turning, 2)
    assert place(before, 1)[0] - place(after, 1)[0] == pytest.approx(540 * np.tan(np.radians(15)), abs=5)
    plain = look(World(world.surfaces, ()), turning, 0.0), look(World(world.surfaces, ()), turning, 0.1)
    H = plain[0].K @ (plain[1].rotation.T @ plain[0].rotation) @ np.linalg.inv(plain[0].K)
    turned = cv2.warpPerspective(plain[0].image, H, (640, 480), flags=cv2.INTER_LINEAR)[20:-60, 20:450]
    assert np.abs(turned.astype(int) - plain[1].image[20:-60, 20:450]).mean() < 4


def test_the_camera_turns_as_fast_as_it_was_told_and_rests_between(world):
    times = np.arange(0, 60, 0.02)
    rotation = wander(5, Motion(turn=150.0, sway=0.0))(times)[1]
    cosine = (np.einsum("nij,nij->n", rotation[1:], rotation[:-1]) - 1) / 2
    speed = np.degrees(np.arccos(np.clip(cosine, -1, 1))) / 0.02
    assert 145 < speed.max() < 151
    assert speed.min() < 0.1
    slow = wander(5, Motion(turn=0.0, pan=20.0, sway=0.0))(times)[1]
    cosine = (np.einsum("nij,nij->n", slow[1:], slow[:-1]) - 1) / 2
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() / 0.02 < 20.5
    assert np.linalg.det(rotation[7]) == pytest.approx(1)


def test_depth_is_that_of_the_surfaces(world):
    """Every pixel's point lies on the floor, on a wall, or on the plane of the thing that is there."""
    view = look(world, wander(6), 3.3)
    rows, columns = np.mgrid[0:480, 0:640]
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(view.K).T
    points = (rays * view.depth[..., None]) @ view.rotation.T + view.position
    gaps = [np.abs((points - s.origin) @ np.cross(s.right, s.down)) for s in world.surfaces]
    background = view.instances == 0
    assert np.min(gaps, 0)[background].max() < 5e-3
    assert (points[..., 1] < 5e-3).all()  # nothing is under the floor
    now = np.array([3.3])
    for thing in world.things:
        (centre,), (right,), (down,) = thing.at(now)
        here = points[view.instances == thing.id] - centre
        if len(here):
            assert np.abs(here @ np.cross(right, down)).max() < 5e-3
            assert np.abs(here @ right).max() < thing.width / 2 + 0.01
            assert np.abs(here @ down).max() < thing.height / 2 + 0.01


def test_the_sky_has_no_depth_and_everything_else_has():
    view = look(draw_world(1, standing=4, moving=0, yard=True, wall="sky"), still(), 0.0)
    none = np.isnan(view.depth)
    assert none[:40].all()
    assert not none[-40:].any()
    assert (view.depth[~none] > 0).all()
    assert not none[view.instances > 0].any()


def test_near_things_hide_far_ones_whatever_their_order(world):
    near, far = Route(0.0, 2.0), Route(0.0, 3.5)
    for routes, first in (((near, far), 1), ((far, near), 2)):
        view = look(only(world, *routes), still((0, -0.9, 0), **LEVEL), 0.0)
        seen = {thing.id: thing for thing in view.things}
        second = 3 - first
        assert [thing.id for thing in view.things] == [first, second]
        assert seen[first].occluded == 0
        assert seen[second].occluded > 0.3
        alone = look(only(world, far), still((0, -0.9, 0), **LEVEL), 0.0).things[0].pixels
        assert seen[second].occluded == pytest.approx(1 - seen[second].pixels / alone)
        x, y = np.rint(place(view, first)).astype(int)
        assert view.instances[y, x] == first
        assert view.depth[y, x] == pytest.approx(2.0, abs=0.01)


def test_what_lies_outside_of_the_image_is_counted(world):
    def outside(yaw: float) -> float:
        return look(only(world, Route(0.0, 2.5)), still((0, -0.6, 0), yaw=yaw, **LEVEL), 0.0).things[0].outside

    assert outside(0.0) == 0
    half = np.degrees(np.arctan(320 / 540))
    assert outside(half) == pytest.approx(0.5, abs=0.1)
    assert outside(half - 4) < 0.35
    assert not look(only(world, Route(0.0, 2.5)), still(yaw=180.0), 0.0).things


# What moves by itself


def test_things_that_move_do_so_on_their_routes_and_the_others_stay(world):
    early, late = (world.centres(seconds) for seconds in (0.0, 1.0))
    moved = np.linalg.norm(early - late, axis=1)
    for thing, distance in zip(world.things, moved, strict=True):
        assert distance == 0 if not thing.route.moves else 0 < distance < 1.2
        np.testing.assert_allclose(thing.at(np.array([1.0]))[0][0], late[world.things.index(thing)])
    assert sum(thing.route.moves for thing in world.things) == 8


def test_no_two_things_walk_through_each_other():
    for seed in range(4):
        world = draw_world(seed)
        for seconds in np.linspace(0, 60, 120):
            centres = world.centres(float(seconds))[:, [0, 2]]
            gaps = np.linalg.norm(centres[:, None] - centres, axis=-1) + 9 * np.eye(len(centres))
            assert gaps.min() > 0.25


def test_a_thing_that_moves_is_seen_to_move(world):
    one = only(world, Route(0.0, 3.0, swing=0.3, period=4.0))
    before, after = film(one, still((0, -1, 0), **LEVEL), 2)
    bearing = 0.3 * np.sin(2 * np.pi * 0.1 / 4)
    assert place(after)[0] - place(before)[0] == pytest.approx(540 * np.tan(bearing), abs=1.6)
    assert np.array_equal(before.image[:20], after.image[:20])


def test_what_rolls_turns_as_far_as_it_goes():
    world = next(w for w in (draw_world(k) for k in range(30)) if any(thing.rolls for thing in w.things))
    ball = next(thing for thing in world.things if thing.rolls)
    (_, there), (right, turned), _ = ball.at(np.array([0.0, 0.05]))
    gone = abs(np.diff(ball.route.at(np.array([0.0, 0.05]))[0])[0]) * ball.route.distance
    angle = np.arccos(np.clip(right @ turned, -1, 1))
    assert angle == pytest.approx(gone / (ball.height / 2), rel=0.1)
    assert there[1] == pytest.approx(-ball.height / 2)


# The sensor


def test_nothing_is_done_to_an_image_by_default(world):
    trajectory = straight(yaw_rate=90.0)
    one = World(world.surfaces, ())
    assert same(look(one, trajectory, 0.3, sensor=Sensor()), look(one, trajectory, 0.3))
    # and a camera that stands still has no blur, whatever the shutter
    assert same(look(one, still(), 0.3, sensor=Sensor(shutter=0.1, line_time=1e-5)), look(one, still(), 0.3))


def test_motion_blur_is_as_wide_as_the_image_moves_while_the_shutter_is_open(world):
    """A sharp upright edge becomes a slope as long as speed times exposure."""
    one = World(world.surfaces, ())
    edge = _edge_world(one)
    speed = 540 * np.radians(60)  # pixels a second at the image's middle

    def width(shutter: float) -> float:
        grey = look(edge, straight(yaw_rate=60.0, **LEVEL), 0.0, sensor=Sensor(shutter=shutter)).image[150, 120:520, 1]
        line = grey.astype(float)
        low, high = line.min(), line.max()
        return np.count_nonzero((line > low + 0.1 * (high - low)) & (line < high - 0.1 * (high - low))) / 0.8

    assert width(0.0) <= 3
    assert width(0.04) == pytest.approx(0.04 * speed, rel=0.2)
    truth = [look(edge, straight(yaw_rate=60.0), 0.0, sensor=Sensor(shutter=s)).depth for s in (0.0, 0.04)]
    assert np.array_equal(*truth)


def _edge_world(world: World) -> World:
    """A wall that is dark to the left and bright to the right of what a level camera sees in the middle at first."""
    tile = np.zeros((64, 1024, 3), np.uint8)
    tile[:, :512] = 200  # 2.56 m, then as much of black, from the middle on
    origin, right, down = np.array([0.0, 0.0, 5.4]), *np.eye(3)[:2]
    wall = dataclasses.replace(
        world.surfaces[1], origin=origin, right=right, down=down, levels=(tile,), density=200.0, board=None
    )
    return World((world.surfaces[0], wall), ())


def test_rolling_exposure_leans_what_is_upright_by_speed_times_line_time(world):
    edge = _edge_world(world)
    line_time = 30e-6
    straight_up, leaning = (
        look(edge, straight(yaw_rate=90.0, **LEVEL), 0.0, sensor=Sensor(line_time=t)) for t in (0.0, line_time)
    )

    def column(view, row: int) -> float:
        line = view.image[row, 250:390, 1].astype(float)
        return 390 - np.count_nonzero(line > 100)

    assert abs(column(straight_up, 20) - column(straight_up, 220)) <= 1
    lean = column(leaning, 20) - column(leaning, 220)
    assert lean == pytest.approx(540 * np.radians(90) * 200 * line_time, abs=1.5)
    # the row in the middle is as it was
    assert abs(column(leaning, 239) - column(straight_up, 239)) <= 1


def test_rolling_exposure_leans_labels_and_depth_with_the_image(world):
    one = only(world, Route(0.0, 2.5), name="door")
    view = look(one, straight((0, -0.9, 0), yaw_rate=120.0, **LEVEL), 0.0, sensor=Sensor(line_time=60e-6))
    rows = np.nonzero((view.instances == 1).any(1))[0]
    top, bottom = (np.nonzero(view.instances[row] == 1)[0].mean() for row in (rows[20], rows[-20]))
    expected = 540 * np.radians(120) * 60e-6 * (rows[-20] - rows[20])
    tilt = np.array(
        [
            np.nonzero(look(one, still((0, -0.9, 0), **LEVEL), 0.0).instances[r] == 1)[0].mean()
            for r in (rows[20], rows[-20])
        ]
    )
    assert (top - tilt[0]) - (bottom - tilt[1]) == pytest.approx(expected, abs=3)


def test_light_flickers_at_its_frequency_and_depth(world):
    one = World(world.surfaces, ())
    sensor = Sensor(flicker_frequency=2.5, flicker_depth=0.2)
    plain = look(one, still(), 0.0, camera=SMALL).image.astype(float).mean()
    means = [view.image.mean() / plain for view in film(one, still(), 9, camera=SMALL, sensor=sensor)]
    np.testing.assert_allclose(means, 1 + 0.2 * np.sin(2 * np.pi * 2.5 * np.arange(9) / 10), atol=0.02)


def test_lamps_show_as_bands_under_rolling_exposure_and_not_at_all_over_whole_periods(world):
    one = World(world.surfaces, ())
    plain = look(one, still(), 0.0).image.astype(float)

    def rows(sensor: Sensor) -> np.ndarray:
        return look(one, still(), 0.0, sensor=sensor).image.mean((1, 2)) / plain.mean((1, 2))

    bands = rows(Sensor(line_time=40e-6, flicker_depth=0.2))
    times = (np.arange(480) - 239.5) * 40e-6
    np.testing.assert_allclose(bands, 1 + 0.2 * np.sin(2 * np.pi * 100 * times), atol=0.03)
    np.testing.assert_allclose(rows(Sensor(line_time=40e-6, flicker_depth=0.2, shutter=0.01)), 1, atol=0.01)


def test_the_exposure_steps_by_no_more_than_its_stops_and_only_between_intervals(world):
    one = World(world.surfaces, ())
    sensor = Sensor(exposure_stops=0.5, exposure_interval=1.0)
    plain = look(one, still(), 0.0, camera=SMALL).image.astype(float).mean()
    shots = film(one, still(), 12, rate=4, camera=SMALL, sensor=sensor, seed=3)
    gains = np.array([view.image.mean() for view in shots]).reshape(3, 4) / plain
    assert np.ptp(gains, axis=1).max() == 0
    assert np.abs(np.diff(gains[:, 0])).min() > 0.01
    assert (np.abs(np.log2(gains)) <= 0.5).all()


def test_noise_has_its_standard_deviation(world):
    one = World(world.surfaces, ())
    plain, noisy = (look(one, still(), 0.0, sensor=Sensor(noise=n)).image.astype(float) for n in (0.0, 4.0))
    middle = (plain > 20) & (plain < 235)
    assert (noisy - plain)[middle].std() == pytest.approx(4, rel=0.02)
    assert abs((noisy - plain)[middle].mean()) < 0.05


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: draw_world(0, names=["dragon"]), "dragon.*ball, cube"),
        (lambda: draw_world(0, names=[]), "drawn from ball"),
        (lambda: draw_world(0, standing=-1), "0 or more"),
        (lambda: draw_world(0, standing=0, moving=200), "no place for 200"),
        (lambda: draw_world(0, standing=300), "no place"),
        (lambda: draw_world(0, yard=False, wall="sky"), "in a room: wall, brick wall"),
        (lambda: draw_world(0, first_id=0), "first_id is 0"),
        (lambda: Route(0.0, 1.0, reach=2.0), "not above 0"),
        (lambda: Route(0.0, 1.0, period=0.0), "period"),
        (lambda: Camera(16, 480), "32 and more"),
        (lambda: Motion(pan=-1.0), "pan is -1"),
        (lambda: Sensor(shutter=-0.1), "shutter"),
        (lambda: Sensor(flicker_depth=1.5), "0 to 1"),
        (lambda: Sensor(exposure_interval=0.0), "above 0"),
        (lambda: next(film(draw_world(0, standing=0, moving=0), still(), 1, rate=0.0)), "rate"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_rotations_are_roll_then_pitch_upwards_then_yaw_to_the_right():
    yaw, pitch, roll = (np.array([value]) for value in (np.pi / 2, 0.0, 0.0))
    zero = np.zeros(1)
    np.testing.assert_allclose(rotations(yaw, zero, zero)[0] @ [0, 0, 1], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rotations(zero, yaw, zero)[0] @ [0, 0, 1], [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(rotations(zero, zero, yaw)[0] @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    assert (pitch, roll) == (zero, zero)
