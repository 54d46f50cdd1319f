"""Votes of atlases, by hand."""

import sys

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.segmentation.multi_atlas import Warped, join_labels, vote_locally

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
    assert shares[2, 5, 3, 3] == pytest.approx(0.5, abs=0.01)  # the bright plane is as strange to both


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
