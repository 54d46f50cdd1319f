from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.derivatives import (
    REGIONS,
    check_output,
    fingerprint,
    is_done,
    output_path,
    save_scan,
    write_dataset_files,
)
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import copy_file, write_json, write_text
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES

MODEL = MODELS["dgm16"]
VALIDATOR = shutil.which("bids-validator-deno") or shutil.which(
    "bids-validator-deno", path=str(Path(sys.executable).parent)
)
AFFINE = np.array([[-1.0, 0, 0, 4], [0, 2, 0, -5], [0, 0, 3, -6], [0, 0, 0, 1]])


@pytest.fixture
def settings(dataset, tmp_path) -> Settings:
    """A dataset with sessions, runs and acquisitions, and a derivative with a ``desc`` of its own."""
    root = dataset(
        "ds",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_Chimap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-2_Chimap.nii.gz",
    )
    given = dataset("qsmxt", "sub-02/anat/sub-02_desc-rts_Chimap.nii", kind="derivative")
    for path in [*root.rglob("*Chimap.nii*"), *given.rglob("*Chimap.nii*")]:
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), AFFINE), path)
    return Settings(bids_dir=root, output_dir=tmp_path / "out", derivatives=(given,))


@pytest.fixture
def results(tmp_path):
    """What the steps before ``save`` leave in the working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    labels = np.random.default_rng(0).integers(0, 17, (4, 5, 6)).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / "dseg.nii.gz")
    probseg = nib.Nifti1Image(np.full((4, 5, 6, 16), 255, np.uint8), AFFINE)
    probseg.header.set_slope_inter(1 / 255, 0)
    nib.save(probseg, folder / "probseg.nii")
    rows = ["\t".join(STATS_COLUMNS), *("\t".join(["n/a"] * len(STATS_COLUMNS)) for _ in STRUCTURES)]
    (folder / "stats.tsv").write_text("\n".join(rows) + "\n")
    (folder / "axial.png").write_bytes(b"\x89PNG")
    return {
        "out_dseg": folder / "dseg.nii.gz",
        "out_probseg": folder / "probseg.nii",
        "stats": folder / "stats.tsv",
        "quality": {"input": {"units": "ppb", "units_from": "sidecar", "reference": "CSF"}, "warnings": []},
        "box_mm": {"low": [-50, -70, -60.5], "high": [50, 30, 40], "rotation_deg": [-17.5, 0, 2]},
        "masks": True,
        "fingerprint": "f" * 64,
        "figures": {"axial": folder / "axial.png"},
        "regions": {},
    }


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_names_follow_bids(settings):
    one, _, two = find_scans(settings)
    out = Path("out")
    assert output_path(out, one, "dseg", ".nii.gz", seg="dgm16") == Path(
        "out/sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_seg-dgm16_dseg.nii.gz"
    )
    assert output_path(out, two, "dseg", ".json", seg="dgm16") == Path(
        "out/sub-02/anat/sub-02_seg-dgm16_desc-rts_dseg.json"
    )
    assert output_path(out, two, "mask", ".nii.gz", label="DNleft", desc="dgm16") == Path(
        "out/sub-02/anat/sub-02_label-DNleft_desc-rtsDgm16_mask.nii.gz"
    )


def test_a_scan_gets_all_its_files_and_no_other(settings, results):
    scan = find_scans(settings)[2]
    written = save_scan(settings.output_dir, scan, MODEL, **results)
    stem = "sub-02/anat/sub-02_seg-dgm16_desc-rts_"
    masks = {
        f"sub-02/anat/sub-02_label-{s.bids_label}_desc-rtsDgm16_mask{extension}"
        for s in STRUCTURES
        for extension in (".nii.gz", ".json")
    }
    others = (
        "dseg.nii.gz",
        "dseg.json",
        "dseg.tsv",
        "probseg.nii.gz",
        "probseg.json",
        "stats.tsv",
        "stats.json",
        "qc.json",
    )
    expected = {stem + other for other in others} | masks | {"figures/sub-02_seg-dgm16_desc-rtsAxial_dseg.png"}
    assert files_below(settings.output_dir) == expected
    assert {path.relative_to(settings.output_dir).as_posix() for path in written} == expected


def test_the_sidecar_says_where_the_labels_come_from(settings, results):
    scan = find_scans(settings)[2]
    mark = save_scan(settings.output_dir, scan, MODEL, **results)[-1]
    sidecar = json.loads(mark.read_text())
    assert mark.name == "sub-02_seg-dgm16_desc-rts_dseg.json"
    assert sidecar["Sources"] == ["bids:qsmxt:sub-02/anat/sub-02_desc-rts_Chimap.nii"]
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    assert (sidecar["BoxLow"], sidecar["BoxHigh"]) == ([-50, -70, -60.5], [50, 30, 40])
    assert sidecar["BoxRotation"] == [-17.5, 0, 2]
    assert (sidecar["InputUnits"], sidecar["InputReference"], sidecar["Model"]) == ("ppb", "CSF", "dgm16")


def test_probabilities_keep_their_scale_and_name_their_volumes(settings, results):
    scan = find_scans(settings)[0]
    save_scan(settings.output_dir, scan, MODEL, **results)
    path = output_path(settings.output_dir, scan, "probseg", ".nii.gz", seg="dgm16")
    assert nib.Nifti1Image.from_filename(path).get_fdata().max() == pytest.approx(1)
    assert json.loads(path.with_suffix("").with_suffix(".json").read_text())["LabelMap"] == list(MODEL.labels)


def test_masks_split_the_labels_on_the_same_grid(settings, results):
    scan = find_scans(settings)[0]
    save_scan(settings.output_dir, scan, MODEL, **results)
    labels = nib.Nifti1Image.from_filename(results["out_dseg"])
    for structure in STRUCTURES:
        path = output_path(settings.output_dir, scan, "mask", ".nii.gz", label=structure.bids_label, desc="dgm16")
        mask = nib.Nifti1Image.from_filename(path)
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj), np.asanyarray(labels.dataobj) == structure.index)
        np.testing.assert_array_equal(mask.affine, labels.affine)
        assert (mask.header["qform_code"], mask.header["sform_code"]) == (
            labels.header["qform_code"],
            labels.header["sform_code"],
        )


def test_doing_it_again_without_masks_removes_them(settings, results):
    scan = find_scans(settings)[0]
    save_scan(settings.output_dir, scan, MODEL, **results)
    save_scan(settings.output_dir, scan, MODEL, **{**results, "masks": False})
    assert not list(settings.output_dir.rglob("*_mask.*"))


def test_rerun_without_viewer_removes_it(settings, results, tmp_path):
    scan = find_scans(settings)[2]
    (tmp_path / "viewer.html").write_text("<html>")
    figures = {**results["figures"], "viewer": tmp_path / "viewer.html"}
    written = save_scan(settings.output_dir, scan, MODEL, **{**results, "figures": figures})
    viewer = settings.output_dir / "figures" / "sub-02_seg-dgm16_desc-rtsViewer_dseg.html"
    assert viewer in written
    save_scan(settings.output_dir, scan, MODEL, **results)
    assert not viewer.exists()


def test_two_models_in_one_folder_keep_their_own_masks_of_the_head(settings, results, tmp_path):
    scan = find_scans(settings)[0]
    for number, model in enumerate((MODEL, dataclasses.replace(MODEL, name="other")), start=1):
        region = tmp_path / "region.nii.gz"
        nib.save(nib.Nifti1Image(np.full((4, 5, 6), number, np.uint8), AFFINE), region)
        save_scan(settings.output_dir, scan, model, **{**results, "regions": dict.fromkeys(REGIONS, region)})
    anat, stem = settings.output_dir / "sub-01" / "ses-1" / "anat", "sub-01_ses-1_acq-x_run-1"
    for region in ("brain", "cerebellum", "ventricles"):
        for number, name in enumerate(("dgm16", "other"), start=1):
            mask = nib.Nifti1Image.from_filename(anat / f"{stem}_label-{region}_desc-{name}_mask.nii.gz")
            assert np.unique(np.asanyarray(mask.dataobj)).tolist() == [number]
    save_scan(settings.output_dir, scan, MODEL, **{**results, "masks": False})
    assert not list(anat.glob("*_desc-dgm16_mask.*"))
    assert len(list(anat.glob("*_label-brain_desc-other_mask.*"))) == 2


def test_a_scan_is_done_only_when_complete_and_unchanged(settings, results):
    scan, other, _ = find_scans(settings)
    assert not is_done(settings.output_dir, scan, "dgm16", "f" * 64)
    save_scan(settings.output_dir, scan, MODEL, **results)
    assert is_done(settings.output_dir, scan, "dgm16", "f" * 64)
    assert not is_done(settings.output_dir, scan, "dgm16", "0" * 64)
    assert not is_done(settings.output_dir, other, "dgm16", "f" * 64)
    output_path(settings.output_dir, scan, "stats", ".tsv", seg="dgm16").unlink()
    assert not is_done(settings.output_dir, scan, "dgm16", "f" * 64)


@pytest.mark.parametrize(
    ("suffix", "extension", "left"),
    [
        ("stats", ".tsv", ""),
        ("dseg", ".nii.gz", ""),
        ("qc", ".json", "{"),
    ],
)
def test_a_scan_whose_files_were_emptied_or_cut_is_not_done(settings, results, suffix, extension, left):
    scan = find_scans(settings)[0]
    save_scan(settings.output_dir, scan, MODEL, **results)
    output_path(settings.output_dir, scan, suffix, extension, seg="dgm16").write_text(left)
    assert not is_done(settings.output_dir, scan, "dgm16", "f" * 64)


def test_a_run_that_is_killed_while_it_saves_leaves_no_finished_scan(settings, results):
    scan = find_scans(settings)[0]
    save_scan(settings.output_dir, scan, MODEL, **results)
    with pytest.raises(FileNotFoundError, match="gone"):
        save_scan(settings.output_dir, scan, MODEL, **{**results, "figures": {"axial": Path("gone.png")}})
    assert not is_done(settings.output_dir, scan, "dgm16", "f" * 64)
    assert not list(settings.output_dir.rglob(".*"))


def test_the_fingerprint_follows_what_changes_results(settings, tmp_path):
    scan = find_scans(settings)[0]
    first = fingerprint(scan, settings, MODEL)
    assert fingerprint(scan, dataclasses.replace(settings, nprocs=7, verbose=2, force=True), MODEL) == first
    for option in ("masks", "viewer"):
        assert fingerprint(scan, dataclasses.replace(settings, **{option: False}), MODEL) != first
    assert fingerprint(dataclasses.replace(scan, sidecar={"Units": "ppb"}), settings, MODEL) != first
    assert fingerprint(scan, settings, dataclasses.replace(MODEL, name="other")) != first
    cleaned = dataclasses.replace(
        MODEL, postprocessing=dataclasses.replace(MODEL.postprocessing, min_component_fraction=0.5)
    )
    assert fingerprint(scan, settings, cleaned) != first
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_text("1")
    weighted = dataclasses.replace(settings, weights=tmp_path / "weights")
    second = fingerprint(scan, weighted, MODEL)
    (tmp_path / "weights" / "w").write_text("2")
    assert len({first, second, fingerprint(scan, weighted, MODEL)}) == 3
    scan.chi.write_bytes(b"another map")
    assert fingerprint(scan, settings, MODEL) != first


def test_a_map_that_cannot_be_read_has_a_fingerprint(settings):
    scan = find_scans(settings)[0]
    scan.chi.unlink()
    assert len(fingerprint(scan, settings, MODEL)) == 64


def test_a_failed_copy_leaves_the_earlier_file(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    (tmp_path / "final").write_text("old")

    def full(source, target):
        Path(target).write_text("ne")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "old"
    assert files_below(tmp_path) == {"new", "final"}


def test_files_written_are_readable_as_the_users_mask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_text("x", tmp_path / "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_json_has_no_nan_and_takes_numpy_numbers(tmp_path):
    write_json({"a": float("nan"), "b": np.float32(0.5), "c": (np.int64(1), np.inf), "d": Path("x")}, tmp_path / "x")
    assert json.loads((tmp_path / "x").read_text()) == {"a": "n/a", "b": 0.5, "c": [1, "n/a"], "d": "x"}


def test_the_top_level_describes_the_output(settings):
    write_dataset_files(settings, find_scans(settings), MODEL)
    out = settings.output_dir
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"raw": "../ds", "qsmxt": "../qsmxt"}
    assert description["GeneratedBy"][0]["Name"] == "bids_dgmseg"
    with (out / "dseg.tsv").open() as file:
        assert next(csv.DictReader(file, delimiter="\t"))["name"] == "left dentate nucleus"
    ids = [line.split("\t")[0] for line in (out / "descriptions.tsv").read_text().splitlines()]
    assert ids == ["desc_id", "desc-dgm16", "desc-rts", "desc-rtsDgm16"]
    assert "[@nipype]" in (out / "logs" / "CITATION.md").read_text()


def test_a_later_run_keeps_what_other_runs_linked(settings, dataset):
    write_dataset_files(settings, find_scans(settings), MODEL)
    later = dataclasses.replace(settings, derivatives=(), participant_label=("01",))
    write_dataset_files(later, find_scans(later), dataclasses.replace(MODEL, name="other"))
    links = json.loads((settings.output_dir / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"qsmxt": "../qsmxt", "raw": "../ds"}
    assert "desc-dgm16\t" in (settings.output_dir / "descriptions.tsv").read_text()


def test_what_the_user_has_the_validator_ignore_stays_ignored(settings):
    write_dataset_files(settings, find_scans(settings), MODEL)
    ours = (settings.output_dir / ".bidsignore").read_text().splitlines()
    (settings.output_dir / ".bidsignore").write_text("mine/**\n")
    write_dataset_files(settings, find_scans(settings), MODEL)
    assert (settings.output_dir / ".bidsignore").read_text().splitlines() == ["mine/**", *ours]


def test_participants_in_parallel_do_not_disturb_each_other(settings):
    scans = find_scans(settings)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda scan: write_dataset_files(settings, [scan], MODEL), scans * 8))
    json.loads((settings.output_dir / "dataset_description.json").read_text())
    assert all(not name.split("/")[-1].endswith(".tmp") for name in files_below(settings.output_dir))


def test_every_reference_of_the_citation_is_in_the_bibliography(settings):
    write_dataset_files(settings, find_scans(settings), MODEL)
    text, bib = ((settings.output_dir / "logs" / f"CITATION.{kind}").read_text() for kind in ("md", "bib"))
    cited = {word.strip("[]@;.,") for word in text.split() if "@" in word}
    assert cited
    assert all(f"{{{key}," in bib for key in cited)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "relative to the reference of each map. In deep"),
        (
            {"reference": "csf"},
            "; referenced values are relative to the mean of a region of the same map (cerebrospinal fluid). In deep",
        ),
        ({"reference": "structure", "reference_structure": "CN_L"}, "a region of the same map (CN_L). In deep"),
    ],
    ids=["no region", "CSF", "structure"],
)
def test_the_citation_says_what_referenced_values_are_relative_to(settings, chosen, said):
    write_dataset_files(dataclasses.replace(settings, **chosen), find_scans(settings), MODEL)
    assert said in " ".join((settings.output_dir / "logs" / "CITATION.md").read_text().split())


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_output_is_valid_bids(settings, results):
    scans = find_scans(settings)
    write_dataset_files(settings, scans, MODEL)
    regions = dict.fromkeys(REGIONS, results["out_dseg"])
    for scan in scans:
        save_scan(settings.output_dir, scan, MODEL, **{**results, "regions": regions})
    (settings.output_dir / "sub-01.html").write_text("<html></html>")
    (settings.output_dir / "group_stats.tsv").write_text("participant_id\nsub-01\n")
    assert VALIDATOR
    run = subprocess.run(
        [VALIDATOR, settings.output_dir, "--ignoreWarnings", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    issues = json.loads(run.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (".", r"^ds: is the input dataset; give another output folder, such as ds/derivatives/bids_dgmseg$"),
        ("sub-01", r"^sub-01: lies in sub-01 of the input"),
        ("sub-01/ses-1/out", r"^out: lies in sub-01 of the input"),
        ("sourcedata/out", r"^out: lies in sourcedata of the input"),
    ],
)
def test_an_output_inside_the_raw_data_is_refused(settings, folder, message):
    with pytest.raises(InputError, match=message):
        check_output(dataclasses.replace(settings, output_dir=settings.bids_dir / folder))


def test_the_usual_place_below_derivatives_is_allowed(settings):
    check_output(dataclasses.replace(settings, output_dir=settings.bids_dir / "derivatives" / "bids_dgmseg"))


def test_an_output_that_cannot_be_written_is_refused(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot be written \(File exists\); choose another output folder$"):
        check_output(dataclasses.replace(settings, output_dir=tmp_path / "file"))


def test_a_dry_run_makes_no_folder(settings):
    check_output(dataclasses.replace(settings, dry_run=True))
    assert not settings.output_dir.exists()
