"""Drawn scenes with exact label masks, which the embedded model pair is trained and measured on.

Indoor and yard scenes with objects of fourteen kinds that differ in shape and texture, seeded and drawn with OpenCV.
The sample bag shows them too. Backgrounds are procedural textures and photographs that scikit-image carries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import cv2
import numpy as np

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11

NAMES: tuple[str, ...] = (
    "ball",
    "cube",
    "cone",
    "ladder",
    "bottle",
    "chair",
    "door",
    "mug",
    "pallet",
    "person",
    "plant",
    "ring",
    "star",
    "cross",
)
"""What can stand in a scene. Label k of `Scene.labels` is NAMES[k - 1]."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "ball": ("sphere", "beach ball"),
    "cube": ("box", "cardboard box"),
    "cone": ("traffic cone", "pylon"),
    "ladder": ("step ladder",),
    "bottle": ("flask", "water bottle"),
    "chair": ("seat", "stool"),
    "door": ("doorway", "wooden door"),
    "mug": ("cup", "coffee mug"),
    "pallet": ("skid", "wooden pallet"),
    "person": ("human", "worker", "man"),
    "plant": ("potted plant", "flower pot"),
    "ring": ("hoop", "tyre"),
    "star": ("five pointed star",),
    "cross": ("plus sign", "red cross"),
}
"""Other words for the names, which the embedded pair learnt beside them."""

STUFF: tuple[str, ...] = (
    "wall",
    "brick wall",
    "tiles",
    "floor",
    "carpet",
    "sky",
    "fence",
    "grass",
    "gravel",
    "road",
    "photo",
)
"""What surrounds the objects. Label k of `Scene.stuff` is STUFF[k - 1]; none is ever an object."""

_PATCH = 256  # side of the canvas on which one object is drawn
_TEXTURE = 512  # side of a texture tile


@dataclass(frozen=True)
class Scene:
    """One drawn image and what is in it.

    image: uint8 [H, W, 3], RGB.
    labels: uint8 [H, W], 0 = background, k = NAMES[k - 1].
    stuff: uint8 [H, W], k = STUFF[k - 1], what the background is at every pixel, under the objects too.
    """

    image: np.ndarray
    labels: np.ndarray
    stuff: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are visible, in label order."""
        return tuple(NAMES[k - 1] for k in np.unique(self.labels) if k)

    @property
    def caption(self) -> str:
        """The visible names as an English list ("a ball, a cube and a door")."""
        items = [f"a {name}" for name in self.names]
        if len(items) < 2:
            return items[0] if items else "an empty room"
        return ", ".join(items[:-1]) + " and " + items[-1]


class _SceneOptions(TypedDict, total=False):
    """The keyword arguments of `draw_scene`."""

    size: tuple[int, int]
    objects: tuple[int, int]
    object_size: tuple[float, float]
    names: Sequence[str]


def draw_scene(
    seed: int | Sequence[int],
    *,
    size: tuple[int, int] = (480, 640),
    objects: tuple[int, int] = (3, 8),
    object_size: tuple[float, float] = (0.17, 0.5),
    names: Sequence[str] = NAMES,
) -> Scene:
    """Draw the scene of a seed; the same arguments always give the same scene.

    size: (rows, columns) in pixels. objects: least and greatest number of objects. object_size: least and greatest
    height of an object as a fraction of the rows. names: the kinds to draw from.
    Raises ValueError for an unknown name, a size below 32 pixels or an empty range.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not names:
        raise ValueError(f"unknown names {unknown}: scenes are drawn from {', '.join(NAMES)}")
    rows, columns = size
    if min(size) < 32:
        raise ValueError(f"a scene of {columns} x {rows} pixels is too small: both sides must be 32 or more")
    if not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"objects is {objects}; it must be (least, greatest), both 0 or more")
    if not 0 < object_size[0] <= object_size[1]:
        raise ValueError(f"object_size is {object_size}; it must be (least, greatest), both above 0")
    rng = np.random.default_rng(seed)
    image, stuff, horizon = _background(rng, rows, columns)
    labels = np.zeros((rows, columns), np.uint8)
    count = int(rng.integers(objects[0], objects[1] + 1))
    standing = sorted(
        ((rng.uniform(0.3, 1.02) * rows, names[int(rng.integers(len(names)))]) for _ in range(count)),
        key=lambda item: item[0],
    )
    for bottom, name in standing:
        _place(rng, image, labels, name, bottom, horizon, object_size)
    return Scene(_photograph(rng, image), labels, stuff)


def draw_scenes(seed: int, count: int, **options: Unpack[_SceneOptions]) -> Iterator[Scene]:
    """Yield `count` scenes of a seed; scene i does not depend on `count`. Options as in `draw_scene`."""
    for index in range(count):
        yield draw_scene((seed, index), **options)


