"""How many processors and how much memory this process may use, and how it keeps what it has."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""

_LARGEST_KEPT = 2**25
"""Bytes of the largest block that glibc can keep."""


def count_cpus() -> int:
    """Count the processors that affinity (Slurm, taskset) and the container's quota leave."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_cgroups():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            usable = min(usable, int(quota) // int(period))
    return max(1, usable)


def available_memory_gb() -> float:
    """Tell the memory in GB that is free now, or less where the container has a limit."""
    free = _free_bytes()
    for folder in _own_cgroups():
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            free = min(free, int(limit) - int(used))
    return max(free, 0) / 1e9


def keep_freed_memory() -> None:
    """Let this process keep the memory of arrays that it frees; the system clears each page that it gives anew.

    Networks free and take tens of MB all the time. Nothing happens where the C library is not glibc.
    """
    import ctypes  # --help need not wait for it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def _free_bytes() -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_cgroups() -> list[Path]:
    """List the folders of this process's control group (version 2) and of those above it."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            own = _CGROUP / line.removeprefix("0::").lstrip("/")
            return [folder for folder in (own, *own.parents) if folder.is_relative_to(_CGROUP)]
    return [_CGROUP]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
