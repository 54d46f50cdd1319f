import math

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.columns import COMPARED, QUALITY_COLUMNS, REGION_COLUMNS, Z_COLUMNS
from bids_dgmseg.measurement.map_quality import SCAN_COLUMNS
from bids_dgmseg.measurement.rating import NUCLEUS_RULES, SCAN_RULES, Rating, Rule, rate, rate_nuclei, rate_scan

GOOD = {
    "n_components": 1,
    "expected_dice": 0.85,
    "rim_contrast_ppm": 0.08,
    "boundary_gradient_ppm_per_mm": 0.03,
    "edge_distance_mm": 20.0,
    "volume_z": 0.5,
    "mean_ppm_z": -1.0,
    "volume_asymmetry": 0.05,
    "mean_ppm_asymmetry": -0.1,
}
GOOD_SCAN = {"noise_sd_ppm": 0.01, "streaking_index": 1.2, "rim_residual_ppm": 0.02, "box_margin_mm": 8.0}


def rule(side: str, amber: float, red: float | None) -> Rule:
    return Rule("x", side, amber, red, "odd", "mm", "made up")  # type: ignore[arg-type]  # a word from the table


@pytest.mark.parametrize(
    ("side", "amber", "red", "value", "rating"),
    [
        ("above", 1, 2, 1.0, "green"),
        ("above", 1, 2, 1.5, "amber"),
        ("above", 1, 2, 2.5, "red"),
        ("below", 2, 1, 2.0, "green"),
        ("below", 2, 1, 1.5, "amber"),
        ("below", 2, 1, 0.5, "red"),
        ("below", 0.01, -0.02, 0.0, "amber"),
        ("below", 0.01, -0.02, -0.03, "red"),
        ("away", 1, 2, -1.5, "amber"),
        ("away", 1, 2, 2.5, "red"),
        ("away", 1, 2, -0.5, "green"),
        ("above", 1, None, 99.0, "amber"),
        ("above", 1, 2, math.nan, "green"),
    ],
)
def test_a_rule_turns_beyond_its_limits(side, amber, red, value, rating):
    assert rule(side, amber, red).rate(value) == rating


@pytest.mark.parametrize(
    ("side", "value", "words"),
    [
        ("above", 1.5, "odd (1.5 mm, above 1)"),
        ("above", 2.53, "odd (2.53 mm, above 2)"),
        ("away", -1.5, "odd (−1.5 mm, beyond ±1)"),
        ("away", -1.00402, "odd (−1.004 mm, beyond ±1)"),
        ("above", 2.00049, "odd (2.0005 mm, above 2)"),
    ],
)
def test_a_reason_tells_the_value_and_the_limit_it_passed(side, value, words):
    assert rule(side, 1, 2).explain(value) == words


def test_the_share_of_red_nuclei_is_told_in_percent():
    ratings: list[Rating] = ["red" if number < 2 else "green" for number in range(16)]
    assert rate_scan(GOOD_SCAN, ratings)[1] == ("nuclei with a red rating (12.5 %, above 0)",)


def test_a_good_nucleus_and_a_good_scan_are_green():
    assert rate(GOOD, NUCLEUS_RULES) == ("green", ())
    assert rate_scan(GOOD_SCAN, ["green"] * 16) == ("green", ())


@pytest.mark.parametrize(
    ("change", "rating", "words"),
    [
        ({"n_components": 0}, "red", "not found"),
        ({"n_components": 3}, "amber", "many parts"),
        ({"expected_dice": 0.6}, "amber", "not certain of its outline"),
        ({"expected_dice": 0.38}, "red", "not certain of its outline"),
        ({"rim_contrast_ppm": 80.0}, "red", "much brighter"),  # a map in ppb taken for ppm
        ({"rim_contrast_ppm": -0.05}, "red", "hardly brighter"),
        ({"edge_distance_mm": 0.0}, "red", "end of what was measured"),
        ({"volume_z": 30.0}, "amber", "volume is unusual"),
        ({"mean_ppm_z": 2000.0}, "red", "susceptibility is unusual"),
        ({"volume_asymmetry": -1.3}, "red", "differs between the sides"),
    ],
)
def test_a_bad_nucleus_is_told_why(change, rating, words):
    found, reasons = rate({**GOOD, **change}, NUCLEUS_RULES)
    assert found == rating
    assert len(reasons) == 1
    assert words in reasons[0]