# --- textures --------------------------------------------------------------------------------------------------------


def _octaves(rng: np.random.Generator, stretch: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Smooth noise in [0, 1], float32 [512, 512]; `stretch` lengthens its grain along (rows, columns)."""
    total = np.zeros((_TEXTURE, _TEXTURE), np.float32)
    for octave in range(2, 9):
        cells = (max(2, 2**octave // stretch[0]), max(2, 2**octave // stretch[1]))
        noise = rng.random(cells, dtype=np.float32)
        total += cv2.resize(noise, (_TEXTURE, _TEXTURE), interpolation=cv2.INTER_CUBIC) * 0.62 ** (octave - 2)
    return cv2.normalize(total, total, 0, 1, cv2.NORM_MINMAX)


def _grid_lines(cell: tuple[int, int], width: int, shifted: bool) -> np.ndarray:
    """Joints of tiles, planks or bricks: float32 [512, 512], 1 on a joint, 0 elsewhere."""
    lines = np.zeros((_TEXTURE, _TEXTURE), np.float32)
    for row, top in enumerate(range(0, _TEXTURE, cell[0])):
        lines[top : top + width] = 1
        start = (cell[1] // 2 if row % 2 else 0) if shifted else 0
        for left in range(start, _TEXTURE, cell[1]):
            lines[top : top + cell[0], left : left + width] = 1
    return lines


@functools.cache
def _textures() -> dict[str, np.ndarray]:
    """Brightness patterns around 1, float32 [512, 512], drawn once from a fixed seed."""
    from skimage import data  # heavy, and only scenes need it

    rng = np.random.default_rng(20251108)
    smooth, fine = _octaves(rng), rng.random((_TEXTURE, _TEXTURE), dtype=np.float32)
    grain = _octaves(rng, (1, 24))
    cells = np.kron(rng.random((8, 4), dtype=np.float32), np.ones((64, 128), np.float32))
    waves = np.sin(np.arange(_TEXTURE, dtype=np.float32) * 2 * np.pi / 32)

    def photograph(grey: np.ndarray) -> np.ndarray:
        scaled = cv2.resize(grey, (_TEXTURE, _TEXTURE)).astype(np.float32)
        return 1 + (scaled - scaled.mean()) / 255 * 1.3

    textures = {
        "plaster": 0.92 + 0.16 * smooth,
        "paper": 0.95 + 0.1 * smooth + 0.12 * (np.outer(waves, np.ones(_TEXTURE)) > 0.2),
        "wood": 0.72 + 0.5 * grain,
        "tiles": (0.93 + 0.12 * smooth) * (1 - 0.35 * _grid_lines((64, 64), 4, False)),
        "planks": (0.7 + 0.35 * grain + 0.2 * cells) * (1 - 0.45 * _grid_lines((64, 256), 3, True)),
        "brick": photograph(data.brick().T),
        "grass": photograph(data.grass()),
        "gravel": photograph(data.gravel()),
        "carpet": 0.75 + 0.35 * fine + 0.15 * smooth,
        "asphalt": 0.85 + 0.2 * fine * smooth + 0.12 * smooth,
        "fence": (0.75 + 0.4 * grain.T) * (1 - 0.6 * _grid_lines((1024, 48), 8, False)),
        "speckle": 0.9 + 0.2 * (fine > 0.82) - 0.25 * (fine < 0.1),
        "leaves": 0.6 + 0.7 * _octaves(rng, (1, 2)),
        "cloth": 0.88 + 0.12 * np.outer(np.ones(_TEXTURE), waves) + 0.1 * smooth,
    }
    return {name: texture.astype(np.float32) for name, texture in textures.items()}


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    """Photographs that scikit-image carries and that show none of NAMES, uint8 RGB."""
    from skimage import data

    return data.chelsea(), data.stereo_motorcycle()[0], data.rocket()


def _tile(rng: np.random.Generator, texture: str, rows: int, columns: int, zoom: float) -> np.ndarray:
    """A random cut of a texture as brightness, float32 [rows, columns]; `zoom` enlarges its grain."""
    pattern = _textures()[texture]
    shift = np.array([[zoom, 0, -rng.uniform(0, _TEXTURE) * zoom], [0, zoom, -rng.uniform(0, _TEXTURE) * zoom]])
    return cv2.warpAffine(pattern, shift, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def _colour(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.04) -> np.ndarray:
    """An RGB colour, float32 [3] in 0..255, near the given hue (0..1), saturation and value."""
    hsv = np.array(
        [
            (hue + rng.normal(0, spread)) % 1 * 360,
            np.clip(saturation + rng.normal(0, 0.08), 0, 1),
            np.clip(value + rng.normal(0, 0.08), 0.1, 1),
        ],
        np.float32,
    )
    return cv2.cvtColor(hsv.reshape(1, 1, 3), cv2.COLOR_HSV2RGB).reshape(3) * 255


# --- backgrounds -----------------------------------------------------------------------------------------------------

# stuff name -> texture, and (hue, saturation, value) of its colour
_WALLS = {
    "wall": (
        ("plaster", "paper"),
        ((0.1, 0.15, 0.85), (0.55, 0.15, 0.75), (0.3, 0.12, 0.75), (0.0, 0.05, 0.9)),
    ),
    "brick wall": (("brick",), ((0.03, 0.5, 0.62), (0.06, 0.35, 0.75))),
    "fence": (("fence",), ((0.08, 0.4, 0.55), (0.1, 0.1, 0.7))),
    "sky": (("plaster",), ((0.57, 0.35, 0.92), (0.58, 0.12, 0.85))),
}
_FLOORS = {
    "tiles": (("tiles",), ((0.1, 0.08, 0.8), (0.55, 0.15, 0.6), (0.05, 0.3, 0.6))),
    "floor": (("planks",), ((0.08, 0.5, 0.6), (0.07, 0.4, 0.45), (0.1, 0.35, 0.75))),
    "carpet": (("carpet",), ((0.6, 0.3, 0.5), (0.95, 0.35, 0.5), (0.1, 0.1, 0.6))),
    "grass": (("grass",), ((0.27, 0.55, 0.5), (0.22, 0.5, 0.55))),
    "gravel": (("gravel",), ((0.1, 0.1, 0.62), (0.08, 0.2, 0.6))),
    "road": (("asphalt",), ((0.6, 0.04, 0.42), (0.1, 0.03, 0.55))),
}
PLACES = (
    (("wall", "brick wall"), ("tiles", "floor", "carpet")),
    (("sky", "fence", "brick wall"), ("grass", "gravel", "road")),
)
"""Walls and floors that go together: indoors, and in a yard."""


def _surface(rng: np.random.Generator, kinds: dict, name: str, rows: int, columns: int, zoom: float) -> np.ndarray:
    """A coloured piece of a wall or floor, float32 [rows, columns, 3]."""
    textures, colours = kinds[name]
    brightness = _tile(rng, textures[int(rng.integers(len(textures)))], rows, columns, zoom)
    return brightness[:, :, None] * _colour(rng, *colours[int(rng.integers(len(colours)))])


def _background(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Image float32 [rows, columns, 3], stuff labels uint8 [rows, columns], and the row where the ground begins."""
    if rng.random() < 0.15:
        photograph = _photographs()[int(rng.integers(len(_photographs())))]
        height, width = photograph.shape[:2]
        side = rng.uniform(0.5, 1)
        window = (int(height * side), int(min(width, height * columns / rows) * side))
        top, left = int(rng.integers(height - window[0] + 1)), int(rng.integers(width - window[1] + 1))
        cut = photograph[top : top + window[0], left : left + window[1]]
        image = cv2.resize(cut, (columns, rows), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        stuff = np.full((rows, columns), STUFF.index("photo") + 1, np.uint8)
        return image * rng.uniform(0.6, 1.1), stuff, int(0.3 * rows)
    walls, floors = PLACES[int(rng.integers(len(PLACES)))]
    wall, floor = walls[int(rng.integers(len(walls)))], floors[int(rng.integers(len(floors)))]
    horizon = int(rng.uniform(0.3, 0.62) * rows)
    zoom = rows / 480 * rng.uniform(0.6, 1.3)
    image = np.empty((rows, columns, 3), np.float32)
    image[:horizon] = _surface(rng, _WALLS, wall, horizon, columns, zoom)
    # the ground is a flat surface seen in perspective: its far edge is compressed onto the horizon
    depth = rows - horizon
    flat = _surface(rng, _FLOORS, floor, 2 * depth, columns, zoom)
    inset = rng.uniform(0.2, 0.42) * columns
    near = np.array([[0, 0], [columns, 0], [columns, 2 * depth], [0, 2 * depth]], np.float32)
    far = np.array([[0, 0], [columns, 0], [columns + 2 * inset, depth], [-2 * inset, depth]], np.float32)
    image[horizon:] = cv2.warpPerspective(
        flat,
        cv2.getPerspectiveTransform(near, far),
        (columns, depth),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    if wall in ("wall", "brick wall") and rng.random() < 0.7:  # a skirting board
        board = max(2, int(rows * rng.uniform(0.01, 0.025)))
        image[horizon - board : horizon] = _colour(rng, 0.08, 0.2, rng.choice([0.35, 0.9]))
    stuff = np.empty((rows, columns), np.uint8)
    stuff[:horizon] = STUFF.index(wall) + 1
    stuff[horizon:] = STUFF.index(floor) + 1
    return image, stuff, horizon


# --- objects ---------------------------------------------------------------------------------------------------------


class _Canvas:
    """One object's paint: colour float32 [256, 256, 3] and coverage uint8 [256, 256]; coordinates are in 0..1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.paint = np.zeros((_PATCH, _PATCH, 3), np.float32)
        self.cover = np.zeros((_PATCH, _PATCH), np.uint8)

    def polygon(self, points: Sequence[tuple[float, float]], colour: np.ndarray, texture: str | None = None) -> None:
        mask = np.zeros((_PATCH, _PATCH), np.uint8)
        corners = np.round(np.array(points) * _PATCH * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, 4)
        self._blend(mask, colour, texture)

    def ellipse(
        self,
        centre: tuple[float, float],
        axes: tuple[float, float],
        colour: np.ndarray,
        texture: str | None = None,
    ) -> None:
        mask = np.zeros((_PATCH, _PATCH), np.uint8)
        cv2.ellipse(
            mask,
            (_fixed(centre[0]), _fixed(centre[1])),
            (_fixed(axes[0]), _fixed(axes[1])),
            0,
            0,
            360,
            255,
            -1,
            cv2.LINE_AA,
            4,
        )
        self._blend(mask, colour, texture)

    def stroke(self, start: tuple[float, float], end: tuple[float, float], width: float, colour: np.ndarray) -> None:
        mask = np.zeros((_PATCH, _PATCH), np.uint8)
        ends = [(_fixed(x), _fixed(y)) for x, y in (start, end)]
        cv2.line(mask, ends[0], ends[1], 255, max(1, round(width * _PATCH)), cv2.LINE_AA, 4)
        self._blend(mask, colour, None)

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: np.ndarray,
        texture: str | None = None,
    ) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, texture)

    def cut(self, centre: tuple[float, float], axes: tuple[float, float]) -> None:
        """Make a hole: what is behind shows through."""
        cv2.ellipse(
            self.cover,
            (_fixed(centre[0]), _fixed(centre[1])),
            (_fixed(axes[0]), _fixed(axes[1])),
            0,
            0,
            360,
            0,
            -1,
            cv2.LINE_AA,
            4,
        )

    def shade(self, brightness: np.ndarray) -> None:
        self.paint *= brightness[:, :, None] if brightness.ndim == 2 else brightness[None, :, None]

    def round_shade(self, strength: float = 0.35) -> None:
        """Light a standing cylinder from the front left."""
        x = np.linspace(-1, 1, _PATCH, dtype=np.float32)
        self.shade(1 + strength * (np.cos((x + 0.35) * 1.6) - 0.75))

    def _blend(self, mask: np.ndarray, colour: np.ndarray, texture: str | None) -> None:
        left, top, width, height = cv2.boundingRect(mask)
        if width == 0:
            return
        window = (slice(top, top + height), slice(left, left + width))
        ink = colour.astype(np.float32)
        if texture:
            ink = ink * _tile(self.rng, texture, height, width, self.rng.uniform(0.4, 0.8))[:, :, None]
        weight = mask[window][:, :, None] * np.float32(1 / 255)
        self.paint[window] += (ink - self.paint[window]) * weight
        np.maximum(self.cover[window], mask[window], out=self.cover[window])


def _fixed(value: float) -> int:
    """A coordinate in 0..1 as OpenCV's fixed point with four fractional bits."""
    return round(value * _PATCH * 16)


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    return _colour(rng, rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.45, 0.95), 0)


def _pick(rng: np.random.Generator, *typical: tuple[float, float, float]) -> np.ndarray:
    """A colour that is typical of a kind three times out of four, and any colour else."""
    if rng.random() < 0.25:
        return _any_colour(rng)
    return _colour(rng, *typical[int(rng.integers(len(typical)))])


def _ball(c: _Canvas) -> None:
    rng = c.rng
    c.ellipse((0.5, 0.5), (0.46, 0.46), _pick(rng, (0.0, 0.8, 0.9), (0.1, 0.8, 0.95), (0.6, 0.7, 0.9)))
    second, inside = _pick(rng, (0.0, 0.0, 0.95), (0.14, 0.8, 0.95)), c.cover.copy()
    turn = rng.uniform(0, np.pi)
    for k in range(3):  # segments of a beach ball
        angles = np.linspace(turn + k * 2.094, turn + k * 2.094 + 1.047, 8)
        c.polygon([(0.5, 0.5)] + [(0.5 + 0.48 * np.cos(a), 0.5 + 0.48 * np.sin(a)) for a in angles], second)
    c.cover = inside
    y, x = np.mgrid[-1:1:256j, -1:1:256j].astype(np.float32)
    c.shade(1.15 - 0.45 * ((x + 0.3) ** 2 + (y + 0.35) ** 2))
    c.paint += 160 * np.exp(-((x + 0.35) ** 2 + (y + 0.4) ** 2) / 0.02)[:, :, None]  # the lamp's reflection


def _cube(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.08, 0.5, 0.75), (0.09, 0.4, 0.65))
    slant, lift = rng.uniform(0.15, 0.3), rng.uniform(0.12, 0.24)
    c.polygon([(0.04, 0.3), (0.96 - slant, 0.3), (0.96 - slant, 0.95), (0.04, 0.95)], colour, "speckle")
    c.polygon(
        [(0.04, 0.3), (0.04 + slant, 0.3 - lift), (0.96, 0.3 - lift), (0.96 - slant, 0.3)],
        np.minimum(colour * 1.25, 255),
        "speckle",
    )
    c.polygon(
        [(0.96 - slant, 0.3), (0.96, 0.3 - lift), (0.96, 0.95 - lift), (0.96 - slant, 0.95)],
        colour * 0.6,
        "speckle",
    )
    tape = colour * 0.45
    middle = (1 - slant) / 2
    c.polygon([(middle - 0.05, 0.3), (middle + 0.05, 0.3), (middle + 0.05, 0.55), (middle - 0.05, 0.55)], tape)
    c.stroke((0.04, 0.3), (0.96 - slant, 0.3), 0.015, tape)
    c.stroke((0.96 - slant, 0.3), (0.96 - slant, 0.95), 0.015, tape)


def _cone(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.06, 0.9, 0.98), (0.03, 0.85, 0.95))
    band = _colour(rng, 0.1, 0.04, 0.95)
    c.box(0.12, 0.86, 0.88, 0.96, colour * 0.8)

    def edge(y: float) -> tuple[float, float]:
        half = 0.05 + 0.27 * (y - 0.05) / 0.81
        return 0.5 - half, 0.5 + half

    cuts = [0.05, 0.28, 0.44, 0.6, 0.74, 0.87]
    for k, (top, bottom) in enumerate(itertools.pairwise(cuts)):
        (a, b), (d, e) = edge(top), edge(bottom)
        c.polygon([(a, top), (b, top), (e, bottom), (d, bottom)], band if k % 2 else colour)
    c.round_shade()


