"""Make a sample bag: a drawn world filmed by a moving camera, with the truth of every image.

    python tools/sample_bag.py --out build/sample_bag
    python tools/sample_bag.py --out build/sample_bag_moving --bag moving

`panning`: a camera pans, zooms, rolls and sways over wide drawn scenes, which are flat, indoors and in a yard by turns.
`moving`, the harder one: a camera goes about, pans and turns fast in a room and then in an open yard, which have
depth, and where some objects move on their own; images have motion blur. The bag (rosbag2, mcap) holds, with one
stamp for each image:

    /camera/image/compressed      sensor_msgs/CompressedImage  JPEG
    /camera/camera_info           sensor_msgs/CameraInfo       of that moment: the zoom of `panning` changes it
    /camera/labels/compressed     sensor_msgs/CompressedImage  PNG, 8 bits: what every pixel of the image shows
    /camera/labels/label_info     vision_msgs/LabelInfo        which label is which name; once, transient local

and of `moving` also:

    /camera/depth/image           sensor_msgs/Image            16UC1, millimetres along the optical axis, registered to
                                                               the image; 0 where there is none or more than 10 m
    /camera/instances/compressed  sensor_msgs/CompressedImage  PNG, 16 bits: which object every pixel shows, 0: none
    /camera/objects               std_msgs/String              JSON: the objects within the image, the nearest first

    {"stamp": nanoseconds, "frame_id": "camera", "objects": [{"id": 7, "name": "mug", "centre": [x, y, z], "size":
    [width, height], "pixels": 5120, "occluded": 0.12, "outside": 0.0}, ...]}

An object's id is its value in the instances, and stays its own through the bag. `centre` and `size` are in metres,
the centre in the camera's optical frame (x right, y down, z forward), and of the whole object, seen or not;
`occluded` is the share of its pixels within the image that nearer objects hide, `outside` the share of it outside of
the image. It is JSON since no message of vision_msgs says how much of an object is hidden, and a topic so that it is
cut, converted and played together with the images.

Needs no ROS. The same options give the same bag, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cv2
import numpy as np
import typer
import yaml
from rich.progress import track
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys.store import Typestore

from nerve_core.console import PlainConsole
from nerve_core.embedded import filming, scenes
from nerve_core.embedded import world as drawn_world
from nerve_core.embedded.filming import Camera, Seen, Sensor, look, wander
from nerve_core.embedded.scenes import NAMES, STUFF, Scene, draw_scene
from nerve_core.embedded.world import draw_world
from nerve_core.replay import messages, writing
from nerve_core.replay.messages import (
    COMPRESSED_IMAGE,
    IMAGE,
    LABEL_INFO,
    STRING,
    header_message,
    label_info_message,
    typestore,
)
from nerve_core.replay.writing import qos

if TYPE_CHECKING:
    from rosbags.typesys.store import Msg

IMAGE_TOPIC = "/camera/image/compressed"
CAMERA_INFO_TOPIC = "/camera/camera_info"
LABELS_TOPIC = "/camera/labels/compressed"
LABEL_INFO_TOPIC = "/camera/labels/label_info"
DEPTH_TOPIC = "/camera/depth/image"
INSTANCES_TOPIC = "/camera/instances/compressed"
OBJECTS_TOPIC = "/camera/objects"
FRAME_ID = "camera"

WIDTH, HEIGHT = 640, 480
RATE = 10
"""Images a second."""
START = 1_700_000_000
"""Stamp of the first image, in seconds."""
WORLDS = 4
"""Scenes that one bag films, one after the other, for equally long."""
WORLD = (840, 2560)
"""Rows and columns of a scene, in pixels of its own."""
WORLD_OBJECTS = (34, 42)
OBJECT_SIZE = (0.11, 0.34)
"""As draw_scene takes them: with them a view of the camera is filled like a scene of ordinary size."""
CROSSING = 8.0
"""Seconds in which the camera goes from one end of a scene to the other."""
FOCAL_LENGTH = 540.0
"""Of the camera at zoom 1, in pixels: 61 degrees across."""
NOISE = 2.5
"""Standard deviation of the sensor's noise, in grey levels."""
JPEG_QUALITIES = (85, 75, 65, 55, 45, 35)
JPEG_BYTES = 40_000
"""Each image is written in the best of these qualities that takes no more than these bytes: half a minute of any seed
stays below 15 MB."""

MOVING_WORLDS = 2
"""Worlds with depth that one bag of moving objects films, a room and an open yard, each for equally long."""
SENSOR = Sensor(noise=NOISE, shutter=0.008)
"""Of the camera that films them: fast turns blur what it sees."""
DEPTH_RANGE = 10.0
"""Metres beyond which the depth camera measures nothing."""
IDS = 100
"""The first object of each world is one more than a multiple of this."""

