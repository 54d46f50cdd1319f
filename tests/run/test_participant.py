from __future__ import annotations

import contextlib
import errno
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.console import RunProgress
from bids_dgmseg.interfaces.step import StepNode
from bids_dgmseg.io.files import temporary_name
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.run import runner
from tests.conftest import coarse_chi, contents
from tests.oracle import oracle_model


def erase(dataset: Path, scan: str) -> None:
    """Set a map to 0."""
    (path,) = dataset.rglob(f"{scan}_Chimap.nii.gz")
    nib.Nifti1Image(np.zeros_like(coarse_chi().array), coarse_chi().affine).to_filename(path)


@pytest.fixture
def special(monkeypatch) -> Callable[[str], str]:
    """Register a predictor of `tests.oracle` and return the name of its model."""

    def register(predictor: str) -> str:
        monkeypatch.setitem(MODELS, predictor, oracle_model(predictor, predictor))
        return predictor

    return register


@pytest.fixture
def crash(monkeypatch) -> Callable[..., None]:
    """Make a function, by default one of the step that draws, raise an exception."""

    def register(error: Exception, name: str = "bids_dgmseg.report.mosaic.draw_mosaic") -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(name, fail)

    return register


def test_nodes_of_finished_scans_are_freed(bids_dataset, run, monkeypatch):
    """Else the memory of a study grows by all of its workflows."""
    scans = ["sub-01", "sub-02", "sub-03"]
    dataset, follow = bids_dataset(*scans), runner.ScanRunner._follow
    nodes: dict[str, weakref.ref[StepNode]] = {}
    alive: list[list[str]] = []

    def record(self: runner.ScanRunner, node: StepNode, status: str) -> None:
        if status == "start":
            alive.append([name for name, reference in nodes.items() if reference() is not None])
            nodes[node.fullname] = weakref.ref(node)
        follow(self, node, status)

    monkeypatch.setattr(runner, "_BATCH", 1)
    monkeypatch.setattr(runner.ScanRunner, "_follow", record)
    for scan in scans:
        erase(dataset, scan)  # each fails in its first step
    assert run(dataset, "--nprocs", "2") == 1
    assert len(alive) == 3
    assert not any("sub-01" in name for name in alive[2])  # sub-02 may wait for the next collection


def test_failed_scan_does_not_stop_others_which_agree_with_a_serial_run(bids_dataset, run, tmp_path, capsys):
    dataset = bids_dataset("sub-01", "sub-02", "sub-03")
    erase(dataset, "sub-02")
    assert run(dataset, "--nprocs", "2") == 1
    out, err = capsys.readouterr()
    assert out.count("first page: ") == 1  # while others are processed
    assert "sub-02_Chimap.nii.gz: all voxels are 0; " in err
    assert "1 of 3 scan(s) failed: sub-02; see " in err
    assert "Traceback" not in err
    assert {path.name for path in (tmp_path / "out").glob("*.html")} == {"sub-01.html", "sub-02.html", "sub-03.html"}
    page = (tmp_path / "out" / "sub-02.html").read_text()
    assert "1 scan(s) failed" in page
    assert "sub-02_Chimap.nii.gz: all voxels are 0; " in page
    assert "1 scan(s) failed" not in (tmp_path / "out" / "sub-01.html").read_text()
    assert len(list((tmp_path / "out" / "logs").glob("*/sub-02/crash-*.txt"))) == 1
    assert run(dataset, "--participant-label", "01", "03", out=tmp_path / "serial") == 0
    serial, parallel = contents(tmp_path / "serial"), contents(tmp_path / "out")
    assert {name: parallel[name] for name in serial} == serial


@pytest.mark.timeout(120)
def test_killed_worker_fails_only_its_scan(bids_dataset, run, special, capsys, tmp_path):
    assert run(bids_dataset("sub-01", "sub-02"), "--model", special("Greedy"), "--nprocs", "2", "--mem-gb", "3") == 1
    err = capsys.readouterr().err
    assert "sub-01: segment was killed, probably out of memory; lower --nprocs or raise --mem-gb (now 3)\n" in err
    assert "2 of 2 scan(s) failed: sub-01, sub-02; see " in err
    assert not (tmp_path / "out" / "sub-01").exists()


