"""What every test of the core shares: one thread, no time limits on property tests, nothing of the user's, a pair."""

import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from nerve_core.cli.app import main
from small_models import save_pair

torch.set_num_threads(1)
settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("core")


@pytest.fixture(autouse=True)
def nothing_of_the_users(tmp_path, monkeypatch):
    """No test sees what a user has cached, nor the network."""
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "nerve cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def whole_pair(tmp_path_factory) -> Path:
    """The small pair as a folder, to be left as it is."""
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(whole_pair, tmp_path) -> Path:
    """A copy of the small pair that a test may damage; its files are hard links until `replace` is used."""
    return Path(shutil.copytree(whole_pair, tmp_path / "pair", copy_function=os.link))


@pytest.fixture
def no_home(monkeypatch):
    """A user as containers have them that run with any number: without HOME, and without an entry in the list of
    users."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "NERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def nerve(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nerve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run
