"""What a user may not read or write, tried by any user, root too."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable

CAPABILITY_VERSION_3 = 0x20080522


def without_privileges(job: Callable[[], None]) -> None:
    """Run `job` in a process to which the permissions of files apply; fails where `job` does.

    A user's own files may be shut to the user. Root's capabilities, by which no file is, are given up (capset(2)).
    """

    def run() -> None:
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
        job()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(300)
    assert process.exitcode == 0
