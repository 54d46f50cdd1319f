"""``dgmseg slurm`` and ``dgmseg status``: jobs on a cluster, and the state of an output directory."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

from bids_dgmseg.cli.bids_app import read_config
from bids_dgmseg.cli.bids_app_options import GROUP_ONLY, OPTIONS
from bids_dgmseg.cli.options import Verb, absolute_path, add_options, option, positive_int
from bids_dgmseg.errors import FAILED, OK, InputError, count, for_terminal

_NOT_PASSED = ("--nprocs", "--mem-gb", "--skip-bids-validation", "--dry-run")
"""Options of the app that the scripts set themselves, or that have no place in a job."""

_AT_BOTH_LEVELS = ("--session-label",)
"""Other than participants: the group level reads the results of all."""

_WRITTEN = ("harmonization_save", "norms_save")
"""Files that the group level writes."""

_NOT_READ = ("work_dir", "container", *_WRITTEN)
"""Paths among the arguments that need no mount, or another one."""

APP_OPTIONS = [one for options in OPTIONS.values() for one in options if one.names[0] not in _NOT_PASSED]

_MEMORY_UNITS = {"": 1, "M": 1, "G": 2**10, "T": 2**20}


def memory_mb(text: str) -> int:
    """Return a memory size as Slurm writes it in MB.

    >>> memory_mb("8G"), memory_mb("8000")
    (8192, 8000)
    """
    match = re.fullmatch(r"([1-9]\d{0,7})([MGT]?)B?", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a memory size such as 8G or 8000M")
    return int(match[1]) * _MEMORY_UNITS[match[2]]


def time_limit(text: str) -> str:
    """Return a time limit as Slurm writes it (minutes, ``MM:SS``, ``HH:MM:SS``, ``D-HH[:MM[:SS]]``) as ``HH:MM:SS``.

    >>> time_limit("90"), time_limit("2:00:00"), time_limit("1-12")
    ('01:30:00', '02:00:00', '36:00:00')
    """
    match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,5})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time limit such as 2:00:00 or 1-12:00:00")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]  # minutes, or minutes and seconds
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise argparse.ArgumentTypeError(f"{text!r} is zero; set a time limit such as 2:00:00")
    return f"{total // 3600:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def cluster_name(text: str) -> str:
    """Return the name of an account or partition, or several with commas."""
    if not re.fullmatch(r"[\w.@+,-]+", text, flags=re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name (letters, digits and . _ - + @)")
    return text


def spell_options(args: argparse.Namespace) -> list[list[str]]:
    """Return the options of the app that were given, each with its values, as they are written on a command line."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, APP_OPTIONS)
    words = []
    for action in parser._actions:
        value, name = getattr(args, action.dest), action.option_strings[-1]
        if value == action.default:
            continue
        if action.nargs == 0:
            words.append([name])
        elif isinstance(value, list):
            words.append([name, *map(str, value)])
        else:
            words.append([f"{name}={value}"])  # a value may start with a hyphen
    return words


def write_jobs(args: argparse.Namespace) -> int:
    """Write the scripts for the participants that need processing, and submit them if asked to."""
    if args.container and not args.container.exists():
        raise InputError(f"{args.container}: no such image; check --container")
    if args.submit and not shutil.which("sbatch"):
        raise InputError("--submit: sbatch not found; run on a login node of the cluster, or omit --submit")
    given = {words[0].partition("=")[0]: words for words in spell_options(args)}
    chosen = given.pop("--participant-label", [])
    at_group = [given.pop(name) for name in list(given) if name in GROUP_ONLY]
    # for both levels; norms are of one model
    shared = [*_AT_BOTH_LEVELS, *(("--norms", "--model") if "--norms" in given else ())]
    at_group += [given[name] for name in shared if name in given]
    folders = [str(args.bids), str(args.out)]
    read_config([*folders, "group", *chain(*at_group)])  # rejects what the job would reject
    config = read_config([*folders, "participant", *chain(chosen, *given.values())])
    given.pop("--work-dir", None)  # each task creates its own folder in it

    from bids_dgmseg.io.locks import wait_for_lock
    from bids_dgmseg.run.batch_jobs import Batch, submit_scripts, write_scripts
    from bids_dgmseg.run.folders import check_folders
    from bids_dgmseg.run.status import find_unqueued, record_run

    check_folders(config)  # before the lock is written into the output directory
    with wait_for_lock(args.out / "logs" / "jobs.lock"):  # two calls at once would submit everything twice
        plan, labels = find_unqueued(config)
        for warning in plan.warnings:
            print(f"dgmseg slurm: warning: {for_terminal(warning)}", file=sys.stderr)
        if not labels:
            print("nothing to submit: all participants are done or in the queue (`dgmseg status` shows which)")
            return OK
        folder = write_scripts(
            args.out,
            args.bids,
            labels,
            Batch(**{field.name: getattr(args, field.name) for field in fields(Batch)}),
            options=list(given.values()),
            group_options=at_group,
            read=_list_paths(args),
            saved=[path for name in _WRITTEN if (path := getattr(args, name))],
            images=[path for scan in plan.scans for path in scan.files]
            + [path for job in plan.jobs for path in job.files],
        )
        record_run(config)
        print(f"{count(len(labels), 'participant')} to process; scripts and logs in {folder}")
        if args.submit:
            print(submit_scripts(folder))
        else:
            print(f"next: edit the scripts if necessary, then run {shlex.quote(str(folder / 'submit.sh'))}")
    return OK