def _ladder(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.13, 0.85, 0.9), (0.6, 0.05, 0.75))
    taper, rail = rng.uniform(0.0, 0.08), rng.uniform(0.07, 0.09)
    left, right = 0.24, 0.76
    rungs = int(rng.integers(5, 7))
    for k in range(rungs):
        y = 0.1 + 0.8 * k / (rungs - 1)
        c.stroke((left + taper, y), (right - taper, y), rail * 0.75, colour * 0.82)
    c.stroke((left + taper, 0.04), (left, 0.96), rail, colour)
    c.stroke((right - taper, 0.04), (right, 0.96), rail, colour)


def _bottle(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.35, 0.7, 0.55), (0.58, 0.6, 0.8), (0.08, 0.8, 0.45))
    half, neck = rng.uniform(0.17, 0.22), rng.uniform(0.06, 0.08)
    outline = [(neck, 0.1), (neck, 0.24), (half, 0.4), (half, 0.94), (half - 0.03, 0.97)]
    c.polygon([(0.5 - x, y) for x, y in outline] + [(0.5 + x, y) for x, y in reversed(outline)], colour)
    c.box(0.5 - neck * 1.2, 0.03, 0.5 + neck * 1.2, 0.12, _pick(rng, (0.0, 0.8, 0.8), (0.0, 0.0, 0.95)))
    c.box(0.5 - half, 0.52, 0.5 + half, 0.78, _pick(rng, (0.1, 0.1, 0.95), (0.14, 0.5, 0.95)))
    c.round_shade(0.5)
    c.paint[:, int((0.5 - half * 0.55) * _PATCH) : int((0.5 - half * 0.35) * _PATCH)] += 55


