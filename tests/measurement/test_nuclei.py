from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from bids_dgmseg.measurement.columns import REGION_COLUMNS
from bids_dgmseg.measurement.nuclei import core_mask, measure_regions
from bids_dgmseg.models.structures import STRUCTURES

DN_L, DN_R = STRUCTURES.both_sides(["DN"])
VOXEL_MM = (1.0, 1.0, 2.0)  # 2 mm³


def measure_line(chi: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, **options: Any) -> pd.Series:
    """Measure DN_L on a row of voxels of 2 mm³."""
    arrays = [np.asarray(values).reshape(-1, 1, 1) for values in (chi, labels, probabilities)]
    options = {"structures": [DN_L], "voxel_size_mm": VOXEL_MM} | options
    return measure_regions(arrays[0].astype(float), arrays[1], arrays[2][None].astype(float), **options).iloc[0]


def test_columns_are_those_of_the_dictionary():
    table = measure_regions(
        np.zeros((2, 2, 2)),
        np.ones((2, 2, 2), np.uint8),
        np.ones((16, 2, 2, 2)),
        structures=STRUCTURES,
        voxel_size_mm=VOXEL_MM,
    )
    assert list(table.columns) == list(REGION_COLUMNS)
    assert table["abbreviation"].tolist() == [structure.abbreviation for structure in STRUCTURES]


def test_a_row_names_its_nucleus():
    row = measure_line([0.1], [1], [1])
    assert (row["index"], row["name"], row["hemisphere"]) == (1, "left dentate nucleus", "L")


def test_the_label_is_counted_and_averaged():
    # Four voxels of 2 mm³ in the label: 0.1, 0.2, 0.3, 0.4; the fifth is outside.
    row = measure_line([0.1, 0.2, 0.3, 0.4, 9], [1, 1, 1, 1, 0], [1, 1, 1, 0.6, 0.4])
    assert row["n_voxels"] == 4
    assert row["volume_mm3"] == pytest.approx(8)
    assert row["mean_ppm"] == pytest.approx(0.25)
    assert row["median_ppm"] == pytest.approx(0.25)
    assert row["std_ppm"] == pytest.approx(np.sqrt(0.05 / 3))  # 0.15² + 0.05² + 0.05² + 0.15² = 0.05, over n - 1
    assert row["mass_ppm_mm3"] == pytest.approx(2.0)  # 1.0 ppm x 2 mm³
    assert row["mean_probability"] == pytest.approx(0.9)  # 3.6 / 4


def test_percentiles_interpolate_between_ranks():
    # Eleven values 0, 0.1, … 1: rank 10 q holds the quantile q.
    row = measure_line(np.arange(11) / 10, np.ones(11, int), np.ones(11))
    assert [row[f"p{q}_ppm"] for q in ("05", "25", "75", "95")] == pytest.approx([0.05, 0.25, 0.75, 0.95])


@pytest.mark.parametrize(
    ("chi", "fraction", "volume_mm3", "mean_ppm"),
    [
        pytest.param([0.1, 0.2], [1, 0.5], 3.0, 2 / 15, id="weights: (0.1 + 0.5 x 0.2) / 1.5 ppm, 1.5 voxels"),
        pytest.param([0.0, 0.2], [1, 1], 4.0, 0.1, id="zero is a value, not a hole"),
        pytest.param([np.nan, 0.2], [1, 1], 4.0, 0.2, id="a voxel without a measurement counts for the volume only"),
        pytest.param([np.nan, np.nan], [1, 1], 4.0, np.nan, id="nothing measured, no mean"),
        pytest.param([0.1, 0.2], [0, 0], 0.0, np.nan, id="an absent nucleus has no mean"),
    ],
)
def test_a_voxel_counts_as_far_as_it_belongs(chi, fraction, volume_mm3, mean_ppm):
    row = measure_line(chi, [0, 0], fraction)
    assert row["volume_pv_mm3"] == pytest.approx(volume_mm3)
    assert row["mean_pv_ppm"] == pytest.approx(mean_ppm, nan_ok=True)


