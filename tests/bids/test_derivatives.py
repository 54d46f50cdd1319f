from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.current import MadeFrom, Verdict, judge
from bids_dgmseg.bids.derivatives import Provenance, map_paths, save_scan
from bids_dgmseg.bids.entities import ScanName, output_path
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import copy_file
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from tests.bids.conftest import AFFINE

MODEL = MODELS["dgm16"]


def test_names_follow_bids(scans):
    first, _, two = scans
    out = Path("out")
    assert output_path(out, first, "dseg", ".nii.gz", seg="dgm16") == Path(
        "out/sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_seg-dgm16_dseg.nii.gz"
    )
    assert output_path(out, two, "dseg", ".json", seg="dgm16") == Path(
        "out/sub-02/anat/sub-02_seg-dgm16_desc-rts_dseg.json"
    )
    assert output_path(out, two, "mask", ".nii.gz", space="orig", label="DNleft", desc="dgm16") == Path(
        "out/sub-02/anat/sub-02_space-orig_label-DNleft_desc-rtsDgm16_mask.nii.gz"
    )


def verdict_of(out: Path, scan: ScanName) -> Verdict:
    """Judge the results of a scan without inputs."""
    return judge(out, output_path(out, scan, "qc", ".json", seg="dgm16"), lambda use, file: None, MadeFrom())


def test_saved_scan_is_current(scans, out, results):
    assert verdict_of(out, scans[0]).reason
    save_scan(out, scans[0], results)
    assert not verdict_of(out, scans[0]).reason
    assert verdict_of(out, scans[1]).reason
    path = output_path(out, scans[0], "dseg", ".nii.gz", seg="dgm16")
    path.write_bytes(b"")  # a full disk
    assert verdict_of(out, scans[0]).reason


def test_scan_has_all_derivatives_and_no_others(scans, out, results):
    scan = scans[2]
    written = save_scan(out, scan, results)
    stem = "sub-02/anat/sub-02_seg-dgm16_desc-rts_"
    masks = {f"sub-02/anat/sub-02_space-orig_label-{s.bids_label}_desc-rtsDgm16_mask.nii.gz" for s in STRUCTURES}
    others = "dseg.nii.gz dseg.json dseg.tsv probseg.nii.gz probseg.json stats.tsv stats.json qc.json"
    expected = {stem + other for other in others.split()} | masks | {"figures/sub-02_seg-dgm16_desc-rtsAxial_dseg.png"}
    assert {path.relative_to(out).as_posix() for path in written} == expected
    below = {path.relative_to(out).as_posix() for path in out.rglob("sub-*") if path.is_file()}
    assert below == {*expected, "logs/inputs/sub-02_seg-dgm16_desc-rts.json"}
    assert json.loads((out / "desc-rtsDgm16_mask.json").read_text())["Type"] == "ROI"
    assert {"dataset_description.json", "dseg.tsv", ".bidsignore", "README"} <= {path.name for path in out.iterdir()}


def test_sidecar_describes_the_segmentation(scans, out, results):
    scan = scans[2]
    *_, path, record = save_scan(out, scan, replace(results, provenance=Provenance(sources=scan.uris)))
    sidecar = json.loads(path.read_text())
    assert path.name == "sub-02_seg-dgm16_desc-rts_dseg.json"
    assert record.name == "sub-02_seg-dgm16_desc-rts_qc.json"  # last: it marks a complete scan
    assert sidecar["Sources"] == ["bids:qsmxt:sub-02/anat/sub-02_desc-rts_Chimap.nii"]
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    assert (sidecar["InputUnits"], sidecar["InputReference"], sidecar["Model"]) == ("ppb", "CSF", "dgm16")


def test_masks_equal_labels_on_same_grid(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, results)
    path = output_path(out, scan, "probseg", ".nii.gz", seg="dgm16")
    assert nib.Nifti1Image.from_filename(path).get_fdata().max() == pytest.approx(1)
    assert json.loads(path.with_suffix("").with_suffix(".json").read_text())["LabelMap"] == list(MODEL.labels)
    labels = nib.Nifti1Image.from_filename(results.dseg)
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
    figures = {**results.figures, "viewer": tmp_path / "viewer.html"}
    written = save_scan(out, scan, replace(results, figures=figures))
    viewer = out / "figures" / "sub-02_seg-dgm16_desc-rtsViewer_dseg.html"
    assert viewer in written
    save_scan(out, scan, results, masks=False)
    assert not viewer.exists()
    assert not list(out.rglob("sub-*_mask.*"))


def test_corrected_labels_are_manual_in_standard_space(scans, out, results):
    space = {"measures": {}, "normalization": {"output_space": "MNI152NLin2009cAsym"}}
    for edited in ({}, {"CN_L": 0.9}):
        report = {**results.segmentation_report, "edits": {"file": "a", "edited": edited}}
        save_scan(
            out,
            scans[0],
            replace(
                results, segmentation_report=report, measures_report=space, standard={"standard_dseg": results.dseg}
            ),
        )
        sidecars = list(out.rglob("*_dseg.json"))
        assert [json.loads(path.read_text())["Manual"] for path in sidecars] == [bool(edited)] * 2


def test_files_that_do_not_belong_together_write_nothing(scans, out, results):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 7), np.uint8), AFFINE), results.dseg.with_name("location.nii.gz"))
    with pytest.raises(InputError, match=r"^location.nii.gz: is another file .*; pass out_location of LocalizeNuclei"):
        save_scan(out, scans[0], results)
    assert not out.exists()


def test_interrupted_save_is_not_current(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, results)
    with pytest.raises(FileNotFoundError, match="gone"):
        save_scan(out, scan, replace(results, figures={"axial": Path("gone.png")}))
    assert verdict_of(out, scan).reason
    assert [path.name for path in out.rglob(".*")] == [".bidsignore"]


def test_map_that_could_not_be_replaced_is_not_edited(scans, out, results, tmp_path, monkeypatch):
    """On a full disk, the sidecar with the new checksum may still be written, but not the map."""
    scan = replace(scans[0], chi=scans[0].chi.with_name("sub-01_ses-1_acq-x_run-1_part-phase_MEGRE.nii.gz"))
    made, (path, _) = tmp_path / "made.nii.gz", map_paths(out, scan)
    made.write_bytes(b"first")
    steps = {"EchoTime": [0.01], "MagneticFieldStrength": 3.0}
    results = replace(results, chi=made, reconstruction_report={"reconstruction": steps})
    save_scan(out, scan, results)
    assert not verdict_of(out, scan).edited

    def copy(source: Path, final: Path) -> Path:
        if final == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy_file(source, final)

    made.write_bytes(b"second")
    with monkeypatch.context() as full:
        full.setattr("bids_dgmseg.bids.derivatives.copy_file", copy)
        with pytest.raises(OSError, match="No space left"):
            save_scan(out, scan, results)
    assert not verdict_of(out, scan).edited
    save_scan(out, scan, results)
    assert path.read_bytes() == b"second"
    path.write_bytes(b"edited")
    assert verdict_of(out, scan).edited == (path,)
