"""Alignment of labels with standard space, for every orientation of the file."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.registration import mni
from bids_dgmseg.registration.mni import (
    Normalization,
    _invert,
    head_masks,
    nucleus_shape,
    overlap,
    scan_indices,
    standard_grid,
    warp_labels,
    warp_map,
    write_field,
)

NEAR = Grid((50, 66, 53), np.array([[2.0, 0, 0, -50], [0, 2, 0, -84], [0, 0, 2, -58], [0, 0, 0, 1]]))


def standard_labels() -> np.ndarray:
    labels = np.zeros(NEAR.shape, np.uint8)
    for structure in STRUCTURES:
        labels[nucleus_shape(structure.abbreviation, NEAR) > 0.5] = structure.index
    return labels


def tilted(labels: np.ndarray) -> Volume:
    """The nuclei of a head that is smaller, tilted by 15 degrees, and elsewhere."""
    angle = np.deg2rad(15)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    move = nib.affines.from_matvec(0.88 * turn, [10, -20, 30])
    return Volume(labels, move @ NEAR.affine)


@pytest.fixture(scope="module", autouse=True)
def _few_iterations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mni, "_ITERATIONS", 5)
        yield


@pytest.fixture(scope="module")
def aligned():
    """Labels of a tilted head, and their registration."""
    labels = tilted(standard_labels())
    return labels, mni.register(labels, {})


def test_tilted_head_is_aligned(aligned):
    labels, normalization = aligned
    # Of the shapes themselves, drawn at 2 mm: smallest for the interposed nuclei, with a dozen voxels.
    dice = overlap(normalization, labels)
    assert np.median(list(dice.values())) > 0.8
    assert normalization.jacobian().min() > 0


def normalize(folder):
    chi, dseg = (folder / f"{name}.nii.gz" for name in ("chi", "dseg"))
    return mni.normalize_files(chi, dseg, None, {}, output_space=f"{MNI}:res-2", folder=folder)


def test_too_few_nuclei_are_an_input_error():
    labels = tilted(np.where(standard_labels() <= 2, standard_labels(), 0))
    with pytest.raises(InputError, match="only 2 nuclei are labelled, at least 4"):
        mni.register(labels, {})


def test_doubtful_alignment_is_reported(monkeypatch, aligned, tmp_path):
    labels, normalization = aligned
    monkeypatch.setattr(mni, "overlap", lambda normalization, labels: {"DN_L": 0.2})
    monkeypatch.setattr(mni, "register", lambda *args: normalization)
    for name in ("chi", "dseg"):
        nib.Nifti1Image(labels.array, labels.affine).to_filename(tmp_path / f"{name}.nii.gz")
    _, _, (warning,) = normalize(tmp_path)
    assert "alignment with MNI152NLin2009cAsym is doubtful (median Dice of the nuclei 0.20" in warning


def test_ventricles_are_those_of_the_template():
    mask = head_masks()["ventricles"]
    centre = nib.affines.apply_affine(mask.affine, np.argwhere(mask.array > 0).mean(axis=0))
    # Symmetric template; the bodies lie above the third ventricle.
    assert abs(centre[0]) < 1.5
    assert 10 < centre[2] < 25
    assert 8 < mask.array.sum() * 8 / 1000 < 40  # mL


def test_unknown_space_is_an_input_error():
    with pytest.raises(InputError, match="output_space MNI152Lin: unknown; use MNI152NLin2009cAsym"):
        parse_output_space("MNI152Lin")


def test_shapes_are_those_of_structures_tsv():
    for structure in STRUCTURES:
        share = nucleus_shape(structure.abbreviation, NEAR)
        centre = np.average(NEAR.centres_mm().reshape(-1, 3), axis=0, weights=share.ravel())
        # The caudate's first point is the centre of its head, not of the whole nucleus.
        assert np.linalg.norm(centre - structure.mni_mm) < 5, structure.abbreviation


def test_grid_is_that_of_templateflow():
    assert standard_grid().shape == (193, 229, 193)
    assert standard_grid(2).affine[:3, 3].tolist() == [-96, -132, -78]


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