BAGS = ("panning", "moving")

CUSTOM_DATA = "nerve_ros_sample_bag"
"""Key of the bag's metadata under which its options and the digest of its generator are written."""

_PLACES = (
    {"tiles", "floor", "carpet"},  # indoors
    {"grass", "gravel", "road"},  # a yard
)

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class Options:
    """What decides a bag. Raises ValueError where a value cannot be used."""

    seconds: float = 32.0
    seed: int = 3
    bag: str = BAGS[0]

    def __post_init__(self) -> None:
        if self.bag not in BAGS:
            raise ValueError(f"bag is {self.bag!r}; accepted: {', '.join(BAGS)}")
        if not 0.1 <= self.seconds <= 3600.0:
            raise ValueError(f"seconds is {self.seconds:g}; accepted: 0.1 to 3600")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; accepted: 0 and above")

    @property
    def images(self) -> int:
        """How many images the bag holds."""
        return round(self.seconds * RATE)


@dataclass(frozen=True)
class Pose:
    """Where the camera looks, in a scene's pixels: the image's middle (x, y), the scene's pixels to one of the image's
    (above 1: zoomed out), and the roll in radians."""

    x: float
    y: float
    scale: float
    roll: float


@dataclass(frozen=True)
class CameraPath:
    """A smooth path over one scene that never shows what is outside it. phases: five numbers in 0..2 pi."""

    phases: tuple[float, float, float, float, float]

    def pose(self, seconds: float) -> Pose:
        """The camera's pose, `seconds` after the scene came up."""
        across, zoom, turn, sway, nod = self.phases
        scale = 1.12 + 0.2 * np.sin(2 * np.pi * seconds / 7.3 + zoom)
        roll = np.radians(3.5) * np.sin(2 * np.pi * seconds / 5.9 + turn)
        cos, sin = abs(np.cos(roll)), abs(np.sin(roll))
        reach_x = scale * (WIDTH * cos + HEIGHT * sin) / 2 + 1
        reach_y = scale * (WIDTH * sin + HEIGHT * cos) / 2 + 1
        rows, columns = WORLD
        start = np.pi if across > np.pi else 0.0
        along = 0.5 - 0.5 * np.cos(np.pi * seconds / CROSSING + start)
        down = 0.47 + 0.3 * np.sin(2 * np.pi * seconds / 6.7 + sway) + 0.06 * np.sin(2 * np.pi * seconds / 1.7 + nod)
        x = reach_x + along * (columns - 1 - 2 * reach_x)
        y = reach_y + down * (rows - 1 - 2 * reach_y)
        return Pose(float(x), float(y), float(scale), float(roll))


def draw_worlds(seed: int) -> Iterator[tuple[Scene, CameraPath]]:
    """The scenes of a bag, indoors and a yard by turns, each with the camera's path over it."""
    for world in range(WORLDS):
        grounds = _PLACES[world % len(_PLACES)]
        for attempt in itertools.count():
            key = (seed, world, attempt)
            # A scene's place does not depend on its size: an empty small one shows it at once.
            if _grounds(draw_scene(key, size=(64, 64), objects=(0, 0))) & grounds:
                scene = draw_scene(key, size=WORLD, objects=WORLD_OBJECTS, object_size=OBJECT_SIZE)
                phases = np.random.default_rng(key).uniform(0, 2 * np.pi, 5)
                yield scene, CameraPath(tuple(phases))
                break


