"""Fixtures of the tests of `nerve watch`."""

import pytest

from nerve_ros.watch.board import Board
from nerve_ros.watch.page import Page
from watching import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return Board(clock)


@pytest.fixture
def page():
    page = Page("127.0.0.1", 0, Board())
    page.start()
    yield page
    page.close()
