"""State of the scans of an output directory: done, failed, missing or out of date.

Each run records its options, and why a scan failed, in ``logs/``.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec

from bids_dgmseg import __version__
from bids_dgmseg.bids.dataset import source_datasets
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.qc_record import with_scan
from bids_dgmseg.bids.resume import explain_outdated, find_changed
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig, RunControl
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import check_file_type, read_optional_json, url_to_path, write_json, write_text
from bids_dgmseg.run.batch_jobs import Task, find_tasks
from bids_dgmseg.run.plan import Plan, plan_run

DONE, MISSING, OUTDATED, FAILED = STATES = ("done", "missing", "out of date", "failed")
"""Of a participant, the last that one of the scans has."""

_LAST_RUN = Path("logs", "last_run.json")


@dataclass(frozen=True)
class ScanState:
    """State of a scan."""

    scan: str
    participant: str
    state: str
    """One of `STATES`."""
    reason: str = ""
    """Why it is not done."""


def record_run(config: RunConfig) -> None:
    """Record the options of a run, except the participants."""
    everyone = replace(config, selection=replace(config.selection, participants=()))
    content = msgspec.to_builtins(everyone, enc_hook=str)
    write_text(json.dumps(content, indent=2), config.output_dir / _LAST_RUN)  # msgspec needs paths that are UTF-8


def read_last_run(output_dir: Path, bids_dir: Path | None = None) -> RunConfig:
    """Return the options of the last run in an output directory.

    Parameters
    ----------
    output_dir : path
    bids_dir : path, optional
        The input dataset, if it is not where it was then.

    Raises
    ------
    InputError
        If the record or the dataset is missing.
    """
    path = output_dir / _LAST_RUN
    check_file_type(path)
    try:
        config = msgspec.convert(json.loads(path.read_bytes()), RunConfig, dec_hook=lambda kind, value: kind(value))
    except FileNotFoundError:
        raise InputError(f"{output_dir}: no {_LAST_RUN}; pass an output directory of the participant level") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it and run the participant level again") from error
    linked = [url_to_path(url, output_dir).resolve() for url in source_datasets(output_dir)[:1]]
    candidates = [bids_dir] if bids_dir else [config.bids_dir, *linked]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        raise InputError(f"{candidates[0]}: input dataset of the last run not found; pass its folder with `bids_dir`")
    return replace(config, bids_dir=found, output_dir=output_dir, control=RunControl(dry_run=True))


def _failure_path(output_dir: Path, scan: str, model: str) -> Path:
    return output_dir / "logs" / "failed" / f"{scan}_seg-{model}.json"


def record_failure(output_dir: Path, scan: str, model: str, reason: str) -> None:
    """Record why a scan failed."""
    record = {"Scan": scan, "Model": model, "Reason": reason, "Time": datetime.now().isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # a full disk may be the reason
        write_json(record, _failure_path(output_dir, scan, model))


def has_failure(output_dir: Path, scan: str, model: str) -> bool:
    """Return whether the last run that processed a scan failed, as far as it could record that."""
    return _failure_path(output_dir, scan, model).is_file()


def read_failures(output_dir: Path, participant: str) -> dict[tuple[str, str], str]:
    """Return the recorded failures of a participant: scan and model → reason, with the name of the scan."""
    folder = _failure_path(output_dir, "", "").parent
    records = map(read_optional_json, sorted(folder.glob(f"sub-{participant}_*.json")))
    return {
        (str(one["Scan"]), str(one["Model"])): with_scan(str(one["Scan"]), str(one["Reason"]))
        for one in records
        if {"Scan", "Model", "Reason"} <= one.keys()
    }


def forget_failure(output_dir: Path, scan: str, model: str) -> None:
    """Remove the record of an earlier failure."""
    with contextlib.suppress(OSError):
        _failure_path(output_dir, scan, model).unlink()


def find_states(config: RunConfig) -> list[ScanState]:
    """Return the state of each scan that a run would consider.

    Images are read only if they are newer than their results.

    Raises
    ------
    InputError
        If the dataset or an option cannot be used.
    """
    plan = plan_run(config, quick=True)
    tasks = find_tasks(config.output_dir)
    to_do = {job.scan.name for job in plan.jobs}
    states = []
    for scan in plan.scans:
        state, reason = DONE, ""
        if scan.name in to_do:
            state, reason = _explain(config.output_dir, scan, plan.model.name, tasks.get(scan.participant))
        states.append(ScanState(scan.name, scan.participant, state, reason))
    return states


def _explain(output_dir: Path, scan: Scan, model: str, task: Task | None) -> tuple[str, str]:
    """Return the state of a scan that is not done, and why."""
    results = output_path(output_dir, scan, "dseg", ".json", seg=model)
    sidecar = read_optional_json(results)
    queued = "in the queue" if task and task.queued else ""
    failure = read_optional_json(_failure_path(output_dir, scan.name, model)).get("Reason")
    if failure:
        return FAILED, "; ".join(filter(None, (str(failure), queued)))
    if not sidecar:
        return MISSING, queued or scan.problem or (task.describe_end() if task else "")
    written = sidecar.get("OutputFiles")
    lost = [name for name in written if not (output_dir / str(name)).is_file()] if isinstance(written, list) else []
    if any(path.startswith(results.name.removesuffix("dseg.json")) for path in find_changed(output_dir, scan)):
        reason = "its images have changed"
    elif lost:
        reason = f"{list_some(lost, most=1)} missing"
    elif sidecar.get("ProgramVersion") != __version__:
        reason = f"made by version {sidecar.get('ProgramVersion')}, this is {__version__}"
    else:
        reason = explain_outdated(results) or "its metadata or the options have changed, or a file is damaged"
    return OUTDATED, "; ".join(filter(None, (reason, queued)))


def find_unqueued(config: RunConfig) -> tuple[Plan, list[str]]:
    """Plan a run and list the participants that it would process and that no task in the queue will.

    Raises
    ------
    InputError
        If the run cannot start or Slurm does not answer.
    """
    # the nodes have the GPU
    resources, control = replace(config.resources, device="auto"), replace(config.control, dry_run=True)
    plan = plan_run(replace(config, resources=resources, control=control))
    tasks = find_tasks(config.output_dir)
    labels = dict.fromkeys(job.scan.participant for job in plan.jobs)
    return plan, [label for label in labels if not (label in tasks and tasks[label].queued)]
