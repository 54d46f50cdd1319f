from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.derivatives import REGIONS, is_done, output_path, save_scan
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES

MODEL = MODELS["dgm16"]
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def test_scan_has_all_derivatives_and_no_others(scans, out, results):
    scan = scans[2]
    written = save_scan(out, scan, MODEL, **results)
    stem = "sub-02/anat/sub-02_seg-dgm16_desc-rts_"
    masks = {
        f"sub-02/anat/sub-02_label-{s.bids_label}_desc-rtsDgm16_mask{extension}"
        for s in STRUCTURES
        for extension in (".nii.gz", ".json")
    }
    others = "dseg.nii.gz dseg.json dseg.tsv probseg.nii.gz probseg.json stats.tsv stats.json qc.json"
    expected = {stem + other for other in others.split()} | masks | {"figures/sub-02_seg-dgm16_desc-rtsAxial_dseg.png"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == expected
    assert {path.relative_to(out).as_posix() for path in written} == expected


def test_sidecar_describes_the_segmentation(scans, out, results):
    scan = scans[2]
    mark = save_scan(out, scan, MODEL, **results)[-1]
    sidecar = json.loads(mark.read_text())
    assert mark.name == "sub-02_seg-dgm16_desc-rts_dseg.json"
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
        path = output_path(out, scan, "mask", ".nii.gz", label=structure.bids_label, desc="dgm16")
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


def test_models_have_separate_region_masks(scans, out, results, tmp_path):
    scan = scans[0]
    for number, model in enumerate((MODEL, dataclasses.replace(MODEL, name="other")), start=1):
        region = tmp_path / "region.nii.gz"
        nib.save(nib.Nifti1Image(np.full((4, 5, 6), number, np.uint8), AFFINE), region)
        save_scan(out, scan, model, **{**results, "regions": dict.fromkeys(REGIONS, region)})
    anat, stem = out / "sub-01" / "ses-1" / "anat", "sub-01_ses-1_acq-x_run-1"
    for region in ("brain", "cerebellum", "ventricles"):
        for number, name in enumerate(("dgm16", "other"), start=1):
            mask = nib.Nifti1Image.from_filename(anat / f"{stem}_label-{region}_desc-{name}_mask.nii.gz")
            assert np.unique(np.asanyarray(mask.dataobj)).tolist() == [number]
    save_scan(out, scan, MODEL, **{**results, "masks": False})
    assert not list(anat.glob("*_desc-dgm16_mask.*"))
    assert len(list(anat.glob("*_label-brain_desc-other_mask.*"))) == 2


def test_interrupted_save_is_not_done(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, MODEL, **results)
    with pytest.raises(FileNotFoundError, match="gone"):
        save_scan(out, scan, MODEL, **{**results, "figures": {"axial": Path("gone.png")}})
    assert not is_done(out, scan, "dgm16", "f" * 64)
    assert not list(out.rglob(".*"))
