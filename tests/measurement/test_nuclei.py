import csv
import math
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import ArrayLike

from bids_dgmseg.measurement.nuclei import (
    HIGH_IRON_COLUMNS,
    NORMS,
    PublishedNorm,
    asymmetry_index,
    compare_with_norms,
    core_mask,
    measure_asymmetry,
    measure_high_iron,
    measure_nuclei,
    measure_r2star,
    measure_uncertainty,
    parse_reference_region,
    unindex_joined,
)
from bids_dgmseg.models.structures import STRUCTURES, Structure, with_pairs

DN_L, DN_R = STRUCTURES.both_sides(["DN"])
VOXEL_MM = (1.0, 1.0, 2.0)  # 2 mm³


def measure_line(chi: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, **options: Any) -> pd.Series:
    """Measure DN_L on a row of voxels of 2 mm³."""
    arrays = [np.asarray(values).reshape(-1, 1, 1) for values in (chi, labels, probabilities)]
    options = {"structures": [DN_L], "voxel_size_mm": VOXEL_MM} | options
    return measure_nuclei(arrays[0].astype(float), arrays[1], arrays[2][None].astype(float), **options).iloc[0]


def test_label_measures_follow_their_formulas():
    # Four voxels of 2 mm³ in the label: 0.1, 0.2, 0.3, 0.4; the fifth is outside.
    row = measure_line([0.1, 0.2, 0.3, 0.4, 9], [1, 1, 1, 1, 0], [1, 1, 1, 0.6, 0.4])
    assert row["n_voxels"] == 4
    assert row["volume_mm3"] == pytest.approx(8)
    assert row["mean_ppm"] == pytest.approx(0.25)
    assert row["median_ppm"] == pytest.approx(0.25)
    assert row["std_ppm"] == pytest.approx(np.sqrt(0.05 / 3))  # 0.15² + 0.05² + 0.05² + 0.15² = 0.05, over n - 1
    assert row["mass_ppm_mm3"] == pytest.approx(2.0)  # 1.0 ppm x 2 mm³
    assert row["mean_probability"] == pytest.approx(0.9)  # 3.6 / 4


@pytest.mark.parametrize(
    ("chi", "fraction", "volume_mm3", "mean_ppm"),
    [
        ([0.1, 0.2], [1, 0.5], 3.0, 2 / 15),  # (0.1 + 0.5 x 0.2) / 1.5 ppm, 1.5 voxels
        ([0.0, 0.2], [1, 1], 4.0, 0.1),
        ([np.nan, 0.2], [1, 1], 4.0, 0.2),  # invalid voxels count only for the volume
        ([np.nan, np.nan], [1, 1], 4.0, np.nan),
        ([0.1, 0.2], [0, 0], 0.0, np.nan),
    ],
    ids=["weighted", "0 is valid", "an invalid voxel", "no valid voxel", "absent"],
)
def test_voxels_are_weighted_by_probability(chi, fraction, volume_mm3, mean_ppm):
    row = measure_line(chi, [0, 0], fraction)
    assert row["volume_pv_mm3"] == pytest.approx(volume_mm3)
    assert row["mean_pv_ppm"] == pytest.approx(mean_ppm, nan_ok=True)


def test_empty_missing_and_single_voxel_nuclei():
    row = measure_line([0.1, 0.2], [0, 0], [0, 0])
    assert (row["n_voxels"], row["volume_mm3"], row["volume_pv_mm3"]) == (0, 0, 0)
    assert row.filter(like="ppm").isna().all()
    assert np.isnan(row["mean_probability"])
    row = measure_line([0.1, 0.2], [1, 0], [1, 0], missing=["DN_L"])
    assert row.drop(["index", "name", "abbreviation", "hemisphere"]).isna().all()
    row = measure_line([0.1], [1], [1])
    assert np.isnan(row["std_ppm"])
    assert row["mean_ppm"] == pytest.approx(0.1)


