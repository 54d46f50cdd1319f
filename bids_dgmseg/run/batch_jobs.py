"""Jobs on a cluster: scripts with an array of tasks over the participants, then the group level.

The scripts, the list of participants and the logs of the tasks are in a folder ``logs/jobs-…`` of the output directory.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_text

JOBS = ("participant", "group", "submit")
"""The template is rendered once for each, to ``JOB.sh``."""

MEMORY_SHARE = 0.9
"""Of the memory of a task, the rest is for the system and the container."""

_PARTICIPANTS = "participants.txt"


@dataclass(frozen=True)
class Batch:
    """Resources and options of the jobs."""

    mem_mb: int
    time: str
    """``HH:MM:SS``."""
    cpus: int = 2
    account: str | None = None
    partition: str | None = None
    at_once: int | None = None
    """Tasks that run at the same time at most."""
    max_tasks: int = 1000
    """Number of tasks at most; with more participants, a task processes several."""
    container: Path | None = None
    """Image for Apptainer or Singularity."""
    device: str = "auto"
    work_dir: Path | None = None
    """Folder for intermediate files; None for the node's ``TMPDIR`` or ``/tmp``."""


@dataclass(frozen=True)
class Task:
    """A task of an earlier submission."""

    log: Path
    queued: bool
    """Whether it waits or runs."""

    def describe_end(self) -> str:
        """Return the last line of the log of a task that has ended."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")[-50:]
        except OSError:
            return f"its task has left no log ({self.log})"
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"its task ended: {last}; see {self.log}"


def find_tasks(output_dir: Path) -> dict[str, Task]:
    """Return the last submitted task of each participant.

    Raises
    ------
    InputError
        If Slurm does not answer.
    """
    folders = sorted((output_dir / "logs").glob("jobs-*"))
    queued = _queued_tasks([_job_name(folder) for folder in folders]) if folders else set()
    tasks: dict[str, Task] = {}
    for folder in folders:
        try:
            lines = (folder / _PARTICIPANTS).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for number, line in enumerate(lines, start=1):
            waits = (_job_name(folder), str(number)) in queued
            for label in line.split():
                if waits or not (label in tasks and tasks[label].queued):
                    tasks[label] = Task(folder / f"{number}.log", waits)
    return tasks


def _queued_tasks(names: Sequence[str]) -> set[tuple[str, str]]:
    """Return name and index of the array tasks that wait or run; none without Slurm."""
    if not shutil.which("squeue"):
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%j|%K", f"--name={','.join(names)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", "") or error)
        raise InputError(f"squeue: {reason}; try again when Slurm answers") from error
    return {(name, index) for name, _, index in (line.rpartition("|") for line in done.stdout.split())}


def _job_name(folder: Path) -> str:
    return f"dgmseg-{folder.name.rpartition('-')[2]}"


def write_scripts(
    output_dir: Path,
    bids_dir: Path,
    labels: Sequence[str],
    batch: Batch,
    *,
    options: Sequence[Sequence[str]] = (),
    group_options: Sequence[Sequence[str]] = (),
    read: Iterable[Path] = (),
    saved: Sequence[Path] = (),
    images: Iterable[Path] = (),
) -> Path:
    """Write ``participant.sh``, ``group.sh``, ``submit.sh`` and ``participants.txt``.

    Parameters
    ----------
    output_dir, bids_dir : path
    labels : sequence of str
        Participants without ``sub-``.
    batch : Batch
    options, group_options : sequence of sequence of str
        Options of the two levels, each with its values.
    read : iterable of path
        Files and folders of the options, to be mounted in a container.
    saved : sequence of path
        Files that the group level writes outside of the output directory; their folders are created.
    images : iterable of path
        Images of the scans; the targets of symbolic links are mounted, too.

    Returns
    -------
    path
        Folder of the scripts.

    Raises
    ------
    InputError
        If a path cannot be written in a script.
    """
    n_tasks = min(batch.max_tasks, len(labels))
    mark = uuid.uuid4().hex[:8]
    folder = output_dir / "logs" / f"jobs-{datetime.now():%Y%m%d-%H%M%S}-{mark}"
    for path in (folder, bids_dir):
        if not str(path).isprintable():
            raise InputError(f"{path}: line breaks and control characters in a path; rename the folder")
    runtime = shutil.which("apptainer") or shutil.which("singularity") or "apptainer"
    written = [output_dir, *([batch.work_dir] if batch.work_dir else []), *(path.parent for path in saved)]
    values: dict[str, Any] = {
        **asdict(batch),
        "name": _job_name(folder),
        # the same for all submissions, so that only one of them runs at a time
        "group_name": f"group-{hashlib.sha256(os.fsencode(output_dir.resolve())).hexdigest()[:8]}",
        "folder": str(folder),
        "bids_dir": str(bids_dir),
        "output_dir": str(output_dir),
        "n_tasks": n_tasks,
        "mem_gb": f"{MEMORY_SHARE * batch.mem_mb * 2**20 / 1e9:.1f}",
        "python": sys.executable,
        "runtime": runtime,
        "mounts": find_mounts([bids_dir, *read], written, images) if batch.container else [],
    }
    scripts = _render({job: {**values, "job": job} for job in JOBS}, options, group_options)
    for path in (folder, *(path.parent for path in saved)):
        path.mkdir(parents=True, exist_ok=True)
    tasks = [" ".join(labels[start::n_tasks]) for start in range(n_tasks)]
    write_text("\n".join(tasks), folder / _PARTICIPANTS)
    for job, text in scripts.items():
        write_text(text, folder / f"{job}.sh").chmod(0o755)
    return folder


def _render(
    values: dict[str, dict[str, Any]], options: Sequence[Sequence[str]], group_options: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Render the script of each job."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bids_dgmseg", "data/jobs"),
        undefined=StrictUndefined,
        finalize=_quote,
        keep_trailing_newline=True,
        autoescape=False,  # shell scripts, in which finalize quotes every value
    )
    jobs = {"participant": options, "group": group_options, "submit": ()}
    template = environment.get_template("slurm.sh")
    return {job: template.render(own, options=jobs[job]) for job, own in values.items()}


def _quote(value: Any) -> str:
    """Quote a value of a template, or the words of a list, for the shell.

    >>> print(_quote("my data"), _quote(["--measures", "mean_ppm"]), _quote(2))
    'my data' --measures mean_ppm 2
    """
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else shlex.quote(str(value))


def submit_scripts(folder: Path) -> str:
    """Run ``submit.sh`` and return what it prints; `InputError` if it fails."""
    done = subprocess.run(["bash", str(folder / "submit.sh")], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise InputError(f"{folder}/submit.sh: {reason}; correct the options, or the script and run it")
    return done.stdout.strip()


def find_mounts(read: Iterable[Path], written: Iterable[Path], images: Iterable[Path] = ()) -> list[str]:
    """Return the values of ``--mount``, with which Apptainer shows paths in a container as they are outside.

    Symbolic links are mounted under their own path and their target's, unless a parent is already mounted. Of
    `images` that are links, the folders with their targets are mounted. Only what is `written` is writable.
    """
    mounts: dict[Path, bool] = {}

    def add(path: Path, writable: bool) -> None:
        for place in follow_links(path):
            above = max(
                (one for one in mounts if place.is_relative_to(one)), key=lambda one: len(one.parts), default=None
            )
            if above is not None and (mounts[above] or not writable):
                continue
            if above is None or above.resolve() / place.relative_to(above) == place.resolve():
                mounts[place] = writable

    for path in read:
        add(path, False)
    places = (place for image in images for place in follow_links(image))
    outside = sorted({place.parent for place in places if not any(place.is_relative_to(one) for one in mounts)})
    for _, folders in groupby(outside, lambda folder: folder.parts[:3]):
        add(Path(os.path.commonpath(list(folders))), False)
    for path in written:
        add(path, True)
    fields = [["type=bind", f"src={one}", f"dst={one}", *([] if mounts[one] else ["ro"])] for one in mounts]
    return [",".join(map(_csv_field, several)) for several in fields]


def _csv_field(text: str) -> str:
    """Quote a field of ``--mount``, which is read as CSV."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"') else text


def follow_links(path: Path) -> list[Path]:
    """Return a path and where its symbolic links lead, one after the other, up to the real path."""
    places = [path]
    for _ in range(40):  # as many as Linux follows
        here = places[-1]
        link = next((part for part in (*reversed(here.parents), here) if part.is_symlink()), None)
        if link is None:
            break
        target = os.path.normpath(link.parent / link.readlink())
        places.append(Path(target) / here.relative_to(link))
    return places
