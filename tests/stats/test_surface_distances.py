import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from bids_dgmseg.stats.overlap import surface_distances

UNIT = (1.0, 1.0, 1.0)
SIZES_MM = st.sampled_from([UNIT, (0.7, 0.7, 0.7), (0.9375, 0.9375, 3.0), (2.0, 1.0, 0.5)])


def line(*filled: int, length: int = 12) -> np.ndarray:
    mask = np.zeros((length, 1, 1), bool)
    mask[list(filled)] = True
    return mask


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """From empty over single voxels to nearly full."""
    return np.asarray(rng.random((5, 6, 4)) < rng.choice([0.01, 0.1, 0.5, 0.95]))


def surface_points(mask: np.ndarray, size_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Centres in mm of the voxels with a neighbour outside, and the area to it, voxel by voxel."""
    points, areas = [], []
    faces_mm2 = [size_mm[1] * size_mm[2], size_mm[0] * size_mm[2], size_mm[0] * size_mm[1]]
    for place in np.argwhere(mask):
        area = 0.0
        for step in np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
            beside = place + step
            inside = (beside >= 0).all() and (beside < mask.shape).all()
            if not inside or not mask[tuple(beside)]:
                area += faces_mm2[int(np.flatnonzero(step)[0])]
        if area:
            points.append(place * np.array(size_mm))
            areas.append(area)
    return np.array(points), np.array(areas)


def test_one_voxel_from_another_is_the_distance_in_mm():
    # 3 voxels of 0.5 mm and 2 of 2 mm: the hypotenuse of 1.5 and 4 mm.
    first, second = np.zeros((2, 6, 6, 1), bool)
    first[0, 0, 0] = second[3, 2, 0] = True
    found = surface_distances(first, second, voxel_size_mm=(0.5, 2.0, 1.0))
    assert [found.hausdorff_mm, found.hd95_mm, found.mean_mm] == pytest.approx([np.hypot(1.5, 4)] * 3)


def test_the_mean_counts_the_surface_voxels_of_both():
    # {0, 1} and {1, 2, 3}: 1, 0 and 0, 1, 2: the largest is 2, the mean (1 + 3) / 5.
    found = surface_distances(line(0, 1), line(1, 2, 3), voxel_size_mm=UNIT)
    assert found.hausdorff_mm == 2
    assert found.mean_mm == pytest.approx(4 / 5)


def test_an_end_of_a_line_has_more_area_than_its_middle():
    # {0, 1, 2} in {0 … 3}, edges of 1 mm: the fourth voxel is 1 away; ends show 5 faces, middles 4: 5 of 14 + 18.
    found = surface_distances(line(0, 1, 2), line(0, 1, 2, 3), voxel_size_mm=UNIT)
    assert found.mean_mm == pytest.approx(1 / 7)
    assert found.mean_area_mm == pytest.approx(5 / (5 + 4 + 5 + 5 + 4 + 4 + 5))


def test_hd95_is_the_larger_of_two_percentiles():
    # From {0} to {0, 4}: 0. Back: 0 and 4, whose 95th percentile is 3.8. Pooled (0, 0, 4) it would be 3.6.
    assert surface_distances(line(0), line(0, 4), voxel_size_mm=UNIT).hd95_mm == pytest.approx(3.8)


def test_the_inside_of_a_mask_is_no_surface():
    cube = np.ones((5, 5, 5), bool)
    shell = cube.copy()
    shell[1:4, 1:4, 1:4] = False
    # The cube reaches the edge of the image, which is its surface; the hollow's lies in the same voxels.
    assert surface_distances(cube, shell, voxel_size_mm=UNIT).hausdorff_mm == 0


@pytest.mark.parametrize(("first", "second"), [((), (1,)), ((1,), ()), ((), ())])
def test_there_is_no_distance_to_an_empty_mask(first, second):
    found = surface_distances(line(*first), line(*second), voxel_size_mm=UNIT)
    assert np.isnan([found.hausdorff_mm, found.hd95_mm, found.mean_mm, found.mean_area_mm]).all()


@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_distances_are_those_between_all_surface_points(seed, size_mm):
    rng = np.random.default_rng(seed)
    first, second = random_mask(rng), random_mask(rng)
    found = surface_distances(first, second, voxel_size_mm=size_mm)
    if not (first.any() and second.any()):
        assert np.isnan(found.mean_mm)
        return
    (first_mm, first_mm2), (second_mm, second_mm2) = (surface_points(mask, size_mm) for mask in (first, second))
    apart = cdist(first_mm, second_mm)
    there, back = apart.min(axis=1), apart.min(axis=0)
    assert found.hausdorff_mm == pytest.approx(max(there.max(), back.max()))
    assert found.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert found.mean_mm == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))
    weighted = (there @ first_mm2 + back @ second_mm2) / (first_mm2.sum() + second_mm2.sum())
    assert found.mean_area_mm == pytest.approx(weighted)


def to_itk(mask: np.ndarray, size_mm: tuple[float, float, float]) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(np.pad(mask, 1).astype(np.uint8).T)
    image.SetSpacing(size_mm)
    return image


@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_the_hausdorff_distance_is_that_of_simpleitk_between_contours(seed, size_mm):
    rng = np.random.default_rng(seed)
    first, second = random_mask(rng), random_mask(rng)
    if not (first.any() and second.any()):
        return
    contours = [SimpleITK.BinaryContour(to_itk(mask, size_mm), fullyConnected=False) for mask in (first, second)]
    measure = SimpleITK.HausdorffDistanceImageFilter()
    measure.Execute(*contours)
    found = surface_distances(first, second, voxel_size_mm=size_mm)
    assert found.hausdorff_mm == pytest.approx(measure.GetHausdorffDistance(), rel=1e-5)  # float32 there


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 1, 1\), expected \(12, 1, 1\)"):
        surface_distances(line(1), line(1, length=3), voxel_size_mm=UNIT)
