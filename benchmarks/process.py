"""Memory of this process, as the system reports it."""

from __future__ import annotations

from pathlib import Path


def status_mb(name: str) -> float:
    """A line of /proc/self/status: VmRSS, resident now, or VmHWM, its peak. getrusage's may be another program's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))