def _list_paths(args: argparse.Namespace) -> list[Path]:
    """Return the files and folders that the app reads, by its options."""
    values = [getattr(args, action) for action in vars(args) if action not in ("bids", "out", *_NOT_READ)]
    several = (value if isinstance(value, list) else [value] for value in values)
    return [path for path in chain(*several) if isinstance(path, Path)]


def show_status(args: argparse.Namespace) -> int:
    """Print the state of each participant; the exit code is 1 unless all are done."""
    from bids_dgmseg.run.status import DONE, STATES, ScanState, find_states, read_last_run

    by_participant: dict[str, list[ScanState]] = {}
    for scan in find_states(read_last_run(args.out, args.bids_dir)):
        by_participant.setdefault(scan.participant, []).append(scan)
    worst = {label: max((scan.state for scan in scans), key=STATES.index) for label, scans in by_participant.items()}
    totals = {state: list(worst.values()).count(state) for state in STATES}
    if args.json:
        rows = [
            {"participant": label, "state": worst[label], "scans": [asdict(scan) for scan in scans]}
            for label, scans in by_participant.items()
        ]
        print(json.dumps({"totals": totals, "participants": rows}, indent=2))
    else:
        width = max(len(label) for label in worst) + len("sub-")
        for label, scans in by_participant.items():
            for scan in [scan for scan in scans if scan.state != DONE] or scans[:1]:
                where = f"{scan.scan}: " if len(scans) > 1 and scan.state != DONE else ""
                print(f"{f'sub-{label}':{width}}  {scan.state:11}  {for_terminal(where + scan.reason)}".rstrip())
        print(f"{count(len(worst), 'participant')}: {', '.join(f'{totals[state]} {state}' for state in STATES)}")
    return OK if totals[DONE] == len(worst) else FAILED


VERBS = (
    Verb(
        "slurm",
        "write, and submit, scripts that run bids_dgmseg on a Slurm cluster: one task per participant, then the "
        "group level; only participants that are not done and not in the queue",
        write_jobs,
        [
            option("BIDS", "root folder of the BIDS dataset", absolute_path),
            option("OUT", "folder for the results", absolute_path),
            option("--account NAME", "account to charge", cluster_name),
            option("--partition NAME", "partition, or several separated by commas", cluster_name),
            option("--mem SIZE", "memory per task (default: 8G)", memory_mb, dest="mem_mb", default=8192),
            option("--time LIMIT", "time limit per task (default: %(default)s)", time_limit, default="02:00:00"),
            option("--cpus N", "CPUs per task (default: %(default)s)", positive_int, default=1),
            option("--at-once N", "number of tasks that run at the same time (default: no limit)", positive_int),
            option(
                "--max-tasks N",
                "number of tasks; with more participants, a task processes several (default: %(default)s)",
                positive_int,
                default=1000,
            ),
            option(
                "--container IMAGE", "image for Apptainer or Singularity (default: this installation)", absolute_path
            ),
            option("--submit", "submit the scripts (default: only write them)"),
            *APP_OPTIONS,
        ],
    ),
    Verb(
        "status",
        "show which participants of an output directory are done, missing, out of date or failed, and why",
        show_status,
        [
            option("OUT", "output directory of the participant level", absolute_path),
            option("--bids-dir FOLDER", "the input dataset (default: that of the last run)", absolute_path),
            option("--json", "print JSON, with one entry per participant"),
        ],
    ),
)
