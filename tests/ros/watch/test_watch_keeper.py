"""`nerve watch --save`: how often pictures are kept, and what ends it."""

from shutil import disk_usage

import pytest

from nerve_ros.watch import keeper as keeper_module
from nerve_ros.watch.keeper import Keeper
from watching import Clock


def test_pictures_are_kept_as_often_as_asked(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(keeper_module.time, "monotonic", clock)
    keeper = Keeper(tmp_path / "new" / "folder", every=1.0)
    for number in range(10):
        keeper.keep(b"jpeg", f"{number}")
        clock.now += 0.4
    kept = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert kept == ["0.jpg", "3.jpg", "6.jpg", "9.jpg"]


def test_no_picture_is_replaced(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"mine")
    keeper = Keeper(tmp_path, every=0.0)
    for content in (b"jpeg", b"more"):
        keeper.keep(content, "one")
    assert keeper.error == ""
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"one.jpg": b"mine", "one_2.jpg": b"jpeg", "one_3.jpg": b"more"}


def test_a_full_disk_ends_the_keeping_and_is_told(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path, every=0.0)
    monkeypatch.setattr(
        keeper_module.shutil, "disk_usage", lambda folder: disk_usage(folder)._replace(free=keeper_module.SPARE)
    )
    keeper.keep(b"jpeg", "one")
    monkeypatch.undo()
    keeper.keep(b"jpeg", "two")
    assert keeper.error == f"no more pictures are kept in {tmp_path}: less than 1 GB is free"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save .*file cannot be used: File exists"):
        Keeper(tmp_path / "file", 1.0)
