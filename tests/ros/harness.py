"""Processes of a test over real DDS: the node by its installed executable, and peers at the other end.

Nothing here sleeps for a fixed time: everything waits for a condition, with a limit that is generous because machines
that run tests are slow and shared. Every process started is ended, whatever the test did, and in order where the test
does not mean to kill it: Fast DDS leaves 70 MB of shared memory behind each process that is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ament_index_python.packages import get_package_prefix, get_package_share_directory

import warm

HERE = Path(__file__).parent
PATIENCE = 60.0
"""Seconds that anything may take that should happen at once."""
LOADING = 180.0
"""Seconds that loading the embedded pair may take on a slow and busy machine."""
ENDING = 20.0
"""Seconds that a peer may take to end in order."""
SEGMENT = re.compile(r"fast(dds|rtps)_[0-9a-f]{16}(_el)?")
OWNED = re.compile(r"/dev/shm/(fast(?:dds|rtps)_(?:[0-9a-f]{16}|port\d+))_el$")


@contextmanager
def domain() -> Iterator[dict[str, str]]:
    """An environment with a ROS domain that no other test run on this machine uses meanwhile.

    A lock on a file for each domain keeps runs apart; discovery stays on this machine.
    """
    first = os.getpid() % 100
    for offset in range(100):
        number = 1 + (first + offset) % 100
        path = Path(tempfile.gettempdir()) / f"nerve_ros_test_domain_{number}.lock"
        try:
            handle = path.open("w")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        with handle:
            yield environment(number)
        return
    raise RuntimeError("all 100 test domains are in use; end the other runs, or delete nerve_ros_test_domain_*.lock")


def environment(number: int) -> dict[str, str]:
    """This process's environment, for processes of ROS domain `number` on this machine alone."""
    profile = str(Path(get_package_share_directory("nerve_ros")) / "config" / "fastdds.xml")
    made = os.environ | {
        "ROS_DOMAIN_ID": str(number),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTDDS_DEFAULT_PROFILES_FILE": profile,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if made.get("ROS_DISTRO") == "jazzy":
        made["FASTRTPS_DEFAULT_PROFILES_FILE"] = profile
    return made


class Process:
    """A child process whose output lines are collected as they come."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, steered: bool = False, forked: bool = False
    ) -> None:
        """Start `command`; `forked`: it is a Python file, and finds the libraries imported already."""
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._held: set[Path] = set()
        self._orphaned: set[Path] = set()
        self._child = _fork(command, env, steered) if forked else _start(command, env, steered)
        self._readers = [threading.Thread(target=self._read, args=(self._child.stdout, self.heard), daemon=True)]
        if steered:
            self._readers.append(
                threading.Thread(target=self._read, args=(self._child.stderr, self.lines.append), daemon=True)
            )
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str], take: Callable[[str], None]) -> None:
        for line in pipe:
            with self._news:
                take(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def heard(self, line: str) -> None:
        """Take one line of output; called with the lock held."""
        self.lines.append(line)

    def until(self, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> object:
        """The first true value of `condition`, looked at whenever a line comes in; fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not (value := condition()):
                left = deadline - time.monotonic()
                if left <= 0.0 or (not self.running and not any(reader.is_alive() for reader in self._readers)):
                    raise AssertionError(f"no {what} within {timeout:.0f} s\n{self.report()}")
                self._news.wait(min(left, 0.5))
            return value

    def report(self) -> str:
        """The last of what the process wrote, for a failed test's message."""
        state = "running" if self.running else f"ended with {self._child.returncode}"
        return "\n".join([f"--- {' '.join(self._child.args[:2])} ({state})", *self.lines[-40:]])

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to the process, or to one that it started."""
        held = self._orphaned if number == signal.SIGKILL else self._held
        held |= shared_memory(pid or self._child.pid)
        if pid is None:
            self._child.send_signal(number)
        else:
            os.kill(pid, number)

    def wait_for_dds(self) -> None:
        """Return once the process takes part in ROS: from then on it could leave shared memory behind."""
        deadline = time.monotonic() + LOADING
        while not shared_memory(self._child.pid):
            if time.monotonic() > deadline or not self.running:
                raise AssertionError(f"took no part in ROS\n{self.report()}")
            time.sleep(0.02)

    def ended(self, timeout: float = PATIENCE) -> int:
        """The exit code, once the process has ended by itself or by a signal."""
        try:
            code = self._child.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"did not end within {timeout:.0f} s\n{self.report()}") from error
        for reader in self._readers:
            reader.join(PATIENCE)
        self._tidy()
        return code

    def ask_to_end(self) -> None:
        """Ask the process to end in order, and return at once."""
        self._held |= shared_memory(*self._session())
        if self._child.stdin is not None:
            with suppress(BrokenPipeError):
                self._child.stdin.close()
        else:
            self._child.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End the process in order, and whatever it started; fails where it does not end, or leaves shared memory."""
        self.ask_to_end()
        try:
            self.ended()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        self._orphaned |= shared_memory(*self._session())
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._tidy()

    def _session(self) -> list[int]:
        """The process and those that it started."""
        found = []
        for number in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            with suppress(ProcessLookupError):
                if os.getsid(number) == self._child.pid:
                    found.append(number)
        return found

    def _tidy(self) -> None:
        """Remove what a killed process had no time to; fails where one that ended in order left something."""
        # A port's name may be another process's by now.
        ended = [path for path in self._held - self._orphaned if SEGMENT.fullmatch(path.name)]
        left = sorted(path.name for path in ended if path.exists())
        for path in self._orphaned.union(ended):
            path.unlink(missing_ok=True)
        self._held.clear()
        self._orphaned.clear()
        assert not left, f"left in /dev/shm: {left}\n{self.report()}"


def _start(command: Sequence[str], env: Mapping[str, str], steered: bool) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.PIPE if steered else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if steered else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


_server: warm.Server | None = None


def _fork(command: Sequence[str], env: Mapping[str, str], steered: bool) -> subprocess.Popen | warm.Popen:
    global _server
    _server = _server or warm.Server(env)
    if not _server.fits(env):
        return _start([sys.executable, *command], env, steered)
    return _server.start(command, env, steered=steered)


def assert_ends_by(number: signal.Signals, command: str, *arguments: object, env: Mapping[str, str]) -> list[str]:
    """Start `nerve COMMAND`, send it a signal once it takes part in DDS, and hold it to its order: a sentence, its exit
    code, and no traceback. Returns what it printed."""
    process = Process([sys.executable, "-m", "nerve_ros.cli", command, *map(str, arguments)], env)
    try:
        process.wait_for_dds()
        process.send(number)
        assert process.ended() == 128 + number
    finally:
        process.kill()
    said = "\n".join(process.lines)
    assert f"nerve {command}: ended by {number.name}" in said
    assert "Traceback" not in said
    return process.lines


def shared_memory(*pids: int) -> set[Path]:
    """What Fast DDS keeps in /dev/shm for these processes: segments, and the ports that they receive by."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            # Whoever owns one holds its lock file open, <name>_el, as long as it lives.
            for target in [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]:
                if owned := OWNED.match(target):
                    name = owned.group(1)
                    found |= {Path("/dev/shm", part) for part in (name, f"{name}_el", f"sem.{name}_mutex")}
    return found


class Node(Process):
    """The node under test, by its installed executable, in a process of its own."""

    def __init__(
        self, env: Mapping[str, str], *, arguments: Sequence[str] = (), forked: bool = True, **parameters: object
    ) -> None:
        executable = Path(get_package_prefix("nerve_ros")) / "lib" / "nerve_ros" / "nerve_node"
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={json.dumps(value)}")]
        super().__init__([str(executable), "--ros-args", *given, *arguments], env, forked=forked)

    def wait_log(self, pattern: str, timeout: float = PATIENCE, since: int = 0) -> str:
        """The first line from number `since` on that `pattern` is found in."""
        expression = re.compile(pattern)
        return self.until(
            lambda: next((line for line in self.lines[since:] if expression.search(line)), None),
            f"line like {pattern!r}",
            timeout,
        )

    def wait_active(self) -> Node:
        """This node, once it is active."""
        self.wait_log(r"\]: active$", LOADING)
        return self


class Peer(Process):
    """A process of peer.py: `peer.do("image", ...)` gives its answer, `peer.events` what its subscriptions got."""

    def __init__(self, env: Mapping[str, str], name: str) -> None:
        self.events: list[dict] = []
        self._replies: dict[int, dict] = {}
        self._commands = 0
        super().__init__([str(HERE / "peer.py"), name], env, steered=True, forked=True)
        self.wait("ready")

    def heard(self, line: str) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            self.lines.append(line)
            return
        if "reply" in said:
            self._replies[said.pop("reply")] = said
        else:
            self.events.append(said)

    def do(self, command: str, *, patience: float = LOADING, **arguments: object) -> dict:
        """The answer to a command of peer.py; fails where the peer reports an error."""
        self._commands += 1
        number = self._commands
        self._child.stdin.write(json.dumps({"id": number, "do": command, **arguments}) + "\n")
        self._child.stdin.flush()
        self.until(lambda: number in self._replies, f"answer to {command}", patience)
        reply = self._replies.pop(number)
        assert "error" not in reply, f"{command}: {reply['error']}\n{self.report()}"
        return reply

    def end(self) -> None:
        """End the peer in order; or kill it, where Fast DDS waits in it for a lock of a process that was killed."""
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(ENDING)
        self.kill()

    def mark(self) -> int:
        """A place in the events, to look from later."""
        return len(self.events)

    def seen(self, kind: str, since: int = 0) -> list[dict]:
        """All events of a kind from place `since` on."""
        return [event for event in self.events[since:] if event["event"] == kind]

    def wait(
        self,
        kind: str,
        fits: Callable[[dict], object] = lambda event: True,
        *,
        since: int = 0,
        timeout: float = PATIENCE,
        what: str = "",
    ) -> dict:
        """The first event of a kind from place `since` on that `fits`."""
        return self.until(
            lambda: next((event for event in self.seen(kind, since) if fits(event)), None),
            what or f"{kind} that fits",
            timeout,
        )


class Rig:
    """A node, a talker (camera and vocabulary) and a listener, in three processes of one domain."""

    def __init__(self, env: Mapping[str, str], **parameters: object) -> None:
        self.env = env
        self._processes: list[Process] = []
        self._stamps = 0
        self.node: Node = self.keep(Node(env, **parameters))
        self.listener = self.keep(Peer(env, "listener"))
        self.talker = self.keep(Peer(env, "talker"))

    def keep(self, process: Process) -> Process:
        """Have `process` ended with the others."""
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End every process, all of them at the same time."""
        with ExitStack() as stack:
            for process in self._processes:
                stack.callback(process.end)
                process.ask_to_end()

    def restart(self, **parameters: object) -> None:
        """End the node and start another one, before the same talker and listener."""
        self.node.end()
        self.node = self.keep(Node(self.env, **parameters))

    def listen(self, *kinds: str) -> None:
        """Subscribe the listener."""
        for kind in kinds:
            self.listener.do("subscribe", kind=kind)

    def segment(self, picture: dict, *, kinds: Sequence[str] = ("mask",), **header: object) -> dict[str, dict]:
        """Publish a picture until every one of `kinds` arrived for it; the events, by kind.

        Best effort may lose a message and the node may be busy with another: the picture is sent again now and then.
        """
        if "stamp" not in header:
            self._stamps += 1
            header["stamp"] = [1_700_000_000 + self._stamps, 123_456_789]
        since = self.listener.mark()
        topic = "image/compressed" if picture.get("encoding") in ("jpeg", "png") else "image"
        self.talker.do("advertise", topic=topic)
        deadline = time.monotonic() + PATIENCE
        found: dict[str, dict] = {}
        while len(found) < len(kinds):
            self.talker.do("image", picture=picture, **header)
            try:
                for kind in kinds:
                    found[kind] = self.listener.wait(
                        kind,
                        lambda event: event["stamp"] == header["stamp"],
                        since=since,
                        timeout=5.0,
                        what=f"{kind} of {picture}",
                    )
            except AssertionError as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{error}\n{self.node.report()}") from error
        return found
