"""Clinical variables and controls of a study."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import adjust_volumes, compare_with_norms, with_variables
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.group_comparisons import compare_with_reference_group, find_variables, relate_to_variables
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import load_study

COLUMNS = ("participant_id", "age", "sex", "group", "site", "updrs", "stage", "dose")


@pytest.fixture
def people(output, add_scan, tmp_path):
    """Write 24 participants at two sites; DN_L rises with UPDRS, which only PD have."""
    rng = np.random.default_rng(4)
    rows = []
    for number in range(24):
        group, site = ("HC", "PD")[number % 2], "AB"[number // 2 % 2]
        age, updrs = rng.uniform(50, 80), rng.normal(30, 8)
        mean = 0.1 + 0.001 * age + (0.002 * updrs if group == "PD" else 0) + 0.01 * (site == "B") + rng.normal(0, 0.005)
        add_scan(f"sub-{number:02d}_seg-dgm16", means=(repr(mean), repr(0.1 + rng.normal(0, 0.005))))
        row = [f"sub-{number:02d}", f"{age:.3f}", "FM"[number // 4 % 2], group, site]
        rows.append([*row, f"{updrs:.3f}" if group == "PD" else "n/a", "II", "8"])
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    return table


@pytest.fixture
def analyse(output, tmp_path):
    """Run one analysis: its tables by name, and the warnings."""

    def call(analysis, **options):
        _, study = load_study([ResultsFolder(output, "out", tmp_path)], GroupOptions(measures=("mean_ppm",), **options))
        result = analysis(with_variables(study))
        return {table.name: table for table in result.tables}, result.warnings

    return call


def test_correlations_are_within_groups(people, analyse, tmp_path):
    """A score that differs between the groups."""
    scores = np.random.default_rng(1).normal(0, 1, 24) + 5 * (people["group"] == "PD")
    people.assign(score=scores).to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    tables, _ = analyse(relate_to_variables, correlate=("score",), covariates=("age",))
    row = tables["group_correlations"].rows.iloc[0]
    points = tables["group_correlation_values"].rows.query("abbreviation == 'DN_L'")
    table = people.astype({"age": float}).assign(score=scores).merge(points[["participant_id", "value"]])
    fit = ols("value ~ score + age + C(group)", table).fit(cov_type="HC3")
    assert (row["n"], row["t"]) == (24, pytest.approx(fit.tvalues["score"]))
    assert set(points["group"]) == {"HC", "PD"}


def test_missing_covariate_of_everybody_is_named(people, analyse, tmp_path):
    people.loc[people["group"] == "PD", "age"] = "n/a"
    people.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    _, warnings = analyse(relate_to_variables, correlate=("updrs",))
    assert "group_correlations.tsv: not tested: no participant with updrs has age" in warnings


@pytest.mark.parametrize(("column", "change"), [("group", {}), ("diagnosis", {"HC": "0", "PD": "1"})], ids=str)
def test_group_among_the_covariates_changes_no_comparison(people, analyse, tmp_path, column, change):
    table = people.replace({"group": change}).rename(columns={"group": column})
    table.loc[0, column] = "n/a"
    table.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    tables = [
        analyse(compare_with_reference_group, covariates=("age", "sex", *more))[0]["group_differences"].rows
        for more in ((), (column,))
    ]
    # Harmonized values depend on whether the group is preserved.
    expected, rows = (table[table["measure"] == "mean_ppm"].reset_index(drop=True) for table in tables)
    assert {(row.n_reference, row.n_group) for row in rows.itertuples()} == {(11, 12)}
    pd.testing.assert_frame_equal(rows, expected)


def test_variables_of_bad_columns_are_one_line(people, analyse, output, tmp_path):
    with pytest.raises(InputError, match=r"^`correlate` UPDRS: no such column in participants.tsv \(columns: age, sex"):
        analyse(relate_to_variables, correlate=("UPDRS",))
    with pytest.raises(InputError, match=r"^participants.tsv: stage is not a number: 'II' of sub-00"):
        analyse(relate_to_variables, correlate=("stage",))
    cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
    variables, warnings = find_variables(cohort, ["dose"])
    assert variables.empty
    assert warnings == ["`correlate` dose: constant (8); not analysed"]
    assert (
        "no clinical variable"
        in analyse(relate_to_variables, correlate=("dose",))[0]["group_correlations"].not_computed
    )


def test_few_controls_are_one_line(people, analyse, tmp_path):
    people.loc[4:, "group"] = "PD"
    people.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    tables, warnings = analyse(compare_with_norms, controls=("HC",))
    line = "`controls` are 2 participant(s); centiles need 10 with values and ages"
    assert tables["group_norms"].not_computed == line
    assert f"group_norms.tsv: not computed: {line}" in warnings
    _, warnings = analyse(adjust_volumes, controls=("HC",))
    assert "group_adjusted.tsv: DN_L: not tested: 2 participants, or all values are the same" in warnings
