"""Transforms between standard space and a scan: inverse, Jacobian, sampling, files for ITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.registration.mni import _invert
from bids_dgmseg.registration.warp import (
    Normalization,
    scan_indices,
    warp_labels,
    warp_map,
    write_field,
)

GRID = Grid((24, 26, 28), np.diag([3.0, 3.0, 3.0, 1.0]))


@pytest.fixture(scope="module")
def normalization() -> Normalization:
    """An affine, and a smooth displacement of at most 2 mm that is 0 at the edges, with its inverse by ITK."""
    noise = np.random.default_rng(0).normal(size=(3, *GRID.shape))
    field_mm = np.stack([ndimage.gaussian_filter(part, 4) for part in noise])
    field_mm *= np.prod(np.meshgrid(*(np.hanning(size) for size in GRID.shape), indexing="ij"), axis=0)
    field_mm *= 2 / np.linalg.norm(field_mm, axis=0).max()
    affine = np.array([[1.1, 0.1, 0, 5], [-0.1, 0.95, 0.05, -3], [0, 0, 1.05, 2], [0, 0, 0, 1]])
    return Normalization(affine, GRID, field_mm, _invert(field_mm, GRID))


def test_inverse_returns_to_the_start(normalization):
    points = np.random.default_rng(1).uniform(10, 60, (200, 3))
    back = normalization.points_in_standard(normalization.points_in_scan(points))
    # Both directions interpolate a field on a grid of 3 mm linearly.
    assert np.abs(back - points).max() < 0.3  # a tenth of a voxel


def test_jacobian_is_positive_and_that_of_the_affine_at_the_edges(normalization):
    jacobian = normalization.jacobian()
    assert jacobian.min() > 0
    assert jacobian[0, 0, 0] == pytest.approx(np.linalg.det(normalization.to_scan), rel=1e-6)


def test_itk_reads_the_field_as_the_same_transform(normalization, tmp_path):
    path = write_field(normalization.field_mm(GRID), GRID, tmp_path / "xfm.nii.gz")
    image = SimpleITK.ReadImage(str(path), SimpleITK.sitkVectorFloat64)
    transform = SimpleITK.DisplacementFieldTransform(image)
    flip = np.array([-1, -1, 1])  # ITK's coordinates are LPS+
    point = np.array([33.0, 36.0, 45.0])
    moved = np.array(transform.TransformPoint((flip * point).tolist())) * flip
    assert moved == pytest.approx(normalization.points_in_scan(point[None])[0], abs=1e-3)


def test_background_is_not_mixed_into_a_map():
    chi = np.full((8, 8, 8), np.nan)
    chi[2:6, 2:6, 2:6] = 0.1
    half = np.diag([0.5, 0.5, 0.5, 1.0])
    warped = warp_map(chi, scan_indices(Normalization(np.eye(4), GRID), Grid((14, 14, 14), half), np.eye(4)))
    assert set(np.unique(warped.astype(float).round(6))) == {0.0, 0.1}


def test_zeros_inside_a_map_of_one_sign_are_values():
    chi = np.zeros((12, 12, 12))
    chi[3:9, 3:9, 3:9] = 0.1
    chi[5, 3:9, 3:9] = 0  # no source
    # A quarter and three quarters of the way from x = 5 to the value at x = 4; from that at x = 3 to the background.
    indices = np.array([[4.75, 4.25, 2.75], [6, 6, 6], [6, 6, 6]]).reshape(3, 3, 1, 1)
    assert warp_map(chi, indices).ravel() == pytest.approx([0.025, 0.075, 0.1])


def test_labels_keep_their_place():
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:5, 2:8, 2:8], labels[5:8, 2:8, 2:8] = 7, 8
    affine = np.array([[-1.0, 0, 0, 9], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # stored from right to left
    warped = warp_labels(labels, scan_indices(Normalization(np.eye(4), GRID), Grid((10, 10, 10), np.eye(4)), affine))
    assert np.array_equal(warped, labels[::-1])


def test_no_labels_stay_no_labels():
    indices = scan_indices(Normalization(np.eye(4), GRID), Grid((4, 4, 4), np.eye(4)), np.eye(4))
    assert not warp_labels(np.zeros((4, 4, 4), np.uint8), indices).any()
