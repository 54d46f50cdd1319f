import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.alignment import OutlineMatch, compare_outlines
from bids_dgmseg.image.volume import Volume

SIZE_MM = np.array([3.0, 2.0, 3.0])
POINTS_MM = np.array([[-20.0, 10, 0], [20, 10, 0], [0, -10, -10]])


def brain(*, shift_mm=(0.0, 0.0, 0.0), turn_deg=(0.0, 0.0, 0.0), margin_mm=0.0, bottom_mm=-np.inf) -> Volume:
    """Ellipsoid of 65 x 85 x 60 mm, which is no sphere, so that turns show."""
    shape = (60, 100, 54)
    affine = np.diag([*SIZE_MM, 1.0])
    affine[:3, 3] = -SIZE_MM * (np.array(shape) - 1) / 2
    points = np.indices(shape).reshape(3, -1).T * SIZE_MM + affine[:3, 3]
    inside = (points - shift_mm) @ Rotation.from_rotvec(turn_deg, degrees=True).as_matrix()
    axes_mm = np.array([65.0, 85.0, 60.0]) + margin_mm
    mask = (np.linalg.norm(inside / axes_mm, axis=1) < 1) & (points[:, 2] > bottom_mm)
    return Volume(mask.reshape(shape), affine)


def compare(other: Volume, reference: Volume | None = None) -> OutlineMatch:
    match = compare_outlines(reference or brain(), other, POINTS_MM)
    assert match is not None
    return match


@pytest.mark.parametrize("shift_mm", [(4.0, 0.0, 0.0), (0.0, 4.0, 0.0), (0.0, 0.0, -4.0)])
def test_shift_is_found(shift_mm):
    match = compare(brain(shift_mm=shift_mm, margin_mm=-4))
    assert match.shift_mm == pytest.approx(4, abs=0.6)
    assert match.offset_mm == pytest.approx(-4, abs=0.7)


def test_turn_moves_the_nuclei():
    turned = compare(brain(turn_deg=(0.0, 0.0, 10.0)))
    expected_mm = np.mean(np.linalg.norm(POINTS_MM[:, :2], axis=1)) * np.radians(10)
    assert turned.shift_mm == pytest.approx(expected_mm, rel=0.35)  # large turns are underestimated


def test_erosion_and_cut_are_no_displacement():
    for other in (brain(margin_mm=-5), brain(margin_mm=4), brain(bottom_mm=-20)):
        assert compare(other).shift_mm < 0.3
    assert compare(brain(), brain(bottom_mm=-20)).shift_mm < 0.3


def test_few_points_give_no_answer():
    slab = brain().array.copy()
    slab[:, :, :25] = slab[:, :, 27:] = False
    assert compare_outlines(brain(), brain().with_array(slab), POINTS_MM) is None
    assert compare_outlines(brain(), brain().with_array(np.zeros_like(slab)), POINTS_MM) is None
