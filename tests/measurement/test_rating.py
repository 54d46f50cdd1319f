import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.map_quality import MAP_QUALITY
from bids_dgmseg.measurement.nuclei import (
    ASYMMETRY_OF,
    BLOB_COLUMNS,
    CONFIDENCE_COLUMNS,
    EXCLUSION_COLUMNS,
    NUCLEUS_COLUMNS,
    PLACEMENT_COLUMNS,
    PROOF_COLUMNS,
    Z_SCORE_OF,
)
from bids_dgmseg.measurement.rating import (
    NUCLEUS_RULES,
    SCAN_RULES,
    Rule,
    measure_confidence,
    rate,
    rate_nuclei,
    rate_scan,
    summarize_nuclei,
)
from bids_dgmseg.measurement.segmented_scan import FieldOfView
from bids_dgmseg.models.structures import STRUCTURES

GOOD = {
    "n_components": 1,
    "expected_dice": 0.85,
    "rim_contrast_ppm": 0.08,
    "edge_distance_mm": 20.0,
    "mean_ppm_z": -1.0,
    "volume_asymmetry": 0.05,
}
GOOD_SCAN = {
    "noise_sd_ppm": 0.01,
    "rim_residual_ppm": 0.02,
    "negative_fraction": 0.5,
}


def nuclei(ratings: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({"rating": pd.Series(ratings, dtype=object)})


def rule(side: str, amber: float, red: float | None) -> Rule:
    return Rule("x", side, amber, red, "unusual", "mm")  # type: ignore[arg-type]  # a word from the table


@pytest.mark.parametrize(
    ("side", "amber", "red", "value", "rating"),
    [
        ("above", 1, 2, 1.0, "green"),
        ("above", 1, 2, 1.5, "amber"),
        ("above", 1, 2, 2.5, "red"),
        ("below", 0.01, -0.02, 0.01, "green"),
        ("below", 0.01, -0.02, 0.0, "amber"),
        ("below", 0.01, -0.02, -0.03, "red"),
        ("away", 1, 2, -1.5, "amber"),
        ("away", 1, 2, 2.5, "red"),
        ("away", 1, 2, -0.5, "green"),
        ("above", 1, None, 99.0, "amber"),
        ("above", 1, 2, math.nan, "green"),
    ],
)
def test_rule_rates_values_beyond_its_limits(side, amber, red, value, rating):
    assert rule(side, amber, red).rate(value) == rating


@pytest.mark.parametrize(
    ("side", "value", "words"),
    [("above", 12345.6, "unusual (12350 mm, above 2)"), ("away", -1.00402, "unusual (−1.004 mm, beyond ±1)")],
)
def test_reason_states_value_and_limit(side, value, words):
    assert rule(side, 1, 2).explain(value) == words


def test_good_nucleus_and_scan_are_green():
    assert rate(GOOD, NUCLEUS_RULES) == ("green", ())
    assert rate_scan({**GOOD_SCAN, **summarize_nuclei(nuclei(["green"] * 16))}) == ("green", ())


@pytest.mark.parametrize(
    ("change", "rating", "words"),
    [
        ({"n_components": 0}, "red", "not found"),
        ({"expected_dice": 0.38}, "red", "uncertain outline"),
        ({"rim_contrast_ppm": 80.0}, "red", "much brighter"),  # a map in ppb read as ppm
        ({"rim_contrast_ppm": -0.05}, "red", "hardly brighter"),
        ({"edge_distance_mm": 0.0}, "red", "edge of the field of view"),
        ({"repeat_dice": 0.5}, "amber", "repetitions"),
        ({"repeat_dice": 0.2}, "red", "repetitions"),
        ({"volume_asymmetry": -1.3}, "red", "differs between left and right"),
    ],
)
def test_bad_nucleus_states_its_reason(change, rating, words):
    rated, reasons = rate({**GOOD, **change}, NUCLEUS_RULES)
    assert rated == rating
    assert len(reasons) == 1
    assert words in reasons[0]


@pytest.mark.parametrize("share", [0.002, 0.05])
def test_clipped_values_are_amber(share):
    rating, (reason,) = rate_scan({**GOOD_SCAN, "clipped_fraction": share})
    assert (rating, "clipped" in reason) == ("amber", True)
    assert rate_scan({**GOOD_SCAN, "clipped_fraction": 0.0}) == ("green", ())


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_missing_measure_is_not_rated(missing):
    assert rate({**GOOD, "mean_ppm_z": missing}, NUCLEUS_RULES) == ("green", ())
    assert rate({}, NUCLEUS_RULES) == ("green", ())


@pytest.mark.parametrize(
    ("weighted_mm3", "rating", "reason"),
    [
        pytest.param(
            12.5, "amber", "detected, but too small to label (0 voxels, below 1)", id="smaller than the voxels"
        ),
        pytest.param(0.0, "red", "not found (0 components, below 1)", id="no probability"),
        pytest.param(np.nan, "red", "not found (0 components, below 1)", id="missing"),
    ],
)
def test_nucleus_without_voxels_differs_from_not_found(weighted_mm3, rating, reason):
    bad = {"n_components": 0, "n_voxels": 0, "expected_dice": 0.0, "volume_asymmetry": 2.0}
    rated = rate_nuclei(pd.DataFrame([{"index": 1, "abbreviation": "DN_L", "volume_pv_mm3": weighted_mm3, **bad}]))
    assert (rated["rating"].tolist(), rated["reasons"].tolist()) == ([rating], [reason])


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        (["red"] * 4 + ["green"] * 12, "amber"),
        (["red"] * 5 + ["green"] * 11, "red"),
        (["amber"] * 8 + ["green"] * 8, "green"),
        (["amber"] * 9 + ["green"] * 7, "amber"),
    ],
)
def test_rated_nuclei_show_in_scan_rating(ratings, expected):
    assert rate_scan({**GOOD_SCAN, **summarize_nuclei(nuclei(ratings))})[0] == expected