def _chair(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.07, 0.65, 0.45), (0.0, 0.75, 0.5), (0.62, 0.6, 0.4))
    leg, seat = colour * 0.75, np.minimum(colour * 1.2, 255)
    for x, y in ((0.22, 0.96), (0.62, 0.96), (0.38, 0.86), (0.8, 0.86)):
        c.stroke((x + 0.01, 0.6), (x, y), 0.065, leg)
    c.box(0.18, 0.06, 0.28, 0.62, leg, "wood")
    c.box(0.58, 0.02, 0.68, 0.6, leg, "wood")
    c.polygon([(0.2, 0.07), (0.66, 0.03), (0.66, 0.2), (0.2, 0.24)], colour, "wood")
    c.polygon([(0.2, 0.3), (0.66, 0.26), (0.66, 0.38), (0.2, 0.42)], colour, "wood")
    c.polygon([(0.16, 0.58), (0.66, 0.52), (0.88, 0.6), (0.36, 0.68)], seat, "wood")
    c.polygon([(0.16, 0.58), (0.36, 0.68), (0.36, 0.74), (0.16, 0.64)], colour * 0.7)
    c.polygon([(0.36, 0.68), (0.88, 0.6), (0.88, 0.66), (0.36, 0.74)], colour * 0.85)


def _door(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.06, 0.6, 0.5), (0.45, 0.4, 0.5), (0.6, 0.5, 0.45))
    c.box(0.22, 0.02, 0.78, 0.98, colour * 0.55)
    c.box(0.26, 0.05, 0.74, 0.98, colour, "wood")
    for left in (0.31, 0.53):
        for top, bottom in ((0.1, 0.42), (0.5, 0.9)):
            c.box(left, top, left + 0.16, bottom, colour * 0.62)
            c.box(left + 0.015, top + 0.015, left + 0.145, bottom - 0.015, colour * 0.88, "wood")
    c.ellipse((0.7, 0.52), (0.025, 0.025), _colour(rng, 0.13, 0.7, 0.95))


