"""Change per year of participants with several sessions."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.change import change_per_year


def scans(rows: list[tuple[str, float, float]], abbreviation: str = "RN_L") -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["participant_id", "age", "mean_ppm"])
    return table.assign(abbreviation=abbreviation)


TWO = scans([("sub-1", 50.0, 0.10), ("sub-1", 52.0, 0.12), ("sub-2", 60.0, 0.10), ("sub-2", 60.5, 0.12)])


def test_change_per_year_by_hand():
    """0.02 ppm in two years and in half a year: 0.01 and 0.04 per year, mean 0.025, standard error 0.015."""
    change = change_per_year(TWO)
    assert change.participants["change_per_year"].tolist() == pytest.approx([0.01, 0.04])
    row: Any = change.summary.loc[0]
    assert (row["change_per_year"], row["std"], row["t"]) == pytest.approx((0.025, 0.015 * np.sqrt(2), 5 / 3))
    assert (row["n"], row["n_single"], row["n_scans"], row["years_median"]) == (2, 0, 4, 1.25)


def test_three_sessions_give_a_least_squares_slope():
    """Times -1, 0, 1 around their mean: half the difference of the ends."""
    change = change_per_year(scans([("sub-1", 53.0, 0.13), ("sub-1", 51.0, 0.10), ("sub-1", 52.0, 0.5)]))
    row: Any = change.participants.loc[0]
    assert (row["change_per_year"], row["first"], row["years"]) == pytest.approx((0.015, 0.10, 2))


def test_summary_is_a_t_test_of_slopes():
    rng = np.random.default_rng(1)
    visits = [(f"sub-{number}", year) for number in range(8) for year in range(3)]
    change = change_per_year(
        scans([(name, 50.0 + year, rng.normal(0.1 + 0.002 * year, 0.003)) for name, year in visits])
    )
    slopes = change.participants["change_per_year"]
    mean, error = slopes.mean(), slopes.std() / np.sqrt(8)
    row: Any = change.summary.loc[0]
    assert (row["t"], row["df"], row["p"]) == pytest.approx((mean / error, 7, 2 * t.sf(abs(mean / error), 7)))
    assert (row["change_low"], row["change_high"]) == pytest.approx(tuple(mean + t.ppf([0.025, 0.975], 7) * error))


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        pytest.param([("sub-3", 40.0, 0.1)], "no change: 1 scans", id="one session"),
        pytest.param([("sub-3", 40.0, 0.1), ("sub-3", 42.0, np.nan)], "no change: 1 scans", id="one value"),
        pytest.param([("sub-3", 40.0, 0.1), ("sub-3", 40.0, 0.2)], "no change: all scans at 40 years", id="one age"),
    ],
)
def test_participants_without_change_have_a_note(rows, note):
    change = change_per_year(pd.concat([TWO, scans(rows)]))
    assert change.participants["note"].tolist() == ["", "", note]
    assert change.summary[["n", "n_single"]].iloc[0].tolist() == [2, 1]


def test_single_changes_and_sessions_are_not_tested():
    row: Any = change_per_year(TWO.head(2)).summary.loc[0]
    assert row["note"] == "not tested: 1 participants with a change, or all the same"
    assert np.isnan(row["p"])
    with pytest.raises(InputError, match="no participant has scans at two values of age; give each session"):
        change_per_year(TWO.iloc[[0, 2]])
