from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multicomp import pairwise_tukeyhsd

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.agreement import (
    adjust_p_values,
    anova,
    bland_altman,
    icc,
    mean_squares,
    paired_t,
    pearson,
    proportional_bias,
    repeated_anova,
    spearman,
    tukey,
    wilcoxon,
)
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS, dice, overlap, surface_distances

DN = STRUCTURES.both_sides(["DN"])

SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
"""Table 2 of Shrout and Fleiss (1979): six targets, four raters."""


def test_icc_agrees_with_shrout_and_fleiss_and_r_psych():
    # Their table 3: BMS 11.24, WMS 6.26, JMS 32.49, EMS 1.02; table 4.
    ms, result = mean_squares(SHROUT_FLEISS), icc(SHROUT_FLEISS)
    assert [ms.targets, ms.within, ms.raters, ms.error] == pytest.approx([11.24, 6.26, 32.49, 1.02], abs=0.005)
    assert [round(estimate.value, 2) for estimate in result.values()] == [0.17, 0.29, 0.71]
    # psych::ICC on the same table: -.13 to .72, .02 to .76, .34 to .95; F = 1.8, 11 and 11.
    bounds = [(round(estimate.low, 2), round(estimate.high, 2)) for estimate in result.values()]
    assert bounds == [(-0.13, 0.72), (0.02, 0.76), (0.34, 0.95)]
    assert [estimate.p for estimate in result.values()] == pytest.approx([0.16, 0.00013, 0.00013], rel=0.05)


@pytest.mark.parametrize(
    "ratings",
    [np.ones((4, 2)), np.array([[1.0, 2]]), np.full((3, 2), np.nan), np.ones((4, 1))],
    ids=["no spread", "one scan", "no values", "one rater"],
)
def test_undefined_icc_is_nan(ratings):
    assert np.isnan([estimate.value for estimate in icc(ratings).values()]).all()


def test_incomplete_scans_are_excluded():
    assert icc(np.vstack([SHROUT_FLEISS, [5, np.nan, 3, 3]])) == icc(SHROUT_FLEISS)


def test_limits_of_agreement_by_hand():
    # Differences 1, 2, 3: mean 2, SD 1; t = 4.3027 for 2 degrees of freedom.
    result = bland_altman(np.array([5.0, 6, 7]), np.array([6.0, 8, 10]))
    assert (result.n, result.bias.value, result.sd) == (3, 2, 1)
    assert [result.lower.value, result.upper.value] == pytest.approx([0.04, 3.96], abs=1e-4)
    assert result.bias.high - 2 == pytest.approx(4.3027 / np.sqrt(3), abs=1e-4)
    assert result.upper.high - result.upper.value == pytest.approx(4.3027 * np.sqrt(1 / 3 + 1.96**2 / 4), abs=1e-3)
    assert np.isnan(bland_altman(np.array([1.0]), np.array([2.0])).sd)
    assert np.isnan(bland_altman(np.array([]), np.array([])).bias.value)


def test_proportional_bias_by_hand():
    # Means 1, 2, 3 and differences 0, 1, 1: slope 1/2, sum of squared residuals 1/6, so a standard error of
    # sqrt(1/12) with one degree of freedom (t = 12.706); t = sqrt(3), and p = 1 - 2/pi * arctan(sqrt(3)) = 1/3.
    result = proportional_bias(np.array([1.0, 1.5, 2.5]), np.array([1.0, 2.5, 3.5]))
    assert result.value == pytest.approx(0.5)
    assert result.high - result.value == pytest.approx(12.706 / np.sqrt(12), abs=1e-3)
    assert result.p == pytest.approx(1 / 3)
    assert np.isnan(proportional_bias(np.array([1.0, 2]), np.array([2.0, 3])).value)


def test_pearson_has_fisher_interval():
    # r = 0.6 by construction in 28 scans: atanh 0.6 = 0.6931, half width 1.96 / 5.
    x, y = stats.zscore(np.random.default_rng(0).normal(size=(2, 28)), axis=1)
    y = stats.zscore(y - x * (x @ y) / 28)
    result = pearson(x, 0.6 * x + 0.8 * y)
    assert result.value == pytest.approx(0.6)
    assert [result.low, result.high] == pytest.approx(np.tanh([0.6931 - 0.392, 0.6931 + 0.392]), abs=1e-4)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=4, max_size=12))
@example([(0, -3), (-3, 0), (-3, 0), (-4, 0)])  # Satterthwaite's interval for -0.87 is -0.911 to -0.910
@example([(0, 1), (0, 1), (1, 0), (1, 0)])  # no degrees of freedom
def test_intervals_contain_their_estimates(pairs):
    x, y = np.array(pairs).T
    result = [*icc(np.column_stack([x, y])).values(), bland_altman(x, y).bias, pearson(x, y), spearman(x, y)]
    for estimate in result:
        if np.isfinite(estimate.low):
            assert estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9


@pytest.mark.parametrize("correlate", [pearson, spearman])
def test_constant_has_no_correlation(correlate):
    assert np.isnan(correlate(np.array([1.0, 2, 3]), np.array([0.3, 0.1 + 0.2, 0.3])).value)


