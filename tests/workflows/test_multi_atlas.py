"""Multi-atlas segmentation of a deformed phantom, and label fusion by hand."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from multi_atlas import MULTI_ATLAS, Warped, join_labels, segment_by_atlases, vote_locally
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration.align import Atlas
from bids_dgmseg.stats.overlap import dice
from tests.conftest import HEAD

GRID = world_grid(HEAD, (3.5, 3.5, 3.5))
COARSE = replace(MULTI_ATLAS, input=replace(MULTI_ATLAS.input, spacing_mm=(3.0, 3.0, 3.0)))
LARGE = [STRUCTURES.named(f"{name}_{side}") for name in ("CN", "PUT") for side in "LR"]
"""Nuclei of more than a few voxels."""


def bump_mm(points_mm):
    """Move the middle of the head by up to 4 mm to the left, front and top: smooth, and 0 at its edge."""
    near = np.exp(-((points_mm / [45, 55, 45]) ** 2).sum(axis=-1, keepdims=True))
    return near * [-4.0, 3.0, 3.0]


@pytest.fixture(scope="module")
def bent():
    """Map and labels of the phantom after its points have moved by `bump_mm`; the inverse is approximate."""
    points = GRID.centres_mm()
    back = points - bump_mm(points - bump_mm(points))
    fine = world_grid(HEAD.expanded(5), (1.75, 1.75, 1.75))
    indices = np.moveaxis(back - fine.affine[:3, 3], -1, 0) / 1.75
    images = (PHANTOM.chi(fine, seed=1, supersampling=1), 1), (PHANTOM.dseg(fine), 0)
    return [Volume(ndimage.map_coordinates(image.array, indices, order=order), GRID.affine) for image, order in images]


def straight(name, *, seed, pitch_deg=0.0):
    """Atlas of the phantom itself, turned in its own world."""
    turn = nib.affines.from_matvec(Rotation.from_euler("x", pitch_deg, degrees=True).as_matrix(), [10, -6, 4])
    chi, labels = PHANTOM.chi(GRID, seed=seed, supersampling=1), PHANTOM.dseg(GRID)
    return Atlas(name, Volume(chi.array, turn @ chi.affine), Volume(labels.array, turn @ labels.affine))


@pytest.mark.slow
def test_two_atlases_segment_a_deformed_phantom(bent):
    atlases = [straight("a", seed=5), straight("b", seed=6, pitch_deg=6.0)]
    segmented = segment_by_atlases(bent[0], atlases, COARSE, fuse=vote_locally)
    scores = dice(bent[1].array.astype(int), segmented.labels.astype(int), structures=LARGE)["dice"]
    assert scores.min() > 0.75
    np.testing.assert_allclose(segmented.block.probabilities.sum(axis=0), 1, atol=1e-5)
    for structure in LARGE:
        x = (bent[0].affine @ [*np.argwhere(segmented.labels == structure.index).mean(axis=0), 1])[0]
        assert (x < 0) == (structure.hemisphere == "L")


SHAPE = (7, 7, 7)


def atlas(label: int, ppm: float, *, valid: bool = True) -> Warped:
    """A map of one value whose every voxel has one label."""
    return Warped(np.full(SHAPE, ppm, np.float32), np.full(SHAPE, label, np.uint8), np.full(SHAPE, valid))


def test_dissimilar_atlas_has_less_weight():
    # 0.006 ppm apart: d = 9 (0.002 ppm)^2, so that its weight is a tenth of the one that looks the same.
    shares = vote_locally(np.full(SHAPE, 0.1), [atlas(1, 0.1), atlas(2, 0.106)], n_channels=4)
    np.testing.assert_allclose(shares[:, 3, 3, 3], [0, 10 / 11, 1 / 11, 0], rtol=1e-4)
    assert shares.shape == (4, *SHAPE)


def test_invalid_voxels_of_an_atlas_do_not_vote():
    shares = vote_locally(np.zeros(SHAPE), [atlas(0, 0.0, valid=False), atlas(1, 0.1)], n_channels=2)
    np.testing.assert_array_equal(shares[1], 1)
    shares = vote_locally(np.zeros(SHAPE), [atlas(1, 0.0, valid=False)], n_channels=2)
    np.testing.assert_array_equal(shares[0], 1)


def test_joint_fusion_follows_similar_atlases():
    pytest.importorskip("ants", reason="joint label fusion is ANTs'")
    rng, labels, there = np.random.default_rng(0), np.zeros((16, 16, 16), np.uint8), np.ones((16, 16, 16), bool)
    labels[4:12, 4:12, 4:12] = 3
    chi, small, other = (rng.normal(0, sd, labels.shape).astype(np.float32) for sd in (0.05, 0.005, 0.05))
    good, bad = Warped(chi + small, labels, there), Warped(other, np.roll(labels, 3, 0), there)
    shares = join_labels(chi, [good, Warped(chi - small, labels, there), bad], n_channels=5)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(shares.argmax(axis=0), labels)
