"""Tables of a comparison of models, by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.evaluate.ranking import MODELS_COLUMNS, NUCLEI_COLUMNS, models_table, nuclei_table

MODELS = {"net": ["DN_L", "RN_L"], "atlas": ["DN_L"]}


@pytest.fixture
def overlap():
    """Two scans; `atlas` misses the nucleus of the second one, whose labels lack RN_L."""
    rows = [
        ("net", "DN_L", 0.8, 1.0, 10, 9),
        ("net", "DN_L", 0.6, 3.0, 10, 8),
        ("net", "RN_L", 0.5, 2.0, 5, 5),
        ("net", "RN_L", 0.0, np.nan, 0, 4),
        ("atlas", "DN_L", 0.4, 5.0, 10, 20),
        ("atlas", "DN_L", 0.0, np.nan, 10, 0),
    ]
    return pd.DataFrame(rows, columns=["prediction", "abbreviation", "dice", "hd95_mm", "n_reference", "n_prediction"])


def test_each_model_is_summed_up_over_its_own_nuclei(overlap):
    costs = pd.DataFrame(
        {
            "model": ["net"] * 3 + ["atlas"] * 3,
            "seconds": [1.0, 3.0, 2.0, 50.0, np.nan, 70.0],
            "cpu_seconds": [1.0, 2.0, 9.0, 40.0, np.nan, 60.0],
            "peak_mb": [900.0, 950.0, 910.0, 1200.0, np.nan, 1100.0],
        }
    )
    table: Any = models_table(overlap, costs, models=MODELS).set_index("model")
    assert table.loc["net", ["n_nuclei", "n_compared", "n_scans", "n_failed", "n_missed"]].tolist() == [2, 2, 3, 0, 0]
    assert table.loc["net", "dice"] == pytest.approx((0.8 + 0.6 + 0.5) / 3)  # not the scan whose labels lack RN_L
    assert table.loc["net", ["dice_least", "hd95_mm", "seconds", "cpu_seconds", "peak_mb"]].tolist() == [
        0.5,
        2,
        2,
        2,
        950,
    ]
    assert table.loc["atlas", ["n_nuclei", "n_compared", "n_scans", "n_failed", "n_missed"]].tolist() == [1, 1, 2, 1, 1]
    assert table.loc["atlas", ["dice", "hd95_mm", "seconds"]].tolist() == [0.2, 5, 60]


def test_a_nucleus_without_labels_is_a_row_without_values():
    summary = pd.DataFrame(
        {
            "prediction": "net",
            "abbreviation": "DN_L",
            "measure": ["dice", "hd95_mm"],
            "n": 2,
            "mean": [0.7, 2.0],
            "sd": [0.1, 0.5],
        }
    )
    agreement = pd.DataFrame(
        {
            "quantity": ["volume_mm3"],
            "prediction": "net",
            "abbreviation": "DN_L",
            "mean_reference": 100.0,
            "mean_prediction": 90.0,
            "pearson_r": 0.9,
            "icc21": 0.8,
            "bias": -10.0,
            "loa_lower": -30.0,
            "loa_upper": 10.0,
        }
    )
    table = nuclei_table(summary, agreement, models=MODELS)
    assert table[["model", "abbreviation", "n"]].to_numpy().tolist() == [
        ["net", "DN_L", 2],
        ["net", "RN_L", 0],
        ["atlas", "DN_L", 0],
    ]
    first: Any = table.loc[0]
    assert first[["dice", "dice_sd", "hd95_mm", "hd95_mm_sd"]].tolist() == [0.7, 0.1, 2, 0.5]
    assert first[["volume_mm3_bias", "volume_mm3_icc21", "volume_mm3_loa_upper"]].tolist() == [-10, 0.8, 10]
    assert np.isnan(first["mean_ppm_bias"])
    assert table.loc[1:].drop(columns=["model", "abbreviation", "n"]).isna().to_numpy().all()


def test_every_column_says_what_it_means(overlap):
    assert all(entry["Description"] for entry in [*NUCLEI_COLUMNS.values(), *MODELS_COLUMNS.values()])
    assert NUCLEI_COLUMNS["volume_mm3_bias"]["Units"] == "mm^3"
    assert NUCLEI_COLUMNS["hd95_mm_sd"]["Units"] == "mm"
    assert "Units" not in NUCLEI_COLUMNS["mean_ppm_icc21"]