@pytest.mark.parametrize("nprocs", ["1", "2"])
def test_lost_interrupt_ends_the_run_at_the_next_step(bids_dataset, run, monkeypatch, capsys, tmp_path, nprocs):
    def lose_signal(progress: RunProgress, scan: str, step: str) -> None:
        progress.info(f"{scan}: {step}")
        with contextlib.suppress(BaseException):  # as __del__ and callbacks of C code do
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunProgress, "start", lose_signal)
    assert run(bids_dataset("sub-01", "sub-02"), "--nprocs", nprocs, "--mem-gb", "1") == 130
    out, err = capsys.readouterr()
    assert out == "sub-01: localize\n"
    assert err == "bids_dgmseg: interrupted; rerun the same command (completed scans are kept)\n"
    assert list((tmp_path / "work").iterdir()) == []


def test_half_written_files_of_killed_processes_are_removed(bids_dataset, run, monkeypatch, tmp_path):
    half_written = temporary_name(tmp_path / "out" / "sub-01" / "anat" / "sub-01_seg-oracle_dseg.nii.gz")

    def interrupt(self: runner.ScanRunner, jobs: object) -> None:
        half_written.parent.mkdir(parents=True)
        half_written.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.ScanRunner, "execute", interrupt)
    assert run(bids_dataset("sub-01")) == 130
    assert not half_written.exists()


def test_page_forgets_the_failure_of_a_run_in_between(bids_dataset, run, crash, tmp_path):
    dataset, page = bids_dataset("sub-01"), tmp_path / "out" / "sub-01.html"
    assert run(dataset) == 0
    before = page.read_bytes()
    crash(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "bids_dgmseg.bids.derivatives.save_scan")
    assert run(dataset, "--force") == 1
    assert page.read_bytes() != before
    assert run(dataset) == 0
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("function", "step", "where"),
    [
        ("report.mosaic.draw_mosaic", "plot", "work; free some or choose another folder with -w"),
        ("bids.derivatives.save_scan", "save", "out; free some"),
    ],
)
def test_full_disk_is_one_line_with_the_folder(bids_dataset, run, crash, capsys, tmp_path, function, step, where):
    crash(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"bids_dgmseg.{function}")
    assert run(bids_dataset("sub-01")) == 1
    assert capsys.readouterr().err.startswith(f"sub-01: {step}: no space left in {tmp_path}/{where}\n")


def test_red_scans_are_named_at_the_end(bids_dataset, run, special, capsys, tmp_path):
    dataset, blind = bids_dataset("sub-01"), ["--model", special("Blind")]
    expected = "1 of 1 scan(s) rated red: sub-01 (nuclei with a red rating (100 %, above 25)); check before use\n"
    for _ in range(2):  # in the second run it is up to date
        assert run(dataset, *blind) == 0
        assert capsys.readouterr().err.endswith(expected)
    logs = [path.read_text() for path in (tmp_path / "out" / "logs").rglob("nipype.log")]
    assert sum(expected in text for text in logs) == 2


def test_dataset_is_validated_after_the_scans(bids_dataset, oracle, monkeypatch, capsys, tmp_path):
    validated = []

    def validate(root: Path, work_dir: Path) -> str:
        validated.append(root)
        return "1 error"

    monkeypatch.setattr("bids_dgmseg.run.participant.validate", validate)
    dataset = bids_dataset("sub-01")
    call = [str(dataset), str(tmp_path / "out"), "participant", "--model", oracle.name, "--nprocs", "1"]
    assert main([*call, "--dry-run"]) == 0
    assert main([*call, "--skip-bids-validation"]) == 0
    assert main(call) == 0  # nothing to do
    assert not validated
    capsys.readouterr()
    assert main([*call, "--force"]) == 0
    assert validated == [dataset]
    assert capsys.readouterr().err == "bids_dgmseg: warning: 1 error\n"


def test_stdout_has_one_line_per_step(bids_dataset, run, capsys, tmp_path):
    run(bids_dataset("sub-01_ses-1"))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "sub-01_ses-1: localize",
        "sub-01_ses-1: ppm (from sidecar), reference whole brain",
        "sub-01_ses-1: segment",
        "sub-01_ses-1: measure",
        "sub-01_ses-1: plot",
        "sub-01_ses-1: save",
        "sub-01_ses-1: done (1 of 1)",
        f"1 of 1 scan(s) done; see {tmp_path / 'out'}/sub-*.html",
    ]
    assert err == ""