@pytest.mark.parametrize(("column", "value"), [("mean_ppm_z", -4.5), ("rim_contrast_ppm", 0.4)])
@pytest.mark.parametrize(("n_atypical", "rating"), [(3, "green"), (4, "amber"), (9, "amber"), (10, "red")])
def test_many_atypical_nuclei_show_in_scan_rating(column, value, n_atypical, rating):
    table = nuclei(["green"] * 16).assign(mean_ppm_z=-1.0, rim_contrast_ppm=0.08)
    table.loc[: n_atypical - 1, column] = value
    rated, reasons = rate_scan({**GOOD_SCAN, **summarize_nuclei(table)})
    assert rated == rating
    assert all("the scale or zero of the map may be wrong" in reason for reason in reasons)


def test_nuclei_poor_in_iron_are_typical_without_contrast():
    names = ["NAC_L", "NAC_R", "THA_L", "THA_R", "PUT_L", "PUT_R", "CN_L", "CN_R"]
    table = nuclei(["green"] * 8).assign(index=range(8), abbreviation=names, rim_contrast_ppm=[0.0] * 5 + [0.05] * 3)
    assert rate_nuclei(table)["rating"].tolist() == ["green"] * 4 + ["amber"] + ["green"] * 3
    assert summarize_nuclei(table)["atypical_nuclei_fraction"] == 1 / 8


@pytest.mark.parametrize(("n_valid", "rating"), [(100, "green"), (99, "green"), (98, "amber"), (74, "red")])
def test_missing_voxels_are_rated(n_valid, rating):
    table = pd.DataFrame([{"index": 1, "abbreviation": "DN_L", **GOOD, "n_voxels": 100, "n_valid": n_valid}])
    rated = rate_nuclei(table)
    assert rated["rating"].tolist() == [rating]
    if rating != "green":
        assert f"voxels without data ({100 - n_valid} %, above " in rated["reasons"].tolist()[0]


def test_caudate_has_rules_of_its_own():
    uncertain = {**GOOD, "expected_dice": 0.75}
    assert rate({**uncertain, "abbreviation": "PUT_L"}, NUCLEUS_RULES) == ("green", ())
    reason = "uncertain outline of the caudate (0.75 expected Dice, below 0.85)"
    assert rate({**uncertain, "abbreviation": "CN_L"}, NUCLEUS_RULES) == ("amber", (reason,))
    apart = {**GOOD, "detached_volume_mm3": 200}
    assert rate({**apart, "abbreviation": "CN_R"}, NUCLEUS_RULES)[0] == "green"
    large = {**GOOD, "abbreviation": "CN_R", "caudate_ratio": 0.9, "caudate_height": 1.1, "detached_volume_mm3": 301}
    assert len(rate(large, NUCLEUS_RULES)[1]) == 3
    assert rate({**large, "abbreviation": "PUT_R"}, NUCLEUS_RULES)[0] == "green"


@pytest.mark.parametrize("facts", [{"longest_edge_mm": 3.6}, {"shortest_edge_mm": 1.8}, {"years_beyond_training": 2}])
def test_thick_slices_large_voxels_and_other_ages_are_amber(facts):
    assert rate_scan(facts)[0] == "amber"
    assert rate_scan({"longest_edge_mm": 3.5, "shortest_edge_mm": 1.7, "years_beyond_training": 0}) == ("green", ())


