"""Folders that the group level reads, and where it may write."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.io.files import write_tsv
from tests.run.test_group import add_scan, rows_of

OWN = {"Name": "x", "GeneratedBy": [{"Name": "bids_dgmseg"}]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Results of two participants."""
    for label in ("01", "02"):
        add_scan(tmp_path / "out", f"sub-{label}", {"DN_L": (700.0, 0.1)})
    return tmp_path / "out"


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda *options, to=tmp_path / "out": main([str(dataset), str(to), "group", *map(str, options)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("merged", [False, True])
def test_dry_run_writes_nothing(tmp_path, out, run, capsys, merged):
    before = files_of(tmp_path)
    to = tmp_path / "pooled" if merged else out
    assert run("--dry-run", *(["--merge", out] if merged else []), to=to) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: 2 scan(s) would be used",
        f"group tables of 2 scan(s) would be written to {to}",
    ]
    assert files_of(tmp_path) == before
    assert not (tmp_path / "pooled").exists()


@pytest.fixture
def study(out: Path, participants: Callable[..., None]) -> Path:
    """Four scans more: sub-03 in two sessions, once with a second model, and sub-3."""
    for session in ("1", "2"):
        add_scan(out, f"sub-03_ses-{session}", {"DN_L": (700.0, 0.1)})
    add_scan(out, "sub-3", {"DN_L": (700.0, 0.1)})
    table = out / "sub-03" / "ses-1" / "anat" / "sub-03_ses-1_seg-dgm16_stats.tsv"
    table.with_name("sub-03_ses-1_seg-dcnnet_stats.tsv").write_bytes(table.read_bytes())
    participants("participant_id age", "sub-01 30", "sub-02 40", "sub-03 50", "sub-04 9")
    return out


@pytest.mark.parametrize(
    ("options", "scans"),
    [
        (("--participant-label", "sub-01", "02"), ["01", "02"]),
        (("--session-label", "ses-2"), ["03 2"]),
        (("--participant-label", "03", "--model", "default"), ["03 1", "03 2"]),
        ((), ["01", "02", "03 1", "03 1", "03 2", "3"]),
    ],
)
def test_scans_are_selected_by_label_and_model(study, run, capsys, options, scans):
    assert run(*options) == 0
    rows = rows_of(study / "group" / "group_volumes.tsv")
    kept = [
        f"{row['participant_id']} {row['session_id']}".replace("sub-", "").replace(" n/a", "").replace("ses-", "")
        for row in rows
    ]
    assert kept == scans
    selected = json.loads((study / "group" / "group_volumes.json").read_text())["Settings"].get("Selected")
    assert bool(selected) is bool(options)
    said = capsys.readouterr().err
    assert ("sub-04" in said) is not bool(options)  # who was not selected is not missed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--participant-label", "07"),
            "out: no results of sub-07; check --participant-label (found sub-01, sub-02, sub-03, sub-3)",
        ),
        (
            ("--participant-label", "01", "--session-label", "1"),
            "out: no scan matches all of --participant-label, --session-label; check them",
        ),
    ],
)
def test_selection_without_scans_is_an_error(study, run, capsys, options, message):
    assert run(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bids_dgmseg: error: {message}")
    assert not list(study.glob("group*"))


def test_failed_table_leaves_the_earlier_state(out, run, monkeypatch, capsys):
    assert run() == 0
    before = files_of(out)
    add_scan(out, "sub-03", {"DN_L": (700.0, 0.1)})
    added = {name: content for name, content in files_of(out).items() if "sub-03" in name}

    def fill_disk(table, path, **options):
        if path.name == "group_outliers.tsv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_tsv(table, path, **options)

    monkeypatch.setattr("bids_dgmseg.study.study.write_tsv", fill_disk)
    assert run() == 1
    assert "group_outliers.tsv: No space left on device; check the path" in capsys.readouterr().err
    assert files_of(out) == before | added
