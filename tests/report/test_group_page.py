"""The group page and the tables for a paper, from a study made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_page import write_group_page
from bids_dgmseg.report.group_tables import describe_participants
from tests.report.conftest import Page
from tests.report.group_study import make_data, make_study, scan_row, with_table


@pytest.fixture
def out(tmp_path) -> Path:
    return Path(tmp_path / "out")


@pytest.fixture
def study(out) -> GroupData:
    return make_study(out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A page that no test changes: six scans, one model, ratings."""
    folder = tmp_path_factory.mktemp("plain")
    return write_group_page(make_study(folder), folder)


def test_worst_scans_come_first(plain):
    table = Page(plain).tables["scans-table"]
    assert table[0] == ["Scan", "Site", "Group", "Whole scan", "DN_L", "DN_R", "Not found", "Outliers", "Warnings"]
    # amber as a whole, then a red nucleus, then one not found; others by warnings (sub-04 has 3, sub-02 1, sub-01 0)
    assert [row[0] for row in table[1:]] == [f"sub-0{number}_ses-1" for number in (5, 3, 6, 4, 2, 1)]
    assert table[2] == ["sub-03_ses-1", "A", "MS", "green", "red", "green", "none", "n/a", "2"]
    assert table[3][6] == "DN_R"


def test_recovery_of_proofs_is_drawn_by_site(study, out):
    proved = study.stats.assign(recovered_ppb=9.0, recovered_percent=8.0)
    page = Page(write_group_page(replace(study, stats=proved), out))
    assert "by site" in page.alts["group/figures/group_recovered_ppb_by-site.png"]
    alone = proved[proved["site"] == "A"]
    (out / "group/figures/group_recovered_ppb_by-site.png").unlink()
    page = Page(write_group_page(replace(study, stats=alone), out))
    assert "group/figures/group_recovered_ppb_by-site.png" in page.alts
    assert "group/figures/group_mean_ppm_by-site.png" not in page.alts


def test_participants_come_first_and_ratings_with_scans(plain):
    page = Page(plain)
    assert list(page.tables) == ["participants-table", "scans-table"]
    assert "Scans: 5 green, 1 amber." in page.text  # sub-05
    # ages 20, 30, 40, 50, 60, 70: mean 45, SD sqrt(1750 / 5) = 18.7; HC 20, 30, 50: sqrt(466.7 / 2) = 15.3
    rows = {tuple(row[:2]): row[2:] for row in page.tables["participants-table"]}
    assert rows["all", "all"] == ["6", "6", "45.0 ± 18.7", "20.0 to 70.0", "n/a", "0"]
    assert rows["HC", "all"] == ["3", "3", "33.3 ± 15.3", "20.0 to 50.0", "n/a", "0"]
    assert rows["all", "A"] == ["3", "3", "30.0 ± 10.0", "20.0 to 40.0", "n/a", "0"]


def test_participants_count_once_with_first_age_and_known_sex():
    visits = (("sub-01", "ses-1", 30, None), ("sub-01", "ses-2", 40, "F"), ("sub-02", "ses-1", 50, None))
    data = make_data(scan_row(name, session=session, age_years=age, sex=sex) for name, session, age, sex in visits)
    (row,) = describe_participants(data).rows[:1]  # one site
    # ages 30 and 50: SD 14.1
    assert [cell.text for cell in row][1:] == ["2", "3", "40.0 ± 14.1", "30.0 to 50.0", "F: 1, n/a: 1", "0"]


def test_excluded_scans_are_listed_and_in_no_summary(out, study):
    """sub-04 is excluded, with a volume ten times too large, and one nucleus of sub-03."""
    stats = study.stats.copy()
    scan, nucleus = stats["person"] == "sub-04", (stats["person"] == "sub-03") & (stats["abbreviation"] == "DN_L")
    stats.loc[scan, "volume_mm3"] = 7000
    stats.loc[scan, "excluded"], stats.loc[nucleus, "excluded"] = "rated red: noise", "rated red: in many parts"
    page = Page(write_group_page(replace(study, stats=stats), out))
    assert page.tables["excluded-table"][1:] == [
        ["sub-04_ses-1", "whole scan", "rated red: noise"],
        ["sub-03_ses-1", "DN_L", "rated red: in many parts"],
    ]
    # both sides of sub-01, sub-02 and sub-05: 550, 560, 610; sub-03 and sub-06 lack a side
    means = read(out / "group" / "group_results.tsv").set_index("Nucleus")["volume (mm³)"]
    assert means["DN"].startswith("573.3 ± ")
    assert page.tables["participants-table"][1][2:4] == ["5", "5"]


def test_study_is_named(out, study, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "dataset_description.json").write_text(json.dumps({"Name": "Iron & age"}))
    described = {"DatasetLinks": {"raw": "../raw"}, "GeneratedBy": [{"Name": "bids_dgmseg", "Version": "0.0.9"}]}
    (out / "dataset_description.json").write_text(json.dumps(described))
    text = write_group_page(study, out).read_text(encoding="utf-8")
    assert "<h1>Iron &amp; age</h1>" in text
    assert "6 scan(s) of 6 participant(s) at 2 site(s) in 2 groups" in text