def test_what_was_not_measured_counts_for_the_volume_only():
    row = measure_line([np.nan, 0.2, 0.4], [1, 1, 1], [1, 1, 1])
    assert (row["n_voxels"], row["volume_mm3"]) == (3, 6)
    assert row["mean_ppm"] == pytest.approx(0.3)
    assert row["mass_ppm_mm3"] == pytest.approx(1.2)  # 0.6 ppm x 2 mm³


def test_zero_is_a_value():
    assert measure_line([0.0, 0.2], [1, 1], [1, 1])["mean_ppm"] == pytest.approx(0.1)


def test_a_nucleus_without_a_voxel_has_volume_zero_and_no_susceptibility():
    row = measure_line([0.1, 0.2], [0, 0], [0, 0])
    assert (row["n_voxels"], row["volume_mm3"], row["volume_pv_mm3"]) == (0, 0, 0)
    assert row.filter(like="ppm").isna().all()
    assert np.isnan(row["mean_probability"])


def test_a_nucleus_outside_the_image_has_no_value_at_all():
    row = measure_line([0.1, 0.2], [1, 0], [1, 0], missing=["DN_L"])
    assert row.drop(["index", "name", "abbreviation", "hemisphere"]).isna().all()


def test_missing_values_are_written_as_bids_has_them():
    arrays = np.zeros((1, 1, 1)), np.zeros((1, 1, 1), np.uint8), np.zeros((2, 1, 1, 1))
    table = measure_regions(*arrays, structures=[DN_L, DN_R], voxel_size_mm=VOXEL_MM, missing={"DN_L"})
    text = table[["n_voxels", "volume_mm3", "mean_ppm"]].to_csv(sep="\t", index=False, na_rep="n/a")
    assert text.splitlines()[1:] == ["n/a\tn/a\tn/a", "0\t0.0\tn/a"]


def test_a_single_voxel_has_no_spread():
    row = measure_line([0.1], [1], [1])
    assert np.isnan(row["std_ppm"])
    assert row["mean_ppm"] == pytest.approx(0.1)


def test_only_the_nucleus_own_label_is_measured():
    # DN_R (2) lies inside the box of DN_L (1).
    row = measure_line([0.1, 9, 0.3], [1, 2, 1], [1, 0, 1])
    assert (row["n_voxels"], row["mean_ppm"]) == (2, pytest.approx(0.2))


def test_channels_follow_the_order_of_the_structures():
    chi = np.array([0.1, 0.2]).reshape(2, 1, 1)
    dseg = np.array([1, 2]).reshape(2, 1, 1)
    probseg = np.stack([dseg == 2, dseg == 1]).astype(float)
    table = measure_regions(chi, dseg, probseg, structures=[DN_R, DN_L], voxel_size_mm=VOXEL_MM)
    assert table["mean_ppm"].tolist() == table["mean_pv_ppm"].tolist() == [0.2, 0.1]


def test_float32_maps_are_summed_in_double():
    # 0.1 in float32 is 13421773 / 2^27; a sum kept in float32 would be off by up to 6e-8 of itself.
    ones = np.ones((100, 100, 100), np.uint8)
    table = measure_regions(
        (0.1 * ones).astype(np.float32), ones, ones[None].astype(np.float32), structures=[DN_L], voxel_size_mm=VOXEL_MM
    )
    assert table.loc[0, "mass_ppm_mm3"] == pytest.approx(2e6 * 13421773 / 2**27, rel=1e-12)