def test_other_shapes_and_types_are_rejected():
    with pytest.raises(ValueError, match=r"second has shape \(2,\), expected \(3,\) with one axis"):
        bland_altman(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match=r"ratings have shape \(3,\), expected \(targets, raters\)"):
        icc(np.zeros(3))
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), expected \(1,\)"):
        dice(np.array([1]), np.array([1, 1]), structures=DN)
    with pytest.raises(ValueError, match="prediction holds float64, expected integers"):
        dice(np.array([1]), np.array([0.5]), structures=DN)


def test_paired_t_by_hand():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3); for 2 degrees of freedom p = 1 - t / sqrt(2 + t^2).
    result = paired_t(np.array([5.0, 6, 7]), np.array([6.0, 8, 10]))
    assert result.statistic == pytest.approx(2 * np.sqrt(3))
    assert result.p == pytest.approx(1 - np.sqrt(12 / 14))


def test_wilcoxon_by_hand():
    # Differences 1, 2, 3, -4: the smaller rank sum is 4; 7 of the 16 sign patterns give 4 or less.
    result = wilcoxon(np.zeros(5), np.array([1.0, 2, 3, -4, 0]))
    assert result.statistic == 4
    assert result.p == pytest.approx(2 * 7 / 16)


def test_differences_equal_up_to_rounding_are_ties():
    # All are 0.1 except for rounding: four ties of one sign, 2 of 16 sign patterns.
    second = np.array([0.1, 0.3, 0.8, 1.1])
    first = np.array([0.0, 0.2, 0.7, 1.0])
    assert len(set(second - first)) > 1
    assert wilcoxon(first, second).p == pytest.approx(2 / 16)
    assert np.isnan(paired_t(first, second).p)


@pytest.mark.parametrize("compare", [paired_t, wilcoxon])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0], [np.nan, 2.0]])
def test_undefined_paired_test_is_nan(compare, values):
    assert np.isnan(compare(np.array(values), np.array(values)).p)


def test_adjusted_p_values_by_hand():
    # Holm: 3 * .01, then 2 * .03, then 1 * .04, which must not decrease.
    p = [0.01, np.nan, 0.04, 0.03]
    np.testing.assert_allclose(adjust_p_values(p, method="bonferroni"), [0.03, np.nan, 0.12, 0.09])
    np.testing.assert_allclose(adjust_p_values(p, method="holm"), [0.03, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(adjust_p_values([0.04, np.nan, 0.01], method="fdr"), [0.04, np.nan, 0.02])
    assert np.isnan(adjust_p_values([np.nan], method="holm")).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_repeated_anova_agrees_with_statsmodels(seed):
    ratings = np.random.default_rng(seed).normal(size=(7, 4))
    long = pd.DataFrame(ratings).rename_axis("scan").reset_index().melt("scan", var_name="rater")
    row = AnovaRM(long, "value", "scan", within=["rater"]).fit().anova_table.iloc[0]
    result = repeated_anova(ratings)
    assert (result.f, result.p) == pytest.approx((row["F Value"], row["Pr > F"]))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 9))
def test_epsilon_agrees_with_orthonormal_contrasts(seed, n):
    # Equivalent definition by orthonormal contrasts.
    ratings = np.random.default_rng(seed).normal(size=(n, 3))
    contrasts = np.array([[1, -1, 0], [1, 1, -2]]).T / np.sqrt([2, 6])
    covariance = np.cov(ratings @ contrasts, rowvar=False)
    expected = np.trace(covariance) ** 2 / (2 * np.trace(covariance @ covariance))
    assert repeated_anova(ratings).epsilon == pytest.approx(expected)


def test_tukey_agrees_with_statsmodels():
    ratings = np.random.default_rng(0).normal((0, 1, 2), size=(8, 3))
    groups = np.repeat([0, 1, 2], 8)
    expected = pairwise_tukeyhsd(ratings.T.ravel(), groups).pvalues
    result = tukey(ratings)
    assert result[np.triu_indices(3, 1)] == pytest.approx(expected, abs=1e-4)  # statsmodels interpolates


def test_anova_by_hand():
    # Means 2, 3, 7 of 3, 3, 1 values lie 8, 1, 27 sevenths from 22 / 7: between (3 * 64 + 3 + 729) / 49 with 2 degrees
    # of freedom, within 4 with 4.
    ratings = np.array([[1.0, 2, 7], [2, 3, np.nan], [3, 4, np.nan]])
    assert anova(ratings).statistic == pytest.approx((3 * 64 + 3 + 729) / 49 / 2)


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
    masks = [rng.random((5, 6, 4)) < rng.choice([0.1, 0.5, 0.95]) for _ in range(2)]
    if not all(mask.any() for mask in masks):
        return
    result = surface_distances(*masks, voxel_size_mm=size_mm)
    steps = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
    surfaces = []  # centres in mm of the voxels with a neighbour outside
    for mask in masks:
        inside = set(map(tuple, np.argwhere(mask).tolist()))
        surface = [
            voxel for voxel in inside if not all(tuple(np.add(voxel, step).tolist()) in inside for step in steps)
        ]
        surfaces.append(np.array(surface) * size_mm)
    apart = cdist(*surfaces)
    there, back = apart.min(axis=1), apart.min(axis=0)
    assert result.hausdorff_mm == pytest.approx(max(there.max(), back.max()))
    assert result.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert result.mean_mm == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))
