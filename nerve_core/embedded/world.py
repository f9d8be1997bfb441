"""A drawn world with depth: walls, a floor and the scenes' objects on it, standing or moving on their own.

Everything is flat: a wall, the floor, and each object, which is a cut-out that stands upright on the floor and faces
the middle of the world. `filming` draws what a camera sees of it. World coordinates are in metres: x right, y down, z
forward, the floor at y = 0, the middle of the floor at x = z = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .scenes import NAMES, PLACES, draw_object, draw_tile

SIDES: dict[str, float] = {
    "ball": 0.6,
    "cube": 0.65,
    "cone": 0.8,
    "ladder": 1.5,
    "bottle": 0.75,
    "chair": 0.95,
    "door": 1.7,
    "mug": 0.6,
    "pallet": 0.85,
    "person": 1.65,
    "plant": 0.95,
    "ring": 0.7,
    "star": 0.7,
    "cross": 0.65,
}
"""How large the kinds are, in metres: the side of the square that an object is drawn in. Small things are made large,
so that they are seen as large as the pair learnt them."""

ROLLING = ("ball", "ring")
"""What rolls where it moves."""

ROOM = 5.4
"""Metres from the middle of the world to its walls."""
SKY = 400.0
"""Metres to the sky, which has no depth."""
WALL_DENSITY, FLOOR_DENSITY = 120.0, 200.0
"""Pixels of a tile for one metre."""
LANES = (2.5, 3.7)
"""Distances from the middle, in metres, at which objects move."""
BAND = (1.7, 4.7)
"""Distances from the middle, in metres, between which objects stand."""
APART = 0.3
"""Metres between two objects and between an object that stands and a lane, at least."""


@dataclass(frozen=True, eq=False)
class Surface:
    """A wall, the floor or the sky: an endless plane with a tile that repeats.

    origin: a point of it, and right, down: the directions of its tile's columns and rows, float64 [3]. levels: the tile
    uint8 [rows, columns, 3] RGB and its halves, each half as large as the one before. density: pixels of the tile for
    one metre. solid: whether it has a depth. board: height in metres and colour of a skirting board at its foot.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray
    levels: tuple[np.ndarray, ...]
    density: float
    solid: bool = True
    board: tuple[float, tuple[int, int, int]] | None = None


