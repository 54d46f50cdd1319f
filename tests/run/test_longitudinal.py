"""The sessions of a participant are labelled together with ``--longitudinal``."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.config import RunConfig, SegmentationOptions, Selection
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import hash_files
from bids_dgmseg.measurement.columns import SESSION_COLUMNS as COLUMNS
from bids_dgmseg.run.group import plan_group
from bids_dgmseg.run.plan import plan_run
from bids_dgmseg.run.scan_workflows import build_sessions_workflow
from bids_dgmseg.workflows.steps import MEMORY_GB
from tests.conftest import coarse_chi, contents, start_dataset, write_map
from tests.run.test_multi_echo_scans import write_echoes

SESSION_COLUMNS = set(COLUMNS)
SCANS = ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1")


@pytest.fixture
def sessions(bids_dataset):
    return bids_dataset(*SCANS)


def read_json(out, scan, suffix):
    (path,) = out.rglob(f"{scan}_seg-*_{suffix}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def read_stats(out, scan):
    (path,) = out.rglob(f"{scan}_seg-*_stats.tsv")
    return pd.read_csv(path, sep="\t", na_values="n/a")


def test_map_of_each_session_is_read_once(bids_dataset, tmp_path, oracle, monkeypatch):
    """Each of three sessions depends on the maps of the two others."""
    read: list[str] = []

    def note(scan, results):
        read.append(scan.name)
        return scan.name

    monkeypatch.setattr("bids_dgmseg.run.plan.hash_current_sources", note)
    scans = [f"sub-01_ses-{number}" for number in (1, 2, 3)]
    config = RunConfig(
        bids_dir=bids_dataset(*scans),
        output_dir=tmp_path / "out",
        segmentation=SegmentationOptions(model=oracle.name, longitudinal=True),
    )
    assert len({job.settings_hash for job in plan_run(config).jobs}) == 3
    assert sorted(read) == scans


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
    for scan in SCANS[:2]:
        stats = read_stats(out, scan)
        assert set(stats) >= SESSION_COLUMNS
        found = stats.dropna(subset="volume_change_percent")
        assert {"DN_L", "RN_R", "PUT_L"} <= set(found["abbreviation"])
        np.testing.assert_allclose(found["volume_change_percent"], 0, atol=0.1)  # the same map twice
        ratio = found["volume_longitudinal_mm3"] / found["volume_pv_mm3"]
        np.testing.assert_allclose(ratio.median(), 1, atol=0.1)
    assert not set(read_stats(out, SCANS[2])) & SESSION_COLUMNS

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


@pytest.mark.parametrize("removed", ["image", "image and results"])
def test_removed_session_outdates_those_labelled_with_it(tmp_path, removed):
    ds, out = tmp_path / "ds", tmp_path / "out"
    start_dataset(ds)
    images = {scan: write_map(ds, scan, coarse_chi()) for scan in ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1")}
    uris = {scan: f"bids:raw:{path.relative_to(ds).as_posix()}" for scan, path in images.items()}
    for scan, image in images.items():
        others = [uris[other] for other in images if other != scan and other.startswith(scan[:6])]
        about = {"Sources": [uris[scan]], "SpatialReference": uris[scan], "LabelledTogetherWith": others}
        folder = out / image.parent.relative_to(ds)
        folder.mkdir(parents=True)
        (folder / f"{scan}_seg-dgm16_stats.tsv").touch()
        (folder / f"{scan}_seg-dgm16_dseg.json").write_text(
            json.dumps({**about, "SourceFingerprint": hash_files([image])})
        )
    config = RunConfig(bids_dir=ds, output_dir=out, level="group")
    assert plan_group(config).outdated == {}
    shutil.rmtree(ds / "sub-01" / "ses-1")
    if removed != "image":
        shutil.rmtree(out / "sub-01" / "ses-1")
    outdated = dict(plan_group(config).outdated)
    assert outdated.pop("sub-01_ses-2_seg-dgm16_stats.tsv") == "the images of the scan have changed since"
    gone = "the image is not in the dataset any more (sub-01_ses-1_Chimap.nii.gz)"
    assert outdated == ({"sub-01_ses-1_seg-dgm16_stats.tsv": gone} if removed == "image" else {})


def test_different_voxels_are_a_warning(sessions, run, capsys):
    chi = coarse_chi()
    write_map(sessions, "sub-01_ses-2", Volume(chi.array[:, :, ::2], chi.affine @ np.diag([1.0, 1, 2, 1])))
    assert run(sessions, "--longitudinal", "--participant-label", "01") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "voxels of the sessions differ" in line]
    assert [line.partition(":")[0] for line in lines] == ["sub-01_ses-1", "sub-01_ses-2"]
    assert all("(2.5 × 2.5 × 2.5 mm, 2.5 × 2.5 × 5 mm); this looks like a change of volume" in line for line in lines)


def test_session_that_is_not_fetched_or_damaged(sessions, tmp_path, run, capsys):
    out = tmp_path / "out"
    options = ("--longitudinal", "--participant-label", "01")
    assert run(sessions, *options) == 0
    first = contents(out)
    sidecar = sessions / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_Chimap.json"
    image = sidecar.with_suffix(".nii.gz")
    image.rename(tmp_path / image.name)
    for path in (image, sidecar):  # as `datalad drop` leaves them
        path.unlink(missing_ok=True)
        path.symlink_to(f"../../../.git/annex/objects/x/{path.name}")
    capsys.readouterr()
    assert run(sessions, *options) == 0
    assert "all 2 scans are up to date" in capsys.readouterr().out
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


def test_session_of_somebody_else_fails_its_participant_only(sessions, run, capsys):
    chi = coarse_chi()
    write_map(sessions, "sub-01_ses-2", chi.with_array(-chi.array))
    assert run(sessions, "--longitudinal") == 1
    err = capsys.readouterr().err
    assert "2 of 3 scans failed: sub-01_ses-1, sub-01_ses-2;" in err
    assert "cannot be aligned with the other sessions" in err
    assert "Traceback" not in err


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
    assert read_json(out, "sub-01_ses-1", "dseg")["LabelledTogetherWith"] == [
        "bids:raw:sub-01/ses-2/anat/sub-01_ses-2_echo-1_part-phase_MEGRE.nii.gz"
    ]
    # a session that is missing is labelled with the map that has been reconstructed of the other one
    before = contents(out / "sub-01" / "ses-2")
    (labels,) = (out / "sub-01" / "ses-2").rglob("*_dseg.json")
    labels.unlink()
    assert run(ds, "--longitudinal") == 0
    printed = capsys.readouterr().out
    assert "sub-01_ses-1: reconstruct" not in printed
    assert "sub-01_ses-2: done (1 of 1)" in printed
    assert contents(out / "sub-01" / "ses-2").keys() == before.keys()
    for name, content in contents(out / "sub-01" / "ses-2").items():
        assert name.endswith(".json") or content == before[name]


def test_maps_with_one_file_name_are_different_sessions(sessions, tmp_path, oracle):
    """SEPIA names all maps alike; the folders tell the sessions."""
    for path in [*sessions.rglob("sub-01_*_Chimap.*")]:
        path.rename(path.with_name(f"Sepia_Chimap{''.join(path.suffixes)}"))
    config = RunConfig(
        bids_dir=sessions,
        output_dir=tmp_path / "out",
        selection=Selection(participants=("01",)),
        segmentation=SegmentationOptions(model=oracle.name, longitudinal=True),
    )
    jobs = plan_run(config).jobs
    workflow = build_sessions_workflow(jobs, mem_gb={job.scan.name: MEMORY_GB for job in jobs})
    align = workflow.get_node("align").inputs
    assert align.names == ["sub-01_ses-1_Chimap.nii.gz", "sub-01_ses-2_Chimap.nii.gz"]
    assert align.in_sessions == [str(sessions / f"sub-01/ses-{n}/anat/Sepia_Chimap.nii.gz") for n in (1, 2)]
    assert {name.partition(".")[0] for name in workflow.list_node_names()} == {"align", *SCANS[:2]}
