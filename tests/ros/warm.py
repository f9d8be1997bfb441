"""Python programs in forks of a process that has imported the large libraries already.

Importing torch, transformers, diffusers and rclpy takes 5 to 10 s of processor, and the tests start some two hundred
processes. A program started here is what its file starts: a process and a session of its own with its arguments,
environment, standard streams, signals and exit code, and it imports this project's own modules itself. What libraries
read of the environment while they are imported is that of the first program, so others are started as usual.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

READ_ONCE = ("HF_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "RMW_", "TORCH", "TRANSFORMERS_")
"""How the names of variables begin that Python or a library reads only once."""
LARGEST_REQUEST = 1 << 17


class Popen:
    """As much of subprocess.Popen as the tests use, for a program that was forked."""

    def __init__(self, command: Sequence[str], pid: int, ended: int, streams: Mapping[str, int]) -> None:
        self.args = list(command)
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended
        self._lock = threading.Lock()
        self.stdin = os.fdopen(streams["stdin"], "w", errors="replace") if "stdin" in streams else None
        self.stdout = os.fdopen(streams["stdout"], errors="replace")
        self.stderr = os.fdopen(streams["stderr"], errors="replace") if "stderr" in streams else None

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        with self._lock:
            if self.returncode is None and select.select([self._ended], [], [], 0.0)[0]:
                self.returncode = int(
                    os.read(self._ended, 32) or "-9"
                )  # nothing: the server was ended, and all with it
                os.close(self._ended)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended."""
        if self.poll() is None:
            select.select([self._ended], [], [], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Server:
    """The process with the libraries, for programs whose environment has the same READ_ONCE variables."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._read_once = read_once(env)
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            command = [sys.executable, __file__, str(other.fileno())]
            self._process = subprocess.Popen(
                command, env=dict(env), pass_fds=[other.fileno()], stdin=subprocess.DEVNULL
            )

    def fits(self, env: Mapping[str, str]) -> bool:
        """Whether a program with this environment would import what is imported."""
        return read_once(env) == self._read_once

    def start(self, command: Sequence[str], env: Mapping[str, str], *, steered: bool) -> Popen:
        """Run a Python file with arguments; `steered`: with a pipe to its standard input, and standard error apart."""
        ended, end = os.pipe()
        stdout, out = os.pipe()
        theirs, ours = [end, out], {"stdout": stdout}
        if steered:
            given, ours["stdin"] = os.pipe()
            ours["stderr"], errors = os.pipe()
            theirs += [given, errors]
        request = json.dumps({"command": list(command), "env": dict(env), "folder": os.getcwd()}).encode()
        socket.send_fds(self._socket, [request], theirs)
        for number in theirs:
            os.close(number)
        answer = self._socket.recv(32)
        if not answer:
            raise RuntimeError(f"the process with the libraries ended with {self._process.wait()}")
        return Popen(command, int(answer), ended, ours)


def read_once(env: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that count while libraries are imported."""
    return {name: value for name, value in env.items() if name.startswith(READ_ONCE)}


def import_libraries() -> None:
    """What the node, its peers and the `nerve` command import of others."""
    import cv2  # noqa: F401
    import cv_bridge  # noqa: F401
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer  # noqa: F401


def serve(requests: socket.socket) -> list[str]:
    """Fork for every request, and say how each fork ended; returns in the forks, with the command to run."""
    running: dict[int, tuple[int, int]] = {}  # by the descriptor that stands for the process: its number, who waits
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    selector.unregister(key.fd)
                    pid, end = running.pop(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with suppress(BrokenPipeError):
                        os.write(end, str(code).encode())
                    os.close(end)
                    continue
                asked, descriptors, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 4)
                if not asked:
                    raise SystemExit  # the test run has ended
                end, *streams = descriptors
                pid = os.fork()
                if pid == 0:
                    for number in [end, requests.fileno(), *running, *(end for _, end in running.values())]:
                        os.close(number)
                    return become(json.loads(asked), streams)
                for number in streams:
                    os.close(number)
                handle = os.pidfd_open(pid)
                running[handle] = (pid, end)
                selector.register(handle, selectors.EVENT_READ)
                requests.send(str(pid).encode())


def become(asked: dict, streams: list[int]) -> list[str]:
    """Make this fork the process that was asked for, as far as an operating system sees it."""
    os.setsid()
    out, given, errors = streams if len(streams) == 3 else (streams[0], os.open(os.devnull, os.O_RDONLY), streams[0])
    for number, stream in enumerate((given, out, errors)):
        os.dup2(stream, number)
    for number in {given, out, errors}:
        os.close(number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    return asked["command"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import_libraries()
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
