from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.config import RunConfig
from bids_dgmseg.image.boxes import Box, OrientedBox
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.segmentation.results import ProbabilityBlock
from bids_dgmseg.workflow.files import (
    describe_block,
    describe_box,
    describe_quality,
    read_block,
    read_box,
    read_fractions,
    to_fractions,
    write_json,
)
from tests.oracle import oracle_model


def test_fractions_are_255ths_inside_the_block_and_0_outside():
    probabilities = np.array([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    fractions = to_fractions(probabilities, (slice(1, 4), slice(0, 1), slice(2, 3)), (5, 2, 3))
    assert fractions.shape == (5, 2, 3, 1)
    assert fractions[:, 0, 2, 0].tolist() == [0, 0, 128, 255, 0]  # 127.5 is rounded to the even 128
    assert fractions.sum() == 128 + 255


def test_fractions_come_back_from_a_file_of_another_orientation(tmp_path):
    reference = tmp_path / "lps.nii"
    nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([-1, -1, 1, 1])).to_filename(reference)
    fractions = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 2), np.uint8)
    write_like(fractions, reference, tmp_path / "probseg.nii.gz", scale=1 / 255)
    block = (slice(1, 3), slice(0, 5), slice(2, 6))
    read = read_fractions(tmp_path / "probseg.nii.gz", block)
    np.testing.assert_allclose(read, np.moveaxis(fractions[block], -1, 0) / 255, rtol=1e-6)  # float32
    assert Volume.read(reference).shape == fractions.shape[:3]


def test_a_block_comes_back_from_its_file(tmp_path):
    slices = (slice(0, 2), slice(1, 3), slice(4, 9))
    block = ProbabilityBlock(np.zeros((3, 2, 2, 5), np.float32), slices, ("DN_R",))
    write_json(describe_block(block), tmp_path / "block.json")
    assert read_block(tmp_path / "block.json") == (slices, ("DN_R",))


@pytest.mark.parametrize("tilt", [None, OrientedBox((-17.5, 2.0, 3.0), (95.0, 120.0, 105.0))])
def test_a_box_comes_back_from_its_file_with_its_tilt(tmp_path, tilt):
    box = Box((-50.0, -80.0, -60.0), (50.0, 40.0, 50.0), tilt)
    write_json(describe_box(box), tmp_path / "box.json")
    assert read_box(tmp_path / "box.json") == box


def test_the_quality_record_keeps_the_scanner_and_nothing_else_of_the_sidecar():
    sidecar = {"Manufacturer": "Siemens", "MagneticFieldStrength": 3, "PatientName": "Jo", "EchoTime": 0.02}
    record = describe_quality(
        SimpleNamespace(name="sub-01", sidecar=sidecar),  # type: ignore[arg-type]
        oracle_model(),
        RunConfig(bids_dir=Path("/ds"), output_dir=Path("/out")),
        check={"warnings": []},
        box_mm={},
        found={"warnings": []},
    )
    assert record["scanner"] == {"Manufacturer": "Siemens", "MagneticFieldStrength": 3}
