"""Keeps safetensors copies of models that are published as pickles alone, in a cache of this project's own.

The cache is laid out as the hub's is, a folder a repository and in it one a commit, so that a revision finds its copy
in the same way. A copy is a whole model folder: descriptions and tokenizer are copied, weights that are safetensors
already are links into the hub's cache, and pickles are rewritten by `unpickle`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ModelError
from ..text.cache import cache_folder

_PROGRAM = (sys.executable, "-m", f"{__package__}.unpickle")
_PART = ".part"  # ends the names of folders that are being made
_log = logging.getLogger(__name__)


def converted_cache() -> Path:
    """The folder of the copies: `converted` beside the text embeddings, so NERVE_CACHE says where."""
    return cache_folder() / "converted"


def copy_of(location: str, commit: str) -> Path:
    """Where the copy of a hub id's commit is, or will be."""
    return _repository(location) / "snapshots" / commit


def convert(
    folder: Path, names: Collection[str], pickles: Mapping[str, Sequence[str]], *, location: str, revision: str | None
) -> Path:
    """Make the copy of a model of the hub, and return its folder.

    folder: of the hub's cache, named after the commit. names: what the copy must hold. pickles: of which files the
    weights among them that are not in `folder` are made. Every file is made under another name and renamed when it is
    whole and compared, weights last, and processes wait for one another. Raises ModelError.
    """
    commit = folder.name
    copy, said = copy_of(location, commit), ", ".join(file for files in pickles.values() for file in files)
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with _locked(_repository(location)):
            for stale in _repository(location).glob(f"*{_PART}"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(suffix=_PART, dir=_repository(location)) as made:
                for name in sorted((name for name in names if not (copy / name).is_file()), key=lambda n: n in pickles):
                    part = Path(made) / name
                    part.parent.mkdir(parents=True, exist_ok=True)
                    if name in pickles:
                        _log.info("%s is published as a pickle: converting %s to safetensors", location, said)
                        _rewrite([folder / file for file in pickles[name]], part)
                    elif name.endswith(".safetensors"):
                        part.symlink_to((folder / name).absolute())
                    else:
                        shutil.copyfile(folder / name, part)
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    part.replace(copy / name)
            note_revision(location, commit, revision)
    except _NotConverted as error:
        raise ModelError(f"{location} cannot be used: it has no safetensors weights, and {error}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ModelError(
            f"{location} is published as a pickle, and its safetensors copy cannot be written into {converted_cache()} "
            f"({error.strerror or error}); make {'room there' if full else 'that folder writable'}, or name another "
            "folder (NERVE_CACHE)"
        ) from error
    return copy


def note_revision(location: str, commit: str, revision: str | None) -> None:
    """Remember which commit a revision means, as the hub's client does. Raises OSError."""
    if revision == commit:
        return
    ref = _repository(location) / "refs" / (revision or "main")
    if not ref.is_file() or ref.read_text() != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f"{ref.name}.{os.getpid()}{_PART}")
        part.write_text(commit)
        part.replace(ref)


def converted_bytes() -> int:
    """Size of all copies, without what they link to."""
    files = (path for path in converted_cache().rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def clear_converted() -> int:
    """Remove every copy; returns the bytes that this freed. Raises OSError."""
    size = converted_bytes()
    if converted_cache().exists():
        shutil.rmtree(converted_cache())
    return size


class _NotConverted(Exception):
    """Why pickles could not be converted; the text is a clause."""


def _repository(location: str) -> Path:
    return converted_cache() / f"models--{location.replace('/', '--')}"


def _rewrite(pickles: Sequence[Path], target: Path) -> None:
    """Run `unpickle` and wait for it. Raises _NotConverted."""
    # What may be crafted is opened where no token is, and nothing is imported from the current folder.
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        [*_PROGRAM, str(target), *map(str, pickles)],
        stdin=subprocess.PIPE,  # never written to: it ends that process where this one ends
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.read().decode(errors="replace").strip().splitlines()
        except BaseException:
            process.kill()
            raise
    last = said[-1] if said else ""
    try:
        result = json.loads(last)
    except ValueError:
        result = {"error": f"the process that converts it ended with {process.returncode} {last[:200]}".rstrip()}
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            result["error"] = f"the process that converts it was ended by {name}, as where memory or the disk is full"
    if result.get("full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "error" in result:
        raise _NotConverted(result["error"])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system takes back from a process that ends. Raises OSError."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
