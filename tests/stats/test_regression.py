"""Relations with other variables, against statsmodels' formulas and correlations of residuals."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, pearsonr, t
from statsmodels.formula.api import ols

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.regression import (
    adjust_for_volume,
    correlate,
    covariate_columns,
    covariate_matrix,
    fit_covariates,
    iter_groups,
    numeric_column,
)

OPTIONS: Any = {"variable": "updrs", "covariates": ("age", "sex", "site")}


@pytest.fixture
def people():
    """Forty participants at two sites, one scan each, of two nuclei: the first falls with the score."""
    rng = np.random.default_rng(3)
    n = 40
    table = pd.DataFrame({"participant_id": [f"sub-{k:02d}" for k in range(n)], "age": rng.uniform(50, 80, n)})
    table["sex"], table["site"], table["group"] = rng.choice(["F", "M"], n), rng.choice(["A", "B"], n), "PD"
    table["updrs"] = 20 + 0.3 * table["age"] + rng.normal(0, 6, n)
    parts = []
    for name, slope in (("SN_L", -0.001), ("DN_L", 0.0)):
        y = 0.1 + slope * table["updrs"] + 0.001 * table["age"] + 0.02 * (table["site"] == "B") + rng.normal(0, 0.01, n)
        parts.append(table.assign(abbreviation=name, mean_ppm=y))
    return pd.concat(parts, ignore_index=True)


def test_slope_agrees_with_statsmodels(people):
    """HC3 errors; degrees of freedom from the matrices B and D of Imbens and Kolesár as they are written."""
    relations = correlate(people, **OPTIONS)[0].set_index("abbreviation")
    for nucleus, table in people.groupby("abbreviation"):
        fit = ols("mean_ppm ~ updrs + age + C(sex) + C(site)", table).fit(cov_type="HC3", use_t=True)
        design = fit.model.exog
        inverse = np.linalg.inv(design.T @ design) @ design.T
        b = np.eye(40) - design @ inverse
        bd = b * (inverse[fit.model.exog_names.index("updrs")] / np.diag(b)) ** 2
        df = np.trace(bd) ** 2 / np.trace(bd @ bd)
        slope, error = fit.params["updrs"], fit.bse["updrs"]
        half = t.ppf(0.975, df) * error
        theirs = [slope, slope - half, slope + half, slope / error, df, 2 * t.sf(abs(slope / error), df)]
        row = relations.loc[nucleus]
        names = ["slope", "slope_low", "slope_high", "t", "df", "p"]
        assert row[names].astype(float).to_numpy() == pytest.approx(theirs)
        assert row["n"] == 40


def test_partial_correlation_is_that_of_residuals(people):
    """Limits: tanh(atanh(r) -+ 1.96 / sqrt(40 - 3 - 3)) with three covariates, times the ratio of the errors."""
    row = correlate(people, **OPTIONS)[0].iloc[0]
    table = people[people["abbreviation"] == "SN_L"]
    residuals = [ols(f"{name} ~ age + C(sex) + C(site)", table).fit().resid for name in ("mean_ppm", "updrs")]
    r = pearsonr(*residuals).statistic
    assert row["r"] == pytest.approx(r)
    fit = ols("mean_ppm ~ updrs + age + C(sex) + C(site)", table).fit()
    half = 1.959964 / np.sqrt(34) * fit.get_robustcov_results("HC3").bse[-2] / fit.bse["updrs"]
    limits = np.tanh(np.arctanh(r) + np.array([-1, 1]) * half)
    assert row[["r_low", "r_high"]].astype(float).to_numpy() == pytest.approx(limits, rel=1e-6)


def test_participant_alone_at_a_site_changes_nothing(people):
    alone = people.groupby("abbreviation").head(1).assign(participant_id="sub-X", site="C", updrs=90)
    (row, with_alone) = (correlate(table, **OPTIONS)[0].iloc[0] for table in (people, pd.concat([people, alone])))
    assert with_alone["r":"p"].to_list() == pytest.approx(row["r":"p"].to_list())
    assert (with_alone["n"], with_alone["n_missing"]) == (40, 1)


def test_missing_values_and_repeated_scans_are_counted(people):
    people.loc[people["participant_id"].isin(["sub-00", "sub-01"]), "age"] = np.nan
    people.loc[people["participant_id"] == "sub-02", "updrs"] = np.nan
    row = correlate(people, **OPTIONS)[0].iloc[0]
    assert (row["n"], row["n_missing"], row["n_scans"]) == (37, 2, 37)
    both = correlate(pd.concat([people, people.assign(sex=None)]), **OPTIONS)[0].iloc[0]  # that of the first session
    assert (both["n"], both["n_scans"], both["p"]) == (37, 74, row["p"])


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"updrs": lambda rows: 2 * rows["age"]}, "not tested: updrs is determined by age and sex and site"),
        ({"mean_ppm": 0.1}, "not tested: 40 participants, or all values are the same"),
        ({"sex": None}, "not tested: no participant with updrs has sex"),
    ],
)
def test_impossible_tests_have_a_note(people, change, note):
    relations, values = correlate(people.assign(**change), **OPTIONS)
    assert relations["note"].iloc[0] == note
    assert relations[["r", "p"]].iloc[0].isna().all()
    assert "SN_L" not in set(values["abbreviation"])


def sized(volumes: Any, values: Any, **columns: Any) -> pd.DataFrame:
    ids = [f"sub-{number:02d}" for number in range(len(volumes))]
    table = {"participant_id": ids, "abbreviation": "DN_L", "volume_mm3": volumes, "mean_ppm": values}
    return pd.DataFrame(table | columns)


def test_slope_of_controls_applies_to_all():
    """Controls rise by about 0.01 ppm from 600 to 680 mm3; a patient with 540 mm3, 100 below the mean, gains 0.0125.

    A control without volume and a patient without measure stay missing.
    """
    volumes, values = [600.0, 620, 640, 660, 680, np.nan, 540, 540], [0.10, 0.102, 0.104, 0.106, 0.111, 0.1, 0.12]
    table = sized(volumes, [*values, np.nan])
    adjusted, coefficients = adjust_for_volume(table, controls=np.arange(8) < 6)
    line = linregress(volumes[:5], values[:5])
    expected = [value - line.slope * (volume - 640) for value, volume in zip(values, volumes, strict=False)]
    assert adjusted.tolist() == pytest.approx([*expected, np.nan], nan_ok=True)
    row = coefficients.loc[0]
    assert (row["slope"], row["mean_volume"], row["n"]) == (pytest.approx(line.slope), 640, 5)
    assert row["r"] == pytest.approx(line.rvalue)


AGES = pd.DataFrame({"participant_id": ["sub-1"], "age": ["30"]})


def test_text_in_numeric_column_is_rejected():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numeric_column(AGES, "age")


@pytest.mark.parametrize("access", [numeric_column, lambda table, column: list(iter_groups(table, [column]))])
def test_missing_column_is_rejected(access):
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        access(AGES, "sex")


def test_covariates_are_columns_as_in_the_fit():
    table = pd.DataFrame({"age": [40.0, 60, np.nan], "sex": ["F", "M", "M"], "site": ["A", "A", None]})
    expected = [[-10, 0, 0], [10, 1, 0], [np.nan, 1, np.nan]]
    np.testing.assert_array_equal(covariate_matrix(table), expected)
    covariates = fit_covariates(table)
    assert (covariates[0].low, covariates[0].high, covariates[1].levels) == (40, 60, ("F", "M"))
    other = pd.DataFrame({"age": [80.0], "sex": ["O"], "site": ["A"]})
    np.testing.assert_array_equal(covariate_columns(covariates, other), [[30, np.nan, 0]])
    assert covariate_columns((), table).shape == (3, 0)