def test_structure_is_a_set_of_labels():
    head, tail = (Structure(number, name, "H_L", "L", "", 0) for number, name in ((1, "left head"), (3, "left tail")))
    right = Structure(2, "right head", "H_R", "R", "", 0)
    rows = with_pairs([head, right, tail])
    assert [(row.abbreviation, row.labels) for row in rows][-1] == ("H", (1, 2, 3))
    chi, dseg = np.array([0.0, 0.1, 0.2, 0.6, 9]).reshape(-1, 1, 1), np.arange(5).reshape(-1, 1, 1)
    table = unindex_joined(measure_nuclei(chi, dseg, structures=rows, voxel_size_mm=VOXEL_MM), rows)
    assert table["mean_ppm"].tolist() == pytest.approx([0.1, 0.2, 0.6, 0.3])
    assert table["index"].isna().tolist() == table["hemisphere"].isna().tolist() == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("voxel_size_mm", "kept"),
    [
        pytest.param((1.0, 1.0, 1.0), (5, 5, 5), id="1 mm: one layer all around"),
        pytest.param((0.5, 0.5, 0.5), (3, 3, 3), id="fine: the two layers within 1 mm"),
        pytest.param((0.9, 0.9, 3.0), (5, 5, 7), id="thick slices: in-plane only"),
    ],
)
def test_core_of_a_cube_is_a_cube(voxel_size_mm, kept):
    region = np.zeros((9, 9, 9), bool)
    region[1:8, 1:8, 1:8] = True
    core = core_mask(region, voxel_size_mm=voxel_size_mm)
    assert tuple(np.ptp(np.argwhere(core), axis=0) + 1) == kept
    assert core.sum() == np.prod(kept)
    # The border of the image is eroded too.
    assert core_mask(np.ones((3, 3, 3), bool), voxel_size_mm=(1, 1, 1)).sum() == 1


def high_iron_of(chi: list[float], labels: list[int] | None = None) -> pd.Series:
    values = np.array(chi, float).reshape(-1, 1, 1)
    dseg = np.array(labels or [1] * len(chi)).reshape(-1, 1, 1)
    return measure_high_iron(values, dseg, structures=[DN_L], voxel_size_mm=(1.0, 1.0, 2.0)).iloc[0]


def test_high_iron_lies_one_sd_above_mean():
    # 0, 0, 0, 0.4, 0.1: mean 0.1; squares 0.03 + 0.09 = 0.12 over 4: SD 0.1732; only 0.4 lies above 0.2732.
    row = high_iron_of([0, 0, 0, 0.4, 0.1])
    assert row["high_iron_threshold_ppm"] == pytest.approx(0.1 + np.sqrt(0.03))
    assert row["high_iron_mean_ppm"] == pytest.approx(0.4)
    assert row["high_iron_volume_mm3"] == 2
    assert row["high_iron_fraction"] == pytest.approx(0.2)
    assert row["sem_ppm"] == pytest.approx(np.sqrt(0.03 / 5))
    assert np.isnan(row["high_iron_sem_ppm"])  # one voxel has no spread
    # Ten voxels at 0 and two at 1 and 1.2: SD of the two 0.1414, divided by the square root of 2.
    row = high_iron_of([0.0] * 10 + [1.0, 1.2])
    assert (row["high_iron_mean_ppm"], row["high_iron_sem_ppm"]) == pytest.approx((1.1, 0.1))


def test_r2star_is_sampled_where_susceptibility_is_valid():
    # Label 1: 30, 40 and 80 of 10, 30, 40, 80, as chi lacks the first voxel. Label 2: R2* lacks its only voxel.
    rows = [10, 30, 40, 80, np.nan], [np.nan, 0, 1, 1, 1], [1, 1, 1, 1, 2]
    r2star, chi, labels = (np.reshape(row, (-1, 1, 1)) for row in rows)
    table = measure_r2star(r2star, chi, labels, structures=[DN_L, DN_R])
    assert table.iloc[0, 1:].tolist() == [50.0, 40.0]
    assert table.iloc[1, 1:].isna().all()


def test_uncertainty_and_parts_by_hand():
    # DN_L has voxels 1 and 2, as chi lacks the first; changes of their means 0.01, -0.02, 0.04 and 0.03.
    rows = [np.nan, 0.1, 0.3, 0.2], [1, 1, 1, 2], [10.0, 20, 40, 50]
    chi, labels, r2star = (np.reshape(row, (-1, 1, 1)) for row in rows)
    changes = np.zeros((4, 4, 1, 1))
    changes[:, 1:3, 0, 0] = [[0.0, 0.02], [-0.01, -0.03], [0.04, 0.04], [0.06, 0.0]]
    options = {"structures": [DN_L, DN_R]}
    table = measure_uncertainty(
        changes, lambda region, decay: 0.001 * region.sum() * decay, r2star, chi, labels, **options
    )
    assert table.iloc[0, 1:].tolist() == pytest.approx([0.001 * 2 * 30, np.hypot(0.03, 0.04)])
    assert table.iloc[1, 1:].tolist() == pytest.approx([0.001 * 50, 0])
    table = measure_r2star(r2star, chi, labels, parts_ppm=[2 * chi, chi], **options)
    np.testing.assert_allclose(table.iloc[:, 3:].astype(float), [[0.4, 0.2], [0.4, 0.2]])