def test_the_arguments_are_left_as_they_were():
    chi, dseg, probseg = np.array([[[np.nan, 0.1]]]), np.ones((1, 1, 2), int), np.full((1, 1, 1, 2), 0.5)
    before = [array.copy() for array in (chi, dseg, probseg)]
    measure_regions(chi, dseg, probseg, structures=[DN_L], voxel_size_mm=VOXEL_MM)
    for array, copy in zip((chi, dseg, probseg), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_measures_agree_with_a_slow_reading_of_their_formulas(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 6, 3))
    dseg = rng.integers(0, 3, shape)
    chi = np.where(rng.random(shape) < 0.1, np.nan, rng.normal(size=shape))
    probseg = rng.random((2, *shape)) * (rng.random((2, *shape)) < 0.5)
    table = measure_regions(chi, dseg, probseg, structures=[DN_L, DN_R], voxel_size_mm=(0.5, 1, 3))
    for number, p, (_, row) in zip((1, 2), probseg, table.iterrows(), strict=True):
        values = [c for c, d in zip(chi.flat, dseg.flat, strict=True) if d == number and not np.isnan(c)]
        pairs = [(c, w) for c, w in zip(chi.flat, p.flat, strict=True) if not np.isnan(c)]
        weight = sum(w for _, w in pairs)
        assert row["volume_pv_mm3"] == pytest.approx(1.5 * sum(p.flat))
        weighted = sum(c * w for c, w in pairs) / weight if weight else np.nan
        assert row["mean_pv_ppm"] == pytest.approx(weighted, nan_ok=True)
        assert row["mean_ppm"] == pytest.approx(sum(values) / len(values) if values else np.nan, nan_ok=True)
        assert row["volume_mm3"] == pytest.approx(1.5 * np.count_nonzero(dseg == number))


@pytest.mark.parametrize(
    ("voxel_size_mm", "kept"),
    [
        pytest.param((1.0, 1.0, 1.0), (5, 5, 5), id="1 mm: one layer all around"),
        pytest.param((1.25, 1.25, 1.25), (5, 5, 5), id="coarse: still one layer"),
        pytest.param((0.5, 0.5, 0.5), (3, 3, 3), id="fine: the two layers within 1 mm"),
        pytest.param((0.9, 0.9, 3.0), (5, 5, 7), id="thick slices: within the slice only"),
        pytest.param((3.0, 0.9, 0.9), (7, 5, 5), id="thick slices along another axis"),
    ],
)
def test_the_core_of_a_cube_is_a_cube(voxel_size_mm, kept):
    region = np.zeros((9, 9, 9), bool)
    region[1:8, 1:8, 1:8] = True
    core = core_mask(region, voxel_size_mm=voxel_size_mm)
    assert tuple(np.ptp(np.argwhere(core), axis=0) + 1) == kept
    assert core.sum() == np.prod(kept)


def test_the_core_is_eroded_at_the_image_border_too():
    assert core_mask(np.ones((3, 3, 3), bool), voxel_size_mm=(1, 1, 1)).sum() == 1


def test_nothing_has_no_core():
    assert not core_mask(np.zeros((3, 3, 3), bool), voxel_size_mm=(1, 1, 1)).any()


def test_the_core_mean_leaves_the_rim_out():
    chi, dseg = np.full((5, 5, 5), 0.5), np.zeros((5, 5, 5), int)
    dseg[1:4, 1:4, 1:4] = 1
    chi[2, 2, 2] = 0.1
    table = measure_regions(chi, dseg, (dseg == 1)[None].astype(float), structures=[DN_L], voxel_size_mm=(1, 1, 1))
    assert table.loc[0, "core_mean_ppm"] == pytest.approx(0.1)


def test_a_thin_nucleus_has_no_core_mean():
    assert np.isnan(measure_line([0.1, 0.2, 0.3], [1, 1, 1], [1, 1, 1])["core_mean_ppm"])


def test_probabilities_on_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"probseg has shape \(1, 2, 2, 2\), expected \(1, 2, 2, 3\)"):
        measure_regions(
            np.zeros((2, 2, 3)),
            np.zeros((2, 2, 3), int),
            np.zeros((1, 2, 2, 2)),
            structures=[DN_L],
            voxel_size_mm=VOXEL_MM,
        )


def test_labels_on_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"dseg has shape \(2, 2, 2\), expected \(2, 2, 3\)"):
        measure_regions(
            np.zeros((2, 2, 3)),
            np.zeros((2, 2, 2), int),
            np.zeros((1, 2, 2, 3)),
            structures=[DN_L],
            voxel_size_mm=VOXEL_MM,
        )


def test_an_unknown_missing_nucleus_is_refused():
    with pytest.raises(ValueError, match=r"missing holds \['DN'\], not among the structures"):
        measure_line([0.1], [1], [1], missing=["DN"])