def _mug(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.0, 0.0, 0.95), (0.55, 0.65, 0.85), (0.95, 0.6, 0.85))
    c.ellipse((0.72, 0.54), (0.22, 0.24), colour * 0.85)
    c.cut((0.73, 0.54), (0.12, 0.14))
    c.box(0.1, 0.16, 0.7, 0.86, colour)
    c.ellipse((0.4, 0.86), (0.3, 0.09), colour)
    c.box(0.1, 0.42, 0.7, 0.64, _any_colour(rng))
    c.round_shade(0.4)
    c.ellipse((0.4, 0.16), (0.3, 0.09), np.minimum(colour * 1.1, 255))
    c.ellipse((0.4, 0.17), (0.25, 0.065), np.array([70, 42, 25]))


def _pallet(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.1, 0.5, 0.8), (0.09, 0.4, 0.68))
    shift = rng.uniform(0.08, 0.16)
    for k in range(3):  # blocks and runners
        left = 0.04 + k * 0.4
        c.box(left, 0.7, left + 0.12, 0.86, colour * 0.6, "wood")
    c.box(0.04, 0.86, 0.96, 0.93, colour * 0.85, "wood")
    c.box(0.04, 0.62, 0.96, 0.7, colour * 0.95, "wood")
    for k in range(4):  # top boards in perspective
        near, far = 0.61 - k * 0.1, 0.61 - k * 0.1 - 0.075
        a, b = shift * (0.61 - near) / 0.4, shift * (0.61 - far) / 0.4
        c.polygon(
            [(0.04 + a, near), (0.96 - a, near), (0.96 - b, far), (0.04 + b, far)],
            colour * (1.15 - 0.06 * k),
            "wood",
        )
    c.polygon([(0.1, 0.62), (0.16, 0.62), (0.16 + shift, 0.24), (0.1 + shift, 0.24)], colour * 0.5)
    c.polygon([(0.84, 0.62), (0.9, 0.62), (0.9 - shift, 0.24), (0.84 - shift, 0.24)], colour * 0.5)


