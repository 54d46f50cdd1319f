from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.current import MadeFrom, Verdict, judge
from bids_dgmseg.bids.derivatives import find_results, map_paths, save_scan
from bids_dgmseg.bids.entities import ScanName, output_path
from bids_dgmseg.bids.scan_results import Provenance, build_quality_record
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import copy_file
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from tests.bids.conftest import AFFINE, write_location

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
    save_scan(out, scans[0], results)
    assert not verdict_of(out, scans[0]).reason
    assert verdict_of(out, scans[1]).reason


@pytest.mark.parametrize(
    ("suffix", "extension", "left"),
    [("stats", ".tsv", None), ("stats", ".tsv", ""), ("dseg", ".nii.gz", ""), ("qc", ".json", "{")],
)
def test_missing_or_damaged_files_are_not_current(scans, out, results, suffix, extension, left):
    save_scan(out, scans[0], results)
    path = output_path(out, scans[0], suffix, extension, seg="dgm16")
    path.unlink()
    if left is not None:
        path.write_text(left)
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
    assert (sidecar["BoxLow"], sidecar["BoxHigh"]) == ([-50, -70, -60.5], [50, 30, 40])
    assert sidecar["BoxRotation"] == [-17.5, 0, 2]
    assert (sidecar["InputUnits"], sidecar["InputReference"], sidecar["Model"]) == ("ppb", "CSF", "dgm16")


def test_probabilities_have_scale_and_label_map(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, results)
    path = output_path(out, scan, "probseg", ".nii.gz", seg="dgm16")
    assert nib.Nifti1Image.from_filename(path).get_fdata().max() == pytest.approx(1)
    assert json.loads(path.with_suffix("").with_suffix(".json").read_text())["LabelMap"] == list(MODEL.labels)


def test_masks_equal_labels_on_same_grid(scans, out, results):
    scan = scans[0]
    save_scan(out, scan, results)
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


def test_masks_of_other_weights_are_removed(scans, out, results):
    """The labels of a network of the user change with its weights."""
    save_scan(out, scans[0], results)
    fewer = {**results.segmentation_report, "labels": MODEL.labels[:2]}
    written = save_scan(out, scans[0], replace(results, segmentation_report=fewer))
    assert {path for path in written if "_mask." in path.name} == set(out.rglob("sub-*_mask.*"))


def test_corrected_labels_are_manual_in_standard_space(scans, out, results):
    space = {"measures": {}, "normalization": {"output_space": "MNI152NLin2009cAsym"}}
    for edited in ({}, {"CN_L": 0.9}):
        report = {**results.segmentation_report, "edits": {"file": "a", "edited": edited}}
        save_scan(
            out,
            scans[0],
            replace(
                results,
                segmentation_report=report,
                measures_report=space,
                standard={"standard_dseg": results.dseg},
            ),
        )
        sidecars = list(out.rglob("*_dseg.json"))
        assert [json.loads(path.read_text())["Manual"] for path in sidecars] == [bool(edited)] * 2


def test_models_have_separate_region_masks(scans, out, results):
    scan = scans[0]
    labels = Volume.read(results.dseg, np.uint8).array
    for column, name in enumerate(("dgm16", "dgm24")):
        inside = np.zeros(labels.shape, bool)
        inside[column:] = True
        location = write_location(results.dseg.parent, brain=inside, ventricles=inside)
        report = {**results.segmentation_report, "model": name}
        save_scan(out, scan, replace(results, location=location, segmentation_report=report))
        for region in ("brain", "ventricles"):
            path = output_path(out, scan, "mask", ".nii.gz", space="orig", label=region, desc=name)
            # the coarse labels of ventricles cover parts of the nuclei beside them
            expected = inside & (labels == 0) if region == "ventricles" else inside
            np.testing.assert_array_equal(Volume.read(path, np.uint8).array, expected)
    save_scan(out, scan, results, masks=False)
    assert not list(out.rglob("sub-*_desc-dgm16_mask.*"))
    assert list(out.rglob("sub-*_label-brain_desc-dgm24_mask.*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("stats.tsv", r"^stats.tsv: no column abbreviation; pass out_stats of MeasureNuclei$"),
        ("probseg.nii", r"^probseg.nii: is not on the grid of the labels; pass out_probseg of SegmentNuclei$"),
        ("location.nii.gz", r"^location.nii.gz: is another file .*; pass out_location of LocalizeNuclei$"),
    ],
)
def test_files_that_do_not_belong_together_write_nothing(scans, out, results, wrong, message):
    path = results.dseg.with_name(wrong)
    if wrong == "stats.tsv":
        path.write_text("participant_id\n")
    else:
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 7, 16)[: 4 if wrong == "probseg.nii" else 3], np.uint8), AFFINE), path)
    with pytest.raises(InputError, match=message):
        save_scan(out, scans[0], results)
    assert not out.exists()


def test_description_of_a_dataset_is_kept(scans, out, results):
    out.mkdir()
    (out / "dataset_description.json").write_text('{"Name": "mine"}')
    save_scan(out, scans[0], results)
    assert (out / "dataset_description.json").read_text() == '{"Name": "mine"}'
    assert not (out / "README").exists()


def test_record_combines_reports_in_the_order_of_the_steps(scans, results):
    record = build_quality_record(
        ScanName("01", None, {}),
        replace(
            results,
            reconstruction_report={
                "reconstruction": {"EchoTime": [0.005, 0.01]},
                "warnings": ["a"],
            },
            map_report={"input": {"units": "ppm"}, "warnings": ["sub-01_Chimap.nii.gz: b"]},
            measures_report={"measures": {"rating": "green"}, "maps": {"T1map": {}}, "warnings": ["c"]},
            provenance=Provenance(scanner={"Manufacturer": "Siemens"}, settings={"masks": True}),
        ),
        {"low": [0, 0, 0]},
    )
    assert record["warnings"] == ["sub-01: a", "sub-01_Chimap.nii.gz: b", "sub-01: c"]
    assert record["input"] == {"units": "ppm", "reconstructed_from": "2 echoes"}
    assert (record["scan"], record["model"], record["rating"]) == ("sub-01", "dgm16", "green")
    assert (record["scanner"], record["maps"]) == ({"Manufacturer": "Siemens"}, {"T1map": {}})
    assert record["settings"] == {"masks": True, "mirrored": True}


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
    steps = {"EchoTime": [0.01]}
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
