"""Films a drawn world: what a moving pinhole camera sees of it, with the truth of every image.

Every image has its labels, instances, depth and the positions of its objects, all of one moment: the middle of its
exposure. What makes images hard is off by default and comes with `Sensor`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from .world import Surface, Thing, World

NEAR = 0.1
"""A thing is not drawn where any corner of it is less than these metres in front of the camera's plane."""
HEIGHT = 1.15
"""Metres from the floor to the camera."""
PITCH = 11.0
"""Degrees by which the camera looks down."""
SUBFRAME = 2.0
"""Pixels that an image moves between two of the exposures whose mean is an image with motion blur, at most."""
SUBFRAMES = 24
"""How many of them one image takes, at most."""

Poses = tuple[np.ndarray, np.ndarray]
"""Positions in world coordinates, float64 [n, 3], and rotations that turn the camera's optical axes (x right, y down, z
forward) into the world's, float64 [n, 3, 3]."""
Trajectory = Callable[[np.ndarray], Poses]
"""Times in seconds, float64 [n] -> the camera's poses then."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion whose axis goes through the image's middle. width, height, focal (length):
    in pixels."""

    width: int = 640
    height: int = 480
    focal: float = 540.0

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 32 or not self.focal > 0:
            raise ValueError(
                f"a camera of {self.width} x {self.height} pixels and focal length {self.focal:g}; accepted: 32 and "
                "more pixels a side, a focal length above 0"
            )

    @property
    def K(self) -> np.ndarray:
        """The camera matrix, float64 [3, 3]; whole numbers are the centres of pixels."""
        return np.array(
            [[self.focal, 0, (self.width - 1) / 2], [0, self.focal, (self.height - 1) / 2], [0, 0, 1]], np.float64
        )


