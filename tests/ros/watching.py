"""What the tests of `nerve watch` share: a clock that stands still, the page's status, and waiting for a condition."""

import json
import sys
import time
import urllib.request

import pytest

import harness


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def status_of(url, after=None, timeout=harness.PATIENCE):
    query = "" if after is None else f"?after={after}"
    with urllib.request.urlopen(f"{url}/status{query}", timeout=timeout) as answer:
        return json.loads(answer.read(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def until(condition, what):
    """The first true value of `condition`."""
    deadline = time.monotonic() + harness.PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {harness.PATIENCE:.0f} s"
        time.sleep(0.05)
    return value


def command(*arguments):
    return [sys.executable, "-m", "nerve_ros.cli", "watch", *arguments]