@dataclass(frozen=True)
class Route:
    """Where an object stands, and how it moves: back and forth through that place, as a pendulum in time.

    bearing: radians to the right of z, seen from the middle of the world; distance: metres from there. swing: radians
    by which the bearing changes to either side, and reach: metres by which the distance does, within `period` seconds
    there and back; phase: radians at the beginning. turn: radians by which the object's face is turned away from the
    middle.
    """

    bearing: float
    distance: float
    swing: float = 0.0
    reach: float = 0.0
    period: float = 8.0
    phase: float = 0.0
    turn: float = 0.0

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise ValueError(f"period is {self.period:g} s; accepted: above 0")
        if not self.distance - abs(self.reach) > 0:
            raise ValueError(f"a distance of {self.distance:g} m less a reach of {self.reach:g} m is not above 0")

    @property
    def moves(self) -> bool:
        """Whether its place ever changes."""
        return bool(self.swing or self.reach)

    def at(self, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bearing in radians and distance in metres at these times, float64 [n] each."""
        along = np.sin(2 * np.pi * seconds / self.period + self.phase)
        return self.bearing + self.swing * along, self.distance + self.reach * along


@dataclass(frozen=True, eq=False)
class Thing:
    """One object: a flat cut-out that stands on the floor.

    id: its instance, 1 and above. name: one of NAMES. levels: its picture, uint8 [rows, columns, 4], which is RGB times
    coverage, and coverage; and the picture's halves. width, height: metres that the picture covers, which ends where
    the object does. route: where it is. rolls: whether it turns as a wheel does.
    """

    id: int
    name: str
    levels: tuple[np.ndarray, ...]
    width: float
    height: float
    route: Route
    rolls: bool = False

    @property
    def label(self) -> int:
        """Its label in a scene."""
        return NAMES.index(self.name) + 1

    def at(self, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Its middle in the world, and the directions of its picture's columns and rows: float64 [n, 3] each."""
        bearing, distance = self.route.at(seconds)
        zero, one = np.zeros_like(bearing), np.ones_like(bearing)
        centre = np.stack([distance * np.sin(bearing), -self.height / 2 * one, distance * np.cos(bearing)], -1)
        facing = bearing + self.route.turn
        right = np.stack([np.cos(facing), zero, -np.sin(facing)], -1)
        down = np.stack([zero, one, zero], -1)
        if self.rolls:
            angle = ((bearing - self.route.bearing) * self.route.distance / (self.height / 2))[:, None]
            right, down = np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right
        return centre, right, down


@dataclass(frozen=True, eq=False)
class World:
    """Surfaces, the floor first, and the things between them. At each pixel that surface is seen which is the nearest
    one in front of the camera: the surfaces enclose a convex room without a ceiling."""

    surfaces: tuple[Surface, ...]
    things: tuple[Thing, ...]

    @functools.cached_property
    def _routes(self) -> np.ndarray:
        routes = [thing.route for thing in self.things]
        return np.array(
            [(r.bearing, r.swing, r.distance, r.reach, r.period, r.phase) for r in routes], np.float64
        ).T.reshape(6, -1)

    def centres(self, seconds: float) -> np.ndarray:
        """The middles of all things, in world coordinates: float64 [things, 3]."""
        bearing, swing, distance, reach, period, phase = self._routes
        along = np.sin(2 * np.pi * seconds / period + phase)
        bearing, distance = bearing + swing * along, distance + reach * along
        heights = np.array([-thing.height / 2 for thing in self.things])
        return np.stack([distance * np.sin(bearing), heights, distance * np.cos(bearing)], -1)


def draw_world(
    seed: int | Sequence[int],
    *,
    standing: int = 24,
    moving: int = 8,
    names: Sequence[str] = NAMES,
    yard: bool | None = None,
    wall: str | None = None,
    first_id: int = 1,
) -> World:
    """Draw the world of a seed; the same arguments always give the same world.

    standing, moving: how many objects stand and how many move on their own. names: the kinds to draw from; each comes
    once before any comes twice. yard: a yard, or a room; wall: what is around it, "wall" or "brick wall" in a room,
    "sky", "fence" or "brick wall" in a yard; None leaves either to the seed. first_id: of the first object; the others
    follow.
    Raises ValueError for an unknown name or wall, a negative count, or more objects than there is place for.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not names:
        raise ValueError(f"unknown names {unknown}: worlds are drawn from {', '.join(NAMES)}")
    if standing < 0 or moving < 0:
        raise ValueError(f"standing is {standing} and moving is {moving}; both must be 0 or more")
    if not 1 <= first_id <= 65535 - standing - moving:
        raise ValueError(f"first_id is {first_id}; accepted: 1 to {65535 - standing - moving}")
    rng = np.random.default_rng(seed)
    surfaces = _surfaces(rng, bool(rng.integers(2)) if yard is None else yard, wall)
    kinds: list[str] = []
    while len(kinds) < standing + moving:
        kinds += [names[k] for k in rng.permutation(len(names))]
    things: list[Thing] = []
    routes = _lanes(rng, moving)
    for number, name in enumerate(kinds[: standing + moving]):
        moves = number < moving
        levels, width, height = _cut_out(rng, name, upright=moves and name in ROLLING)
        route = routes[number] if moves else _spot(rng, max(width, 0.3), things[moving:])
        things.append(Thing(first_id + number, name, levels, width, height, route, moves and name in ROLLING))
    return World(surfaces, tuple(things))


def halves(picture: np.ndarray, smallest: int = 4) -> tuple[np.ndarray, ...]:
    """A picture and its halves down to `smallest` pixels a side, each the mean of the one before."""
    levels = [picture]
    while min(levels[-1].shape[:2]) >= 2 * smallest:
        rows, columns = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (columns // 2, rows // 2), interpolation=cv2.INTER_AREA))
    return tuple(levels)


def _surfaces(rng: np.random.Generator, yard: bool, asked: str | None) -> tuple[Surface, ...]:
    """The floor, and what is around it: four walls, or the sky in their place."""
    walls, floors = PLACES[int(yard)]
    if asked is not None and asked not in walls:
        raise ValueError(f"wall is {asked!r}; accepted in a {'yard' if yard else 'room'}: {', '.join(walls)}")
    drawn, floor = walls[int(rng.integers(len(walls)))], floors[int(rng.integers(len(floors)))]
    wall = asked or drawn
    light = rng.uniform(0.8, 1.1) * (1 + rng.normal(0, 0.04, 3))

    def levels(name: str, brightness: float = 1.0) -> tuple[np.ndarray, ...]:
        tile = draw_tile(np.random.default_rng(look), name) * light * brightness
        return halves(np.clip(np.rint(tile), 0, 255).astype(np.uint8), 2)

    look = int(rng.integers(2**31))
    turned = rng.uniform(-np.pi / 4, np.pi / 4)
    x, y, z = np.eye(3)
    found = [Surface(np.zeros(3), x, z, levels(floor), FLOOR_DENSITY * rng.uniform(0.8, 1.2))]
    far = SKY if wall == "sky" else ROOM
    density = WALL_DENSITY * ROOM / far * rng.uniform(0.8, 1.2)
    board = None
    if not yard and rng.random() < 0.7:
        grey = 255 * float(rng.choice([0.35, 0.9]))
        board = (float(rng.uniform(0.06, 0.14)), (round(grey), round(grey * 0.92), round(grey * 0.84)))
    look = int(rng.integers(2**31))
    for side in range(4):
        facing = turned + side * np.pi / 2
        outward = np.array([np.sin(facing), 0, np.cos(facing)])
        right = np.array([np.cos(facing), 0, -np.sin(facing)])
        # Light comes from one side, so that corners are seen.
        brightness = 1 - 0.12 * side % 0.36 if wall != "sky" else 1.0
        found.append(Surface(far * outward, right, y, levels(wall, brightness), density, wall != "sky", board))
    return tuple(found)


def _cut_out(rng: np.random.Generator, name: str, *, upright: bool) -> tuple[tuple[np.ndarray, ...], float, float]:
    """An object's picture and its halves, and the width and height in metres that it covers."""
    paint, cover, tilt = draw_object(rng, name)
    side = cover.shape[0]
    angle = 0.0 if upright else float(rng.uniform(-tilt, tilt))
    mirrored = bool(rng.integers(2))
    stretch = 1.0 if upright else float(rng.uniform(0.9, 1.1))
    metres = SIDES[name] * float(rng.uniform(0.85, 1.15))
    canvas = 3 * side // 2  # holds it at every angle
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2 - 0.5, side / 2 - 0.5), angle, 1.0), np.float64)
    matrix[:, 2] += (canvas - side) / 2
    weight = cover[:, :, None].astype(np.float32) / 255
    shown = np.clip(paint * np.float32(rng.uniform(0.8, 1.12)), 0, 255) * weight
    picture = np.dstack([shown, cover.astype(np.float32)])
    if angle:
        picture = cv2.warpAffine(picture, matrix, (canvas, canvas), flags=cv2.INTER_LINEAR)
    if mirrored:
        picture = picture[:, ::-1]
    left, top, columns, rows = cv2.boundingRect((picture[..., 3] > 127).astype(np.uint8))
    picture = np.clip(np.rint(picture[top : top + rows, left : left + columns]), 0, 255).astype(np.uint8)
    return halves(picture, 8), metres * stretch * columns / side, metres * rows / side


