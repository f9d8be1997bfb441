"""The page of `nerve watch` as a browser gets it."""

import http.client
import json
import re
import socket
import threading
from contextlib import ExitStack

import pytest

import harness
from nerve_ros.watch import board as board_module
from nerve_ros.watch import page as page_module
from nerve_ros.watch.board import Board
from nerve_ros.watch.page import Page
from watching import until


def answer_of(page, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=harness.PATIENCE)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_the_page_asks_nobody_else_for_anything(page):
    answer, body = answer_of(page)
    assert answer.status == 200
    assert set(re.findall(r"https?://[^\s'\"<>)]+", body)) <= {"http://www.w3.org/2000/svg"}
    policy = answer.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert f'<script nonce="{nonce}">' in body
    assert "NONCE" not in body
    assert nonce not in answer_of(page)[1]
    # Nothing that comes from the network is ever read as HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", body)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "localhost:8090", "[::1]:8090", "127.9.9.9"])
def test_the_page_answers_by_the_names_of_this_machine(page, host):
    assert answer_of(page, "/status", host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8090", "192.168.1.7", "localhost.evil.example", "[", "@"]
)
def test_another_name_that_leads_here_is_turned_away(page, host):
    assert answer_of(page, "/status", host)[0].status == 421


@pytest.mark.parametrize("path", ["/etc/passwd", "/../page.py", "/status/", "/overlay", "/favicon.ico"])
def test_there_is_nothing_else(page, path):
    assert answer_of(page, path)[0].status == 404


@pytest.mark.parametrize("query", ["?after=-1", "?after=x", "?after=", "?after=1&after=2", "?after=" + "9" * 99])
def test_a_question_that_makes_no_sense_gets_no_picture(page, query):
    page.board.picture(b"jpeg", (1, 0), 1)
    answer, body = answer_of(page, f"/status{query}")
    assert answer.status == 200
    assert "jpeg" not in json.loads(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_nothing_can_be_changed(page, method):
    assert answer_of(page, "/status", method=method)[0].status == 501


def test_a_browser_that_goes_away_or_talks_nonsense_disturbs_nobody(page, capfd):
    for words in (
        b"",
        b"GET",
        b"GET /status?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\xff" * 50_000 + b"\r\n\r\n",
    ):
        with socket.create_connection(page.server_address, timeout=harness.PATIENCE) as connection:
            connection.sendall(words)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert answer_of(page, "/status")[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_connections_beyond_the_limit_are_closed_until_there_is_room_again(page, monkeypatch):
    monkeypatch.setattr(page_module._Handler, "timeout", 1000.0)
    with ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(page.server_address, timeout=harness.PATIENCE))
            for _ in range(page_module.CONNECTIONS)
        ]
        until(lambda: not page._free._value, "full server")
        with socket.create_connection(page.server_address, timeout=harness.PATIENCE) as late:
            assert late.recv(1) == b""
        assert held
    until(lambda: page._free._value == page_module.CONNECTIONS, "free server")
    assert answer_of(page, "/status")[0].status == 200


def test_closing_the_page_ends_a_question_at_once(page, monkeypatch):
    monkeypatch.setattr(board_module, "WAIT", 1000.0)
    answers = []
    threading.Thread(target=lambda: answers.append(answer_of(page, "/status?after=0")), daemon=True).start()
    until(lambda: page.board.watched, "question")
    page.close()
    until(lambda: answers, "answer")


def test_an_address_of_another_machine_is_told_in_a_sentence():
    with pytest.raises(ValueError, match=r"the page cannot be served on 192\.0\.2\.1, port 0: Cannot assign"):
        Page("192.0.2.1", 0, Board())
