"""CPUs and memory available to this process, and how it keeps freed memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

# Parameters of glibc's mallopt, and the largest block that it can keep
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_KEPT = 2**25


def count_cpus() -> int:
    """Return the number of CPUs within the process's affinity (Slurm, taskset) and the container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_cgroups():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            usable = min(usable, int(quota) // int(period))
    return max(1, usable)


def available_memory_gb() -> float:
    """Return the memory in GB that is free now, or less if the container has a limit."""
    free = _free_bytes()
    for folder in _own_cgroups():
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            free = min(free, int(limit) - int(used))
    return max(free, 0) / 1e9


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed arrays in this process; does nothing with another C library.

    Networks allocate and free tens of MB all the time, and the system clears each page that it hands out again.
    """
    import ctypes  # not needed for --help

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
    """Return the folders of this process's control group (version 2) and its parents."""
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
