import math
from functools import cache

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.measurement.columns import ASYMMETRY_OF, CONFIDENCE_COLUMNS, NUCLEUS_COLUMNS, Z_SCORE_OF
from bids_dgmseg.measurement.field_of_view import FieldOfView
from bids_dgmseg.measurement.map_quality import MAP_QUALITY, measure_map_quality
from bids_dgmseg.measurement.nuclei import compare_with_norms, measure_asymmetry, measure_nuclei
from bids_dgmseg.measurement.rating import (
    NUCLEUS_RULES,
    SCAN_RULES,
    Rating,
    Rule,
    measure_confidence,
    rate,
    rate_nuclei,
    rate_scan,
)
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import make_grid

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
    return Rule("x", side, amber, red, "unusual", "mm")  # type: ignore[arg-type]  # a word from the table


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
def test_rule_rates_values_beyond_its_limits(side, amber, red, value, rating):
    assert rule(side, amber, red).rate(value) == rating


@pytest.mark.parametrize(
    ("side", "value", "words"),
    [
        ("above", 1.5, "unusual (1.5 mm, above 1)"),
        ("above", 2.53, "unusual (2.53 mm, above 2)"),
        ("away", -1.5, "unusual (−1.5 mm, beyond ±1)"),
        ("away", -1.00402, "unusual (−1.004 mm, beyond ±1)"),
        ("above", 2.00049, "unusual (2.0005 mm, above 2)"),
    ],
)
def test_reason_states_value_and_limit(side, value, words):
    assert rule(side, 1, 2).explain(value) == words


def test_red_nuclei_are_stated_in_percent():
    ratings: list[Rating] = ["red" if number < 2 else "green" for number in range(16)]
    assert rate_scan(GOOD_SCAN, ratings)[1] == ("nuclei with a red rating (12.5 %, above 0)",)


def test_good_nucleus_and_scan_are_green():
    assert rate(GOOD, NUCLEUS_RULES) == ("green", ())
    assert rate_scan(GOOD_SCAN, ["green"] * 16) == ("green", ())


@pytest.mark.parametrize(
    ("change", "rating", "words"),
    [
        ({"n_components": 0}, "red", "not found"),
        ({"n_components": 3}, "amber", "many components"),
        ({"expected_dice": 0.6}, "amber", "uncertain outline"),
        ({"expected_dice": 0.38}, "red", "uncertain outline"),
        ({"rim_contrast_ppm": 80.0}, "red", "much brighter"),  # a map in ppb read as ppm
        ({"rim_contrast_ppm": -0.05}, "red", "hardly brighter"),
        ({"edge_distance_mm": 0.0}, "red", "edge of the field of view"),
        ({"volume_z": 30.0}, "amber", "unusual volume"),
        ({"mean_ppm_z": 2000.0}, "red", "unusual susceptibility"),
        ({"volume_asymmetry": -1.3}, "red", "differs between left and right"),
    ],
)
def test_bad_nucleus_states_its_reason(change, rating, words):
    found, reasons = rate({**GOOD, **change}, NUCLEUS_RULES)
    assert found == rating
    assert len(reasons) == 1
    assert words in reasons[0]


def test_worst_reason_comes_first():
    rating, reasons = rate({**GOOD, "expected_dice": 0.4, "n_components": 0}, NUCLEUS_RULES)
    assert rating == "red"
    assert [words.split(" (")[0] for words in reasons] == ["not found", "uncertain outline"]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_missing_measure_is_not_rated(missing):
    assert rate({**GOOD, "volume_z": missing}, NUCLEUS_RULES) == ("green", ())
    assert rate({}, NUCLEUS_RULES) == ("green", ())


def test_table_is_rated_row_by_row():
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


def test_nucleus_not_found_has_one_reason():
    lost = {"index": 1, "abbreviation": "DN_L", **GOOD, "n_components": 0, "volume_asymmetry": 2.0}
    (reasons,) = rate_nuclei(pd.DataFrame([lost]))["reasons"]
    assert reasons == "not found (0 components, below 1)"


@pytest.mark.parametrize(
    ("weighted_mm3", "rating", "reason"),
    [
        pytest.param(12.5, "amber", "found, but fills no voxel (0 voxels, below 1)", id="smaller than the voxels"),
        pytest.param(0.0, "red", "not found (0 components, below 1)", id="no probability"),
        pytest.param(np.nan, "red", "not found (0 components, below 1)", id="missing"),
    ],
)
def test_nucleus_without_voxels_differs_from_not_found(weighted_mm3, rating, reason):
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
def test_red_nuclei_show_in_scan_rating(n_red, rating):
    ratings: list[Rating] = ["red" if number < n_red else "amber" for number in range(16)]
    assert rate_scan(GOOD_SCAN, ratings)[0] == rating


def test_scan_without_nuclei_is_rated_by_map():
    assert rate_scan({"noise_sd_ppm": 0.1}, [])[0] == "red"