def test_outliers_link_to_scans_largest_first(out, study):
    rows = [
        scan_row(f"sub-0{number}", measure="mean_ppm", value=0.1, robust_z=z, outlier=abs(z) > 3.5)
        for number, z in ((1, 4.0), (2, 1.0), (3, -6.0))
    ]
    for row in rows:
        row["scan"] = row["name"] = f"{row['participant_id']}_ses-1"
    page = Page(write_group_page(with_table(study, "group_outliers", rows), out))
    assert [row[0] for row in page.tables["group_outliers-table"]] == ["Scan", "sub-03_ses-1", "sub-01_ses-1"]
    assert page.links.count("sub-03.html#sub-03_ses-1_dgm16") == 2
    assert page.tables["scans-table"][2][7] == "1"  # sub-03


def test_both_age_curves_are_drawn_and_tabulated(out, study):
    keys = {"measure": "mean_ppm", "scans": "group HC", "model": "dgm16", "abbreviation": "DN"}
    fits = [
        {**keys, "curve": curve, "n": 6, "alpha": 0.0123, "alpha_low": 0.01, "alpha_high": 0.03}
        | {"aicc": -50.0 + more, "delta_aicc": more, "best": not more}
        for curve, more in (("exponential", 1.5), ("linear", 0.0))
    ]
    fits += [fit | {"scans": "group MS", "n": 3} for fit in fits]
    curves = [
        {**keys, "curve": curve, "age": age, "fit": 0.01 * age, "low": 0.0, "high": 1.0}
        for curve in ("exponential", "linear")
        for age in (20, 70)
    ]
    values = [{**keys, "participant_id": "sub-01", "age": 30, "value_adjusted": 0.1}]
    data = with_table(with_table(study, "group_ageing_curves", curves), "group_ageing_values", values)
    page = Page(write_group_page(with_table(data, "group_ageing", fits), out))
    headings, *rows = page.tables["group_ageing-mean_ppm"]
    assert [(row[headings.index("Curve")], row[headings.index("ΔAICc")]) for row in rows] == [
        ("exponential", "1.5"),
        ("linear", "0"),
    ]
    assert "with two curves and their confidence bands" in page.alts["group/figures/group_mean_ppm_age.png"]
    effect = "DN (+123 ppb per 10 years, 95 % CI 100 to 300)"  # 0.0123 ppm per year
    assert f"number of nuclei): mean susceptibility in 1 of 1 nuclei, most in {effect}." in page.text


DIFFERENCE = {"model": "dgm16", "abbreviation": "DN_L", "reference": "HC", "group": "MS"}


def test_differences_have_limits_covariates_and_units(out, study):
    rows = [
        {
            "measure": measure,
            **DIFFERENCE,
            "n_reference": 10,
            "n_group": 9,
            "mean_reference": mean,
            "se_reference": 0.001,
        }
        | {"difference": difference, "difference_low": -2 * difference, "difference_high": 4 * difference}
        | {"p": 0.0004, "q": 0.02, "df": 17.0}
        for measure, mean, difference in (("mean_ppm", 0.05, 0.012), ("volume_mm3", 600, 8.25))
    ]
    data = with_table(study, "group_differences", rows, Covariates=["age", "sex"])
    page = Page(write_group_page(data, out))
    headings, row = page.tables["group_differences-mean_ppm"]
    assert dict(zip(headings, row, strict=True)) == {
        **{
            "Nucleus": "DN_L",
            "Group": "MS",
            "n, reference": "10",
            "n, group": "9",
            "Adjusted mean, reference": "50 ± 1",
        },
        **{"Difference": "12 [−24, 48]", "p": "< 0.001", "q": "0.020"},
    }
    headings, row = page.tables["group_differences-volume_mm3"]
    assert row[headings.index("Difference")] == "8.25 [−16.5, 33]"
    title = "Differences between groups adjusted for age, sex (ANCOVA), relative to HC: mean susceptibility (ppb)<"
    assert title in page.source


def test_each_note_is_written_once_with_its_nuclei(out, study):
    notes = {"DN_L": "few; odd", "DN_R": "few", "SN_L": None}
    rows = [
        {"measure": "mean_ppm", **DIFFERENCE, "abbreviation": name, "difference": 0.01, "note": note}
        for name, note in notes.items()
    ]
    page = Page(write_group_page(with_table(study, "group_differences", rows), out))
    assert "Note DN_L, DN_R: few." in page.text
    assert "Note DN_L: odd." in page.text
    assert all("few" not in "".join(row) for rows in page.tables.values() for row in rows)


