"""Throw mutated messages at a real node, in its process: python tools/fuzz.py --count 100000 --seed 1

Images, compressed images, vocabularies by topic, text and service, and questions, each made from its number and the
seed alone: most are changed in their fields, the others in their bytes as they travel (CDR). What a node's executor
would do with a message is done here at once, without the network. Looked at for each message: nothing is raised,
nothing takes longer than --bound; what is accepted becomes an RGB image of the size that it declares; what is not is
counted with a printable reason. At the end: every message is accounted for, the memory has not grown, and the node
still segments. A death of the process is a finding too: the run goes on with the message after it.

Exit code: 0 where nothing was found, else 1.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from nerve_core.output import claim, write

if TYPE_CHECKING:
    from rclpy.task import Future

Result = TypeVar("Result")
Message: TypeAlias = Any
"""A ROS message or a request of a service: the classes that ROS generates have no types of their own."""

MAX_GROWTH = 60.0
"""MB that the least memory of the last quarter may be above the least of the second: while a large image is worked on
there is more."""

LONG = 20_000
"""Messages of a run whose memory is judged, at least."""

LONGEST_REASON = 500
"""Characters."""

SIZES = (0, 1, 2, 3, 7, 64, 255, 256, 16383, 16384, 16385, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (
    "chair", "mug|cup|coffee mug", "стул", "椅子", "كرسي", "🪑", "é", "e\u0301", "%s%n%x", "{0}{1!r}", "$(reboot)",
    "`id`", "; rm -rf /", "/../../etc/passwd", "\\\\host\\share", "<script>", "\x1b[2J\x1b[31m", "a\nb", "a\rb", "\0",
    "\x7f", "\u202eevil\u202c", "zero\u200bwidth", "\ufeff", "\ud7ff", "\U0010ffff", "", " ", "|", "a|", "||||",
    "x" * 128, "x" * 129, "y" * 5000, "A\u0300" * 128, "ﬃ" * 128, "İ", "ß", "NaN", "null", "-1",
    "'; drop table", "a,b,c",
)  # fmt: skip
FORMATS = (
    "jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed ", "16UC1; compressedDepth png", "", "tiff",
    "%s%n", "\x1b[31m", "x" * 100_000, "jpeg\0png",
)  # fmt: skip
STRANGE_ENCODINGS = ("", "32FC1", "16UC1", "rgb16", "rgb8 ", "RGB8", "8UC4", "%s%n", "\x1b[2J", "e" * 100_000, "\0")


class Mill:
    """Makes message `number` of a run; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        import cv2
        import numpy as np
        from rclpy.serialization import deserialize_message, serialize_message
        from sensor_msgs.msg import CompressedImage, Image
        from std_msgs.msg import Header, String

        from nerve_ros.images import ACCEPTED_ENCODINGS
        from nerve_ros.msg import Vocabulary
        from nerve_ros.srv import Locate, SetVocabulary

        self._seed, self._encodings = seed, ACCEPTED_ENCODINGS
        self._serialize, self._deserialize = serialize_message, deserialize_message
        self._image, self._compressed, self._header = Image, CompressedImage, Header
        self._vocabulary, self._text = Vocabulary, String
        self._set_vocabulary, self._locate = SetVocabulary.Request, Locate.Request
        rows, columns = np.mgrid[0:48, 0:64]
        picture = np.stack([rows * 5, columns * 3, rows * columns % 256], -1).astype(np.uint8)
        alpha = np.dstack([picture, picture[..., 0]])
        progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
        self._files = [
            cv2.imencode(kind, image, options)[1].tobytes()
            for kind, image, options in (
                (".jpg", picture, []),
                (".jpg", picture[..., 0], []),
                (".jpg", picture, progressive),
                (".png", picture, []),
                (".png", picture[..., 0], []),
                (".png", alpha, []),
                (".png", picture.astype(np.uint16) * 257, []),
                (".bmp", picture, []),
                (".tiff", picture, []),
                (".webp", picture, []),
            )
        ]

    def message(self, number: int) -> tuple[str, Message | None]:
        """The kind and the message; None for the message where its bytes are none."""
        luck = random.Random(f"{self._seed}:{number}")
        kinds: tuple[tuple[str, Callable[[random.Random], Message], int], ...] = (
            ("Image", self._make_image, 40),
            ("CompressedImage", self._make_compressed, 30),
            ("Vocabulary", lambda luck: self._vocabulary(names=self._names(luck)), 12),
            ("vocabulary_text", lambda luck: self._text(data=luck.choice(",\n").join(self._names(luck))), 6),
            ("SetVocabulary", lambda luck: self._set_vocabulary(names=self._names(luck)), 6),
            ("Locate", lambda luck: self._locate(name=luck.choice(WORDS)), 6),
        )
        (kind, make, _) = luck.choices(kinds, [share for *_, share in kinds])[0]
        made = make(luck)
        if luck.random() < 0.3:
            # The four bytes of the byte order stay: Fast CDR reads beyond its buffer where they are wrong. Over the
            # network such a message does not get that far.
            encoded = self._serialize(made)
            changed = encoded[:4] + self._changed(encoded[4:], luck)
            try:
                return kind, self._deserialize(changed, type(made))
            except Exception:
                return kind, None
        return kind, made

    def _make_header(self, luck: random.Random) -> Message:
        header = self._header(frame_id=luck.choice([*WORDS, "camera", "f" * 1025]))
        header.stamp.sec = luck.choice([0, 1, -1, 2**31 - 1, -(2**31), 1_700_000_000])
        header.stamp.nanosec = luck.choice([0, 999_999_999, 2**32 - 1])
        return header

    def _make_image(self, luck: random.Random) -> Message:
        encoding = luck.choice(self._encodings)
        wide, high = luck.randint(1, 40) * 2, luck.randint(1, 30) * 2
        depth = {"rgba8": 4, "bgra8": 4, "rgb8": 3, "bgr8": 3, "8UC3": 3}.get(encoding, 2 if "16" in encoding else 1)
        depth = 2 if encoding.startswith("yuv") else depth
        rows = high * 3 // 2 if encoding.startswith("nv") else high
        step = wide * depth + luck.choice([0, 0, 0, 1, 13])
        image = self._image(header=self._make_header(luck), width=wide, height=high, encoding=encoding, step=step)
        image.is_bigendian = luck.choice([0, 0, 1, 255])
        data = luck.randbytes(64) * (step * rows // 64 + 1)
        data = data[: step * rows]
        for _ in range(luck.choice([0, 1, 1, 2, 3])):
            match luck.randrange(6):
                case 0:
                    image.width = luck.choice([*SIZES, wide + 1, wide - 1])
                case 1:
                    image.height = luck.choice([*SIZES, high + 1, high - 1])
                case 2:
                    image.step = luck.choice([*SIZES, step - 1, step + 1, wide])
                case 3:
                    image.encoding = luck.choice([*STRANGE_ENCODINGS, *self._encodings])
                case 4:
                    data = data[: luck.randrange(len(data) + 1)]
                case 5:
                    data = data + bytes(luck.choice([1, 100, 1_000_000]))
        image.data.frombytes(data)
        return image

    def _make_compressed(self, luck: random.Random) -> Message:
        message = self._compressed(header=self._make_header(luck), format=luck.choice(FORMATS))
        data = luck.choice(self._files)
        if luck.random() < 0.3:
            data = self._resized(data, luck)
        if luck.random() < 0.8:
            data = self._changed(data, luck)
        message.data.frombytes(data)
        return message

    @staticmethod
    def _resized(data: bytes, luck: random.Random) -> bytes:
        """A picture that declares another size."""
        place = 16 if data[:4] == b"\x89PNG" else max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        form = ">II" if data[:4] == b"\x89PNG" else ">HH"
        most = 2 ** (4 * struct.calcsize(form)) - 1
        declared = [min(luck.choice([*SIZES, 48, 64]), most) for _ in range(2)]
        return data[:place] + struct.pack(form, *declared) + data[place + struct.calcsize(form) :]

    @staticmethod
    def _names(luck: random.Random) -> list[str]:
        count = luck.choice([0, 1, 1, 2, 3, 10, 254, 255, 300])
        return [
            luck.choice(WORDS) if luck.random() < 0.1 / (1 + count / 20) else f"thing {luck.randrange(400)}"
            for _ in range(count)
        ]

    @staticmethod
    def _changed(data: bytes, luck: random.Random) -> bytes:
        """`data` with a few bytes changed, put in, taken out or moved."""
        made = bytearray(data)
        for _ in range(luck.randint(1, 4)):
            place = luck.randrange(len(made) + 1)
            match luck.randrange(6):
                case 0:
                    made[place : place + 1] = luck.randbytes(1)
                case 1:
                    made[place : place + 4] = luck.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
                case 2:
                    del made[place : place + luck.randint(1, 20)]
                case 3:
                    made[place:place] = luck.randbytes(luck.randint(1, 20))
                case 4:
                    del made[place:]
                case 5:
                    made[place:place] = made[: luck.randint(1, 200)]
        return bytes(made)


class Run:
    """One process's part of a run."""

    def __init__(self, seed: int, bound: float) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.parameter import Parameter

        from nerve_ros.lifecycle import NerveNode

        rclpy.init(args=["--ros-args", "--log-level", "fatal"])
        self.findings: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.memory: list[float] = []
        self._bound, self._mill = bound, Mill(seed)
        self._answers: list[tuple[int, Future]] = []
        given = {"vocabulary": ["ball", "ladder"], "id_reuse_delay": 0.0, "inference_timeout": 600.0}
        self._node = NerveNode(parameter_overrides=[Parameter(name, value=value) for name, value in given.items()])
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._node.start()
        if self._node.phase.state != "active":
            raise RuntimeError(self._node.phase.error)

    def take(self, number: int) -> None:
        """Make message `number` and have the node take it."""
        from nerve_ros.images import ImageError, to_rgb

        kind, message = self._mill.message(number)
        if message is None:
            self.outcomes[f"{kind}: bytes that are no message"] += 1
            return
        before = self._figures()
        faulthandler.dump_traceback_later(self._bound, exit=True)
        try:
            answer = self._timed(kind, lambda: self._deliver(kind, message))
            if kind.endswith("Image"):
                try:
                    image = self._timed(f"{kind} to RGB", lambda: to_rgb(message))
                except ImageError as error:
                    self._check_reason(number, str(error))
                    self.outcomes[f"{kind}: rejected for {error.kind}"] += 1
                else:
                    self.outcomes[f"{kind}: read"] += 1
                    right = image.ndim == 3 and image.shape[2] == 3 and image.dtype == "uint8" and image.size
                    if kind == "Image":
                        right = right and image.shape[:2] == (message.height, message.width)
                    if not right:
                        self._found(number, f"{kind} became {image.dtype} {image.shape}")
        except Exception as error:
            self._found(number, f"{kind}: {error!r}")
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        after = self._figures()
        gained = {name: after[name] - before[name] for name in after}
        if kind.endswith("Image"):
            if gained["images_received"] != 1:
                self._found(number, f"{kind} is not counted")
        elif kind == "Locate":
            self._answers.append((number, answer))
        else:
            done = [word for word in ("accepted", "rejected") if gained[f"vocabularies_{word}"]]
            self.outcomes[f"{kind}: {done[0] if done else 'as before'}"] += 1
            if len(done) > 1:
                self._found(number, f"{kind} is both accepted and rejected")
            if kind == "SetVocabulary" and not answer.accepted:
                self._check_reason(number, answer.message)
        if number % 50 == 0:
            self._executor.spin_once(timeout_sec=0.0)
            self._answers = [(asked, answer) for asked, answer in self._answers if not self._answered(asked, answer)]

    def close(self) -> None:
        """Look at what is left when everything was taken."""
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline and not self._all_done():
            self._executor.spin_once(timeout_sec=0.05)
        figures = self._figures()
        ends = figures["images_segmented"] + figures["images_dropped"] + figures["images_rejected"]
        if figures["images_received"] != ends:
            self._found(-1, f"{figures['images_received']} images came and {ends} were accounted for: {figures}")
        reported = self._node._health.figures()
        for_reasons = sum(int(value) for name, value in reported.items() if name.startswith("rejected_for_"))
        if for_reasons != figures["images_rejected"]:
            self._found(-1, f"{figures['images_rejected']} images were rejected, {for_reasons} for a reason")
        if figures["errors"]:
            self._found(-1, f"{figures['errors']} errors, the last: {reported['last_error']}")
        for number, answer in self._answers:
            if not self._answered(number, answer):
                self._found(number, "Locate was never answered")
        self.outcomes["segmented meanwhile"] = figures["images_segmented"]
        good = self._mill._image(width=64, height=48, step=192, encoding="rgb8", data=bytes(64 * 48 * 3))
        self._node._images.on_image(good)
        deadline = time.monotonic() + 60.0
        while self._figures()["images_segmented"] == figures["images_segmented"]:
            if time.monotonic() > deadline or self._node.phase.state != "active":
                self._found(-1, "a good image at the end was not segmented")
                break
            self._executor.spin_once(timeout_sec=0.05)
        self._node.close()

    def _deliver(self, kind: str, message: Message) -> Any:
        """What the callback returns: a response to SetVocabulary, a future of one to Locate, else None."""
        from nerve_ros.srv import SetVocabulary

        node = self._node
        match kind:
            case "Vocabulary":
                return node._vocabularies.on_vocabulary(message)
            case "vocabulary_text":
                return node._vocabularies.on_vocabulary_text(message)
            case "SetVocabulary":
                return node._vocabularies.on_set_vocabulary(message, SetVocabulary.Response())
            case "Locate":
                return node._questions.on_locate(message)
            case _:
                return node._images.on_image(message)

    def _timed(self, what: str, do: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            return do()
        finally:
            self.slowest[what] = max(self.slowest.get(what, 0.0), time.perf_counter() - started)

    def _answered(self, number: int, answer: Future) -> bool:
        response = answer.result() if answer.done() else None
        if response is None:
            return False
        self.outcomes[f"Locate: {'searched' if response.success else 'refused'}"] += 1
        if not response.success:
            self._check_reason(number, response.message)
        return True

    def _all_done(self) -> bool:
        figures = self._figures()
        ends = figures["images_segmented"] + figures["images_dropped"] + figures["images_rejected"]
        return figures["images_received"] == ends and all(answer.done() for _, answer in self._answers)

    def _figures(self) -> dict[str, int]:
        # Not Health.figures(), whose percentiles would take longer than the messages.
        counts = self._node._health._counts
        return {
            name: counts[name]
            for name in (
                "images_received",
                "images_segmented",
                "images_dropped",
                "images_rejected",
                "errors",
                "vocabularies_accepted",
                "vocabularies_rejected",
            )
        }

    def _check_reason(self, number: int, reason: str) -> None:
        if not reason or not reason.isprintable() or len(reason) > LONGEST_REASON:
            self._found(number, f"the reason is {reason[:100]!r}, {len(reason)} characters")

    def _found(self, number: int, what: str) -> None:
        if len(self.findings) < 100:
            self.findings.append(f"message {number}: {what}")


def resident_mb() -> float:
    """Memory of this process in MB, without what the allocator (glibc's) only keeps for the next time."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def part(first: int, end: int, seed: int, bound: float, progress: Path) -> None:
    """Take the messages `first` to `end` - 1 in this process; what was found is written into `progress`."""
    run = Run(seed, bound)
    samples = max(1, (end - first) // 100)
    for number in range(first, end):
        if number % 10 == 0 or end - first < 1000:
            progress.with_suffix(".number").write_text(str(number))
        run.take(number)
        if (number - first) % samples == 0:
            run.memory.append(resident_mb())
    progress.with_suffix(".number").write_text(str(end))
    run.close()
    run.memory.append(resident_mb())
    progress.write_text(
        json.dumps(
            {
                "findings": run.findings,
                "outcomes": run.outcomes,
                "slowest": run.slowest,
                "memory": run.memory,
            }
        )
    )
    sys.stdout.flush()
    # The interpreter's end may take rclpy's objects in an order that aborts, which is not what is looked for here.
    os._exit(0)


def main() -> int:
    """Run the parts one after the other, more than one where a process died, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="messages (default 100000)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other messages (default 1)")
    parser.add_argument("--bound", type=float, default=20.0, help="seconds that one message may take (default 20)")
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.json:
        claim([given.json], option="--json")
    if given.part:
        part(int(given.part[0]), int(given.part[1]), given.seed, given.bound, Path(given.part[2]))
    started, first = time.monotonic(), 0
    findings: list[str] = []
    outcomes: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XDG_CACHE_HOME": folder}
        while first < given.count:
            progress = Path(folder) / f"part_{first}"
            arguments = ["--part", str(first), str(given.count), str(progress)]
            arguments += ["--seed", str(given.seed), "--bound", str(given.bound)]
            code = subprocess.run([sys.executable, __file__, *arguments], env=env).returncode
            number = progress.with_suffix(".number")
            reached = int(number.read_text()) if number.exists() else given.count
            if code:
                findings.append(f"the process died with {code} at message {reached} or one of the nine after it")
                first = reached + 10
                continue
            found = json.loads(progress.read_text())
            findings += found["findings"]
            outcomes.update(found["outcomes"])
            slowest |= {what: max(seconds, slowest.get(what, 0.0)) for what, seconds in found["slowest"].items()}
            memory = found["memory"]
            first = given.count
    quarter = len(memory) // 4
    growth = min(memory[-quarter:]) - min(memory[quarter : 2 * quarter]) if quarter else 0.0
    # A short run is at the beginning all the time: libraries still load, and large images come for the first time.
    if growth > MAX_GROWTH and given.count >= LONG:
        findings.append(f"memory grew by {growth:.0f} MB from the second quarter to the last")
    figures = {
        "messages": given.count,
        "seed": given.seed,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_ms": {what: round(1e3 * seconds, 1) for what, seconds in sorted(slowest.items())},
        "memory_mb": [round(value) for value in memory[:: max(1, len(memory) // 20)]],
        "memory_growth_mb": round(growth, 1),
        "findings": findings,
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if given.json:
        write(given.json, json.dumps(figures, indent=2, ensure_ascii=False))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
