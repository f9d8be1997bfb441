"""The board of `nerve watch`: what is shown, for how long, and how text from the network is shown in a terminal."""

import base64
import os
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from vision_msgs.msg import LabelInfo, VisionClass

from nerve_ros.watch import board as board_module
from nerve_ros.watch import watcher as watcher_module
from nerve_ros.watch.board import Board, class_entry, printable
from nerve_ros.watch.terminal import line, table
from watching import until

EVIL = "<script>alert(1)</script>\x1b[2J\u202e{0}%s"


def entries(*areas):
    return [class_entry(number, f"name {number}", presence=0.5, area=area) for number, area in enumerate(areas, 1)]


def test_classes_are_those_of_the_picture_that_is_shown(board, clock):
    board.result(entries(1, 2), (1, 0))
    board.picture(b"one", (1, 0), 100)
    board.result(entries(3, 4), (2, 0))
    assert [entry["area"] for entry in board.status()["classes"]] == [1, 2]
    board.picture(b"two", (2, 0), 100)
    assert [entry["area"] for entry in board.status()["classes"]] == [3, 4]
    clock.now += board_module.PATIENCE + 0.1
    board.result(entries(5, 6), (3, 0))
    assert [entry["area"] for entry in board.status()["classes"]] == [5, 6]


def test_a_picture_that_does_not_change_is_stale_after_a_while(board, clock):
    board.picture(b"one", (1, 0), 100)
    assert not board.status()["picture"]["stale"]
    clock.now += board_module.PATIENCE + 0.1
    assert board.status()["picture"] == {"number": 1, "pixels": 100, "age": 2.1, "stale": True}
    assert board.quiet() == (pytest.approx(2.1), pytest.approx(2.1))


def test_what_always_comes_slowly_is_not_stale_between_two(board, clock):
    for number in range(3):
        clock.now += 10.0
        board.picture(b"jpeg", (number, 0), 100)
        board.result(entries(1), (number, 0))
    clock.now += 9.0
    status = board.status()
    assert not status["picture"]["stale"]
    assert not status["result"]["stale"]
    assert status["fps"] == pytest.approx(0.1)
    assert board.quiet() == (0.0, 0.0)
    clock.now += 22.0
    status = board.status()
    assert status["picture"]["stale"]
    assert status["result"]["stale"]
    assert status["fps"] == 0.0


def test_the_rate_is_of_the_last_seconds(board, clock):
    for number in range(200):
        clock.now += 0.1
        board.result(entries(1), (number, 0))
    assert board.status()["fps"] == pytest.approx(10.0, rel=0.03)


def test_a_picture_from_before_nobody_looked_is_not_shown(board, clock):
    board.picture(b"old", (1, 0), 100)
    clock.now += 60.0
    board.forget_picture()
    assert board.status()["picture"] is None
    assert board.quiet()[1] == 0.0
    clock.now += 1.0
    board.picture(b"new", (2, 0), 100)
    clock.now += 1.0
    assert board.status()["picture"]["number"] == 2
    assert not board.status()["picture"]["stale"]


def test_results_of_pictures_that_never_come_are_not_kept(board):
    for number in range(1000):
        board.result(entries(1), (number, 0))
    assert len(board._classes_of) == board_module.RESULTS


def test_new_names_are_shown_before_they_are_looked_for(board):
    board.result(entries(7), (1, 0))
    board.labels([(1, "name 1"), (2, "plant")])
    assert [(entry["name"], entry["area"]) for entry in board.status()["classes"]] == [("name 1", 7), ("plant", None)]


def test_a_label_info_without_end_is_cut_off(board):
    message = LabelInfo(class_map=[VisionClass(class_id=n % 256, class_name=f"name {n}") for n in range(3000)])
    watcher_module.Watcher._on_labels(SimpleNamespace(_board=board), message)
    classes = board.status()["classes"]
    assert [entry["id"] for entry in classes] == list(range(1, 255))
    assert classes[-1]["name"] == "name 254"


def test_a_question_waits_for_the_next_picture_and_counts_as_looking(monkeypatch):
    board = Board()
    assert not board.watched
    assert board.newer(0)["jpeg"] == ""
    assert board.watched
    board.picture(b"one", (1, 0), 100)
    assert base64.b64decode(board.newer(0)["jpeg"]) == b"one"
    monkeypatch.setattr(board_module, "WAIT", 1000.0)
    answers = []
    threading.Thread(target=lambda: answers.append(board.newer(1)), daemon=True).start()
    board.picture(b"two", (2, 0), 100)
    (status,) = until(lambda: answers, "answer")
    assert (status["picture"]["number"], base64.b64decode(status["jpeg"])) == (2, b"two")


def test_nobody_looks_once_no_question_comes_any_more(clock):
    board = Board(clock)
    board.picture(b"one", (1, 0), 100)
    board.newer(0)
    clock.now += board_module.LINGER - 0.1
    assert board.watched
    clock.now += 0.2
    assert not board.watched


def test_text_is_made_printable_and_short():
    assert printable("mug") == "mug"
    assert printable("a\x1b[31m\u202eb\nc\x9b") == "a\ufffd[31m\ufffdb\ufffdc\ufffd"
    assert printable("Straße 漢字 👩\u200d🚀 می\u200cخواهم") == "Straße 漢字 👩\u200d🚀 می\u200cخواهم"
    assert len(printable("x" * 10_000)) == 128


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_gets_no_escape_sequence_from_a_name(board, terminal):
    board.about = {"node": "/nerve", "topic": "/t", "domain": 0}
    board.reason = printable(EVIL)
    board.result([class_entry(1, EVIL + "[bold]", presence=0.5, confidence=None, area=3)] * 300, (1, 0))
    board.diagnostics({"level": "ok", "message": "", "values": {"state": printable(EVIL)}})
    console = Console(force_terminal=terminal, width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(board.status(), rows=20))
    console.print(line(board.status()))
    shown = console.export_text(styles=terminal)
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert "<script>" in shown
    assert "[bold]" in shown
    assert "and 283 more" in shown
    assert "and 280 more" in shown
