"""What the group level reads, and where it may write."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bids_dgmseg.bids.toplevel import IGNORED
from bids_dgmseg.cli import main
from tests.pipeline.test_group import add_scan, rows_of

OWN = {"Name": "x", "GeneratedBy": [{"Name": "bids_dgmseg"}]}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "ds"
    folder.mkdir()
    return folder


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


def test_tables_are_not_merged_into_the_raw_data(dataset, out, run, capsys):
    (dataset / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    (dataset / ".bidsignore").write_text("mine\n")
    before = files_of(dataset)
    assert run("--merge", out, to=dataset) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bids_dgmseg: error: ds: output directory inside the input's raw data")
    assert files_of(dataset) == before


def test_tables_are_not_merged_into_another_programs_dataset(tmp_path, out, run, capsys):
    other = tmp_path / "qsmxt"
    other.mkdir()
    (other / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "QSMxT"}]}')
    before = files_of(other)
    assert run("--merge", out, to=other) == 2
    assert "qsmxt: holds a dataset of QSMxT; choose a folder of its own" in capsys.readouterr().err
    assert files_of(other) == before


def test_lines_that_a_user_added_to_bidsignore_stay(tmp_path, out, run):
    pooled = tmp_path / "pooled"
    pooled.mkdir()
    (pooled / "dataset_description.json").write_text(json.dumps(OWN))
    (pooled / ".bidsignore").write_text("mine/**\n*.html\n")
    for _ in range(2):  # nothing is added twice
        assert run("--merge", out, to=pooled) == 0
        lines = (pooled / ".bidsignore").read_text().splitlines()
        assert lines == ["mine/**", "*.html", *(line for line in IGNORED if line != "*.html")]


@pytest.mark.parametrize("merged", [False, True])
def test_a_dry_run_counts_the_scans_and_writes_nothing(tmp_path, out, run, capsys, merged):
    before = files_of(tmp_path)
    to = tmp_path / "pooled" if merged else out
    assert run("--dry-run", *(["--merge", out] if merged else []), to=to) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: would gather 2 scans", f"2 scans would be gathered in {to}"]  # fmt: skip
    assert files_of(tmp_path) == before
    assert not (tmp_path / "pooled").exists()


def test_an_option_that_does_not_fit_leaves_a_new_folder_alone(tmp_path, out, run):
    assert run("--merge", out, "--control-filter", 'group == "HC"', to=tmp_path / "pooled") == 2
    assert not (tmp_path / "pooled").exists()


def test_a_folder_that_is_merged_through_a_link_too_counts_once(tmp_path, out, run, capsys):
    (tmp_path / "link").symlink_to(out)
    assert run("--merge", out, tmp_path / "link", to=tmp_path / "pooled") == 0
    assert len(rows_of(tmp_path / "pooled" / "group_volumes.tsv")) == 2
    assert "different persons" not in capsys.readouterr().err
    assert run("--merge", tmp_path / "link") == 0  # the output itself
    assert len(rows_of(out / "group_volumes.tsv")) == 2


def test_a_dataset_that_does_not_exist_ends_the_run_in_one_line(tmp_path, out, capsys):
    before = files_of(tmp_path)
    assert main([str(tmp_path / "gone"), str(out), "group"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"bids_dgmseg: error: {tmp_path}/gone: no such folder; give the root folder of the BIDS dataset"
    assert files_of(tmp_path) == before