def test_the_worst_reason_comes_first():
    rating, reasons = rate({**GOOD, "expected_dice": 0.4, "n_components": 0}, NUCLEUS_RULES)
    assert rating == "red"
    assert [words.split(" (")[0] for words in reasons] == ["not found", "the model is not certain of its outline"]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_what_is_missing_is_not_judged(missing):
    assert rate({**GOOD, "volume_z": missing}, NUCLEUS_RULES) == ("green", ())
    assert rate({}, NUCLEUS_RULES) == ("green", ())


def test_a_table_is_judged_row_by_row():
    table = pd.DataFrame(
        [
            {"index": 1, "abbreviation": "DN_L", **GOOD},
            {"index": 2, "abbreviation": "DN_R", **GOOD, "n_components": 3, "volume_asymmetry": 2.0},
        ]
    ).astype({"n_components": "Int64"})
    found = rate_nuclei(table)
    assert found["rating"].tolist() == ["green", "red"]
    assert found["reasons"].tolist()[0] == ""
    assert found["reasons"].tolist()[1].count("; ") == 1


def test_of_a_nucleus_that_was_not_found_nothing_else_is_said():
    lost = {"index": 1, "abbreviation": "DN_L", **GOOD, "n_components": 0, "volume_asymmetry": 2.0}
    (reasons,) = rate_nuclei(pd.DataFrame([lost]))["reasons"]
    assert reasons == "not found (0 parts, below 1)"


@pytest.mark.parametrize(
    ("weighted_mm3", "rating", "reason"),
    [
        pytest.param(12.5, "amber", "found, but fills no voxel (0 voxels, below 1)", id="smaller than the voxels"),
        pytest.param(0.0, "red", "not found (0 parts, below 1)", id="no probability"),
        pytest.param(np.nan, "red", "not found (0 parts, below 1)", id="missing"),
    ],
)
def test_a_nucleus_that_fills_no_voxel_is_told_from_one_that_was_not_found(weighted_mm3, rating, reason):
    small = {
        "index": 1,
        "abbreviation": "DN_L",
        "n_components": 0,
        "n_voxels": 0,
        "volume_pv_mm3": weighted_mm3,
        "expected_dice": 0.0,
        "volume_asymmetry": 2.0,
    }
    found = rate_nuclei(pd.DataFrame([small]))
    assert (found["rating"].tolist(), found["reasons"].tolist()) == ([rating], [reason])


@pytest.mark.parametrize(("n_red", "rating"), [(0, "green"), (1, "amber"), (4, "amber"), (5, "red")])
def test_a_scan_is_amber_when_a_nucleus_is_red_and_red_when_more_than_a_quarter_are(n_red, rating):
    ratings: list[Rating] = ["red" if number < n_red else "amber" for number in range(16)]
    assert rate_scan(GOOD_SCAN, ratings)[0] == rating


def test_a_scan_without_nuclei_is_judged_by_its_map():
    assert rate_scan({"noise_sd_ppm": 0.1}, [])[0] == "red"


def test_every_rule_reads_a_measure_that_exists():
    names = {*REGION_COLUMNS, *QUALITY_COLUMNS, *Z_COLUMNS.values(), *COMPARED.values()}
    assert {each.column for each in NUCLEUS_RULES} <= names
    assert {each.column for each in SCAN_RULES} == {*SCAN_COLUMNS, "box_margin_mm", "red_nuclei_fraction"}


@pytest.mark.parametrize("each", [*NUCLEUS_RULES, *SCAN_RULES], ids=lambda each: f"{each.column} {each.side}")
def test_red_lies_beyond_amber_and_a_limit_has_a_reason(each):
    assert each.why
    if each.red is not None:
        assert each.red <= each.amber if each.side == "below" else each.red >= each.amber
