"""Multi-atlas segmentation of a deformed phantom, and label fusion by hand."""

import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.evaluate.multi_atlas import MULTI_ATLAS, Warped, join_labels, segment_by_atlases, vote_locally
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration.align import Atlas, deform
from bids_dgmseg.stats.agreement import dice
from tests.conftest import HEAD

GRID = world_grid(HEAD, (2.5, 2.5, 2.5))
COARSE = replace(MULTI_ATLAS, input=replace(MULTI_ATLAS.input, spacing_mm=(2.0, 2.0, 2.0)))
LARGE = [STRUCTURES.named(f"{name}_{side}") for name in ("DN", "CN", "PUT", "GP") for side in "LR"]
"""Nuclei of more than a few voxels of 2.5 mm."""


def bump_mm(points_mm):
    """Move the middle of the head by up to 4 mm to the left, front and top: smooth, and 0 at its edge."""
    near = np.exp(-((points_mm / [45, 55, 45]) ** 2).sum(axis=-1, keepdims=True))
    return near * [-4.0, 3.0, 3.0]


@pytest.fixture(scope="module")
def bent():
    """Map and labels of the phantom after its points have moved by `bump_mm`; the inverse is approximate."""
    points = GRID.centres_mm()
    back = points - bump_mm(points - bump_mm(points))
    fine = world_grid(HEAD.expanded(5), (1.25, 1.25, 1.25))
    indices = np.moveaxis(back - fine.affine[:3, 3], -1, 0) / 1.25
    images = (PHANTOM.chi(fine, seed=1, supersampling=1), 1), (PHANTOM.dseg(fine), 0)
    return [Volume(ndimage.map_coordinates(one.array, indices, order=order), GRID.affine) for one, order in images]


def straight(name, *, seed, pitch_deg=0.0):
    """Atlas of the phantom itself, turned in its own world."""
    turn = nib.affines.from_matvec(Rotation.from_euler("x", pitch_deg, degrees=True).as_matrix(), [10, -6, 4])
    chi, labels = PHANTOM.chi(GRID, seed=seed, supersampling=1), PHANTOM.dseg(GRID)
    return Atlas(name, Volume(chi.array, turn @ chi.affine), Volume(labels.array, turn @ labels.affine))


def test_two_atlases_segment_a_deformed_phantom(bent):
    atlases = [straight("a", seed=5), straight("b", seed=6, pitch_deg=6.0)]
    segmented = segment_by_atlases(bent[0], atlases, COARSE, fuse=vote_locally)
    scores = dice(bent[1].array.astype(int), segmented.labels.astype(int), structures=LARGE)["dice"]
    assert scores.min() > 0.8
    np.testing.assert_allclose(segmented.block.probabilities.sum(axis=0), 1, atol=1e-5)
    for structure in STRUCTURES:
        x = (bent[0].affine @ [*np.argwhere(segmented.labels == structure.index).mean(axis=0), 1])[0]
        assert (x < 0) == (structure.hemisphere == "L")


def test_displacement_points_from_fixed_to_moving(bent):
    # A point that moved to the left is further right in the map that did not move: the centre of PUT_L.
    moving = PHANTOM.chi(GRID, seed=5, supersampling=1)
    found, again = (deform(bent[0], moving, HEAD.expanded(-20)) for _ in range(2))
    np.testing.assert_array_equal(found.displacement_mm, again.displacement_mm)
    labels = bent[1].array == STRUCTURES.named("PUT_L").index
    nearby = resample(bent[1].with_array(labels.astype(np.uint8)), found.grid, order=0).array > 0
    points = found.grid.centres_mm()[nearby]
    expected = -bump_mm(points - bump_mm(points)).mean(axis=0)
    np.testing.assert_allclose(found.displacement_mm[:, nearby].mean(axis=1), expected, atol=1.0)


def test_atlases_without_nuclei_are_refused(bent):
    bare = straight("a", seed=5)
    bare = replace(bare, labels=bare.labels.with_array(np.zeros_like(bare.labels.array)))
    with pytest.raises(InputError, match="atlases: none contains a nucleus; check their labels"):
        segment_by_atlases(bent[0], [bare], COARSE, fuse=vote_locally)


SHAPE = (7, 7, 7)


def atlas(label: int, ppm: float, *, valid: bool = True) -> Warped:
    """A map of one value whose every voxel has one label."""
    return Warped(np.full(SHAPE, ppm, np.float32), np.full(SHAPE, label, np.uint8), np.full(SHAPE, valid))


def test_dissimilar_atlas_has_less_weight():
    # 0.006 ppm apart: d = 9 (0.002 ppm)^2, so that its weight is a tenth of the one that looks the same.
    shares = vote_locally(np.full(SHAPE, 0.1), [atlas(1, 0.1), atlas(2, 0.106)], n_channels=4)
    np.testing.assert_allclose(shares[:, 3, 3, 3], [0, 10 / 11, 1 / 11, 0], rtol=1e-4)
    assert shares.shape == (4, *SHAPE)


def test_weights_depend_on_the_neighbourhood_only():
    chi = np.zeros(SHAPE)
    chi[6] = 0.5
    same = Warped(np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.uint8), np.ones(SHAPE, bool))
    shares = vote_locally(chi, [same, atlas(2, 0.002)], n_channels=3)
    np.testing.assert_allclose(shares[1:, 3, 3, 3], [2 / 3, 1 / 3], rtol=1e-4)  # weights 1 and 1 / 2
    assert shares[2, 5, 3, 3] == pytest.approx(0.5, abs=0.01)  # the bright plane differs from both alike


def test_invalid_voxels_of_an_atlas_do_not_vote():
    shares = vote_locally(np.zeros(SHAPE), [atlas(0, 0.0, valid=False), atlas(1, 0.1)], n_channels=2)
    np.testing.assert_array_equal(shares[1], 1)
    shares = vote_locally(np.zeros(SHAPE), [atlas(1, 0.0, valid=False)], n_channels=2)
    np.testing.assert_array_equal(shares[0], 1)


def test_joint_fusion_follows_similar_atlases():
    pytest.importorskip("ants", reason="joint label fusion is ANTs'")
    rng = np.random.default_rng(0)
    size = (16, 16, 16)
    chi = rng.normal(0, 0.05, size).astype(np.float32)
    labels = np.zeros(size, np.uint8)
    labels[4:12, 4:12, 4:12] = 3
    there, wrong = np.ones(size, bool), np.roll(labels, 3, 0)
    good = [Warped(chi + rng.normal(0, 0.005, size).astype(np.float32), labels, there) for _ in range(2)]
    bad = Warped(rng.normal(0, 0.05, size).astype(np.float32), wrong, there)
    shares = join_labels(chi, [*good, bad], n_channels=5)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
    assert shares.min() >= 0
    np.testing.assert_array_equal(shares.argmax(axis=0), labels)


def test_missing_antspy_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    with pytest.raises(InputError, match="ANTsPy: not installed; run `pip install antspyx` or use multiatlas"):
        join_labels(np.zeros(SHAPE), [atlas(1, 0.1)], n_channels=2)


def test_joint_fusion_of_one_atlas_is_refused(monkeypatch):
    monkeypatch.setattr("bids_dgmseg.lab.evaluate.multi_atlas.import_ants", lambda: None)
    with pytest.raises(InputError, match=r"^`atlases`: joint label fusion needs two or more labelled heads"):
        join_labels(np.zeros(SHAPE), [atlas(1, 0.1)], n_channels=2)