def test_high_iron_needs_two_different_voxels():
    row = high_iron_of([0.1, 0.1, 0.1])
    assert row["high_iron_volume_mm3"] == 0
    assert np.isnan(row["high_iron_mean_ppm"])
    for chi, labels in (([0.1, 0.2], [0, 0]), ([0.1, 0.2], [1, 0]), ([np.nan, 0.2], [1, 1])):
        assert high_iron_of(chi, labels)[list(HIGH_IRON_COLUMNS)].isna().all()


def test_asymmetry_is_difference_over_mean():
    result = asymmetry_index([110.0, 90.0, 5.0, 0.0], [90.0, 110.0, 5.0, 5.0])
    assert result == pytest.approx([0.2, -0.2, 0, -2])
    # Undefined if both are 0, one is missing or the signs differ.
    assert np.isnan(asymmetry_index([0.0, np.nan, -0.01], [0.0, 5.0, 0.03])).all()


def test_sides_are_matched_by_nucleus():
    rows = [
        ("GP_R", "R", 900.0, 0.1),
        ("RN_L", "L", 300.0, 0.1),
        ("GP_L", "L", 1100.0, 0.3),
        ("GP", np.nan, 2000.0, 0.2),
    ]
    stats = pd.DataFrame(rows, columns=["abbreviation", "hemisphere", "volume_mm3", "mean_ppm"])
    table = measure_asymmetry(stats).set_index("abbreviation")
    assert table["volume_asymmetry"].tolist() == pytest.approx([0.2, np.nan, 0.2, np.nan], nan_ok=True)
    assert table.loc["GP_R", "mean_ppm_asymmetry"] == pytest.approx(1.0)  # 0.2 over 0.2
    assert list(table.columns) == ["volume_asymmetry", "mean_ppm_asymmetry"]


OWN = {("RN", "volume_mm3"): PublishedNorm(200.0, 50.0, None), ("RN", "mean_ppm"): PublishedNorm(0.1, 0.02, "csf")}


@pytest.mark.parametrize(("reference", "z"), [("csf", -2.5), (None, -2.5), ("whole-brain", np.nan)])
def test_z_score_counts_standard_deviations_with_the_same_reference(reference, z):
    rows = [("RN_L", "L", 300.0, 0.05), ("RN_R", "R", pd.NA, np.nan), ("GP_R", "R", 1500.0, 0.1)]  # GP has no norm here
    stats = pd.DataFrame(rows, columns=["abbreviation", "hemisphere", "volume_mm3", "mean_ppm"])
    table = compare_with_norms(stats.astype({"volume_mm3": "Float64"}), reference=reference, norms=OWN)
    assert table["volume_z"].tolist() == pytest.approx([2, np.nan, np.nan], nan_ok=True)  # it needs no reference
    assert table["mean_ppm_z"].tolist() == pytest.approx([z, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("words", "region"),
    [
        ("whole brain without CSF", "whole-brain"),
        ("Brain mask, excluding ventricles", "whole-brain"),
        ("CSF-excluded whole brain", "whole-brain"),
        ("ventricular CSF", "csf"),
        ("CSF without choroid plexus", "csf"),
        ("cerebrospinal fluid, vessels excluded", "csf"),
        ("white matter without CSF", "white matter without csf"),
        ("not stated", None),
    ],
)
def test_excluded_region_is_not_the_reference(words, region):
    assert parse_reference_region(words) == region


def test_norms_state_source_or_reason():
    text = files("bids_dgmseg").joinpath("data", "norms.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    nuclei = {structure.nucleus for structure in STRUCTURES}
    result = sorted((row["nucleus"], row["measure"]) for row in rows)
    assert result == sorted(product(nuclei, ("volume_mm3", "mean_ppm")))
    for row in rows:
        has_mean = row["mean"] != "n/a"
        assert (row["sd"] != "n/a") == (row["source"] != "n/a") == has_mean, row
        assert row["note"] != "n/a", row
        assert not has_mean or float(row["sd"]) > 0, row
        assert not has_mean or (row["reference"] != "n/a") == (row["measure"] == "mean_ppm"), row


@pytest.mark.parametrize(("nucleus", "mean", "sd"), [("RN", 459.0, 71.2), ("CN", 8420, 880)])
def test_bilateral_volumes_are_halved(nucleus, mean, sd):
    # The sum of two independent sides of SD s has SD √2 s.
    norm = NORMS[nucleus, "volume_mm3"]
    assert norm.mean == pytest.approx(mean / 2, abs=0.06)
    assert norm.sd == pytest.approx(sd / math.sqrt(2), abs=0.06)
