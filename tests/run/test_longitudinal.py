"""The sessions of a participant are labelled together with ``--longitudinal``."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.nuclei import SESSION_COLUMNS as COLUMNS
from tests.conftest import coarse_chi, coarsen_sessions, contents, start_dataset, write_map
from tests.run.conftest import process
from tests.run.test_multi_echo_scans import write_echoes

SESSION_COLUMNS = set(COLUMNS)
SCANS = ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Folder with a dataset of three scans, ``ds``, and their results, ``out``."""
    root = tmp_path_factory.mktemp("labelled")
    start_dataset(root / "ds")
    for scan in SCANS:
        write_map(root / "ds", scan, coarse_chi())
    with pytest.MonkeyPatch.context() as patch:
        coarsen_sessions(patch)
        process(root, "--longitudinal")
    return root


@pytest.fixture
def sessions(labelled, tmp_path):
    """Copy of the dataset, with its results beside it."""
    shutil.copytree(labelled, tmp_path, dirs_exist_ok=True)
    return tmp_path / "ds"


def read_json(out, scan, suffix):
    (path,) = out.rglob(f"{scan}_seg-*_{suffix}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def read_stats(out, scan):
    (path,) = out.rglob(f"{scan}_seg-*_stats.tsv")
    return pd.read_csv(path, sep="\t", na_values="n/a")


def test_sessions_depend_on_each_other(sessions, tmp_path, run, capsys):
    out = tmp_path / "out"
    assert run(sessions, "--longitudinal", "--dry-run") == 0
    said = capsys.readouterr()
    assert "sub-02_ses-1: no map of another session; labelled without --longitudinal" in said.err
    assert "0 of 3 scan(s) would be segmented" in said.out
    together = read_json(out, "sub-01_ses-2", "qc")["settings"]["longitudinal"]
    assert set(together) == {"sub-01_ses-1_Chimap.nii.gz", "sub-01_ses-2_Chimap.nii.gz"}
    assert min(together.values()) > 0.9  # the same map twice
    assert "longitudinal" not in read_json(out, "sub-02_ses-1", "qc")["settings"]
    about = read_json(out, "sub-01_ses-2", "dseg")
    inputs = read_json(out, "sub-01_ses-2", "qc")["made_from"]["inputs"]
    other = inputs["sub-01_ses-1: map"]["file"]
    assert other.endswith("sub-01_ses-1_Chimap.nii.gz")
    assert about["Sources"] == [other.replace("ses-1", "ses-2")]
    assert "mid-space" in (out / "sub-01.html").read_text(encoding="utf-8")
    for scan in SCANS[:2]:
        stats = read_stats(out, scan)
        assert set(stats) >= SESSION_COLUMNS
        changes = stats.dropna(subset="volume_change_percent")
        assert {"DN_L", "RN_R", "PUT_L"} <= set(changes["abbreviation"])
        np.testing.assert_allclose(changes["volume_change_percent"], 0, atol=0.1)  # the same map twice
        ratio = changes["volume_longitudinal_mm3"] / changes["volume_pv_mm3"]
        np.testing.assert_allclose(ratio.median(), 1, atol=0.1)
    assert not set(read_stats(out, SCANS[2])) & SESSION_COLUMNS

    chi = coarse_chi()
    write_map(sessions, "sub-01_ses-1", chi.with_array(chi.array * np.float32(0.9)))
    assert run(sessions, "--longitudinal", "--dry-run") == 0
    printed = capsys.readouterr().out
    for scan, redone in zip(SCANS, (True, True, False), strict=True):
        assert (f"{scan}: would segment" in printed) == redone
    write_map(sessions, "sub-01_ses-3", chi)
    assert run(sessions, "--longitudinal", "--dry-run") == 0
    assert "sub-01_ses-2: would segment" in (printed := capsys.readouterr().out)
    assert "sub-01_ses-3: map is new" in printed
    shutil.rmtree(sessions / "sub-01" / "ses-3")
    assert run(sessions, "--dry-run") == 0  # without the option, those of one session stay as they are
    assert "sub-02_ses-1: up to date" in capsys.readouterr().out
    # at the group level, the results of both sessions are out of date
    assert run(sessions, level="group") == 1
    line = "2 of 3 scans out of date: sub-01_ses-1, sub-01_ses-2;"
    assert line in capsys.readouterr().err
    write_map(sessions, "sub-01_ses-1", chi)
    write_map(sessions, "sub-01_ses-3", chi)  # a session that was added
    assert run(sessions, "--dry-run", level="group") == 0
    assert line in capsys.readouterr().err
    assert run(sessions, "--dry-run", "--session-label", "1", "2", level="group") == 0
    assert "out of date" not in capsys.readouterr().err


def test_session_that_is_not_fetched_or_damaged(sessions, tmp_path, run, capsys):
    out = tmp_path / "out"
    options = ("--longitudinal", "--participant-label", "01")
    first = contents(out)
    sidecar = sessions / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_Chimap.json"
    image = sidecar.with_suffix(".nii.gz")
    image.rename(tmp_path / image.name)
    for path in (image, sidecar):  # as `datalad drop` leaves them
        path.unlink(missing_ok=True)
        path.symlink_to(f"../../../.git/annex/objects/x/{path.name}")
    capsys.readouterr()
    assert run(sessions, *options) == 0
    assert "all 2 scan(s) are up to date" in capsys.readouterr().out
    assert contents(out) == first

    for path in (image, sidecar):
        path.unlink()
    (tmp_path / image.name).rename(image)
    sidecar.write_text("{")
    line = (
        "not labelled, because sub-01_ses-2 of the same participant failed (sub-01_ses-2_Chimap.json: invalid JSON "
        "(line 1, column 2)); correct or remove it, or run without --longitudinal\n"
    )
    assert run(sessions, *options, "--dry-run") == 0
    assert f"sub-01_ses-1: would fail: {line}" in capsys.readouterr().out
    assert run(sessions, *options) == 1
    err = capsys.readouterr().err
    assert f"sub-01_ses-1: {line}" in err
    assert "no map of another session" not in err
    results = {name: content for name, content in contents(out).items() if name.endswith((".nii.gz", ".tsv"))}
    assert results == {name: content for name, content in first.items() if name in results}


@pytest.mark.slow
def test_echoes_are_reconstructed_once_and_labelled_together(tmp_path, run, capsys):
    ds, out = tmp_path / "ds", tmp_path / "out"
    start_dataset(ds)
    for session in ("ses-1", "ses-2"):
        write_echoes(ds, f"sub-01_{session}", folder=f"sub-01/{session}")
    assert run(ds, "--longitudinal") == 0
    printed = capsys.readouterr().out
    for step, times in (("reconstruct", 1), ("align", 1), ("segment", 1)):
        assert printed.count(f"sub-01_ses-1: {step}\n") == times
    settings = read_json(out, "sub-01_ses-1", "qc")["settings"]["longitudinal"]
    assert settings == {"sub-01_ses-1_Chimap.nii.gz": 1, "sub-01_ses-2_Chimap.nii.gz": 1}  # the same echoes twice
    assert "sub-01_ses-2: echo 1, phase" in read_json(out, "sub-01_ses-1", "qc")["made_from"]["inputs"]
    # a session that is missing is labelled with the map that has been reconstructed of the other one
    before = contents(out / "sub-01" / "ses-2")
    (record,) = (out / "sub-01" / "ses-2").rglob("*_qc.json")
    record.unlink()
    assert run(ds, "--longitudinal") == 0
    printed = capsys.readouterr().out
    assert "sub-01_ses-1: reconstruct" not in printed
    assert "sub-01_ses-2: done (1 of 1)" in printed
    assert contents(out / "sub-01" / "ses-2").keys() == before.keys()
    for name, content in contents(out / "sub-01" / "ses-2").items():
        assert name.endswith(".json") or content == before[name]
