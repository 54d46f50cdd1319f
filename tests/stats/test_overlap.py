from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.agreement import (
    OVERLAP_COLUMNS,
    dice,
    expected_calibration_error,
    overlap,
    surface_distances,
)

DN = STRUCTURES.both_sides(["DN"])


def test_other_shapes_and_types_are_rejected():
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), expected \(1,\)"):
        dice(np.array([1]), np.array([1, 1]), structures=DN)
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 1, 1\), expected \(12, 1, 1\)"):
        surface_distances(line(1), line(1, length=3), voxel_size_mm=UNIT)
    with pytest.raises(ValueError, match="prediction holds float64, expected integers"):
        dice(np.array([1]), np.array([0.5]), structures=DN)


SIZES_MM = st.sampled_from([(1.0, 1.0, 1.0), (0.9375, 0.9375, 3.0), (2.0, 1.0, 0.5)])


def row(*labels: list[int], size_mm: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> dict[str, Any]:
    """Measures of DN_L on a line of voxels along x."""
    reference, prediction = (np.array(line).reshape(-1, 1, 1) for line in labels)
    table = overlap(reference, prediction, structures=DN, voxel_size_mm=size_mm)
    assert list(table) == list(OVERLAP_COLUMNS)
    return {str(name): value for name, value in table.iloc[0].items()}


def test_overlap_by_hand():
    # R = {0, 1, 2}, P = {1, 2, 3, 4}, voxels of 2 mm3: shared 2, together 5, centres at 1 and 2.5 mm.
    result = row([1, 1, 1, 0, 0, 2], [0, 1, 1, 1, 1, 2])
    assert result["dice"] == pytest.approx(4 / 7)
    assert result["jaccard"] == pytest.approx(2 / 5)
    assert result["volume_similarity"] == pytest.approx(1 - 1 / 7)
    assert (result["volume_reference_mm3"], result["volume_prediction_mm3"]) == (6, 8)
    assert result["volume_difference_mm3"] == 2
    assert result["volume_difference_percent"] == pytest.approx(100 / 3)
    assert result["centre_distance_mm"] == pytest.approx(1.5)
    assert result["hausdorff_mm"] == 2
    assert result["mean_surface_distance_mm"] == pytest.approx((1 + 1 + 2) / 7)


def test_nucleus_in_one_or_none_has_no_distances():
    result = row([1, 1, 0], [0, 0, 0])
    assert (result["dice"], result["jaccard"], result["volume_similarity"]) == (0, 0, 0)
    assert (result["volume_difference_mm3"], result["volume_difference_percent"]) == (-4, -100)
    assert np.isnan([result[name] for name in result if name.endswith("_mm")]).all()
    result = row([0, 0, 0], [1, 1, 0])
    assert result["volume_difference_mm3"] == 4
    assert np.isnan(result["volume_difference_percent"])
    result = row([0, 2], [0, 2])
    counts = ("index", "abbreviation", "n_reference", "n_prediction", "volume_reference_mm3", "volume_prediction_mm3")
    assert np.isnan([value for name, value in result.items() if name not in counts]).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_overlap_agrees_with_simpleitk(seed, size_mm):
    rng = np.random.default_rng(seed)
    density = rng.choice([0.01, 0.2, 0.9])
    first, second = (rng.random((2, 5, 4, 6)) < density).astype(np.uint8)
    if not (first.any() and second.any()):
        return
    measure = SimpleITK.LabelOverlapMeasuresImageFilter()
    measure.Execute(SimpleITK.GetImageFromArray(first), SimpleITK.GetImageFromArray(second))
    result = overlap(first, second, structures=DN, voxel_size_mm=size_mm).iloc[0]
    assert result["dice"] == pytest.approx(measure.GetDiceCoefficient(1))
    assert result["jaccard"] == pytest.approx(measure.GetJaccardCoefficient(1))
    # SimpleITK's is 2 (source - target) / (source + target).
    assert result["volume_similarity"] == pytest.approx(1 - abs(measure.GetVolumeSimilarity(1)) / 2)


UNIT = (1.0, 1.0, 1.0)


def line(*filled: int, length: int = 12) -> np.ndarray:
    mask = np.zeros((length, 1, 1), bool)
    mask[list(filled)] = True
    return mask


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Random mask, from empty to nearly full."""
    return np.asarray(rng.random((5, 6, 4)) < rng.choice([0.01, 0.1, 0.5, 0.95]))


def surface_points(mask: np.ndarray, size_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the surface voxels in mm, and their outer areas, by plain loops."""
    points, areas = [], []
    faces_mm2 = [size_mm[1] * size_mm[2], size_mm[0] * size_mm[2], size_mm[0] * size_mm[1]]
    for voxel in np.argwhere(mask):
        area = 0.0
        for step in np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
            beside = voxel + step
            inside = (beside >= 0).all() and (beside < mask.shape).all()
            if not inside or not mask[tuple(beside)]:
                area += faces_mm2[int(np.flatnonzero(step)[0])]
        if area:
            points.append(voxel * np.array(size_mm))
            areas.append(area)
    return np.array(points), np.array(areas)


def test_area_weights_favour_ends_of_lines():
    # {0, 1, 2} in {0 … 3}, edges of 1 mm: the fourth voxel is 1 away; ends show 5 faces, middles 4: 5 of 14 + 18.
    result = surface_distances(line(0, 1, 2), line(0, 1, 2, 3), voxel_size_mm=UNIT)
    assert result.mean_mm == pytest.approx(1 / 7)
    assert result.mean_area_mm == pytest.approx(5 / (5 + 4 + 5 + 5 + 4 + 4 + 5))


@pytest.mark.parametrize(("first", "second"), [((), (1,)), ((1,), ()), ((), ())])
def test_empty_mask_has_no_distance(first, second):
    assert np.isnan(astuple(surface_distances(line(*first), line(*second), voxel_size_mm=UNIT))).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_distances_agree_with_all_pairs_of_points(seed, size_mm):
    rng = np.random.default_rng(seed)
    first, second = random_mask(rng), random_mask(rng)
    result = surface_distances(first, second, voxel_size_mm=size_mm)
    if not (first.any() and second.any()):
        assert np.isnan(result.mean_mm)
        return
    (first_mm, first_mm2), (second_mm, second_mm2) = (surface_points(mask, size_mm) for mask in (first, second))
    apart = cdist(first_mm, second_mm)
    there, back = apart.min(axis=1), apart.min(axis=0)
    assert result.hausdorff_mm == pytest.approx(max(there.max(), back.max()))
    assert result.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert result.mean_mm == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))
    weighted = (there @ first_mm2 + back @ second_mm2) / (first_mm2.sum() + second_mm2.sum())
    assert result.mean_area_mm == pytest.approx(weighted)


@pytest.mark.parametrize(
    ("probability", "truth", "n_bins", "error"),
    [
        pytest.param([0.3] * 10, [True] * 3 + [False] * 7, 15, 0, id="calibrated"),
        # Three voxels at 0.9, two of them inside: |0.9 − 2/3|. One at 0.2 outside: 0.2. (3·0.2333 + 0.2) / 4 = 0.225.
        pytest.param([0.9, 0.9, 0.9, 0.2], [True, True, False, False], 10, 0.225, id="weighted by voxels"),
        pytest.param([1.0, 1.0], [True, False], 4, 0.5, id="1 is in the last bin"),
        pytest.param([0.25, 0.75], [False, True], 2, 0.25, id="errors of two bins do not cancel"),
        pytest.param([], [], 15, np.nan, id="no voxels"),
    ],
)
def test_calibration_error_by_hand(probability, truth, n_bins, error):
    assert expected_calibration_error(probability, truth, n_bins=n_bins) == pytest.approx(error, nan_ok=True)