def film(scene: Scene, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """What the camera sees from `pose`, without noise: image uint8 [480, 640, 3] RGB and labels uint8 [480, 640].

    Both look at the same points of the scene: the image between its pixels, a label at the nearest of them.
    """
    u = np.arange(WIDTH, dtype=np.float64)[None, :] - (WIDTH - 1) / 2
    v = np.arange(HEIGHT, dtype=np.float64)[:, None] - (HEIGHT - 1) / 2
    cos, sin = pose.scale * np.cos(pose.roll), pose.scale * np.sin(pose.roll)
    x, y = pose.x + cos * u - sin * v, pose.y + sin * u + cos * v
    image = cv2.remap(scene.image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    labels = scene.labels[np.rint(y).astype(np.intp), np.rint(x).astype(np.intp)]
    return image, labels


def expose(image: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """What the sensor makes of an image, uint8 RGB in and out: brightness that drifts by a tenth, and noise."""
    gain = 1 + 0.1 * np.sin(2 * np.pi * seconds / 13.0)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(NOISE)
    return np.clip(np.rint(image * np.float32(gain) + noise), 0, 255).astype(np.uint8)


def generator_digest(options: Options) -> str:
    """Changes with the options, the sources that a bag is made by and what turns them into bytes."""
    digest = hashlib.sha256(json.dumps(asdict(options)).encode())
    sources = [__file__, scenes.__file__, messages.__file__, writing.__file__]
    if options.bag == "moving":
        sources += [drawn_world.__file__, filming.__file__]
    for source in sources:
        digest.update(Path(source).read_bytes())
    for package in ("numpy", "opencv-python-headless", "rosbags"):
        digest.update(_version(package).encode())
    return digest.hexdigest()


def ensure(out: Path, options: Options, *, progress: Progress = iter) -> bool:
    """Make the bag of `options` in the folder `out` unless it is there already; whether it was made now.

    A bag of other options or of an older generator is replaced; anything else in its place raises FileExistsError.
    Safe to be called by several processes at once.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        digest = generator_digest(options)
        if out.exists():
            if _written_digest(out) == digest:
                return False
            if foreign := sorted({path.name for path in out.iterdir()} - {"metadata.yaml", f"{out.name}.mcap"}):
                raise FileExistsError(
                    f"{out} holds {foreign[0]} besides the old bag: move it away, or name another folder"
                )
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            # Under its own name: the files in a bag are called after its folder.
            made = Path(folder) / out.name
            _write(made, options, digest, progress)
            if out.exists():
                shutil.rmtree(out)
            os.replace(made, out)
        return True


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # OpenCV comes under several names, or with the system
        return cv2.__version__


def _written_digest(out: Path) -> str:
    """The digest in a bag's metadata. Raises FileExistsError where `out` is no bag of this generator."""
    try:
        metadata = yaml.safe_load((out / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        return json.loads(metadata["custom_data"][CUSTOM_DATA])["digest"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise FileExistsError(
            f"{out} is there already and is no sample bag: delete it, or name another folder"
        ) from error


def _grounds(scene: Scene) -> set[str]:
    return {STUFF[k - 1] for k in np.unique(scene.stuff)}


def _write(out: Path, options: Options, digest: str, progress: Progress) -> None:
    store = typestore()
    with_depth = options.bag == "moving"
    writer = Writer(out, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
    if with_depth:  # depth images are not compressed by themselves
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        writer.set_custom_data(CUSTOM_DATA, json.dumps({**asdict(options), "digest": digest}))
        topics = [
            (LABEL_INFO_TOPIC, LABEL_INFO, True),
            (IMAGE_TOPIC, COMPRESSED_IMAGE, False),
            (CAMERA_INFO_TOPIC, "sensor_msgs/msg/CameraInfo", False),
            (LABELS_TOPIC, COMPRESSED_IMAGE, False),
        ]
        if with_depth:
            topics += [
                (DEPTH_TOPIC, IMAGE, False),
                (INSTANCES_TOPIC, COMPRESSED_IMAGE, False),
                (OBJECTS_TOPIC, STRING, False),
            ]
        connections = {
            topic: writer.add_connection(
                topic, kind, typestore=store, offered_qos_profiles=[qos(latched, 1 if latched else 10)]
            )
            for topic, kind, latched in topics
        }
        for topic, nanoseconds, message in _messages(store, options, progress):
            kind = connections[topic].msgtype
            writer.write(connections[topic], nanoseconds, store.serialize_cdr(message, kind))


@dataclass(frozen=True)
class Filmed:
    """One image and its truth: uint8 [480, 640, 3] RGB, labels uint8 [480, 640], the focal length in pixels; of a world
    with depth also that in metres, float32, the instances, uint16, and the objects."""

    image: np.ndarray
    labels: np.ndarray
    focal: float
    depth: np.ndarray | None = None
    instances: np.ndarray | None = None
    objects: tuple[Seen, ...] = ()


def _panning(options: Options, numbers: Iterable[int]) -> Iterator[Filmed]:
    """The images of a bag over flat scenes."""
    worlds, current = draw_worlds(options.seed), -1
    for number in numbers:
        world = number * WORLDS // options.images
        if world != current:
            scene, path = next(itertools.islice(worlds, world - current - 1, None))
            current, first = world, number
        pose = path.pose((number - first) / RATE)
        image, labels = film(scene, pose)
        image = expose(image, number / RATE, np.random.default_rng((options.seed, number)))
        yield Filmed(image, labels, FOCAL_LENGTH / pose.scale)


def _moving(options: Options, numbers: Iterable[int]) -> Iterator[Filmed]:
    """The images of a bag in worlds with depth."""
    camera, current = Camera(WIDTH, HEIGHT, FOCAL_LENGTH), -1
    for number in numbers:
        place = number * MOVING_WORLDS // options.images
        if place != current:
            key = (options.seed, place)
            yard = bool(place % 2)
            drawn = draw_world(key, yard=yard, wall="sky" if yard else None, first_id=IDS * place + 1)
            trajectory = wander(key)
            current, first = place, number
        view = look(drawn, trajectory, (number - first) / RATE, camera=camera, sensor=SENSOR, seed=(*key, number))
        yield Filmed(view.image, view.labels, camera.focal, view.depth, view.instances, view.things)


def _messages(store: Typestore, options: Options, progress: Progress) -> Iterator[tuple[str, int, object]]:
    """Topic, stamp in nanoseconds and message, in the order of time."""
    types = store.types
    header = header_message(START * 10**9, FRAME_ID)
    yield LABEL_INFO_TOPIC, START * 10**9, label_info_message(header, NAMES, 0.0)
    compressed = types[COMPRESSED_IMAGE]
    filmed = _moving if options.bag == "moving" else _panning
    for number, shot in enumerate(filmed(options, progress(range(options.images)))):
        nanoseconds = START * 10**9 + number * 10**9 // RATE
        header = header_message(nanoseconds, FRAME_ID)
        yield IMAGE_TOPIC, nanoseconds, compressed(header, "rgb8; jpeg compressed bgr8", _jpeg(shot.image))
        yield CAMERA_INFO_TOPIC, nanoseconds, _camera_info(store, header, shot.focal)
        png = _encoded(".png", shot.labels, [cv2.IMWRITE_PNG_COMPRESSION, 9])
        yield LABELS_TOPIC, nanoseconds, compressed(header, "mono8; png compressed ", png)
        if shot.depth is None or shot.instances is None:
            continue
        depth = _millimetres(shot.depth).view(np.uint8).reshape(-1)
        yield DEPTH_TOPIC, nanoseconds, types[IMAGE](header, HEIGHT, WIDTH, "16UC1", 0, 2 * WIDTH, depth)
        png = _encoded(".png", shot.instances, [cv2.IMWRITE_PNG_COMPRESSION, 9])
        yield INSTANCES_TOPIC, nanoseconds, compressed(header, "mono16; png compressed ", png)
        said = {"stamp": nanoseconds, "frame_id": FRAME_ID, "objects": [_described(one) for one in shot.objects]}
        yield OBJECTS_TOPIC, nanoseconds, types[STRING](json.dumps(said))


def _millimetres(depth: np.ndarray) -> np.ndarray:
    """Depth in metres, float32, NaN where there is none, as depth cameras give it: uint16, 0 where there is none."""
    with np.errstate(invalid="ignore"):
        there = depth <= DEPTH_RANGE
    return np.where(there, np.rint(np.nan_to_num(depth) * 1000), 0).astype("<u2")


def _described(one: Seen) -> dict:
    """An object as the bag's JSON has it: lengths to a tenth of a millimetre."""
    return {
        "id": one.id,
        "name": one.name,
        "centre": [round(value, 4) for value in one.centre],
        "size": [round(value, 4) for value in one.size],
        "pixels": one.pixels,
        "occluded": round(one.occluded, 4),
        "outside": round(one.outside, 4),
    }


def _camera_info(store: Typestore, header: Msg, focal: float) -> object:
    """Of a camera without distortion whose axis goes through the image's middle."""
    K = np.array([focal, 0, (WIDTH - 1) / 2, 0, focal, (HEIGHT - 1) / 2, 0, 0, 1], np.float64)
    P = np.hstack([K.reshape(3, 3), np.zeros((3, 1))]).ravel()
    region = store.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return store.types["sensor_msgs/msg/CameraInfo"](
        header, HEIGHT, WIDTH, "plumb_bob", np.zeros(5), K, np.eye(3).ravel(), P, 0, 0, region
    )


def _jpeg(image: np.ndarray) -> np.ndarray:
    for quality in JPEG_QUALITIES:
        data = _encoded(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(data) <= JPEG_BYTES:
            break
    return data


def _encoded(suffix: str, image: np.ndarray, options: list[int]) -> np.ndarray:
    written, data = cv2.imencode(suffix, image, options)
    if not written:
        raise RuntimeError(f"OpenCV could not write a {suffix} image")
    return data.ravel()


def main(
    out: Annotated[Path, typer.Option(help="The bag's folder.")] = Path("build/sample_bag"),
    seconds: Annotated[float, typer.Option(help="Length, 0.1 to 3600.")] = Options.seconds,
    seed: Annotated[int, typer.Option(help="Another seed, another film.")] = Options.seed,
    bag: Annotated[
        str, typer.Option(help="panning, or moving: with depth, moving objects and fast turns.")
    ] = Options.bag,
) -> None:
    """Make a sample bag, unless the one that these options give is there already."""
    console = PlainConsole(stderr=True)
    try:
        options = Options(seconds, seed, bag)
        made = ensure(out, options, progress=lambda items: track(items, "filming the sample bag", console=console))
    except (ValueError, FileExistsError) as error:
        console.print(f"sample_bag: {error}", style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    if made:
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        console.print(f"sample bag: {options.images} images, {size:.1f} MB, in {out}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
