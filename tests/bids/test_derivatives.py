from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.current import MadeFrom, Verdict, judge
from bids_dgmseg.bids.derivatives import REGIONS, find_results, map_paths, save_scan
from bids_dgmseg.bids.entities import ScanName, output_path
from bids_dgmseg.io.files import copy_file
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from tests.bids.conftest import AFFINE

MODEL = MODELS["dgm16"]


def test_names_follow_bids(scans):
    one, _, two = scans
    out = Path("out")
    assert output_path(out, one, "dseg", ".nii.gz", seg="dgm16") == Path(
        "out/sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_seg-dgm16_dseg.nii.gz"
    )
    assert output_path(out, two, "dseg", ".json", seg="dgm16") == Path(
        "out/sub-02/anat/sub-02_seg-dgm16_desc-rts_dseg.json"
    )
    assert output_path(out, two, "mask", ".nii.gz", space="orig", label="DNleft", desc="dgm16") == Path(
        "out/sub-02/anat/sub-02_space-orig_label-DNleft_desc-rtsDgm16_mask.nii.gz"
    )


def test_results_are_those_of_one_scan(tmp_path):
    plain, other = ScanName("01", None, {}), ScanName("01", None, {"desc": "cosmos"})
    paths = [output_path(tmp_path, scan, "dseg", ".json", seg=seg) for scan in (plain, other) for seg in ("a", "b")]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        path.write_text("{}")
    assert find_results(tmp_path, plain) == paths[:2]
    assert find_results(tmp_path, other) == paths[2:]


def verdict_of(out: Path, scan: ScanName) -> Verdict:
    """Judge the results of a scan without inputs."""
    return judge(out, output_path(out, scan, "qc", ".json", seg="dgm16"), lambda use, file: None, MadeFrom())


def test_saved_scan_is_current(scans, out, results):
    assert verdict_of(out, scans[0]).reason
    save_scan(out, scans[0], MODEL, **results)
    assert not verdict_of(out, scans[0]).reason
    assert verdict_of(out, scans[1]).reason


@pytest.mark.parametrize(
    ("suffix", "extension", "left"),
    [("stats", ".tsv", None), ("stats", ".tsv", ""), ("dseg", ".nii.gz", ""), ("qc", ".json", "{")],
)
def test_missing_or_damaged_files_are_not_current(scans, out, results, suffix, extension, left):
    save_scan(out, scans[0], MODEL, **results)
    path = output_path(out, scans[0], suffix, extension, seg="dgm16")
    path.unlink()
    if left is not None:
        path.write_text(left)
    assert verdict_of(out, scans[0]).reason


def test_scan_has_all_derivatives_and_no_others(scans, out, results):
    scan = scans[2]
    written = save_scan(out, scan, MODEL, **results)
    stem = "sub-02/anat/sub-02_seg-dgm16_desc-rts_"
    masks = {
        f"sub-02/anat/sub-02_space-orig_label-{s.bids_label}_desc-rtsDgm16_mask{extension}"
        for s in STRUCTURES
        for extension in (".nii.gz", ".json")
    }
    others = "dseg.nii.gz dseg.json dseg.tsv probseg.nii.gz probseg.json stats.tsv stats.json qc.json"
    expected = {stem + other for other in others.split()} | masks | {"figures/sub-02_seg-dgm16_desc-rtsAxial_dseg.png"}
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {*expected, "logs/inputs/sub-02_seg-dgm16_desc-rts.json"}
    assert {path.relative_to(out).as_posix() for path in written} == expected


def test_sidecar_describes_the_segmentation(scans, out, results):
    scan = scans[2]
    *_, path, record = save_scan(out, scan, MODEL, **{**results, "sources": scan.uris})
    sidecar = json.loads(path.read_text())
    assert path.name == "sub-02_seg-dgm16_desc-rts_dseg.json"
    assert record.name == "sub-02_seg-dgm16_desc-rts_qc.json"  # last: it marks a complete scan
    assert sidecar["Sources"] == ["bids:qsmxt:sub-02/anat/sub-02_desc-rts_Chimap.nii"]
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    assert (sidecar["BoxLow"], sidecar["BoxHigh"]) == ([-50, -70, -60.5], [50, 30, 40])
    assert sidecar["BoxRotation"] == [-17.5, 0, 2]
    assert (sidecar["InputUnits"], sidecar["InputReference"], sidecar["Model"]) == ("ppb", "CSF", "dgm16")


def test_probabilities_have_scale_and_label_map(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, MODEL, **results)
    path = output_path(out, scan, "probseg", ".nii.gz", seg="dgm16")
    assert nib.Nifti1Image.from_filename(path).get_fdata().max() == pytest.approx(1)
    assert json.loads(path.with_suffix("").with_suffix(".json").read_text())["LabelMap"] == list(MODEL.labels)


