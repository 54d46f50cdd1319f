"""Tables of agreement, on values computed by hand."""

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.lab.evaluate.summary_tables import agreement_table, methods_table, raters_table, summarize

RATERS = ["A", "B", "C", "D"]
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


@pytest.fixture
def values():
    """The same ratings for two nuclei, of which the second lacks one."""
    frame = pd.DataFrame(SHROUT_FLEISS, columns=RATERS, dtype=float).assign(quantity="volume_mm3")
    table = pd.concat([frame.assign(abbreviation=name) for name in ("DN_L", "DN_R")], ignore_index=True)
    table.loc[len(frame), "A"] = np.nan
    return table


def test_missing_values_are_counted(values):
    rows = agreement_table(values, raters=["A", "B"], pairs=[("A", "B")]).set_index("abbreviation")
    assert rows["n"].to_dict() == {"DN_L": 6, "DN_R": 5, "all": 11}
    assert rows["n_missing"].tolist() == [0, 1, 1]
    assert rows["tukey_p"].isna().all()  # of two raters
    # The means of the second are over the five scans that both have.
    assert rows.loc["DN_R", "mean_reference"] == pytest.approx((6 + 8 + 7 + 10 + 6) / 5)


def test_p_values_are_corrected_within_each_quantity(values):
    both = pd.concat([values, values.assign(quantity="mean_ppm")], ignore_index=True)
    rows = agreement_table(both, raters=RATERS[:3], pairs=[("A", "B"), ("A", "C")])
    assert rows.loc[rows["abbreviation"] == "all", "t_p_bonferroni"].isna().all()
    rows = rows[rows["abbreviation"] != "all"]
    assert rows["t_p_bonferroni"].tolist() == pytest.approx((4 * rows["t_p"]).tolist())  # two nuclei and pairs
    assert (rows["t_p_holm"] <= rows["t_p_bonferroni"]).all()


def test_icc_matches_shrout_and_fleiss(values):
    row = raters_table(values, raters=RATERS).iloc[0]
    assert (row["k"], row["n"]) == (4, 6)
    assert [round(row[name], 2) for name in ("icc11", "icc21", "icc31")] == [0.17, 0.29, 0.71]


def test_all_pairs_of_predictions_are_compared(values):
    rows = methods_table(values, raters=RATERS)
    assert len(rows) == 2 * 6
    first = rows.iloc[0]
    assert (first["first"], first["second"]) == ("A", "B")
    assert first["mean_difference"] == pytest.approx((15 - 46) / 6)


def test_summary_excludes_missing_values():
    overlap = pd.DataFrame({"reference": "R", "prediction": "P", "abbreviation": "DN_L", "hd95_mm": [1.0, 3.0, np.nan]})
    row = summarize(overlap, measures=["hd95_mm"]).iloc[0]
    assert (row["n"], row["n_missing"]) == (2, 1)
    assert [row[name] for name in ("mean", "median", "minimum", "maximum")] == [2, 2, 1, 3]
    assert row["sd"] == pytest.approx(np.sqrt(2))


def test_missing_nucleus_does_not_affect_others():
    scores = {"first": [0.8, 0.82, 0.84, 0.9], "second": [0.7, 0.75, 0.72, 0.8], "third": [0.6, 0.64, 0.61, 0.7]}
    values = pd.DataFrame({"quantity": "dice", "abbreviation": "DN_L", **scores, "other": np.nan})
    alone = methods_table(values.drop(columns="other"), raters=list(scores))
    among = methods_table(values, raters=[*scores, "other"])
    pd.testing.assert_frame_equal(among, alone)
    assert len(among) == 3
    assert among["tukey_p"].notna().all()
