import json
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main
from bids_dgmseg.config import RunConfig, RunControl, Selection
from bids_dgmseg.run.status import read_last_run, record_run
from tests.conftest import coarse_chi


def status(out, capsys, *options: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Exit code, and state and reason of the scans by participant."""
    capsys.readouterr()
    code = main(["status", str(out), "--json", *options])
    rows = json.loads(capsys.readouterr().out)["participants"]
    return code, {row["participant"]: [(scan["state"], scan["reason"]) for scan in row["scans"]] for row in rows}


def test_each_state_has_its_reason(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01", "sub-02", "sub-03_ses-1", "sub-03_ses-2", "sub-04"), tmp_path / "out"
    broken, changed = (next(dataset.rglob(f"{name}*_Chimap.nii.gz")) for name in ("sub-02", "sub-04"))
    good = broken.read_bytes()
    broken.write_bytes(good[:500])
    assert run(dataset, "--participant-label", "01", "02", "04") == 1
    nib.Nifti1Image(np.zeros(coarse_chi().shape), coarse_chi().affine).to_filename(changed)
    code, states = status(out, capsys)
    assert code == 1
    assert states["01"] == [("done", "")]
    ((state, reason),) = states["02"]
    assert (state, reason[:31]) == ("failed", "sub-02_Chimap.nii.gz: the data ")
    assert states["03"] == [("missing", ""), ("missing", "")]
    assert states["04"] == [("out of date", "its images have changed")]

    broken.write_bytes(good)
    changed.write_bytes(good)
    assert run(dataset) == 0
    assert status(out, capsys) == (
        0,
        {"01": [("done", "")], "02": [("done", "")], "03": [("done", "")] * 2, "04": [("done", "")]},
    )


def test_table_has_a_line_per_participant(bids_dataset, run, tmp_path, capsys):
    dataset = bids_dataset("sub-01", "sub-02_ses-1", "sub-02_ses-2")
    next(dataset.rglob("sub-02_ses-2_Chimap.nii.gz")).write_bytes(b"\x1b[2J")
    assert run(dataset) == 1
    capsys.readouterr()
    assert main(["status", str(tmp_path / "out")]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "sub-01  done"
    assert second.startswith("sub-02  failed       sub-02_ses-2: sub-02_ses-2_Chimap.nii.gz: ")
    assert last == "2 participants: 1 done, 0 missing, 0 out of date, 1 failed"


def test_results_out_of_date(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01"), tmp_path / "out"
    assert run(dataset) == 0
    record, (sidecar,) = out / "logs" / "last_run.json", out.rglob("sub-01_seg-oracle_dseg.json")
    options, results = record.read_text(), json.loads(sidecar.read_text())

    def reason() -> str:
        code, states = status(out, capsys)
        ((state, why),) = states["01"]
        assert (code, state) == (1, "out of date")
        return why

    record.write_text(options.replace('"kind": "none"', '"kind": "whole-brain"'))
    assert reason() == "its metadata or the options have changed, or a file is damaged"
    record.write_text(options)
    sidecar.write_text(json.dumps({**results, "ProgramVersion": "0.0.1", "Fingerprint": "x"}))
    assert reason().startswith("made by version 0.0.1, this is ")
    sidecar.write_text(json.dumps({**results, "FailedSince": "no time"}))
    assert reason() == "a later run failed (no time)"
    sidecar.write_text(json.dumps(results))
    (out / "sub-01" / "anat" / "sub-01_seg-oracle_probseg.nii.gz").unlink()
    assert reason() == "sub-01/anat/sub-01_seg-oracle_probseg.nii.gz missing"


def test_failures_of_scans_that_were_not_tried_again_stay(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01", "sub-02"), tmp_path / "out"
    for path in dataset.rglob("*_Chimap.nii.gz"):
        path.write_bytes(path.read_bytes()[:500])
    assert run(dataset) == 1
    first = status(out, capsys)
    assert [scans[0][0] for scans in first[1].values()] == ["failed", "failed"]
    assert run(dataset, "--stop-on-first-crash") == 1
    assert status(out, capsys) == first


def test_page_keeps_failures_of_scans_that_were_not_tried_again(bids_dataset, run, tmp_path):
    dataset, page = bids_dataset("sub-01_ses-1", "sub-01_ses-2", "sub-01_ses-3"), tmp_path / "out" / "sub-01.html"
    maps = sorted(dataset.rglob("*_Chimap.nii.gz"))
    for path in maps:
        path.write_bytes(path.read_bytes()[:500])
    lines = [f"{path.name}: the data are damaged" for path in maps]
    assert run(dataset) == 1
    assert all(line in page.read_text() for line in lines)
    assert run(dataset, "--stop-on-first-crash") == 1  # ses-2 is not tried
    assert all(line in page.read_text() for line in lines)
    assert run(dataset, "--session-label", "1") == 1
    assert all(line in page.read_text() for line in lines)
    shutil.rmtree(maps[2].parents[1])  # what is not in the dataset any more does not matter
    assert run(dataset) == 1
    assert [line in page.read_text() for line in lines] == [True, True, False]


def test_moved_dataset_is_found_or_given(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01"), tmp_path / "out"
    assert run(dataset) == 0
    moved = dataset.rename(tmp_path / "moved")
    assert main(["status", str(out)]) == 2
    assert (
        f"{dataset}: input dataset of the last run not found; pass its folder with --bids-dir"
        in capsys.readouterr().err
    )
    assert status(out, capsys, "--bids-dir", str(moved))[0] == 0


def test_record_has_any_path(tmp_path):
    out = tmp_path / os.fsdecode(b"r\xe9sultats \xc3\xa9")  # Latin-1 and UTF-8
    config = RunConfig(bids_dir=tmp_path, output_dir=out, selection=Selection(chi=("desc-cosmos",), derivatives=(out,)))
    record_run(config)
    assert read_last_run(out) == replace(config, control=RunControl(dry_run=True))


@pytest.mark.parametrize("record", [None, "{", '{"bids_dir": 1}', '{"bids_dir": "x"}'])
def test_folder_without_a_record_is_rejected(tmp_path, capsys, record):
    if record is not None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "last_run.json").write_text(record)
    assert main(["status", str(tmp_path)]) == 2
    assert "last_run.json" in capsys.readouterr().err
