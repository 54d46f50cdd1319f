"""CPUs and memory available to this process, what it does with freed memory, and the container it runs in."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

_CGROUP, _PROC_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# Files with limit and usage of a control group, and the entry of memory.stat for cached files: version 2 and 1
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_CFS = ("quota", "period")

_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_IMAGE_PATHS = {"apptainer": "APPTAINER_CONTAINER", "singularity": "SINGULARITY_CONTAINER"}
_MOUNTS = Path("/proc/self/mountinfo")

HAS_FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
"""Whether processes can be forked from one that has loaded the libraries: not on Windows."""

# Parameters of glibc's mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def count_cpus() -> int:
    """Return the number of CPUs within the process's affinity (Slurm, taskset) and the container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_cgroups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota, period = (quota, period) if period else (_read(folder / f"cpu.cfs_{name}_us") for name in _CFS)
        if quota.isdecimal() and period.isdecimal() and int(period):  # else unlimited: "max" or -1
            usable = min(usable, int(quota) // int(period))
    return max(1, usable)


def available_memory_gb() -> float:
    """Return the memory in GB that is free now, or less if the container or the job has a limit."""
    import psutil  # not needed for --help

    free: int = psutil.virtual_memory().available
    for folder in _own_cgroups("memory"):
        for limit_name, used_name, cache_name in _MEMORY_FILES:
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            if limit.isdecimal() and used.isdecimal():
                statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                # the system drops cached files when a program needs their memory
                free = min(free, int(limit) - int(used) + int(statistics.get(cache_name, 0)))
    return float(max(free, 0)) / 1e9


def end_with_parent() -> None:
    """Kill this process when the process that started it ends, in whatever way; a thread waits for that."""

    def end(sentinel: int) -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=end, args=(parent.sentinel,), daemon=True).start()


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed arrays in this process; does nothing with another C library.

    Networks allocate and free tens of MB all the time, and the system clears each page that it hands out again: a third
    of the CPU time of a segmentation in float32. Blocks of more than 32 MB are kept only if none is mapped separately.
    """
    import ctypes  # not needed for --help

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def describe_container() -> dict[str, str]:
    """Return ``Container`` of BIDS' ``GeneratedBy``: type, tag and, if known, URI; empty outside of its own image.

    The image sets ``BIDS_DGMSEG_IMAGE``, users may set ``BIDS_DGMSEG_IMAGE_URI``; Apptainer states the image's path.
    """
    if not (image := os.environ.get("BIDS_DGMSEG_IMAGE")):
        return {}
    kind = next((kind for kind, name in _IMAGE_PATHS.items() if name in os.environ), "")
    path = os.environ.get(_IMAGE_PATHS[kind], "") if kind else ""
    uri = os.environ.get("BIDS_DGMSEG_IMAGE_URI") or (Path(path).as_uri() if path.startswith("/") else path)
    kind = kind or os.environ.get("container") or "docker"
    return {"Type": kind, "Tag": image, **({"URI": uri} if uri else {})}


def relative_outside(path: Path, start: Path) -> str | None:
    """Return a path relative to a folder, in a container as it is outside; None if that is unknown.

    Inside, ``/data`` and ``/out`` are neighbours wherever they are on the host. Mount points tell where their folders
    are in their file systems, so the result is known if both are in the same one.
    """
    variables = ("BIDS_DGMSEG_IMAGE", *_IMAGE_PATHS.values())
    if not any(name in os.environ for name in variables) and not any(mark.exists() for mark in _CONTAINER_MARKS):
        return os.path.relpath(path, start)
    (device, target), (other, folder) = _locate(path), _locate(start)
    return os.path.relpath(target, folder) if device == other else None


def _locate(path: Path) -> tuple[str, Path]:
    """Return the device of a path and its place in the file system of the device (see proc(5), mountinfo)."""
    device, place, longest = "", path, -1
    for line in _read(_MOUNTS).splitlines():
        _, _, number, root, point, *_ = line.split(" ")
        root, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in (root, point))
        if path.is_relative_to(point) and len(point) >= longest:  # of several at one point, the last is visible
            device, place, longest = number, Path(root) / path.relative_to(point), len(point)
    return device, place


def _own_cgroups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups for ``cpu`` or ``memory`` and of their parents.

    Version 2 has one hierarchy, version 1 one per controller, also both at once. A container may see its own group as
    the root of the hierarchy, whatever its path is outside.
    """
    folders = []
    for line in _read(_PROC_CGROUP).splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            roots = {_CGROUP / controllers, _CGROUP / controller}
        else:
            roots = set() if controllers else {_CGROUP}
        paths = [root / group.lstrip("/") for root in sorted(roots)]
        folders += [folder for path in paths for folder in (path, *path.parents) if folder.is_relative_to(_CGROUP)]
    return folders or [_CGROUP]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


@contextmanager
def environment_variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or remove those whose value is None, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set_variables(values)
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
