"""Files that commands write: whole or not at all, and never in place of a file that is not ours."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from nerve_core import output
from nerve_core.output import (
    LOG_HEAD,
    RECORD,
    OutputError,
    claim,
    claim_folder,
    is_own,
    made_here,
    marked,
    named,
    placing,
    write,
    writing,
)


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD)


def test_a_file_of_ours_may_be_written_again_and_again(tmp_path):
    for text in ("one", "two", "one"):
        write(tmp_path / "below" / "a.txt", text)
    assert (tmp_path / "below" / "a.txt").read_text() == "one"
    assert is_own(tmp_path / "below" / "a.txt")
    assert inside(tmp_path / "below") == ["a.txt"]


def test_a_file_that_is_not_ours_is_kept_and_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("mine")
    for attempt in (lambda: claim([tmp_path / "new.txt", path]), lambda: write(path, "yours")):
        with pytest.raises(OutputError, match=r"a\.txt would be replaced, and nerve did not write it.*--overwrite"):
            attempt()
    assert path.read_text() == "mine"
    assert inside(tmp_path) == ["a.txt"]


def test_a_file_of_ours_that_somebody_changed_is_theirs(tmp_path):
    path = write(tmp_path / "a.txt", "ours")
    path.write_text("edited")
    with pytest.raises(OutputError, match="did not write it as it is now"):
        write(path, "new")
    assert path.read_text() == "edited"


def test_overwrite_takes_what_is_there_as_ours(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("mine")
    claim([path], overwrite=True)
    assert path.read_text() == "mine", "nothing is replaced before there is something to replace it by"
    assert write(path, "yours").read_text() == "yours"


def test_the_folder_may_move_and_a_copy_without_its_record_is_not_ours(tmp_path):
    write(tmp_path / "a" / "x.txt", "ours")
    (tmp_path / "a").rename(tmp_path / "b")
    assert is_own(tmp_path / "b" / "x.txt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.txt").write_text("ours")
    assert not is_own(tmp_path / "c" / "x.txt")


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_plain_file_is_left_even_with_overwrite(tmp_path, kind):
    path, target = tmp_path / "a.txt", tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("mine")
    before = os.lstat(path)
    with pytest.raises(OutputError, match=r"a\.txt is (a link|a folder|no plain file) and is left as it is"):
        claim([path], overwrite=True)
    with pytest.raises(OutputError):
        write(path, "yours")
    assert os.lstat(path).st_ino == before.st_ino
    assert not target.exists() or target.read_text() == "mine"


def test_a_folder_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out is a file, no folder"):
        claim([tmp_path / "out" / "below" / "a.txt"])


def test_nothing_is_left_of_a_file_whose_writing_failed(tmp_path):
    write(tmp_path / "a.txt", "old")
    with contextlib.suppress(KeyError), writing(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise KeyError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert inside(tmp_path) == ["a.txt"]


def test_a_file_that_does_not_fit_is_named_and_nothing_of_it_is_left(tmp_path):
    write(tmp_path / "a.txt", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.txt cannot be written, File too large: make room.*nothing") as full:
            write(tmp_path / "a.txt", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert full.value.full
    assert (tmp_path / "a.txt").read_text() == "old"
    assert inside(tmp_path) == ["a.txt"]


def test_an_error_of_another_file_is_not_said_to_be_of_this_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.txt"), named(tmp_path / "a.txt"):
        Path(tmp_path.parent, "elsewhere.txt").read_text()


def test_a_folder_is_placed_whole_and_is_kept_where_something_else_is_in_it(tmp_path):
    bag = tmp_path / "bag"
    for text in ("one", "two"):
        with placing(bag) as part:
            part.mkdir()
            (part / "data").write_text(text)
    assert (bag / "data").read_text() == "two"
    assert inside(tmp_path) == ["bag"]
    (bag / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt would be replaced"):
        claim_folder(bag)
    with pytest.raises(OutputError), placing(bag) as part:
        part.mkdir()
    assert inside(bag) == ["data", "notes.txt"]


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path):
    with contextlib.suppress(KeyError), placing(tmp_path / "bag") as part:
        part.mkdir()
        (part / "data").write_text("half")
        raise KeyError
    assert inside(tmp_path) == []


def test_a_log_is_ours_by_its_first_line(tmp_path):
    (tmp_path / "node.log").write_bytes(LOG_HEAD + b"more\n")
    (tmp_path / "other.log").write_text("mine")
    claim([tmp_path / "node.log"])
    with pytest.raises(OutputError, match=r"other\.log"):
        claim([tmp_path / "other.log"])


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_picture_is_known_by_its_mark_wherever_it_is_copied_to(tmp_path, ending):
    data = cv2.imencode(ending, np.full((20, 30, 3), 90, np.uint8))[1].tobytes()
    (tmp_path / f"plain{ending}").write_bytes(data)
    (tmp_path / f"copy{ending}").write_bytes(marked(data))
    assert not made_here(tmp_path / f"plain{ending}")
    assert made_here(tmp_path / f"copy{ending}")
    assert not is_own(tmp_path / f"copy{ending}"), "a mark says who made it, not that nobody needs it"
    plain, copy = (cv2.imread(str(tmp_path / f"{name}{ending}")) for name in ("plain", "copy"))
    assert np.array_equal(plain, copy)


def test_a_record_that_was_cut_short_speaks_for_the_other_files(tmp_path):
    write(tmp_path / "a.txt", "a")
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"name": "b.t\n[1]\n')
    write(tmp_path / "c.txt", "c")
    output._records._read.clear()
    assert [is_own(tmp_path / name) for name in ("a.txt", "c.txt")] == [True, True]
