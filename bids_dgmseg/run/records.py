"""Records of failed scans in ``logs/failed``, for the pages of later runs."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path

from bids_dgmseg.bids.scan_results import with_scan
from bids_dgmseg.io.files import read_optional_json, write_json


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