def _lanes(rng: np.random.Generator, count: int) -> list[Route]:
    """Routes along the lanes on which nobody meets anybody."""
    routes = []
    for lane, distance in enumerate(LANES):
        here = count // len(LANES) + (lane < count % len(LANES))
        start = rng.uniform(0, 2 * np.pi)
        for k in range(here):
            room = np.pi / here - 0.75 / distance  # an object may be 1.5 m wide
            if room < 0.05:
                raise ValueError(f"there is no place for {count} objects that move; fewer will do")
            swing = min(room, 1.3 / distance) * rng.uniform(0.7, 1.0)
            speed = rng.uniform(0.5, 1.1)  # m/s, the greatest
            routes.append(
                Route(
                    float(start + 2 * np.pi * k / here),
                    distance,
                    float(swing),
                    0.0,
                    float(2 * np.pi * swing * distance / speed),
                    float(rng.uniform(0, 2 * np.pi)),
                )
            )
    return routes


def _spot(rng: np.random.Generator, width: float, others: Sequence[Thing]) -> Route:
    """A place to stand at that is no other's and on no lane."""
    for _ in range(2000):
        # Of even density on the floor.
        distance = float(np.sqrt(rng.uniform(BAND[0] ** 2, BAND[1] ** 2)))
        bearing = float(rng.uniform(0, 2 * np.pi))
        if min(abs(distance - lane) for lane in LANES) < APART:
            continue
        place = distance * np.array([np.sin(bearing), np.cos(bearing)])
        gaps = [
            np.hypot(
                *(place - other.route.distance * np.array([np.sin(other.route.bearing), np.cos(other.route.bearing)]))
            )
            - (width + other.width) / 2
            for other in others
        ]
        if min(gaps, default=np.inf) > 0.1:
            return Route(bearing, distance, turn=float(rng.uniform(-0.3, 0.3)))
    raise ValueError(f"there is no place for {len(others) + 1} objects that stand; fewer will do")
