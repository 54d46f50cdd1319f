"""Inputs that do not fit each other: one line that names them, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces import AlignSessions, LocalizeNuclei, MeasureNuclei, PlotNuclei, SegmentNuclei
from bids_dgmseg.io.files import write_json
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.localize import Localization
from bids_dgmseg.segmentation.predict import Location

SHAPE = (12, 12, 12)


def write(path: Path, array: np.ndarray, *, shift_mm: float = 0) -> str:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = shift_mm
    nib.Nifti1Image(array, affine).to_filename(path)
    return str(path)


def locate(path: Path, like: str, **place) -> str:
    box = Box(**{"low_mm": (0.0, 0.0, 0.0), "high_mm": (11.0, 11.0, 11.0), **place})
    return str(Localization(location=Location(box)).write(path, Volume.read(like), like=Path(like)))


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, str]:
    """A map with labels and probabilities of dgm16, and files that do not fit."""
    monkeypatch.chdir(tmp_path)
    dseg = np.zeros(SHAPE, np.uint8)
    dseg[2:10, 2:10, 2:10] = 11
    probseg = np.stack([dseg == index for index in range(1, 17)], axis=-1).astype(np.float32)
    chi = write(tmp_path / "chi.nii", np.random.default_rng(1).normal(0, 0.02, SHAPE).astype(np.float32))
    elsewhere = write(tmp_path / "elsewhere.nii", dseg, shift_mm=3)
    report = {"model": "dgm16", "labels": get_model("dgm16").labels, "detected": ["CN_L"], "edits": {}}
    freesurfer = np.where(dseg == 11, 12, 0).astype(np.int16)
    freesurfer[3] = 20005  # left putamen and left red nucleus with the numbers of FreeSurfer
    return {
        "chi": chi,
        "dseg": write(tmp_path / "dseg.nii", dseg),
        "probseg": write(tmp_path / "probseg.nii", probseg),
        "location": locate(tmp_path / "location.nii.gz", chi),
        "report": str(write_json({**report, "warnings": []}, tmp_path / "report.json")),
        "elsewhere": elsewhere,
        "elsewhere_location": locate(tmp_path / "elsewhere_location.nii.gz", elsewhere),
        "far_location": locate(tmp_path / "far_location.nii.gz", chi, low_mm=(50, 0, 0), high_mm=(60, 11, 11)),
        "fewer": str(write_json({**report, "labels": ["CN_L", "CN_R"]}, tmp_path / "fewer.json")),
        "other_report": str(write_json({"input": {}}, tmp_path / "other_report.json")),
        "freesurfer": write(tmp_path / "fs.nii", freesurfer),
    }


LABELLED = {"in_chi": "chi", "in_dseg": "dseg", "segmentation_report": "report"}
MEASURED = {**LABELLED, "in_probseg": "probseg", "in_location": "location"}
SEGMENTED = {"in_chi": "chi", "in_location": "location"}
OTHER_GRID = r"is not on the same grid as the map \(corners are 3 mm"


@pytest.mark.parametrize(
    ("interface", "inputs", "wrong", "message"),
    [
        (MeasureNuclei, MEASURED, {"in_r2star": "elsewhere"}, rf"^elsewhere.nii: {OTHER_GRID}"),
        (MeasureNuclei, MEASURED, {"in_location": "elsewhere_location"}, rf"^elsewhere_location.nii.gz: {OTHER_GRID}"),
        (MeasureNuclei, MEASURED, {"in_location": "dseg"}, "^dseg.nii: is another file .*; pass out_location"),
        (MeasureNuclei, MEASURED, {"reference": "csf"}, "^`reference` csf: no ventricles in `in_location`; set `find_"),
        (MeasureNuclei, MEASURED, {"segmentation_report": "fewer"}, r"^dseg.nii: label 11 is not a nucleus|has 16 vol"),
        (MeasureNuclei, MEASURED, {"segmentation_report": "other_report"}, "other_report.json: has no model; pass the"),
        (MeasureNuclei, MEASURED, {"in_dseg": "freesurfer"}, "^fs.nii: label 20005 is not a nucleus of dgm16"),
        (PlotNuclei, LABELLED, {"in_automatic": "elsewhere"}, rf"^elsewhere.nii: {OTHER_GRID}"),
        (SegmentNuclei, SEGMENTED, {"in_location": "far_location"}, "^`in_location`: is outside chi.nii; pass"),
        (
            LocalizeNuclei,
            {"in_chi": "chi"},
            {"in_session": "report"},
            "^report.json: is another file .*; pass one of out_s",
        ),
        (AlignSessions, {"in_sessions": ["chi", "chi"]}, {"names": ["a"]}, "^`names`: 1 for 2 maps; pass one per map"),
        (AlignSessions, {"in_sessions": ["chi"]}, {}, "^`in_sessions`: one map; pass those of two or more sessions"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(files, interface, inputs, wrong, message):
    def find(value):
        return [find(inner) for inner in value] if isinstance(value, list) else files.get(value, value)

    step = interface(**{name: find(value) for name, value in {**inputs, **wrong}.items()})
    with pytest.raises(InputError, match=message):
        step.run()
    assert not Path("stats.tsv").exists()
