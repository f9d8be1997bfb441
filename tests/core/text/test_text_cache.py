"""Embeddings on disk: whole or not there, shared by processes, bounded, and never a reason to fail."""

import json
import logging
import multiprocessing
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

from nerve_core.text.cache import EmbeddingCache, cache_folder, space_of
from unprivileged import without_privileges

FORK = multiprocessing.get_context("fork")


def vector(k, size=16):
    return np.random.default_rng(k).normal(size=size).astype(np.float32)


def vectors(count, size=16):
    return {f"thing {k}": vector(k, size) for k in range(count)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)
    return True


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_arrays_of_any_shape_come_back_bit_by_bit(tmp_path):
    arrays = {"": vector(0), "a prompt": vector(1, (1, 77, 8)), "机器人 👩‍🚀": vector(2, ()), "none": vector(3, (0, 4))}
    arrays["transposed"] = vector(4, (3, 5)).T
    EmbeddingCache(tmp_path).put("here", arrays)
    again = EmbeddingCache(tmp_path)
    same(again.get("here", [*arrays, "unheard of"]), arrays)
    again.get("here", [""])[""][:] = 0  # what was given out is the caller's own
    same(again.get("here", [""]), {"": arrays[""]})


def test_names_and_spaces_that_look_alike_share_nothing(tmp_path):
    cache = EmbeddingCache(tmp_path)
    names = ["ball", "Ball", "ball ", "é", "e\u0301", "b%ll", "b_ll", "'; DROP TABLE embeddings; --", "ball\0"]
    arrays = {name: vector(k) for k, name in enumerate(names)}
    cache.put("one", arrays)
    same(cache.get("one", names), arrays)
    assert cache.get("two", names) == {}
    assert cache.get("ONE", names) == {}


