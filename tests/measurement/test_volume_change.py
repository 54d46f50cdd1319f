"""Change of volume between sessions, on blurred ellipsoids of known size."""

import numpy as np
import pandas as pd
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation
from scipy.special import ndtr

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import add_session_columns, measure_session_volumes, measure_volume_change
from bids_dgmseg.models.structures import STRUCTURES

RN = STRUCTURES.named("RN_L")
RADIUS_MM, BLUR_MM, CONTRAST_PPM = 6.0, 0.6, 0.1
SHAPE, CENTRE_MM = (36, 36, 36), np.array([17.3, 17.8, 18.1])
ROUND = (1.0, 1.0, 1.0)
GRID_44 = Grid((44, 44, 44), np.eye(4))
VOLUME_MM3 = 4 / 3 * np.pi * RADIUS_MM**3


def ball(points_mm, *, scale=ROUND, shift_mm=(0.0, 0.0, 0.0), contrast_ppm=CONTRAST_PPM):
    """An ellipsoid in tissue of 0.02 ppm; its semi-axes are 6 mm times `scale`, its surface is blurred."""
    x = (points_mm - CENTRE_MM - shift_mm) / scale
    radius = np.linalg.norm(x, axis=-1)
    return (0.02 + contrast_ppm * ndtr((RADIUS_MM - radius) / BLUR_MM)).astype(np.float32)


def points(size_mm=(1.0, 1.0, 1.0)):
    x, y, z = (int(36 / size) for size in size_mm)
    return Grid((x, y, z), np.diag([*size_mm, 1.0])).centres_mm()


def labels(points_mm):
    inside = np.linalg.norm(points_mm - CENTRE_MM, axis=-1) < RADIUS_MM
    return np.where(inside, RN.index, 0).astype(np.uint8)


def changes(*maps, size_mm=(1.0, 1.0, 1.0), dseg=None):
    table = measure_volume_change(
        maps, labels(points(size_mm)) if dseg is None else dseg, structures=[RN], voxel_size_mm=size_mm
    )
    return table.loc["RN_L"].to_numpy()


@pytest.mark.parametrize(("size_mm", "change"), [((1.0, 1.0, 1.0), -0.02), ((0.8, 0.8, 1.5), -0.1)])
def test_shrinkage_is_recovered_within_a_tenth(change, size_mm):
    at = points(size_mm)
    first, second = changes(ball(at), ball(at, scale=(1 + change) ** (1 / 3)), size_mm=size_mm)
    assert (1 + second / 100) / (1 + first / 100) - 1 == pytest.approx(change, rel=0.1)
    assert first + second == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "other",
    [{"contrast_ppm": 1.1 * CONTRAST_PPM}, {"contrast_ppm": 0.9 * CONTRAST_PPM, "shift_mm": (0.4, -0.3, 0.2)}],
    ids=["iron", "iron and motion"],
)
def test_other_differences_are_no_change_of_volume(other):
    shifted_zero = ball(points(), **other) + np.float32(0.01)
    np.testing.assert_allclose(changes(ball(points()), shifted_zero), 0, atol=0.3)


def test_missing_voxels_are_left_out():
    maps = [ball(points()), ball(points(), scale=0.95 ** (1 / 3))]
    maps[1][:, :, :13] = np.nan  # a cap of the nucleus
    first, second = changes(*maps)
    assert second - first == pytest.approx(-5, rel=0.1)
    maps[0][:, :, :16] = np.nan
    assert np.isnan(changes(*maps)).all()


def test_small_and_missing_nuclei_have_no_change():
    dseg = labels(points())
    dseg[:] = 0
    assert np.isnan(changes(ball(points()), ball(points()), dseg=dseg)).all()
    dseg[17:19, 17:19, 17:20] = RN.index  # 12 mm³
    assert np.isnan(changes(ball(points()), ball(points()), dseg=dseg)).all()


def test_sessions_keep_their_own_grids():
    at, maps = points(), []
    for sign, scale in ((1, 1.0), (-1, 0.9 ** (1 / 3))):
        turn = 0.9 * Rotation.from_euler("xyz", sign * np.array([4, -3, 5]), degrees=True).as_matrix()
        affine = from_matvec(turn, CENTRE_MM - turn @ np.full(3, 22.0))
        maps.append(Volume(ball(apply_affine(affine, GRID_44.centres_mm()), scale=scale), affine))
    probability = ndtr((RADIUS_MM - np.linalg.norm(at - CENTRE_MM, axis=-1)) / BLUR_MM)
    first, second = measure_session_volumes(maps, Volume(labels(at), np.eye(4)), probability[None], [RN])
    assert first["RN_L"]["mean_mm3"] == second["RN_L"]["mean_mm3"] == pytest.approx(VOLUME_MM3, rel=0.05)
    ratio = (1 + second["RN_L"]["change_percent"] / 100) / (1 + first["RN_L"]["change_percent"] / 100)
    assert ratio - 1 == pytest.approx(-0.1, rel=0.1)


def test_parts_are_joined_to_their_nucleus():
    at = points()
    inner, outer = STRUCTURES.named("GPi_L"), STRUCTURES.named("GPe_L")
    dseg = np.where(labels(at) == 0, 0, np.where(at[..., 0] > CENTRE_MM[0], inner.index, outer.index)).astype(np.uint8)
    shares = np.stack([dseg == structure.index for structure in (inner, outer)]).astype(np.float32)
    maps = [Volume(ball(at, scale=scale), np.eye(4)) for scale in (1.0, 0.95 ** (1 / 3))]
    first, second = measure_session_volumes(maps, Volume(dseg, np.eye(4)), shares, [inner, outer])
    assert list(first) == ["GPi_L", "GPe_L", "GP_L"]
    assert first["GP_L"]["mean_mm3"] == np.count_nonzero(dseg)
    assert second["GP_L"]["change_percent"] - first["GP_L"]["change_percent"] == pytest.approx(-5, rel=0.1)


@pytest.mark.parametrize("column", ["edited", "excluded_fraction"])
def test_changed_outlines_have_no_change_of_volume(column):
    stats = pd.DataFrame({"abbreviation": ["RN_L", "RN_R"], column: [0.5, 0]})
    volumes = {name: {"mean_mm3": 200.0, "change_percent": 1.0} for name in stats["abbreviation"]}
    table = add_session_columns(stats, volumes, STRUCTURES.both_sides(["RN"]))
    assert np.isnan(table["volume_change_percent"][0])
    assert table["volume_longitudinal_mm3"].tolist()[1] == pytest.approx(202)