def test_rules_use_existing_measures():
    names = {*NUCLEUS_COLUMNS, *CONFIDENCE_COLUMNS, *Z_SCORE_OF.values(), *ASYMMETRY_OF.values()}
    assert {each.column for each in NUCLEUS_RULES} <= names
    assert {each.column for each in SCAN_RULES} == {*MAP_QUALITY, "box_margin_mm", "red_nuclei_fraction"}


@pytest.mark.parametrize("each", [*NUCLEUS_RULES, *SCAN_RULES], ids=lambda each: f"{each.column} {each.side}")
def test_red_limit_lies_beyond_amber(each):
    if each.red is not None:
        assert each.red <= each.amber if each.side == "below" else each.red >= each.amber


Triple = tuple[float, float, float]


def describe(chi: np.ndarray, dseg: np.ndarray, size_mm: Triple, fov: FieldOfView) -> pd.DataFrame:
    """All measures used by the rules, with probabilities of 0 or 1."""
    probseg = np.stack([dseg == structure.index for structure in STRUCTURES]).astype(np.float32)
    stats = measure_nuclei(chi, dseg, probseg, structures=STRUCTURES, voxel_size_mm=size_mm)
    table = measure_confidence(chi, dseg, probseg, structures=STRUCTURES, voxel_size_mm=size_mm, fov=fov)
    table = table.merge(compare_with_norms(stats), on=["index", "abbreviation"])
    table["nucleus"] = table["abbreviation"].str.split("_").str[0]
    return table.merge(measure_asymmetry(stats), on="nucleus")


def size_of(grid: Grid) -> Triple:
    x, y, z = np.linalg.norm(grid.affine[:3, :3], axis=0).tolist()
    return x, y, z


@cache
def upright() -> tuple[np.ndarray, np.ndarray]:
    """Map with noise and labels at 2 mm."""
    chi, dseg = PHANTOM.scan(make_grid("RAS"), seed=3)
    return chi.array, dseg.array


def ratings_of(chi: np.ndarray, dseg: np.ndarray) -> pd.DataFrame:
    size_mm = size_of(make_grid("RAS"))
    table = describe(chi, dseg, size_mm, FieldOfView.of(is_valid(chi), voxel_size_mm=size_mm))
    return rate_nuclei(table).set_index("abbreviation")


def test_phantom_is_green_in_every_orientation(grid):
    chi, dseg = PHANTOM.chi(grid).array, PHANTOM.dseg(grid).array
    fov = FieldOfView.of(is_valid(chi), voxel_size_mm=size_of(grid))
    table = describe(chi, dseg, size_of(grid), fov)
    ratings = rate_nuclei(table)
    assert ratings["rating"].tolist() == ["green"] * 16, ratings["reasons"].tolist()
    # Nuclei are 0.03 ppm (white matter) to 0.1 ppm brighter than their surroundings. DN is 18 mm from the edge.
    assert table["rim_contrast_ppm"].between(0.03, 0.2).all()
    assert table["edge_distance_mm"].min() > 15


def test_phantom_map_is_green():
    chi, _ = upright()
    fov = FieldOfView.of(is_valid(chi), voxel_size_mm=(2.0, 2.0, 2.0))
    found = measure_map_quality(chi, inside=fov.inside, voxel_size_mm=(2.0, 2.0, 2.0))
    assert rate_scan(found, ["green"] * 16) == ("green", ())
    assert found["noise_sd_ppm"] == pytest.approx(0.005, rel=0.2)  # edges add a little


def test_ppb_read_as_ppm_is_red():
    chi, dseg = upright()
    assert (ratings_of(1000 * chi, dseg)["rating"] == "red").all()


def test_inverted_map_is_red():
    chi, dseg = upright()
    found = ratings_of(-chi, dseg)
    assert (found["rating"] == "red").all()
    assert found["reasons"].str.contains("hardly brighter").all()


def test_displaced_labels_are_not_green():
    chi, dseg = upright()
    found = ratings_of(chi, np.roll(dseg, 10, axis=1))  # 20 mm towards the front
    assert (found["rating"] != "green").mean() > 0.5


def test_nucleus_cut_by_field_of_view_is_red():
    chi, dseg = upright()
    first = int(np.argwhere(dseg == STRUCTURES.named("DN_L").index)[:, 2].min()) + 2
    empty = chi.copy()
    empty[:, :, :first] = 0
    labels = np.where(empty != 0, dseg, 0)
    found = ratings_of(empty, labels)
    assert found.loc["DN_L", "rating"] == "red"
    assert "edge of the field of view" in str(found.loc["DN_L", "reasons"])
    assert found.loc["GP_L", "rating"] == "green"


def test_lost_side_makes_both_sides_red():
    chi, dseg = upright()
    found = ratings_of(chi, np.where(dseg == STRUCTURES.named("RN_R").index, 0, dseg))
    assert str(found.loc["RN_R", "reasons"]).startswith("not found")
    assert found.loc[["RN_L", "RN_R"], "rating"].tolist() == ["red", "red"]
