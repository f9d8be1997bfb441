"""A stand-in of the Hugging Face hub on this machine: the few endpoints that its client uses, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

NAMES = {"clip": "someone/small-clip", "diffusion": "someone/small-diffusion"}
"""Hub ids for the small pair."""


@dataclass
class Hub:
    """Repositories by id, every request that came, and what is to go wrong.

    refused: (part of a path) -> (status, error code, error message). cut: (end of a path) -> bytes after which the
    connection is dropped, and how often. damaged: file names whose bytes differ from what is announced. short: file
    names of which a part is sent as if it were all. stalled: file names that stop half-way until `release` is set;
    `reached` says that one did.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    refused: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    stalled: set[str] = field(default_factory=set)
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, **extra: bytes) -> None:
        """Publish a folder's files. extra: further files by name, with __ for a slash."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = files | {key.replace("__", "/"): content for key, content in extra.items()}

    def commit(self, name: str) -> str:
        """Changes with the repository's content."""
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()

    def fetched(self, ending: str = "") -> list[str]:
        """Names of the files that were transferred, or begun to be, in order, with repetitions."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths if path.endswith(ending)]


def is_large(name: str) -> bool:
    """Whether the hub keeps a file as a large one, known by its SHA-256."""
    return name.endswith((".safetensors", ".bin", ".ckpt", ".png"))


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1 while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_GET

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, dict(self.headers)))
            for part, (status, code, message) in hub.refused.items():
                if part in path:
                    return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
            if path.startswith("/api/models/"):
                return self.describe(path.removeprefix("/api/models/"))
            owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
            return self.give(f"{owner}/{name}", revision, file)

        def describe(self, path: str) -> None:
            repository = "/".join(path.split("/")[:2])
            if repository not in hub.repositories:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            commit, files = hub.commit(repository), hub.repositories[repository]
            kind, _, revision = path.removeprefix(repository).strip("/").partition("/")
            if kind and revision not in ("main", "v1", commit):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if kind == "tree":
                listed = [
                    {
                        "type": "file",
                        "path": key,
                        "size": len(content),
                        "oid": digest(key, content),
                        **large(key, content, "oid"),
                    }
                    for key, content in sorted(files.items())
                ]
                return self.send(200, json.dumps(listed).encode())
            siblings = [
                {
                    "rfilename": key,
                    "size": len(content),
                    "blobId": digest(key, content),
                    **large(key, content, "sha256"),
                }
                for key, content in sorted(files.items())
            ]
            return self.send(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())

        def give(self, repository: str, revision: str, file: str) -> None:
            files = hub.repositories.get(repository, {})
            if file not in files:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            content = files[file]
            about = {
                "ETag": f'"{digest(file, content)}"',
                "X-Repo-Commit": hub.commit(repository),
                "Accept-Ranges": "bytes",
            }
            if self.command == "HEAD":
                return self.send(200, content, about)
            if file in hub.damaged:
                content = bytes([content[0] ^ 1]) + content[1:]
            if file in hub.short:
                content = content[: len(content) // 2]
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if begin:
                about["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            return self.send(206 if begin else 200, content[begin:], about, file)

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = "") -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            after, times = hub.cut.get(file, (0, 0))
            if times:
                hub.cut[file] = (after, times - 1)
                self.wfile.write(body[:after])
                self.close_connection = True
                return
            if file in hub.stalled:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                hub.reached.set()
                hub.release.wait(60)
                self.close_connection = True
                return
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients that go away are part of the tests

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


def digest(name: str, content: bytes) -> str:
    """What the hub knows a file by."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large(name: str, content: bytes, key: str) -> dict[str, object]:
    """What a listing says more of a large file."""
    if not is_large(name):
        return {}
    return {"lfs": {key: digest(name, content), "size": len(content), "pointerSize": 130}}


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT would, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