def _person(c: _Canvas) -> None:
    rng = c.rng
    skin = _colour(rng, 0.07, rng.uniform(0.25, 0.6), rng.uniform(0.4, 0.95), 0.01)
    shirt = _pick(rng, (0.17, 0.85, 0.95), (0.06, 0.9, 0.95))
    trousers = _pick(rng, (0.62, 0.6, 0.4), (0.6, 0.1, 0.25))
    step, swing = rng.uniform(0.02, 0.09), rng.uniform(0.02, 0.14)
    c.stroke((0.46, 0.56), (0.45 - step, 0.93), 0.09, trousers)
    c.stroke((0.54, 0.56), (0.55 + step, 0.93), 0.09, trousers)
    c.stroke((0.44 - step, 0.95), (0.41 - step, 0.95), 0.05, trousers * 0.4)
    c.stroke((0.56 + step, 0.95), (0.6 + step, 0.95), 0.05, trousers * 0.4)
    for side in (-1, 1):
        elbow = (0.5 + side * (0.15 + swing * 0.5), 0.4)
        hand = (0.5 + side * (0.13 + swing), 0.54)
        c.stroke((0.5 + side * 0.12, 0.27), elbow, 0.075, shirt * 0.85)
        c.stroke(elbow, hand, 0.06, shirt * 0.85)
        c.ellipse(hand, (0.035, 0.035), skin)
    c.polygon([(0.36, 0.23), (0.64, 0.23), (0.61, 0.6), (0.39, 0.6)], shirt, "cloth")
    band = _colour(rng, 0.1, 0.03, 0.92)
    c.box(0.38, 0.36, 0.62, 0.4, band)
    c.box(0.39, 0.47, 0.61, 0.51, band)
    c.box(0.46, 0.17, 0.54, 0.24, skin * 0.9)
    c.ellipse((0.5, 0.12), (0.075, 0.095), skin)
    cap = _pick(rng, (0.14, 0.9, 0.95), (0.07, 0.7, 0.25))
    c.polygon([(0.42, 0.1), (0.44, 0.04), (0.5, 0.02), (0.56, 0.04), (0.58, 0.1)], cap)


