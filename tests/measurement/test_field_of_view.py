import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.measurement.field_of_view import View


def gap(view: View, *place: int) -> float:
    """The gap of one voxel."""
    region = np.zeros(view.inside.shape, bool)
    region[place] = True
    return view.measure_gap(region)


def slab(*measured: int, length: int = 20, width: int = 15) -> np.ndarray:
    mask = np.zeros((width, width, length), bool)
    mask[..., list(measured)] = True
    return mask


def test_the_gap_to_the_edge_is_counted_in_mm_between_surfaces():
    # 15 voxels across: the middle one has 7 on each side of 1 mm; along z the slab begins at slice 5.
    view = View.of(slab(*range(5, 20)), voxel_size_mm=(1.0, 1.0, 3.0))
    assert gap(view, 7, 7, 5) == 0  # touches the empty slice, however thick slices are
    assert gap(view, 7, 7, 6) == 3
    assert gap(view, 7, 7, 12) == 7  # x and y end before z, which is 21 mm away
    assert gap(view, 7, 7, 19) == 0


def test_diagonal_gaps_are_those_of_boxes():
    # Only a corner block is outside: from (8, 8, 8) 4 and 4 voxels of 0.5 mm lie between: the hypotenuse of 2 and 2.
    measured = np.ones((40, 40, 3), bool)
    measured[:16, :16] = False
    view = View.of(np.tile(measured, (1, 1, 10)), voxel_size_mm=(0.5, 0.5, 5.0))
    assert gap(view, 20, 20, 15) == pytest.approx(np.hypot(2, 2))


def test_single_voxels_without_a_value_are_no_edge():
    measured = np.ones((15, 15, 15), bool)
    measured[7, 7, 7] = False
    view = View.of(measured, voxel_size_mm=(1.0, 1.0, 1.0))
    assert view.inside.all()
    assert gap(view, 7, 7, 7) == 7


def test_a_hole_of_three_voxels_is_an_edge():
    measured = np.ones((15, 15, 15), bool)
    measured[6:9, 6:9, 6:9] = False
    view = View.of(measured, voxel_size_mm=(1.0, 1.0, 1.0))
    assert not view.inside[7, 7, 7]
    assert gap(view, 9, 7, 7) == 0
    assert gap(view, 11, 7, 7) == 2


def test_nothing_measured_is_all_outside():
    view = View.of(np.zeros((4, 4, 4), bool), voxel_size_mm=(1.0, 1.0, 1.0))
    assert not view.inside.any()
    assert gap(view, 1, 1, 1) == 0


def test_a_block_keeps_the_distances_of_the_whole():
    view = View.of(np.ones((9, 9, 9), bool), voxel_size_mm=(1.0, 1.0, 1.0))
    assert gap(view.cut((slice(4, 5),) * 3), 0, 0, 0) == 4


def test_the_nearest_voxel_of_a_region_counts():
    # From 12 voxels along z: the region's ends leave 3 below and 2 above; across, 5 on either side.
    region = np.zeros((11, 11, 12), bool)
    region[5, 5, 3:10] = True
    assert View.of(np.ones(region.shape, bool), voxel_size_mm=(1.0, 1.0, 1.0)).measure_gap(region) == 2


def test_an_empty_region_has_no_gap():
    measured = np.ones((4, 4, 4), bool)
    assert np.isnan(View.of(measured, voxel_size_mm=(1.0, 1.0, 1.0)).measure_gap(~measured))


@given(seed=st.integers(0, 2**32 - 1))
def test_gaps_agree_with_all_pairs_of_voxels(seed):
    rng = np.random.default_rng(seed)
    measured = np.ones((7, 8, 9), bool)
    x, y, z = rng.integers(0, 5, 3)
    measured[x : x + 3, y : y + 3, z : z + 3] = False
    size_mm = np.array([0.7, 1.0, 3.0])
    view = View.of(measured, voxel_size_mm=(0.7, 1.0, 3.0))
    beyond = np.argwhere(np.pad(view.inside, 1, constant_values=False) == 0) - 1
    place = np.array([rng.integers(0, size) for size in measured.shape])
    gaps = np.linalg.norm(np.maximum(np.abs(beyond - place) - 1, 0) * size_mm, axis=1)
    assert gap(view, *place) == pytest.approx(gaps.min(), abs=1e-5)
