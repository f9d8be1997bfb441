"""Fixtures of the tests that need ROS 2: one node process serves a whole module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import harness


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of a ROS domain that is this module's alone."""
    with harness.domain() as env:
        yield env


@pytest.fixture(scope="module")
def new_rig(environment: dict[str, str]) -> Iterator[Callable[..., harness.Rig]]:
    """Start a node with the given parameters, a talker and a listener; all are ended when the module is done."""
    with ExitStack() as stack:

        def start(**parameters: object) -> harness.Rig:
            rig = harness.Rig(environment, **parameters)
            stack.callback(rig.close)
            return rig

        yield start


@pytest.fixture
def new_peer(environment: dict[str, str]) -> Iterator[Callable[[str], harness.Peer]]:
    """Start another peer for one test."""
    with ExitStack() as stack:

        def start(name: str) -> harness.Peer:
            peer = harness.Peer(environment, name)
            stack.callback(peer.end)
            return peer

        yield start
