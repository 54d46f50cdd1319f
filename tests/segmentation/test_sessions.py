"""Sessions of a participant, simulated by turning one head in the world."""

import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, resample, world_grid
from bids_dgmseg.image.masks import valid_box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.engines import engine_of
from bids_dgmseg.segmentation.sessions import AlignedSessions, align_sessions
from tests.conftest import HEAD, coarsen_sessions

GRID = world_grid(HEAD, (2.5, 2.5, 2.5))
POSES = {
    "ses-1": from_matvec(Rotation.from_euler("xyz", [6, -3, 4], degrees=True).as_matrix(), [4, -3, 5]),
    "ses-2": from_matvec(Rotation.from_euler("xyz", [-5, 2, -7], degrees=True).as_matrix(), [-6, 8, -2]),
}
"""From the head of the phantom to the world of the session, mm."""
CENTRES_MM = np.array([item.mni_mm for item in get_model("dgm16").structures])


def turned(pose, *, seed):
    chi = PHANTOM.chi(GRID, seed=seed, supersampling=1)
    return Volume(chi.array, pose @ chi.affine)


@pytest.fixture(scope="module")
def maps() -> list[Volume]:
    return [turned(pose, seed=seed) for seed, pose in enumerate(POSES.values())]


@pytest.fixture(scope="module")
def aligned(maps) -> AlignedSessions:
    return align_sessions(maps, names=list(POSES))


def heads_from_midspace(aligned, points_mm, poses=POSES):
    """Positions in the head that each session gives to points of the mid-space."""
    return [
        apply_affine(np.linalg.inv(pose) @ matrix, points_mm)
        for pose, matrix in zip(poses.values(), aligned.to_maps, strict=True)
    ]


def test_sessions_agree_where_a_point_is(aligned):
    first, second = heads_from_midspace(aligned, CENTRES_MM)
    assert np.linalg.norm(first - second, axis=1).max() < 0.5  # a fifth of a voxel
    assert min(aligned.correlations) > 0.8


def test_mid_space_is_halfway(aligned):
    angles = [np.rad2deg(Rotation.from_matrix(item[:3, :3]).magnitude()) for item in aligned.to_maps]
    between = POSES["ses-1"] @ np.linalg.inv(POSES["ses-2"])
    half = np.rad2deg(Rotation.from_matrix(between[:3, :3]).magnitude()) / 2
    np.testing.assert_allclose(angles, half, atol=0.3)


def test_map_of_another_head_is_refused(maps):
    other = turned(POSES["ses-2"], seed=7)
    inverted = other.with_array(-other.array)  # as if the sign of the phase were wrong
    with pytest.raises(InputError, match=r"^ses-[12]: cannot be aligned with the other sessions"):
        align_sessions([maps[0], inverted], names=list(POSES))


def test_mean_contains_the_head_of_each_session(maps, monkeypatch):
    """The first session ends above the cerebellum, 25 mm below the centre of the head; the second does not."""
    coarsen_sessions(monkeypatch)
    points = np.moveaxis(np.indices(maps[0].shape), 0, -1)
    z_mm = apply_affine(np.linalg.inv(POSES["ses-1"]) @ maps[0].affine, points)[..., 2]
    short = maps[0].with_array(np.where(z_mm < -25, np.float32(0), maps[0].array))
    aligned = align_sessions([short, maps[1]], names=list(POSES))
    mean, whole = valid_box(aligned.mean), valid_box(aligned.maps[1])
    assert (np.array(mean.low_mm) < np.array(whole.low_mm) + 2).all()
    assert (np.array(mean.high_mm) > np.array(whole.high_mm) - 2).all()

    grid = Grid(aligned.mean.shape, aligned.mean.affine)
    points = np.moveaxis(np.indices(grid.shape), 0, -1)
    heads_mm = apply_affine(np.linalg.inv(POSES["ses-1"]) @ aligned.to_maps[0] @ grid.affine, points)
    (centre,) = [item.mni_mm for item in get_model("dgm16").structures if item.abbreviation == "DN_L"]
    nucleus = (np.linalg.norm(heads_mm - centre, axis=-1) < 8) & (heads_mm[..., 2] < -28)
    other = resample(aligned.maps[1], grid, antialias=True).array
    np.testing.assert_array_equal(aligned.mean.array[nucleus], other[nucleus])  # not half of it
    assert np.count_nonzero(nucleus) > 100


def test_models_that_resample_maps_themselves_are_refused():
    with pytest.raises(InputError, match="`longitudinal`: not supported by nnunet2step"):
        engine_of(get_model("nnunet2step"), longitudinal=True)