@dataclass(frozen=True)
class Motion:
    """How a camera moves: degrees a second of slow pans (`pan`, the greatest) and of fast turns (`turn`, the greatest;
    0: none), metres that it goes to either side (`travel`), degrees by which it nods and rolls (`sway`). Negative
    values raise ValueError."""

    pan: float = 25.0
    turn: float = 150.0
    travel: float = 0.45
    sway: float = 1.2

    def __post_init__(self) -> None:
        for name in ("pan", "turn", "travel", "sway"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 and above")


@dataclass(frozen=True)
class Sensor:
    """What a sensor and its light do to an image; by default nothing.

    shutter: seconds of exposure; what moves meanwhile is blurred. line_time: seconds from one row's exposure to the
    next one's, the uppermost first (rolling exposure); the image's stamp is that of its middle. noise: standard
    deviation in grey levels. flicker_frequency, flicker_depth: of light that swings around its mean, in Hz and as a
    share of the mean; lamps on 50 Hz have 100. exposure_stops, exposure_interval: the exposure jumps every interval
    (seconds) to a level at most so many stops above or below. Raises ValueError where a value cannot be used.
    """

    shutter: float = 0.0
    line_time: float = 0.0
    noise: float = 0.0
    flicker_frequency: float = 100.0
    flicker_depth: float = 0.0
    exposure_stops: float = 0.0
    exposure_interval: float = 2.0

    def __post_init__(self) -> None:
        for name in ("shutter", "line_time", "noise", "flicker_frequency", "exposure_stops"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 and above")
        if not 0 <= self.flicker_depth <= 1:
            raise ValueError(f"flicker_depth is {self.flicker_depth}; accepted: 0 to 1")
        if not self.exposure_interval > 0:
            raise ValueError(f"exposure_interval is {self.exposure_interval}; accepted: above 0")


@dataclass(frozen=True)
class Seen:
    """A thing of which some lies within an image, hidden or not.

    id, name: the thing's. centre: its middle in metres in the camera's optical frame (x right, y down, z forward),
    whether seen or not; size: its width and height in metres. pixels: how many of the image show it. occluded: share of
    its pixels within the image that nearer things hide. outside: share of it that lies outside of the image.
    """

    id: int
    name: str
    centre: tuple[float, float, float]
    size: tuple[float, float]
    pixels: int
    occluded: float
    outside: float


@dataclass(frozen=True, eq=False)
class View:
    """One image of a film and what is true of it.

    image: uint8 [H, W, 3] RGB. labels: uint8 [H, W] as a scene's, 0 = background. instances: uint16 [H, W], the ids of
    things, 0 = none. depth: float32 [H, W], metres along the optical axis, NaN where there is none (the sky). stamp:
    nanoseconds. K: float64 [3, 3]. things: those within the image, the nearest first. position, rotation: the camera's
    pose in the world, float64 [3] and [3, 3] (Poses).
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    stamp: int
    K: np.ndarray
    things: tuple[Seen, ...]
    position: np.ndarray = field(repr=False)
    rotation: np.ndarray = field(repr=False)


def film(
    world: World,
    trajectory: Trajectory,
    frames: int,
    *,
    rate: float = 10.0,
    camera: Camera | None = None,
    sensor: Sensor | None = None,
    seed: int | Sequence[int] = 0,
    start: int = 0,
) -> Iterator[View]:
    """Yield `frames` images, `rate` a second, the first at time 0 of world and trajectory, stamped `start` (ns).

    Image i does not depend on `frames`. seed: of the noise and the steps of the exposure. Raises ValueError for a rate
    that is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; accepted: above 0")
    for number in range(frames):
        seconds = number / rate
        stamp = start + round(number * 1e9 / rate)
        yield look(world, trajectory, seconds, camera=camera, sensor=sensor, seed=seed, stamp=stamp)


def look(
    world: World,
    trajectory: Trajectory,
    seconds: float,
    *,
    camera: Camera | None = None,
    sensor: Sensor | None = None,
    seed: int | Sequence[int] = 0,
    stamp: int | None = None,
) -> View:
    """The image whose exposure has its middle `seconds` after the beginning. Arguments as in `film`."""
    camera, sensor = camera or Camera(), sensor or Sensor()
    key = [seed] if isinstance(seed, int) else list(seed)
    nanoseconds = round(seconds * 1e9) if stamp is None else stamp
    rows = np.arange(camera.height) - (camera.height - 1) / 2
    times = seconds + rows * sensor.line_time if sensor.line_time else np.array([seconds])
    truth = _render(world, trajectory, camera, times)
    image = truth.image
    count = _subframes(world, trajectory, camera, sensor, seconds)
    if count > 1:
        total = np.zeros(image.shape, np.float32)
        for k in range(count):
            moment = times + sensor.shutter * ((k + 0.5) / count - 0.5)
            total += _render(world, trajectory, camera, moment).image
        image = total * np.float32(1 / count)
    gain = _light(sensor, times, key)
    if not np.all(gain == 1):
        image = image * gain.astype(np.float32)[:, None, None]
    noise = np.random.default_rng([*key, 1, abs(round(seconds * 1e6))]) if sensor.noise else None
    now = np.array([seconds])
    (position,), (rotation,) = trajectory(now)
    return View(
        _expose(image, sensor.noise, noise),
        truth.labels,
        truth.instances,
        truth.depth,
        nanoseconds,
        camera.K,
        _seen(truth, camera, position, rotation, now),
        position,
        rotation,
    )


# --- where the camera is ---------------------------------------------------------------------------------------------


def still(
    position: tuple[float, float, float] = (0.0, -HEIGHT, 0.0), *, yaw: float = 0.0, pitch: float = -PITCH
) -> Trajectory:
    """A camera that does not move. position: world coordinates; yaw: degrees to the right; pitch: degrees upwards."""
    return straight(position, yaw=yaw, pitch=pitch)


def straight(
    position: tuple[float, float, float] = (0.0, -HEIGHT, 0.0),
    *,
    velocity: tuple[float, float, float] = (0.0, 0.0, 0.0),
    yaw: float = 0.0,
    yaw_rate: float = 0.0,
    pitch: float = -PITCH,
) -> Trajectory:
    """A camera of constant velocity (m/s in world coordinates) and yaw rate (degrees a second to the right).

    position, yaw and pitch (degrees upwards) are those of time 0.
    """

    def poses(seconds: np.ndarray) -> Poses:
        places = np.array(position) + seconds[:, None] * np.array(velocity)
        level = np.zeros_like(seconds)
        return places, rotations(np.radians(yaw + yaw_rate * seconds), level + np.radians(pitch), level)

    return poses


def wander(seed: int | Sequence[int], motion: Motion | None = None) -> Trajectory:
    """A camera that pans, rests, turns fast and goes about the middle of the world, all smoothly, for at least half an
    hour; then it only goes about."""
    motion = motion or Motion()
    rng = np.random.default_rng(seed)
    begins, lasts, angles = _yaws(rng, motion)
    before = np.concatenate([[0.0], np.cumsum(angles)])
    first = rng.uniform(0, 360)
    phases = rng.uniform(0, 2 * np.pi, 5)
    across, along, nod, roll, bob = phases

    def poses(seconds: np.ndarray) -> Poses:
        step = np.clip(np.searchsorted(begins, seconds, side="right") - 1, 0, len(begins) - 1)
        share = np.clip((seconds - begins[step]) / lasts[step], 0, 1)
        yaw = first + before[step] + angles[step] * _smooth(share)
        x = motion.travel * np.sin(2 * np.pi * seconds / 7.9 + across)
        z = motion.travel * np.sin(2 * np.pi * seconds / 10.7 + along)
        y = -HEIGHT - 0.1 * motion.travel * np.sin(2 * np.pi * seconds / 3.1 + bob)
        pitch = -PITCH + motion.sway * np.sin(2 * np.pi * seconds / 3.7 + nod)
        tilt = motion.sway * np.sin(2 * np.pi * seconds / 5.3 + roll)
        return np.stack([x, y, z], -1), rotations(np.radians(yaw), np.radians(pitch), np.radians(tilt))

    return poses


def rotations(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Rotations from the camera's optical axes to the world's, float64 [n, 3, 3]: roll about z, then pitch upwards
    about x, then yaw to the right about y, in radians, [n] each."""
    zero, one = np.zeros_like(yaw), np.ones_like(yaw)

    def matrices(*rows: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.stack([np.stack(row, -1) for row in rows], -2)

    sin, cos = np.sin, np.cos
    y = matrices((cos(yaw), zero, sin(yaw)), (zero, one, zero), (-sin(yaw), zero, cos(yaw)))
    x = matrices((one, zero, zero), (zero, cos(pitch), -sin(pitch)), (zero, sin(pitch), cos(pitch)))
    z = matrices((cos(roll), -sin(roll), zero), (sin(roll), cos(roll), zero), (zero, zero, one))
    return y @ x @ z


def _smooth(share: np.ndarray) -> np.ndarray:
    """From 0 to 1 with the least jerk; the greatest slope is 1.875."""
    return share**3 * (10 - 15 * share + 6 * share**2)


def _yaws(rng: np.random.Generator, motion: Motion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Beginnings and lengths in seconds and angles in degrees of pans, rests and turns, one after the other."""
    lasts: list[float] = []
    angles: list[float] = []
    total = 0.0
    while total < 1800:
        seconds, way = rng.uniform(2.5, 4.0), rng.choice([-1.0, 1.0])
        rest, angle = rng.uniform(0.4, 1.0), rng.uniform(60, 100) * rng.choice([-1.0, 1.0])
        lasts += [seconds, rest]
        angles += [way * motion.pan * seconds / 1.875 * rng.uniform(0.7, 1.0), 0.0]
        if motion.turn:
            lasts.append(1.875 * abs(angle) / motion.turn)
            angles.append(angle)
        total += sum(lasts[-3:])
    return np.concatenate([[0.0], np.cumsum(lasts)[:-1]]), np.array(lasts), np.array(angles)


# --- what a sensor does ----------------------------------------------------------------------------------------------


def _light(sensor: Sensor, times: np.ndarray, key: list[int]) -> np.ndarray:
    """By how much the rows are brighter than they are drawn: float64, as `times`."""
    gain = np.ones_like(times)
    if sensor.flicker_depth:
        swing = sensor.flicker_depth * np.sinc(sensor.flicker_frequency * sensor.shutter)  # the mean over the exposure
        gain += swing * np.sin(2 * np.pi * sensor.flicker_frequency * times)
    if sensor.exposure_stops:
        step = int(np.floor(np.median(times) / sensor.exposure_interval))
        gain *= 2 ** np.random.default_rng([*key, 2, abs(step)]).uniform(-sensor.exposure_stops, sensor.exposure_stops)
    return gain


@functools.cache
def _quantiles() -> np.ndarray:
    """The normal distribution's, float32 [65536]: noise from them takes a quarter of the time."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((k + 0.5) / 65536) for k in range(65536)], np.float32)


def _expose(image: np.ndarray, noise: float, rng: np.random.Generator | None) -> np.ndarray:
    """An image as uint8, rounded, with noise from `rng`; float32 or uint8 in."""
    if rng is None:
        return image if image.dtype == np.uint8 else np.clip(np.rint(image), 0, 255).astype(np.uint8)
    grain = np.take(_quantiles(), rng.integers(0, len(_quantiles()), image.shape, dtype=np.uint16))
    return cv2.addWeighted(image.astype(np.float32, copy=False), 1.0, grain, noise, 0.0, dtype=cv2.CV_8U)


def _subframes(world: World, trajectory: Trajectory, camera: Camera, sensor: Sensor, seconds: float) -> int:
    """How many exposures an image with motion blur is the mean of."""
    if not sensor.shutter:
        return 1
    ends = seconds + sensor.shutter * np.array([-0.5, 0.5])
    positions, turned = trajectory(ends)
    cosine = (np.trace(turned[0].T @ turned[1]) - 1) / 2
    moved = float(np.arccos(np.clip(cosine, -1, 1)) + np.linalg.norm(positions[1] - positions[0]) / 1.2)
    for thing in world.things:
        if thing.route.moves:
            centres = thing.at(ends)[0]
            distance = max(float(np.linalg.norm(centres[0] - positions[0])), 0.5)
            moved = max(moved, float(np.linalg.norm(np.diff(centres - positions, axis=0))) / distance)
    return int(np.clip(np.ceil(moved * camera.focal / SUBFRAME), 1, SUBFRAMES))


# --- drawing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Rays:
    """The rays of an image's pixels, as they are once their third coordinate is 1.

    x: float32 [columns], y: float32 [rows, 1]. times: float64 [n]; positions, rotations: the camera's poses then. n is
    1, or the number of rows.
    """

    x: np.ndarray
    y: np.ndarray
    times: np.ndarray
    positions: np.ndarray
    rotations: np.ndarray

    def product(self, vectors: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """The rays' inner products with vectors in the optical frame, float64 [n, 3]: float32, of the window's size."""
        rows, columns = window
        chosen = (vectors if len(vectors) == 1 else vectors[rows]).astype(np.float32)
        return chosen[:, :1] * self.x[columns] + (chosen[:, 1:2] * self.y[rows] + chosen[:, 2:])

    def into_camera(self, vectors: np.ndarray) -> np.ndarray:
        """Directions of the world, float64 [n or 1, 3], in the optical frame of each time, [n, 3]."""
        return np.einsum("nij,ni->nj", self.rotations, np.broadcast_to(vectors, self.positions.shape))

    def plane(self, origin: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """A plane's vectors, float64 [n, 3], whose product with a ray is 1 / depth."""
        offset = np.sum(normal * (origin - self.positions), -1, keepdims=True)
        # A camera in the plane itself sees nothing of it.
        return self.into_camera(normal) / np.where(np.abs(offset) < 1e-9, np.inf, offset)

    def along(self, origin: np.ndarray, axis: np.ndarray, depth: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """How far along `axis` from `origin` the points are that the rays meet at `depth`, float32 in metres."""
        shift = np.sum(axis * (self.positions - origin), -1, keepdims=True).astype(np.float32)
        return depth * self.product(self.into_camera(axis), window) + (shift if len(shift) == 1 else shift[window[0]])


@dataclass
class _Drawn:
    """What was rendered, and of every thing within the image its pixels there, hidden ones included."""

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    things: list[tuple[Thing, int]]


def _render(world: World, trajectory: Trajectory, camera: Camera, times: np.ndarray) -> _Drawn:
    """The image and its truth, row i at times[i] (or all at times[0])."""
    size = (camera.height, camera.width)
    K = camera.K
    rays = _Rays(
        ((np.arange(camera.width) - K[0, 2]) / camera.focal).astype(np.float32),
        ((np.arange(camera.height) - K[1, 2]) / camera.focal).astype(np.float32)[:, None],
        times,
        *trajectory(times),
    )
    whole = (slice(0, size[0]), slice(0, size[1]))
    planes = [rays.plane(s.origin, np.cross(s.right, s.down)) for s in world.surfaces]
    nearness = rays.product(planes[0], whole)  # 1 / depth of what is nearest
    surface = np.zeros(size, np.uint8)
    for number, plane in enumerate(planes[1:], 1):
        here = rays.product(plane, whole)
        surface[here > nearness] = number
        np.maximum(nearness, here, out=nearness)
    image = np.zeros((*size, 3), np.uint8)
    instances = np.zeros(size, np.uint16)
    for number, one in enumerate(world.surfaces):
        _draw_surface(one, rays, camera.focal, nearness, surface == number, image)
    floor = surface == 0
    found = []
    for thing in _nearby(world, rays, camera):
        window = _window(thing, rays, camera)
        if window is not None:
            depth = (rays.rotations[:, :, 2] * (thing.at(times)[0] - rays.positions)).sum(-1).mean()
            found.append((depth, thing, window))
    found.sort(key=lambda one: -one[0])
    for _, thing, _ in found:
        _draw_shadow(thing, rays, camera, nearness, floor, image)
    skies = [number for number, one in enumerate(world.surfaces) if not one.solid]
    sky = np.isin(surface, skies) if skies else None
    things = []
    for _, thing, window in found:
        if count := _draw_thing(thing, rays, camera.focal, window, image, nearness, instances):
            things.append((thing, count))
    depth = 1 / nearness
    if sky is not None:
        depth[sky & (instances == 0)] = np.nan
    table = np.zeros(max((thing.id for thing in world.things), default=0) + 1, np.uint8)
    for thing in world.things:
        table[thing.id] = thing.label
    return _Drawn(image, table[instances], instances, depth, things[::-1])


def _draw_surface(
    surface: Surface,
    rays: _Rays,
    focal: float,
    nearness: np.ndarray,
    mask: np.ndarray,
    image: np.ndarray,
) -> None:
    """Draw a surface where `mask` says that it is seen."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return
    window = (slice(top, top + height), slice(left, left + width))
    mask = mask[window]
    depth = 1 / np.maximum(nearness[window], np.float32(1e-6))
    across = rays.along(surface.origin, surface.right, depth, window)
    down = rays.along(surface.origin, surface.down, depth, window)
    # A pixel shows depth ** 3 / (focal ** 2 * distance of the plane) square metres: the level that is as fine.
    distance = np.abs(np.sum(np.cross(surface.right, surface.down) * (surface.origin - rays.positions), -1)).mean()
    steps = (2.0 ** (np.arange(1, len(surface.levels)) - 0.5) * focal / surface.density) ** 2 * distance
    steps = np.concatenate([[0.0], np.cbrt(steps), [np.inf]]).astype(np.float32)
    nearest, farthest = depth[mask].min(), depth[mask].max()
    target = image[window]
    for level, tile in enumerate(surface.levels):
        if steps[level] > farthest or steps[level + 1] <= nearest:
            continue
        inside = mask & (depth >= steps[level]) & (depth < steps[level + 1])
        x, y, w, h = cv2.boundingRect(inside.view(np.uint8))
        if not w:
            continue
        part = (slice(y, y + h), slice(x, x + w))
        scale = np.float32(surface.density / 2**level)
        columns, rows = (
            _wrapped(place * scale, side) - np.float32(0.5)
            for place, side in ((across[part], tile.shape[1]), (down[part], tile.shape[0]))
        )
        drawn = cv2.remap(tile, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        target[part] = cv2.copyTo(drawn, inside[part].view(np.uint8), np.ascontiguousarray(target[part]))
    if surface.board:
        target[mask & (down > -surface.board[0])] = surface.board[1]


def _wrapped(places: np.ndarray, side: int) -> np.ndarray:
    """Places modulo `side`: OpenCV's own wrapping is slow where all is outside."""
    return places - np.floor(places * np.float32(1 / side)) * np.float32(side)


def _corners(thing: Thing, rays: _Rays, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Corners at the first, middle and last of the rays' times: pixels [3, 4, 2] and depths [3, 4]."""
    chosen = [0, len(rays.times) // 2, -1]
    centre, right, down = thing.at(rays.times[chosen])
    sides = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]) * (thing.width, thing.height)
    points = centre[:, None] + sides[:, :1] * right[:, None] + sides[:, 1:] * down[:, None]
    seen = np.einsum("nij,nki->nkj", rays.rotations[chosen], points - rays.positions[chosen][:, None])
    z = np.maximum(seen[..., 2:], 1e-6)
    return seen[..., :2] / z * camera.focal + camera.K[:2, 2], seen[..., 2]


def _nearby(world: World, rays: _Rays, camera: Camera) -> list[Thing]:
    """The things of which something may lie within the image, and some more: quickly found."""
    if not world.things:
        return []
    middle = len(rays.times) // 2
    centres = world.centres(float(rays.times[middle])) - rays.positions[middle]
    x, y, z = rays.rotations[middle].T @ centres.T
    reach = np.array([np.hypot(thing.width, thing.height) for thing in world.things])
    if len(rays.times) > 1:  # what the camera turns while its rows are exposed
        reach = reach + 0.3 * np.linalg.norm(centres, axis=1)
    ahead = np.maximum(z + reach, 0) / camera.focal
    near = (
        (z > -reach) & (np.abs(x) < ahead * camera.width / 2 + reach) & (np.abs(y) < ahead * camera.height / 2 + reach)
    )
    return [thing for thing, here in zip(world.things, near, strict=True) if here]


def _window(thing: Thing, rays: _Rays, camera: Camera) -> tuple[slice, slice] | None:
    """The part of the image that a thing lies in; None where there is none."""
    corners, depths = _corners(thing, rays, camera)
    if depths.min() < NEAR:
        return None
    margin = 2 if len(rays.times) == 1 else 8
    left, top = np.floor(corners.min((0, 1))).astype(int) - margin
    right, bottom = np.ceil(corners.max((0, 1))).astype(int) + margin + 1
    columns, rows = slice(max(left, 0), min(right, camera.width)), slice(max(top, 0), min(bottom, camera.height))
    return (rows, columns) if columns.start < columns.stop and rows.start < rows.stop else None


def _draw_shadow(
    thing: Thing, rays: _Rays, camera: Camera, nearness: np.ndarray, floor: np.ndarray, image: np.ndarray
) -> None:
    """Darken the floor around a thing's foot."""
    centre, right, _ = thing.at(rays.times)
    foot = centre * (1, 0, 1)
    level = right * (1, 0, 1)
    level /= np.maximum(np.linalg.norm(level, axis=-1, keepdims=True), 1e-6)
    away = np.cross(level, np.array([0.0, 1.0, 0.0]))
    # The shadow's own corners, as a flat thing's.
    width, length = 0.5 * thing.width + 0.1, 0.12 + 0.1 * thing.width
    sides = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width, length) * 1.5
    chosen = [0, -1]
    points = foot[chosen][:, None] + sides[:, :1] * level[chosen][:, None] + sides[:, 1:] * away[chosen][:, None]
    seen = np.einsum("nij,nki->nkj", rays.rotations[chosen], points - rays.positions[chosen][:, None])
    if seen[..., 2].min() < NEAR:
        return
    pixels = seen[..., :2] / seen[..., 2:] * camera.focal + camera.K[:2, 2]
    left, top = np.maximum(np.floor(pixels.min((0, 1))).astype(int) - 2, 0)
    last, bottom = np.minimum(np.ceil(pixels.max((0, 1))).astype(int) + 2, (camera.width, camera.height))
    if left >= last or top >= bottom:
        return
    window = (slice(top, bottom), slice(left, last))
    depth = 1 / np.maximum(nearness[window], np.float32(1e-6))
    across = rays.along(foot, level, depth, window) / np.float32(width)
    back = rays.along(foot, away, depth, window) / np.float32(length)
    dark = np.float32(0.55) * np.exp(-2 * (across**2 + back**2)) * floor[window]
    image[window] = image[window] * (1 - dark)[:, :, None] + np.float32(0.5)


def _draw_thing(
    thing: Thing,
    rays: _Rays,
    focal: float,
    window: tuple[slice, slice],
    image: np.ndarray,
    nearness: np.ndarray,
    instances: np.ndarray,
) -> int:
    """Draw a thing where nothing nearer is; how many of the image's pixels it takes, hidden ones included."""
    centre, right, down = thing.at(rays.times)
    near = rays.product(rays.plane(centre, np.cross(right, down)), window)
    depth = 1 / np.maximum(near, np.float32(1e-6))
    across = rays.along(centre, right, depth, window)
    below = rays.along(centre, down, depth, window)
    middle = float(np.median(depth))
    scale = thing.levels[0].shape[0] / thing.height * middle / focal  # the picture's pixels to one of the image's
    level = int(np.clip(np.floor(np.log2(max(scale, 1e-6)) + 0.35), 0, len(thing.levels) - 1))
    picture = thing.levels[level]
    rows, columns = picture.shape[:2]
    x = (across / np.float32(thing.width) + np.float32(0.5)) * columns - np.float32(0.5)
    y = (below / np.float32(thing.height) + np.float32(0.5)) * rows - np.float32(0.5)
    drawn = cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(0, 0, 0, 0))
    covered = drawn[..., 3] > 127
    count = int(np.count_nonzero(covered))
    behind = nearness[window] > near  # where something nearer has been drawn
    drawn[behind] = 0
    shown = covered & ~behind
    target = image[window]
    rest = cv2.cvtColor(255 - drawn[..., 3], cv2.COLOR_GRAY2RGB)
    target[:] = cv2.add(cv2.multiply(np.ascontiguousarray(target), rest, scale=1 / 255), drawn[..., :3])
    nearness[window][shown] = near[shown]
    instances[window][shown] = thing.id
    return count


# --- what is true of the things --------------------------------------------------------------------------------------

_GRID = 24  # points a side by which the share of a thing outside of the image is measured


def _seen(
    drawn: _Drawn, camera: Camera, position: np.ndarray, rotation: np.ndarray, now: np.ndarray
) -> tuple[Seen, ...]:
    visible = np.bincount(drawn.instances.ravel(), minlength=1)
    found = []
    for thing, count in drawn.things:
        (centre,), (right,), (down,) = thing.at(now)
        pixels = int(visible[thing.id]) if thing.id < len(visible) else 0
        found.append(
            Seen(
                thing.id,
                thing.name,
                tuple((rotation.T @ (centre - position)).tolist()),
                (thing.width, thing.height),
                pixels,
                1 - pixels / count,
                _outside(thing, camera, rotation.T @ (centre - position), rotation.T @ right, rotation.T @ down),
            )
        )
    return tuple(found)


def _outside(thing: Thing, camera: Camera, centre: np.ndarray, right: np.ndarray, down: np.ndarray) -> float:
    """The share of a thing's pixels that an endless image would have outside of this one."""
    cover = cv2.resize(thing.levels[0][..., 3].astype(np.float32), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    steps = (np.arange(_GRID) + 0.5) / _GRID - 0.5
    points = centre + (steps * thing.width)[None, :, None] * right + (steps * thing.height)[:, None, None] * down
    x, y = np.moveaxis(points[..., :2] / points[..., 2:] * camera.focal, -1, 0)
    weight = cover / points[..., 2] ** 3  # a piece's size in the image
    inside = (np.abs(x) <= camera.width / 2) & (np.abs(y) <= camera.height / 2)
    return float(weight[~inside].sum() / weight.sum())
