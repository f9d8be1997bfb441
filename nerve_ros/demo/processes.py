"""Starts child processes that are always ended, and reserves a ROS domain that no other run uses."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ament_index_python.packages import get_package_prefix, get_package_share_directory

from nerve_core.output import LOG_HEAD

DOMAINS = range(215, 232)
"""ROS domains whose ports lie above those that Linux hands out by itself, and away from everyday's low numbers."""

_PR_SET_PDEATHSIG = 1


@contextmanager
def own_domain() -> Iterator[int]:
    """A ROS domain that no other demonstration here uses meanwhile. Raises RuntimeError where none is free."""
    start = os.getpid() % len(DOMAINS)
    for number in [*DOMAINS[start:], *DOMAINS[:start]]:
        path = Path(tempfile.gettempdir()) / f"nerve_ros_demo_domain_{number}.lock"
        try:
            lock = path.open("w")
        except OSError:  # another user's
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield number
            return
    raise RuntimeError(f"{len(DOMAINS)} demonstrations run on this machine already; wait for one to end")


def environment(domain: int | None = None) -> dict[str, str]:
    """This process's environment for processes of ROS on this machine alone, with shared memory for large images.

    domain: ROS's; None leaves it, and how far discovery reaches, as they are.
    """
    made = os.environ | {"PYTHONUNBUFFERED": "1"}
    if domain is not None:
        made |= {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    profile = str(Path(get_package_share_directory("nerve_ros")) / "config" / "fastdds.xml")
    names = ["FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"]
    if not any(made.get(name) for name in names):
        made |= dict.fromkeys(names[: 2 if made.get("ROS_DISTRO") == "jazzy" else 1], profile)
    return made


def node_command(**parameters: object) -> list[str]:
    """What starts the node by its installed executable."""
    executable = Path(get_package_prefix("nerve_ros")) / "lib" / "nerve_ros" / "nerve_node"
    given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={json.dumps(value)}")]
    return [str(executable), "--ros-args", *given]


class Child:
    """A process in a group of its own, which ends with this one, even where this one is killed.

    Its standard error goes to `log`, and its standard output too unless `talks`: then `read` gives its lines.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, *, talks: bool = False):
        self.name, self.log = name, log
        self._lines: deque[str] = deque()
        self._asked_to_end = False
        with log.open("wb", buffering=0) as written:
            written.write(LOG_HEAD)
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else written,
                stderr=written,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        if talks:
            self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def say(self, line: str) -> None:
        """Write a line to its standard input; in vain where it has ended. Raises ValueError unless it `talks`."""
        if self._process.stdin is None:
            raise ValueError(f"{self.name} was not started to be talked to")
        with suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def read(self) -> list[str]:
        """The lines that came since last time."""
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return lines

    def finish(self) -> None:
        """Ask it to end (SIGINT, once), and return at once."""
        if not self._asked_to_end:
            self._asked_to_end = True
            self._signal(signal.SIGINT)
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()

    def end(self, patience: float = 6.0) -> None:
        """End it: asked first, killed with its whole group after `patience` seconds."""
        self.finish()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[1:][-count:])  # without LOG_HEAD

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is not None:  # its number may be another process's by now
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.append(line.decode(errors="replace").rstrip("\n"))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