def _plant(c: _Canvas) -> None:
    rng = c.rng
    leaf = _colour(rng, rng.uniform(0.25, 0.38), 0.65, 0.5)
    for _ in range(13):
        angle = rng.uniform(-1.5, 1.5)
        reach, width = rng.uniform(0.3, 0.5), rng.uniform(0.05, 0.085)
        tip = np.array([0.5 + np.sin(angle) * reach, 0.6 - np.cos(angle) * reach])
        root, normal = np.array([0.5, 0.62]), np.array([np.cos(angle), np.sin(angle)]) * width
        middle = (tip + root) / 2
        c.polygon(
            [tuple(root), tuple(middle + normal), tuple(tip), tuple(middle - normal)],
            leaf * rng.uniform(0.65, 1.35),
            "leaves",
        )
    pot = _pick(rng, (0.04, 0.65, 0.7), (0.0, 0.0, 0.85))
    c.polygon([(0.3, 0.62), (0.7, 0.62), (0.64, 0.97), (0.36, 0.97)], pot)
    c.box(0.27, 0.6, 0.73, 0.68, pot * 0.85)


def _ring(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.0, 0.0, 0.2), (0.0, 0.85, 0.9), (0.85, 0.7, 0.8))
    hole = rng.uniform(0.2, 0.26)
    c.ellipse((0.5, 0.5), (0.46, 0.46), colour)
    other = _pick(rng, (0.0, 0.0, 0.95), (0.0, 0.0, 0.5))
    inside = c.cover.copy()
    for angle in np.arange(6) * np.pi / 3 + rng.uniform(0, 1):
        wedge = [(0.5 + 0.48 * np.cos(angle + d), 0.5 + 0.48 * np.sin(angle + d)) for d in (-0.16, 0.16)]
        c.polygon([(0.5, 0.5), *wedge], other)
    c.cover = inside
    c.cut((0.5, 0.5), (hole, hole))
    y, x = np.mgrid[-1:1:256j, -1:1:256j].astype(np.float32)
    middle = 0.46 + hole
    c.shade(1.1 - 1.6 * (np.hypot(x, y) - middle) ** 2 / 0.4 - 0.15 * y)


def _star(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.14, 0.85, 0.97), (0.13, 0.7, 0.85))
    inner = rng.uniform(0.19, 0.23)
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    tips = [(0.5 + r * np.cos(a), 0.52 + r * np.sin(a)) for a, r in zip(angles, [0.48, inner] * 5, strict=True)]
    for k in range(10):  # facets, light and dark in turn
        c.polygon([(0.5, 0.52), tips[k], tips[(k + 1) % 10]], colour * (1.05 if k % 2 else 0.72))


def _cross(c: _Canvas) -> None:
    rng = c.rng
    colour = _pick(rng, (0.99, 0.85, 0.85), (0.4, 0.75, 0.65))
    arm = rng.uniform(0.14, 0.18)
    rim = _colour(rng, 0.0, 0.03, 0.95)
    for width, length, ink in ((arm, 0.47, rim), (arm - 0.045, 0.425, colour)):
        c.box(0.5 - width, 0.5 - length, 0.5 + width, 0.5 + length, ink)
        c.box(0.5 - length, 0.5 - width, 0.5 + length, 0.5 + width, ink)


# how a kind is drawn, its greatest tilt in degrees, and its size against the others
_KINDS: dict[str, tuple[Callable[[_Canvas], None], float, float]] = {
    "ball": (_ball, 180, 0.75),
    "cube": (_cube, 12, 0.8),
    "cone": (_cone, 12, 0.85),
    "ladder": (_ladder, 25, 1.3),
    "bottle": (_bottle, 15, 0.9),
    "chair": (_chair, 10, 1.05),
    "door": (_door, 4, 1.35),
    "mug": (_mug, 15, 0.7),
    "pallet": (_pallet, 12, 0.95),
    "person": (_person, 8, 1.35),
    "plant": (_plant, 10, 1.0),
    "ring": (_ring, 180, 0.8),
    "star": (_star, 180, 0.8),
    "cross": (_cross, 45, 0.75),
}


