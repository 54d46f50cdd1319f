import csv
import math
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.nuclei import NORMS, Norm, compare_with_norms, parse_reference_region
from bids_dgmseg.models.structures import STRUCTURES

MEASURES = ("volume_mm3", "mean_ppm")


def table_rows() -> list[dict[str, str]]:
    text = files("bids_dgmseg").joinpath("data", "norms.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def stats(**rows: tuple[float, float]) -> pd.DataFrame:
    """One row per nucleus: volume and mean."""
    return pd.DataFrame(
        [
            {"index": STRUCTURES.named(name).index, "abbreviation": name, "volume_mm3": volume, "mean_ppm": mean}
            for name, (volume, mean) in rows.items()
        ]
    )


OWN = {
    ("RN", "volume_mm3"): Norm(200.0, 50.0, None, "example", None),
    ("RN", "mean_ppm"): Norm(0.1, 0.02, "csf", "example", None),
}


def test_z_score_counts_standard_deviations():
    row = compare_with_norms(stats(RN_L=(300.0, 0.05)), norms=OWN).iloc[0]
    assert row["volume_z"] == pytest.approx(2)
    assert row["mean_ppm_z"] == pytest.approx(-2.5)


def test_no_norm_no_z_score():
    row = compare_with_norms(stats(GP_R=(1500.0, 0.1)), norms=OWN).iloc[0]
    assert np.isnan(row["volume_z"])
    assert np.isnan(row["mean_ppm_z"])


def test_missing_measure_has_no_z_score():
    table = stats(RN_L=(np.nan, np.nan)).astype({"volume_mm3": "Float64"})
    table["volume_mm3"] = table["volume_mm3"].mask(table["volume_mm3"].isna())
    assert compare_with_norms(table, norms=OWN)[["volume_z", "mean_ppm_z"]].isna().all(axis=None)


@pytest.mark.parametrize(("reference", "scored"), [("csf", True), (None, True), ("whole-brain", False)])
def test_other_reference_has_no_z_score(reference, scored):
    row = compare_with_norms(stats(RN_L=(300.0, 0.05)), reference=reference, norms=OWN).iloc[0]
    assert math.isfinite(row["mean_ppm_z"]) is scored
    assert math.isfinite(row["volume_z"])  # a volume has no reference


@pytest.mark.parametrize(
    ("words", "region"),
    [
        ("whole brain without CSF", "whole-brain"),
        ("Brain mask, excluding ventricles", "whole-brain"),
        ("whole brain (CSF excluded)", "whole-brain"),
        ("CSF-excluded whole brain", "whole-brain"),
        ("brain without CSF", "whole-brain"),
        ("ventricular CSF", "csf"),
        ("CSF without choroid plexus", "csf"),
        ("cerebrospinal fluid, vessels excluded", "csf"),
        ("white matter without CSF", "white matter without csf"),
        ("not stated", None),
    ],
)
def test_excluded_region_is_not_the_reference(words, region):
    assert parse_reference_region(words) == region


def test_norms_have_a_row_per_nucleus_and_measure():
    nuclei = {structure.nucleus for structure in STRUCTURES}
    assert sorted((row["nucleus"], row["measure"]) for row in table_rows()) == sorted(
        (nucleus, measure) for nucleus in nuclei for measure in MEASURES
    )


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: f"{row['nucleus']} {row['measure']}")
def test_norms_state_source_or_reason(row):
    assert len(row) == 11
    known = row["mean"] != "n/a"
    assert (row["sd"] != "n/a") == known
    assert (row["source"] != "n/a") == known
    assert row["note"] != "n/a"
    assert not known or float(row["sd"]) > 0
    assert not known or (row["reference"] != "n/a") == (row["measure"] == "mean_ppm")


@pytest.mark.parametrize(
    ("nucleus", "mean", "sd"),
    [
        ("RN", 459.0, 71.2),
        ("SN", 984.5, 210.8),
        ("STN", 230.9, 63.1),
        ("CN", 8420, 880),
        ("PUT", 8900, 890),
    ],
)
def test_bilateral_volumes_are_halved(nucleus, mean, sd):
    # The sum of two independent sides of SD s has SD √2 s.
    norm = NORMS[nucleus, "volume_mm3"]
    assert norm.mean == pytest.approx(mean / 2, abs=0.06)
    assert norm.sd == pytest.approx(sd / math.sqrt(2), abs=0.06)
