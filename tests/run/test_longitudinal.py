"""The sessions of a participant are labelled together with ``--longitudinal``."""

import json

import numpy as np
import pytest

from tests.conftest import coarse_chi, write_map

SCANS = ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1")


@pytest.fixture
def sessions(bids_dataset):
    return bids_dataset(*SCANS)


def read_json(out, scan, suffix):
    (path,) = out.rglob(f"{scan}_seg-*_{suffix}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_sessions_depend_on_each_other(sessions, tmp_path, run, capsys):
    out = tmp_path / "out"
    assert run(sessions, "--longitudinal") == 0
    assert "sub-02_ses-1: no map of another session; labelled without --longitudinal" in capsys.readouterr().err
    together = read_json(out, "sub-01_ses-2", "qc")["settings"]["longitudinal"]
    assert set(together) == {"sub-01_ses-1_Chimap.nii.gz", "sub-01_ses-2_Chimap.nii.gz"}
    assert min(together.values()) > 0.9  # the same map twice
    assert "longitudinal" not in read_json(out, "sub-02_ses-1", "qc")["settings"]
    about = read_json(out, "sub-01_ses-2", "dseg")
    (other,) = about["LabelledTogetherWith"]
    assert other.endswith("sub-01_ses-1_Chimap.nii.gz")
    assert about["Sources"] == [other.replace("ses-1", "ses-2")]
    assert "mid-space" in (out / "sub-01.html").read_text(encoding="utf-8")

    assert run(sessions, "--longitudinal", "--dry-run") == 0
    assert "up to date" in capsys.readouterr().out
    chi = coarse_chi()
    write_map(sessions, "sub-01_ses-1", chi.with_array(chi.array * np.float32(0.9)))
    assert run(sessions, "--longitudinal", "--dry-run") == 0
    printed = capsys.readouterr().out
    for scan, redone in zip(SCANS, (True, True, False), strict=True):
        assert (f"{scan}: would segment" in printed) == redone
    assert run(sessions, "--dry-run") == 0  # without the option, those of one session stay as they are
    assert "sub-02_ses-1: up to date" in capsys.readouterr().out
    # at the group level, the results of both sessions are out of date
    assert run(sessions, level="group") == 1
    assert "results of 2 of 3 scans out of date: sub-01_ses-1, sub-01_ses-2;" in capsys.readouterr().err


def test_session_of_somebody_else_fails_its_participant_only(sessions, run, capsys):
    chi = coarse_chi()
    write_map(sessions, "sub-01_ses-2", chi.with_array(-chi.array))
    assert run(sessions, "--longitudinal") == 1
    err = capsys.readouterr().err
    assert "2 of 3 scans failed: sub-01_ses-1, sub-01_ses-2;" in err
    assert "cannot be aligned with the other sessions" in err
    assert "Traceback" not in err