def test_changes_are_drawn_per_person_and_tabulated(out):
    """In a column of integers with missing values, too."""
    visits = [(who, session) for who in range(3) for session in range(2 if who else 1)]
    data = make_data(
        scan_row(f"sub-{who}", session=f"ses-{session}", volume_mm3=600 + who + session, years_since_first=2 * session)
        for who, session in visits
    )
    keys = {"measure": "volume_mm3", "model": "dgm16", "abbreviation": "DN_L", "group": "all"}
    row = {**keys, "n": 2, "change_per_year": 0.5, "change_low": -1.0, "change_high": 2.0, "q_difference": np.nan}
    page = Page(write_group_page(with_table(data, "group_change", [row]), out))
    assert "one line per person with repeated scans (2)." in page.alts["group/figures/group_volume_mm3_change.png"]
    assert page.tables["group_change-volume_mm3"] == [
        ["Nucleus", "Group", "n", "Change per year"],
        ["DN_L", "all", "2", "0.5 [−1, 2]"],
    ]


def test_only_some_measures_are_drawn(out, study):
    keys = {"model": "dgm16", "abbreviation": "DN", "between_sd": 0.02, "n_now": 20, "detectable_now": 0.0186}
    rows = [keys | {"measure": measure} for measure in ("mean_ppm", "volume_mm3")]
    data = replace(with_table(study, "group_power", rows), settings={"MeasuresDrawn": ["mean_ppm"]})
    page = Page(write_group_page(data, out))
    assert "found at 80 % over the number" in page.alts["group/figures/group_mean_ppm_power.png"]
    assert not [name for name in page.alts if "volume" in name]


def test_correlations_are_drawn_and_tabulated(out, study):
    keys = {"measure": "mean_ppm", "model": "dgm16", "abbreviation": "DN_L", "variable": "UPDRS"}
    relation = keys | {
        "n": 6,
        "r": 0.8,
        "r_low": 0.1,
        "r_high": 0.97,
        "slope": 0.0025,
        "t": 2.6,
        "df": 4,
        "p": 0.06,
        "q": 0.06,
    }
    points = [
        keys | {"group": "MS", "x": 10 * n, "value_adjusted": 0.1 + 0.02 * n + 0.001 * (-1) ** n} for n in range(6)
    ]
    data = with_table(study, "group_correlations", [relation], Covariates=["age", "sex"])
    page = Page(write_group_page(with_table(data, "group_correlation_values", points), out))
    headings, row = page.tables["group_correlations-mean_ppm"]
    shown = dict(zip(headings, row, strict=True))
    assert shown["Partial r"] == "0.8 [0.1, 0.97]"
    assert shown["Slope per unit"] == "2.5"  # ppb per point
    assert "Relation to clinical variables at equal age, sex: mean susceptibility (ppb)" in page.source
    alt = page.alts["group/figures/group_mean_ppm_variable_UPDRS.png"]
    assert alt.endswith("The partial correlation is largest in DN_L: 0.80.")


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def test_results_for_paper_have_adjusted_differences_in_ppb(out, study):
    row = {"measure": "mean_ppm", **DIFFERENCE, "n_reference": 3, "n_group": 2, "p": 0.04, "q": 0.08}
    row |= {"mean_reference": 0.11, "se_reference": 0.0123, "mean_group": 0.2, "se_group": 0.01}
    row |= {"difference": 0.0125, "difference_low": -0.001, "difference_high": 0.026, "hedges_g": 0.8}
    write_group_page(with_table(study, "group_differences", [row], Covariates=["age", "site"]), out)
    (shown,) = read(out / "group" / "group_results.tsv").to_dict("records")
    assert shown == {
        **{"Measure": "mean susceptibility (ppb)", "Nucleus": "DN_L", "Group": "MS"},
        **{"n, reference": "3", "n, group": "2"},
        **{"Adjusted mean, reference": "110 ± 12.3", "Adjusted mean, group": "200 ± 10"},
        **{"Difference": "12.5 [−1, 26]", "Standardized": "0.8", "p": "0.040", "q": "0.080"},
    }
    html = (out / "group" / "group_results.html").read_text(encoding="utf-8")
    assert "are adjusted for age, site (one analysis of covariance per nucleus, HC3 errors)" in html
    assert "standardized by the residual standard deviation of this model" in html
    assert "The main tables have 1 tests. q limits" in html


def test_results_are_said_in_plain_words(out, study):
    row = {**DIFFERENCE, "n_reference": 30, "n_group": 20, "hedges_g": 0.8, "p": 0.004, "difference_low": 0.005}
    row |= {"difference": 0.0125, "difference_high": 0.02}
    rows = [
        row | {"measure": "mean_ppm", "abbreviation": "SN", "q": 0.008},
        row | {"measure": "mean_ppm", "abbreviation": "RN", "q": 0.6, "p": 0.6},
        row | {"measure": "volume_mm3", "abbreviation": "SN", "q": 0.3, "p": 0.2},
    ]
    page = Page(write_group_page(with_table(study, "group_differences", rows, Covariates=["age"]), out))
    assert (
        "Groups. 20 MS were compared with 30 HC at equal age: mean susceptibility differs in SN of MS (+12.5 ppb, "
        "95 % CI 5 to 20, g 0.80, q 0.008); no difference of volume is shown (smallest q 0.300). Tests. The main "
        "tables have 3 tests. q limits"
    ) in " ".join(page.text.split())