def test_the_later_of_two_puts_counts(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.put("here", {"ball": vector(0), "cube": vector(1)})
    cache.put("here", {"ball": vector(2, 3)})
    same(cache.get("here", ["ball", "cube"]), {"ball": vector(2, 3), "cube": vector(1)})


def test_a_space_is_told_by_every_part_and_their_order():
    parts = [(), ("",), ("a",), ("a", "b"), ("b", "a"), ("ab",), ("a", "", "b"), ('a", "b',), ("a\0b",)]
    assert len({space_of(*each) for each in parts}) == len(parts)
    assert space_of("a", "b") == space_of("a", "b")


def test_the_folder_is_the_users_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/nerve_ros"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/nerve_ros"
    monkeypatch.setenv("NERVE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_a_user_without_a_home_is_told_to_name_a_folder(no_home):
    with pytest.raises(OSError, match=r"no home folder.*name a folder by NERVE_CACHE"):
        cache_folder()


def test_what_is_not_finite_is_refused_and_nothing_of_its_put_is_kept(tmp_path):
    cache = EmbeddingCache(tmp_path)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="'cube' is not finite"):
            cache.put("here", {"ball": vector(0), "cube": np.array([1.0, wrong], np.float32)})
    assert cache.get("here", ["ball", "cube"]) == {}


def test_looking_makes_no_file_and_a_put_leaves_one(tmp_path):
    cache = EmbeddingCache(tmp_path / "new")
    assert cache.get("here", ["ball"]) == {}
    assert cache.clear() == cache.nbytes == 0
    cache.close()
    cache.put("here", {})
    assert not (tmp_path / "new").exists()
    cache.put("here", vectors(3))
    assert files(tmp_path / "new") == [cache.path.name]
    assert cache.nbytes == cache.path.stat().st_size > 0


def test_clear_forgets_all_and_says_what_that_freed(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.put("here", vectors(200, 768))
    before = cache.nbytes
    freed = EmbeddingCache(tmp_path).clear()
    assert freed > 200 * 768 * 4
    assert cache.nbytes == before - freed < 32 * 1024
    assert cache.get("here", vectors(200)) == {}
    cache.put("here", vectors(1))
    same(cache.get("here", vectors(200)), vectors(1))


# --- the limit ----------------------------------------------------------------------------------------------


def test_the_file_keeps_to_its_limit_and_the_newest_stay(tmp_path):
    limit = 200_000
    cache = EmbeddingCache(tmp_path, limit=limit)
    for start in range(0, 300, 10):
        cache.put("here", {f"thing {k}": vector(k, 768) for k in range(start, start + 10)})
        assert cache.nbytes <= limit
    kept = sorted(int(name.split()[1]) for name in cache.get("here", vectors(300)))
    assert kept == list(range(300 - len(kept), 300))
    assert len(kept) * 768 * 4 > limit / 2


def test_what_is_used_stays_and_what_is_not_goes(tmp_path):
    names = [f"thing {k}" for k in range(40)]
    EmbeddingCache(tmp_path, limit=200_000).put("here", vectors(40, 768))
    reader = EmbeddingCache(tmp_path, limit=200_000)
    assert reader.get("here", names[:5]).keys() == set(names[:5])
    reader.close()  # a run that only reads marks what it read
    writer = EmbeddingCache(tmp_path, limit=200_000)
    for k in range(40, 100):
        writer.put("here", {f"thing {k}": vector(k, 768)})
        writer.get("here", names[5:10])  # in use all the time
    left = writer.get("here", names)
    assert left.keys() >= set(names[5:10])
    assert not left.keys() & set(names[10:])
    assert writer.nbytes <= 200_000


def test_use_counts_across_a_restart(tmp_path):
    EmbeddingCache(tmp_path).put("here", {"old": vector(0, 20_000)})
    EmbeddingCache(tmp_path).put("here", {"older in use": vector(1, 20_000)})
    with closing(EmbeddingCache(tmp_path)) as cache:
        cache.get("here", ["old"])
    small = EmbeddingCache(tmp_path, limit=220_000)
    small.put("here", {"new": vector(2, 20_000)})
    assert small.get("here", ["old", "older in use", "new"]).keys() == {"old", "new"}


def test_one_array_beyond_the_limit_is_not_kept(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path, limit=100_000)
    cache.put("here", {"large": vector(0, 100_000)})
    assert cache.get("here", ["large"]) == {}
    assert cache.nbytes <= 100_000
    assert not caplog.records


# --- damage -------------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-5000])


def garble(path):
    path.write_bytes(path.read_bytes()[:4096] + bytes(range(256)) * 100)


def other_application(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE bookmarks (page TEXT)")
        db.commit()


def other_schema(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE embeddings (space TEXT, name TEXT, vector BLOB)")
        db.commit()


DAMAGE = {
    "no database": lambda path: path.write_bytes(b"\xff" * 9000),
    "a few bytes": lambda path: path.write_bytes(b"no"),
    "cut off": cut_off,
    "garbled": garble,
    "another application's": other_application,
    "another schema": other_schema,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("first", ["get", "put", "clear"])
def test_a_file_that_is_no_cache_is_replaced_with_one_warning(tmp_path, caplog, damage, first):
    EmbeddingCache(tmp_path).put("here", vectors(40, 768))
    cache = EmbeddingCache(tmp_path)
    damage(cache.path)
    if first == "get":
        assert cache.get("here", vectors(40)) == {}
    elif first == "clear":
        cache.clear()
    cache.put("here", vectors(2))
    same(cache.get("here", vectors(2)), vectors(2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(cache.path) in caplog.text
    assert "replaced" in caplog.text
    assert files(tmp_path) == [cache.path.name]


def test_an_empty_file_is_where_a_writer_was_stopped_and_no_news(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path)
    cache.path.touch()
    assert cache.get("here", ["ball"]) == {}
    cache.put("here", vectors(1))
    same(cache.get("here", vectors(1)), vectors(1))
    assert not caplog.records


def edited(path, change, *values):
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(f"UPDATE embeddings SET {change} WHERE name = 'thing 0'", values).rowcount == 1
        db.commit()


ROWS = {
    "a bit flipped": ("data = ?", bytes([vector(0).tobytes()[0] ^ 1]) + vector(0).tobytes()[1:]),
    "cut off": ("data = ?", vector(0).tobytes()[:-4]),
    "empty": ("data = ?", b""),
    "text": ("data = ?", "words"),
    "a number": ("data = ?", 3),
    "other shape": ("shape = ?", "[4, 4]"),
    "no shape": ("shape = ?", "[16"),
    "shape of words": ("shape = ?", '["16"]'),
    "checksum": ("checksum = checksum + 1",),
    "of another name": ("name = 'thing 0', data = ?", vector(1).tobytes()),
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_a_row_that_is_not_whole_counts_as_unknown_and_is_overwritten(tmp_path, caplog, change):
    cache = EmbeddingCache(tmp_path)
    cache.put("here", vectors(3))
    edited(cache.path, *change)
    assert cache.get("here", vectors(3)).keys() == {"thing 1", "thing 2"}
    cache.put("here", vectors(1))
    same(cache.get("here", vectors(3)), vectors(3))
    assert not caplog.records


def test_values_that_are_not_finite_are_not_given_out_though_their_checksum_is_right(tmp_path):
    from nerve_core.text.cache import _checksum

    cache = EmbeddingCache(tmp_path)
    cache.put("here", vectors(1))
    data = np.full(16, np.nan, "<f4").tobytes()
    checksum = _checksum("here", "thing 0", json.dumps((16,)), data)
    edited(cache.path, "data = ?, checksum = ?", data, checksum)
    assert cache.get("here", vectors(1)) == {}


# --- what cannot be read or written -------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    cache = EmbeddingCache(tmp_path / "file" / "folder")
    for _ in range(3):
        cache.put("here", vectors(2))
        assert cache.get("here", vectors(2)) == {}
    cache.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(cache.path) in caplog.text
    assert "cache_dir" in caplog.text


def test_a_read_only_folder_still_serves(tmp_path):
    EmbeddingCache(tmp_path).put("here", vectors(3))
    next(tmp_path.iterdir()).chmod(0o444)
    tmp_path.chmod(0o555)

    def job():
        heard = []
        logging.getLogger("nerve_core.text.cache").addFilter(heard.append)
        cache = EmbeddingCache(tmp_path)
        same(cache.get("here", vectors(4)), vectors(3))
        assert heard == []
        for _ in range(2):
            cache.put("here", {"new": vector(9)})
            same(cache.get("here", [*vectors(4), "new"]), vectors(3))
        cache.close()
        assert len(heard) == 1
        assert "readonly" in heard[0].getMessage()
        with pytest.raises(OSError, match="cannot be cleared"):
            cache.clear()

    without_privileges(job)
    same(EmbeddingCache(tmp_path).get("here", vectors(3)), vectors(3))


def test_a_file_that_must_not_be_read_is_said_once_and_left_alone(tmp_path):
    EmbeddingCache(tmp_path).put("here", vectors(3))
    next(tmp_path.iterdir()).chmod(0o000)

    def job():
        heard = []
        logging.getLogger("nerve_core.text.cache").addFilter(heard.append)
        cache = EmbeddingCache(tmp_path)
        for _ in range(2):
            assert cache.get("here", vectors(3)) == {}
            cache.put("here", vectors(1))
        assert len(heard) == 1

    without_privileges(job)


def test_a_full_disk_keeps_what_was_there(tmp_path, caplog, monkeypatch):
    cache = EmbeddingCache(tmp_path)
    cache.put("here", vectors(3))
    connect = sqlite3.connect

    def small_disk(*arguments, **options):
        db = connect(*arguments, **options)
        db.execute("PRAGMA max_page_count = 8")  # SQLite then says what it says where a disk is full
        return db

    monkeypatch.setattr(sqlite3, "connect", small_disk)
    for _ in range(2):
        cache.put("here", vectors(100, 768))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "full" in caplog.text
    same(cache.get("here", vectors(100)), vectors(3))
    assert files(tmp_path) == [cache.path.name]


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_lock_that_is_not_given_back_is_waited_for_only_once(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr("nerve_core.text.cache._PATIENCE", 0.05)
    cache = EmbeddingCache(tmp_path)
    cache.put("here", vectors(3))
    with closing(sqlite3.connect(cache.path, isolation_level=None)) as holder:
        holder.execute(f"BEGIN {kind}")
        read = cache.get("here", vectors(3))
        assert len(read) == (3 if kind == "IMMEDIATE" else 0)
        for _ in range(3):
            cache.put("here", vectors(5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "locked" in caplog.text
    same(EmbeddingCache(tmp_path).get("here", vectors(5)), vectors(3))


# --- several at once ----------------------------------------------------------------------------------------


def _write_and_read(barrier, folder, seed):
    failures = []
    logging.getLogger("nerve_core.text.cache").addFilter(lambda record: failures.append(record.getMessage()))
    cache = EmbeddingCache(folder)
    barrier.wait()
    for turn in range(60):
        mine = {f"of {seed} in {turn}": vector(turn, 64)}
        cache.put("here", mine | {"shared": vector(turn % 3, 64)})
        same(cache.get("here", mine), mine)
        shared = cache.get("here", ["shared"])["shared"]
        assert any((shared == vector(k, 64)).all() for k in range(3))  # whole at any moment
    assert not failures, failures


@pytest.mark.parametrize("start", ["new", "damaged"])
def test_processes_that_write_at_once_lose_nothing(tmp_path, monkeypatch, start):
    monkeypatch.setattr("nerve_core.text.cache._PATIENCE", 30.0)  # machines that run tests are slow and shared
    if start == "damaged":
        EmbeddingCache(tmp_path).path.write_bytes(b"\xff" * 9000)
        EmbeddingCache(tmp_path).get("here", ["ball"])
    barrier = FORK.Barrier(3)
    writers = [FORK.Process(target=_write_and_read, args=(barrier, tmp_path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    names = [f"of {seed} in {turn}" for seed in range(3) for turn in range(60)]
    assert EmbeddingCache(tmp_path).get("here", names).keys() == set(names)
    assert files(tmp_path) == [EmbeddingCache(tmp_path).path.name]


def _write_until_killed(began, folder):
    cache = EmbeddingCache(folder, limit=300_000)
    for turn in range(10**6):
        cache.put("here", {f"thing {k}": vector(turn, 768) for k in range(60)})
        began.set()


def test_a_writer_that_is_killed_leaves_all_of_a_put_or_nothing(tmp_path, caplog):
    for patience in (0.01, 0.02, 0.03, 0.05, 0.08):
        began = FORK.Event()
        writer = FORK.Process(target=_write_until_killed, args=(began, tmp_path))
        writer.start()
        assert began.wait(60)
        writer.join(patience)
        writer.kill()
        writer.join(60)
        cache = EmbeddingCache(tmp_path)
        found = cache.get("here", [f"thing {k}" for k in range(60)])
        assert len(found) == 60
        assert len({array.tobytes() for array in found.values()}) == 1
        cache.put("here", {"thing 0": vector(0)})
    assert not caplog.records


def test_one_cache_serves_several_threads_and_a_fork(tmp_path):
    cache = EmbeddingCache(tmp_path)
    errors = []

    def use(seed):
        try:
            for turn in range(15):
                cache.put("here", {f"of {seed} in {turn}": vector(turn)})
                same(cache.get("here", [f"of {seed} in {turn}"]), {f"of {seed} in {turn}": vector(turn)})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    child = FORK.Process(target=use, args=("fork",))
    child.start()
    child.join(60)
    names = [f"of {seed} in {turn}" for seed in (0, 1, 2, "fork") for turn in range(15)]
    assert cache.get("here", names).keys() == set(names)
