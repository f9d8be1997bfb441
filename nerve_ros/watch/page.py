"""The page of `nerve watch`: an HTTP server that gives browsers watch.html and the board as JSON."""

from __future__ import annotations

import errno
import ipaddress
import json
import re
import secrets
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nerve_ros.watch.board import Board

CONNECTIONS = 64
"""Connections that the page serves at once; further ones are closed."""


class Page(ThreadingHTTPServer):
    """The page on `host`:`port`. Bound when made, serves from :meth:`start` to :meth:`close`.

    Raises ValueError where the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS
    block_on_close = False

    def __init__(self, host: str, port: int, board: Board) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.board = board
        self.host = host
        self.html = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of {host} is in use; give another with --port, or --port 0") from None
            raise ValueError(f"the page cannot be served on {host}, port {port}: {error.strerror}") from None

    @property
    def url(self) -> str:
        """What to open."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown}:{self.server_address[1]}"

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving; viewers are sent away."""
        self.board.close()
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether fewer than CONNECTIONS are being served; the new one then counts as one of them."""
        return self._free.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is only that the browser went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Page
    protocol_version = "HTTP/1.1"
    server_version = "nerve"
    sys_version = ""
    timeout = 10.0  # seconds that a browser may take to send a request, or to take an answer

    def do_GET(self) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "open the page by the address it is served on")
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self._answer(
                self.server.html.replace("NONCE", nonce).encode(),
                "text/html; charset=utf-8",
                f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
                f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            )
        elif path == "/status":
            after = re.fullmatch(r"after=(\d{1,18})", query)
            board = self.server.board
            status = board.newer(int(after[1])) if after else board.status()
            self._answer(json.dumps(status, allow_nan=False).encode(), "application/json")
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there are / and /status")

    def _is_for_us(self) -> bool:
        """Whether the browser means this server: a page from elsewhere may have had its own name resolve to it."""
        if not is_loopback(self.server.host):
            return True
        try:
            host = urlsplit("//" + self.headers.get("Host", "")).hostname or ""
        except ValueError:
            return False
        return is_loopback(host)

    def _answer(self, body: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal shows the table."""


def is_loopback(host: str) -> bool:
    """Whether `host` is a name or an address by which a machine reaches itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