def test_rules_use_existing_measures():
    for each in (*NUCLEUS_RULES, *SCAN_RULES):
        if each.red is not None:
            assert each.red <= each.amber if each.side == "below" else each.red >= each.amber
    names = {*NUCLEUS_COLUMNS, *CONFIDENCE_COLUMNS, *PLACEMENT_COLUMNS, *Z_SCORE_OF.values(), *ASYMMETRY_OF.values()}
    names |= {*EXCLUSION_COLUMNS, *BLOB_COLUMNS, *PROOF_COLUMNS}
    assert {each.column for each in NUCLEUS_RULES} <= names | {"missing_fraction", "automatic_dice"}
    assert {each.column for each in SCAN_RULES} | {"streaking_index"} == {
        *MAP_QUALITY,
        "head_size",
        "slice_scale",
        "brain_volume_ml",
        "longest_edge_mm",
        "shortest_edge_mm",
        "failed_checks",
        "years_beyond_training",
        "n_blobs",
        *summarize_nuclei(nuclei([])),
    }


DN_L, DN_R = STRUCTURES.both_sides(["DN"])
UNIT = (1.0, 1.0, 1.0)


def measure(chi: np.ndarray, dseg: np.ndarray, probability: np.ndarray | None = None, **options: Any) -> pd.Series:
    """Measure DN_L; by default all voxels of 1 mm are valid and the probabilities are 0 or 1."""
    certain = (dseg == 1).astype(float) if probability is None else probability
    size_mm = options.get("size_mm", UNIT)
    fov = options.get("fov") or FieldOfView.of(np.ones(chi.shape, bool), voxel_size_mm=size_mm)
    return measure_confidence(chi, dseg, certain[None], structures=[DN_L], voxel_size_mm=size_mm, fov=fov).iloc[0]


def cube(shape: tuple[int, int, int] = (11, 11, 11), low: int = 4, high: int = 7) -> np.ndarray:
    dseg = np.zeros(shape, np.uint8)
    dseg[low:high, low:high, low:high] = 1
    return dseg


def line(values: Any) -> np.ndarray:
    return np.asarray(values).reshape(-1, 1, 1)


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    # H(1/4) = 1/4 log2 4 + 3/4 log2 (4/3) = 1/2 + 3/4 (2 - log2 3)
    [([0.5, 1.0], 0.5), ([0.25, 0.75], 0.5 + 0.75 * (2 - np.log2(3)))],
)
def test_entropy_of_nucleus_against_the_rest(probabilities, bits):
    row = measure(line([0.1, 0.1, 0]), line([1, 1, 0]), line([*probabilities, 0.5]))
    assert row["mean_entropy_bits"] == pytest.approx(bits)


def test_mass_outside_and_expected_dice_by_hand():
    row = measure(line([0.1] * 4), line([0, 1, 1, 0]), line([0.4, 0.8, 0.7, 0.1]))
    assert row["mass_outside_fraction"] == pytest.approx(0.25)  # 0.8 + 0.7 inside, 0.4 + 0.1 outside: 0.5 of 2
    assert row["expected_dice"] == pytest.approx(0.75)  # 1.5 shared, 2 voxels outlined, 2 expected: 2 * 1.5 / 4


def test_contrast_uses_rim_in_mm():
    # Voxels of 1 mm at 3: the rim holds those 2 and 3 mm away (0.03, 0.05 on both sides), not the neighbours (9).
    chi = line([7, 0.05, 0.03, 9, 0.24, 9, 0.03, 0.05, 7])
    row = measure(chi, line([0, 0, 0, 0, 1, 0, 0, 0, 0]))
    assert row["rim_contrast_ppm"] == pytest.approx(0.24 - 0.04)
    # Along z the next slice is 3 mm away and within the rim; the next one, at 6 mm, is not.
    chi = np.array([[[5, 0.04, 0.24, 0.04, 5]]], float)
    row = measure(chi, np.array([[[0, 0, 1, 0, 0]]]), size_mm=(1.0, 1.0, 3.0))
    assert row["rim_contrast_ppm"] == pytest.approx(0.2)


def test_rim_excludes_other_nuclei_and_holes():
    # At 2 and 3 mm on the left lies DN_R, on the right one invalid voxel and 0.04.
    chi = line([0.9, 0.9, 0.0, 0.24, 0.0, np.nan, 0.04])
    row = measure(chi, line([2, 2, 0, 1, 0, 0, 0]))
    assert row["rim_contrast_ppm"] == pytest.approx(0.2)


def test_absent_nucleus_has_only_defined_measures():
    row = measure(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), np.uint8), np.full((3, 3, 3), 0.1))
    assert row["n_components"] == 0
    assert (row["mass_outside_fraction"], row["expected_dice"]) == (1, 0)
    names = ["mean_entropy_bits", "rim_contrast_ppm", "edge_distance_mm"]
    assert row[names].isna().all()
    row = measure(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 3)))
    assert np.isnan(row["mass_outside_fraction"])
    assert np.isnan(row["expected_dice"])