def draw_object(rng: np.random.Generator, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw one object by itself.

    Returns its colour, float32 [256, 256, 3] RGB in 0..255 and above, which means something only where it is covered;
    its coverage, uint8 [256, 256]; and the greatest tilt that the kind is drawn with, in degrees. Raises KeyError for
    a name that is not in NAMES.
    """
    draw, tilt, _ = _KINDS[name]
    canvas = _Canvas(rng)
    draw(canvas)
    return canvas.paint, canvas.cover, tilt


def draw_tile(rng: np.random.Generator, name: str) -> np.ndarray:
    """Draw a tile of a wall or floor, one of STUFF but "photo": float32 [512, 512, 3] RGB in 0..255 and above.
    Raises KeyError for another name."""
    textures, colours = (_WALLS | _FLOORS)[name]
    brightness = _textures()[textures[int(rng.integers(len(textures)))]]
    return brightness[:, :, None] * _colour(rng, *colours[int(rng.integers(len(colours)))])


def _place(
    rng: np.random.Generator,
    image: np.ndarray,
    labels: np.ndarray,
    name: str,
    bottom: float,
    horizon: int,
    object_size: tuple[float, float],
) -> None:
    """Draw one object of a kind into the image and the labels, its foot near row `bottom`."""
    rows, columns = labels.shape
    draw, tilt, bulk = _KINDS[name]
    canvas = _Canvas(rng)
    draw(canvas)
    side = bulk * rng.uniform(*object_size) * rows * (0.75 + 0.35 * bottom / rows)
    bottom = max(bottom, horizon * 0.9 + 0.2 * side)
    centre = (rng.uniform(0.02, 0.98) * columns, bottom - side / 2)
    angle = rng.uniform(-180, 180) if rng.random() < 0.08 else rng.uniform(-tilt, tilt)
    stretch = rng.uniform(0.88, 1.14)
    scale = np.diag([stretch * side / _PATCH * rng.choice([-1, 1]), side / _PATCH])
    matrix: np.ndarray = scale @ cv2.getRotationMatrix2D((_PATCH / 2, _PATCH / 2), angle, 1.0)
    reach = int(np.ceil(side * 0.75)) + 2
    left, top = int(centre[0]) - reach, int(centre[1]) - reach
    offset = matrix @ np.array([_PATCH / 2, _PATCH / 2, 1])
    matrix[:, 2] += np.array(centre) - offset - np.array([left, top])
    smoothing = _PATCH / side
    paint: np.ndarray = canvas.paint
    cover: np.ndarray = canvas.cover
    if smoothing > 1.6:  # shrink without aliasing
        kernel = (int(smoothing) | 1, int(smoothing) | 1)
        paint, cover = cv2.blur(paint, kernel), cv2.blur(cover, kernel)
    box = (2 * reach, 2 * reach)
    paint = cv2.warpAffine(paint, matrix, box, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    cover = cv2.warpAffine(cover, matrix, box, flags=cv2.INTER_LINEAR)
    y0, y1, x0, x1 = max(top, 0), min(top + box[1], rows), max(left, 0), min(left + box[0], columns)
    if y0 >= y1 or x0 >= x1:
        return
    inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    outer = (slice(y0, y1), slice(x0, x1))
    shadow: np.ndarray = cv2.GaussianBlur(cover, (0, 0), max(1.0, side * 0.05)).astype(np.float32) / 255
    shift = np.array([[1, 0, side * 0.06], [0, 1, side * 0.04]], np.float32)
    shadow = cv2.warpAffine(shadow, shift, box)
    image[outer] *= (1 - 0.4 * shadow[inner])[:, :, None]
    weight = cover[inner][:, :, None].astype(np.float32) / 255
    image[outer] += (paint[inner] * rng.uniform(0.75, 1.15) - image[outer]) * weight
    labels[outer][cover[inner] > 127] = NAMES.index(name) + 1


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """What light and the sensor do to the picture: float32 [H, W, 3] -> uint8 [H, W, 3]."""
    rows, columns = image.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    across = np.cos(angle) * np.linspace(-1, 1, columns, dtype=np.float32)
    down = np.sin(angle) * np.linspace(-1, 1, rows, dtype=np.float32)
    light = (1 + strength * (across[None, :] + down[:, None])) * rng.uniform(0.7, 1.15)
    tint = 1 + rng.normal(0, 0.05, 3)
    image = image * light[:, :, None].astype(np.float32) * tint.astype(np.float32)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2) * rows / 480)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(1, 9)
    return np.clip(image + noise, 0, 255).astype(np.uint8)
