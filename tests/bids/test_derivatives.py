from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bids_dgmseg.bids.derivatives import fingerprint, is_done, output_path, save_scan
from bids_dgmseg.config import ReferenceRegion, Segmentation
from bids_dgmseg.models.registry import MODELS

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
    assert output_path(out, two, "mask", ".nii.gz", label="DNleft", desc="dgm16") == Path(
        "out/sub-02/anat/sub-02_label-DNleft_desc-rtsDgm16_mask.nii.gz"
    )


def test_fingerprint_depends_on_inputs_and_options(scans, tmp_path):
    scan, options, reference = scans[0], Segmentation(), ReferenceRegion()
    first = fingerprint(scan, MODEL, options, reference)
    for changed in (Segmentation(masks=False), Segmentation(viewer=False)):
        assert fingerprint(scan, MODEL, changed, reference) != first
    assert fingerprint(scan, MODEL, options, ReferenceRegion("whole-brain")) != first
    assert fingerprint(replace(scan, sidecar={"Units": "ppb"}), MODEL, options, reference) != first
    assert fingerprint(scan, replace(MODEL, name="other"), options, reference) != first
    cleaned = replace(MODEL, postprocessing=replace(MODEL.postprocessing, min_component_fraction=0.5))
    assert fingerprint(scan, cleaned, options, reference) != first
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_text("1")
    weighted = Segmentation(weights=tmp_path / "weights")
    second = fingerprint(scan, MODEL, weighted, reference)
    (tmp_path / "weights" / "w").write_text("2")
    assert len({first, second, fingerprint(scan, MODEL, weighted, reference)}) == 3
    scan.chi.write_bytes(b"another map")
    assert fingerprint(scan, MODEL, options, reference) != first


def test_unreadable_map_has_a_fingerprint(scans):
    scans[0].chi.unlink()
    assert len(fingerprint(scans[0], MODEL, Segmentation(), ReferenceRegion())) == 64


def test_scan_is_done_if_complete_and_unchanged(scans, out, results):
    scan, other, _ = scans
    assert not is_done(out, scan, "dgm16", "f" * 64)
    save_scan(out, scan, MODEL, **results)
    assert is_done(out, scan, "dgm16", "f" * 64)
    assert not is_done(out, scan, "dgm16", "0" * 64)
    assert not is_done(out, other, "dgm16", "f" * 64)


@pytest.mark.parametrize(
    ("suffix", "extension", "left"),
    [("stats", ".tsv", None), ("stats", ".tsv", ""), ("dseg", ".nii.gz", ""), ("qc", ".json", "{")],
)
def test_missing_or_damaged_files_are_not_done(scans, out, results, suffix, extension, left):
    save_scan(out, scans[0], MODEL, **results)
    path = output_path(out, scans[0], suffix, extension, seg="dgm16")
    path.unlink()
    if left is not None:
        path.write_text(left)
    assert not is_done(out, scans[0], "dgm16", "f" * 64)