def test_masks_equal_labels_on_same_grid(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, MODEL, **results)
    labels = nib.Nifti1Image.from_filename(results["out_dseg"])
    for structure in STRUCTURES:
        path = output_path(out, scan, "mask", ".nii.gz", space="orig", label=structure.bids_label, desc="dgm16")
        mask = nib.Nifti1Image.from_filename(path)
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj), np.asanyarray(labels.dataobj) == structure.index)
        np.testing.assert_array_equal(mask.affine, labels.affine)
        assert (mask.header["qform_code"], mask.header["sform_code"]) == (
            labels.header["qform_code"],
            labels.header["sform_code"],
        )


def test_rerun_without_masks_and_viewer_removes_them(scans, out, results, tmp_path):
    scan = scans[2]
    (tmp_path / "viewer.html").write_text("<html>")
    figures = {**results["figures"], "viewer": tmp_path / "viewer.html"}
    written = save_scan(out, scan, MODEL, **{**results, "figures": figures})
    viewer = out / "figures" / "sub-02_seg-dgm16_desc-rtsViewer_dseg.html"
    assert viewer in written
    save_scan(out, scan, MODEL, **{**results, "masks": False})
    assert not viewer.exists()
    assert not list(out.rglob("*_mask.*"))


def test_masks_of_other_weights_are_removed(scans, out, results):
    """The labels of a network of the user change with its weights."""
    scan, other = scans[0], replace(MODEL, labels=MODEL.labels[:2])
    save_scan(out, scan, MODEL, **results)
    written = save_scan(out, scan, other, **results)
    assert {path for path in written if "_mask." in path.name} == set(out.rglob("*_mask.*"))


def test_corrected_labels_are_manual_in_standard_space(scans, out, results):
    given = {**results, "standard": {"out_dseg": results["out_dseg"]}, "output_space": "MNI152NLin2009cAsym"}
    for edited in ([], ["CN_L"]):
        save_scan(out, scans[0], MODEL, **given, correction={"edited": edited})
        sidecars = list(out.rglob("*_dseg.json"))
        assert [json.loads(path.read_text())["Manual"] for path in sidecars] == [bool(edited)] * 2


def test_models_have_separate_region_masks(scans, out, results, tmp_path):
    scan = scans[0]
    labels = np.asanyarray(nib.Nifti1Image.from_filename(results["out_dseg"]).dataobj)
    for column, model in enumerate((MODEL, replace(MODEL, name="other"))):
        region, inside = tmp_path / "region.nii.gz", np.zeros((4, 5, 6), np.uint8)
        inside[column:] = 1
        nib.save(nib.Nifti1Image(inside, AFFINE), region)
        save_scan(out, scan, model, **{**results, "regions": dict.fromkeys(REGIONS, region)})
    anat, stem = out / "sub-01" / "ses-1" / "anat", "sub-01_ses-1_acq-x_run-1"
    for region in ("brain", "cerebellum", "ventricles"):
        for column, name in enumerate(("dgm16", "other")):
            mask = nib.Nifti1Image.from_filename(anat / f"{stem}_space-orig_label-{region}_desc-{name}_mask.nii.gz")
            expected = np.arange(4)[:, None, None] >= np.full((4, 5, 6), column)
            if region == "ventricles":  # their coarse labels cover parts of the nuclei beside them
                assert (expected & (labels > 0)).any()
                expected &= labels == 0
            np.testing.assert_array_equal(np.asanyarray(mask.dataobj), expected)
    save_scan(out, scan, MODEL, **{**results, "masks": False})
    assert not list(anat.glob("*_desc-dgm16_mask.*"))
    assert len(list(anat.glob("*_space-orig_label-brain_desc-other_mask.*"))) == 2


def test_interrupted_save_is_not_current(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, MODEL, **results)
    with pytest.raises(FileNotFoundError, match="gone"):
        save_scan(out, scan, MODEL, **{**results, "figures": {"axial": Path("gone.png")}})
    assert verdict_of(out, scan).reason
    assert not list(out.rglob(".*"))


def test_map_that_could_not_be_replaced_is_not_edited(scans, out, results, tmp_path, monkeypatch):
    """On a full disk, the sidecar with the new checksum may still be written, but not the map."""
    scan = replace(scans[0], chi=scans[0].chi.with_name("sub-01_ses-1_acq-x_run-1_part-phase_MEGRE.nii.gz"))
    made, (path, _) = tmp_path / "made.nii.gz", map_paths(out, scan)
    made.write_bytes(b"first")
    save_scan(out, scan, MODEL, **results, chi=made)
    assert not verdict_of(out, scan).edited

    def copy(source: Path, final: Path) -> Path:
        if final == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy_file(source, final)

    made.write_bytes(b"second")
    with monkeypatch.context() as full:
        full.setattr("bids_dgmseg.bids.derivatives.copy_file", copy)
        with pytest.raises(OSError, match="No space left"):
            save_scan(out, scan, MODEL, **results, chi=made)
    assert not verdict_of(out, scan).edited
    save_scan(out, scan, MODEL, **results, chi=made)
    assert path.read_bytes() == b"second"
    path.write_bytes(b"edited")
    assert verdict_of(out, scan).edited == (path,)
