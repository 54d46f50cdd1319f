from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.phase import read_phase

TRUE_RAD = np.array((-3.1, -2.0, -0.5, -0.02, 0.02, 0.25, 1.0, 3.1))
"""Values near both ends of all ranges, as of noise outside the head."""


def write(tmp_path, values, dtype=np.float32):
    path = tmp_path / "sub-01_echo-1_part-phase_MEGRE.nii.gz"
    nib.Nifti1Image(np.asarray(values, dtype).reshape(1, 2, -1), np.eye(4)).to_filename(path)
    return path


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (lambda rad: rad, np.float32),
        (lambda rad: np.mod(rad, 2 * math.pi), np.float32),
        (lambda rad: np.rint(rad / math.pi * 4096), np.int16),
        (lambda rad: np.rint((rad + math.pi) / (2 * math.pi) * 4096), np.int16),
        (lambda rad: np.rint(rad * 1000), np.int16),
    ],
    ids=["-pi to pi", "0 to 2 pi", "-4096 to 4095", "0 to 4095", "milliradians"],
)
def test_stored_ranges_are_read_in_radians(tmp_path, stored, dtype):
    read = read_phase(write(tmp_path, stored(TRUE_RAD), dtype)).array.ravel()
    np.testing.assert_allclose(read, TRUE_RAD, atol=2e-3)


def test_stated_radians_are_used_as_they_are(tmp_path):
    read = read_phase(write(tmp_path, (-0.5, 0.5, 0.25, 7.0)), units="rad").array.ravel()
    np.testing.assert_allclose(read, (-0.5, 0.5, 0.25, 7.0 - 2 * math.pi), atol=1e-6)


def test_integers_stated_as_radians_are_rescaled(tmp_path):
    read = read_phase(write(tmp_path, (-4096, 4094, 2048, 0), np.int16), units="rad").array.ravel()
    np.testing.assert_allclose(read[2:], (math.pi / 2, 0), atol=1e-3)
    with pytest.raises(InputError, match=r"values from -2048 to 2047 are not radians and not in a known range"):
        read_phase(write(tmp_path, (-2048, 2047, 5, 0), np.int16), units="rad")


def test_nonfinite_phase_becomes_nan(tmp_path):
    read = read_phase(write(tmp_path, (-3.14, 3.14, np.nan, np.inf))).array.ravel()
    assert np.isnan(read[2:]).all()
    assert np.isfinite(read[:2]).all()


def test_unknown_range_is_rejected(tmp_path):
    with pytest.raises(
        InputError, match=r"part-phase_MEGRE.nii.gz: values from -1 to 1 are not in a known range of ph"
    ):
        read_phase(write(tmp_path, (-1, 1, 0.5, 0)), units="arbitrary")


def test_constant_phase_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"part-phase_MEGRE.nii.gz: all values are 0, expected a phase image"):
        read_phase(write(tmp_path, (0, 0, 0, 0)), units="rad")
