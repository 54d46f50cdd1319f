from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import check_header

UPRIGHT = np.diag([2.0, 2.0, 2.0, 1.0])
MIRRORED = np.diag([-2.0, 2.0, 2.0, 1.0])


def image(*, qform=(UPRIGHT, 1), sform=(UPRIGHT, 1)) -> nib.Nifti1Image:
    """Ten voxels along each axis; each form is an affine and its code."""
    made = nib.Nifti1Image(np.zeros((10, 10, 10), np.float32), UPRIGHT)
    made.set_qform(*qform)
    made.set_sform(*sform)
    return made


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (1, 4)])
def test_one_place_or_twice_the_same_is_no_doubt(codes):
    assert check_header(image(qform=(UPRIGHT, codes[0]), sform=(UPRIGHT, codes[1])), "a.nii") == ()


def test_a_header_without_orientation_is_doubted():
    (warning,) = check_header(image(qform=(None, 0), sform=(None, 0)), "a.nii")
    assert warning.startswith("a.nii: no orientation in the header (qform and sform codes are 0); the first axis is")


def test_without_orientation_the_first_axis_runs_to_the_left():
    assert nib.aff2axcodes(image(qform=(None, 0), sform=(None, 0)).affine) == ("L", "A", "S")


def test_two_places_that_differ_are_doubted():
    (warning,) = check_header(image(sform=(MIRRORED, 1)), "a.nii")
    # Voxel 9 of the first axis lies at 18 mm in one and at -18 mm in the other.
    assert warning == "a.nii: qform and sform differ by up to 36 mm; the sform is used, check left and right"


def test_two_sizes_of_a_voxel_are_doubted():
    strange = image(qform=(None, 0))
    strange.header["pixdim"][1:4] = [2.0, 2.0, 3.0]
    (warning,) = check_header(strange, "a.nii")
    assert warning == (
        "a.nii: voxel size is 2 x 2 x 3 mm in pixdim but 2 x 2 x 2 mm in the affine; the affine is used, "
        "check the voxel size"
    )


@pytest.mark.parametrize(("edge", "said"), [(2500, "2.5e.03"), (0.0025, "0.0025")])  # in micrometres, in metres
def test_voxels_in_another_unit_of_length_are_refused(edge, said):
    strange = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.diag([1, edge, edge, 1]))
    with pytest.raises(InputError, match=rf"^a.nii: voxel size 1 x {said} x {said} mm, expected 0.05 to 20 mm"):
        check_header(strange, "a.nii")


@pytest.mark.parametrize(("shear", "refused"), [(0.02, False), (0.1, True)])  # tan 1.1 and tan 5.7 degrees
def test_voxels_that_are_no_boxes_are_refused(shear, refused):
    sheared = UPRIGHT.copy()
    sheared[0, 1] = 2 * shear
    turn = np.array([[0.8, 0, 0.6, 0], [0, 1, 0, 0], [-0.6, 0, 0.8, 0], [0, 0, 0, 1]])
    slanted = nib.Nifti1Image(np.zeros((10, 10, 10), np.float32), turn @ sheared)
    if not refused:
        check_header(slanted, "a.nii")
        return
    with pytest.raises(InputError, match=r"^a.nii: the axes deviate from right angles by 5.7 degrees \(.*; resample"):
        check_header(slanted, "a.nii")
