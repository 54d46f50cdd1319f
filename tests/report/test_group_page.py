"""The group page and the tables for a paper, from a study made by hand."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_dgmseg.report import group_figures, group_tables
from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_page import write_group_page
from bids_dgmseg.report.group_tables import describe_participants
from tests.report.conftest import Page
from tests.report.group_study import SCANS, make_data, make_study, scan_row, with_table

PIXEL = io.BytesIO()
Image.new("RGB", (1, 1)).save(PIXEL, format="PNG")


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch) -> None:
    """Write one pixel instead of each figure; only the page of `plain` has real ones."""
    for name in ("violins", "panels"):
        monkeypatch.setattr(group_figures, f"draw_{name}", lambda *_args, **_options: PIXEL.getvalue())


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


def test_ratings_and_participants_come_before_scans_and_plots(plain):
    page = Page(plain)
    assert list(page.tables)[:3] == ["ratings-table", "participants-table", "scans-table"]
    # sub-05 is amber as a whole, DN_L of sub-03 red; DN_R of sub-06 was not found
    assert page.tables["ratings-table"] == [
        ["Rating", "Whole scan", "DN_L", "DN_R"],
        ["green", "5", "5", "6"],
        ["amber", "1", "0", "0"],
        ["red", "0", "1", "0"],
        ["failed or not found", "0", "0", "1"],
    ]
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
    # DN_L without sub-03 and sub-04: 600, 610, 710, 720
    means = read(out / "group" / "group_results.tsv").set_index("Nucleus")["volume (mm³)"]
    assert means["DN_L"].startswith("660.0 ± ")
    assert page.tables["participants-table"][1][2:4] == ["5", "5"]


def test_study_and_versions_are_shown(out, study, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "dataset_description.json").write_text(json.dumps({"Name": "Iron & age"}))
    described = {"DatasetLinks": {"raw": "../raw"}, "GeneratedBy": [{"Name": "bids_dgmseg", "Version": "0.0.9"}]}
    (out / "dataset_description.json").write_text(json.dumps(described))
    text = write_group_page(study, out).read_text(encoding="utf-8")
    assert "<h1>Iron &amp; age</h1>" in text
    assert "6 scan(s) of 6 participant(s) at 2 site(s) in 2 groups" in text
    assert "<dt>bids_dgmseg, scans</dt><dd>0.0.9</dd>" in text


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


def with_curves(data: GroupData, *measures: str) -> GroupData:
    """Add two curves of DN_L: a falling one with the lower AICc, and a rising one."""
    keys = [{"measure": measure, "scans": "all", "model": "dgm16", "abbreviation": "DN_L"} for measure in measures]
    limits = {"n": 6, "alpha": 0.0123, "alpha_low": -0.01, "alpha_high": 0.03}
    fits = [
        {**key, "curve": curve, **limits, "best": curve == "linear"}
        for key in keys
        for curve in ("linear", "exponential")
    ]
    curves = [
        {**key, "curve": curve, "age": age, "fit": slope * age, "low": slope * age - 1, "high": slope * age + 1}
        for key in keys
        for curve, slope in (("linear", -0.002), ("exponential", 0.002))
        for age in (20, 70)
    ]
    return with_table(with_table(data, "group_ageing", fits), "group_ageing_curves", curves)


def test_harmonized_values_are_drawn_by_site_and_over_age(out, study):
    rows = [scan_row(who, site=site, measure="mean_ppm", harmonized=0.15) for who, site, *_ in SCANS]
    data = with_curves(with_table(study, "group_harmonized", rows), "mean_ppm", "mean_ppm_harmonized")
    page = Page(write_group_page(data, out))
    assert [name for name in page.alts if "_age" in name] == ["group/figures/group_mean_ppm_age_harmonized.png"]
    assert "Values are harmonized over sites (ComBat)." in page.text
    assert "Mean susceptibility by site, raw and harmonized" in page.text


DIFFERENCE = {"model": "dgm16", "abbreviation": "DN_L", "reference": "HC", "group": "MS"}


def test_differences_have_limits_covariates_and_units(out, study):
    rows = [
        {"measure": measure, **DIFFERENCE, "n_reference": 10, "n_group": 9, "mean_reference": mean}
        | {"difference": difference, "difference_low": -2 * difference, "difference_high": 4 * difference}
        | {"p": 0.0004, "q": 0.02, "df": 17.0}
        for measure, mean, difference in (("mean_ppm", 0.05, 0.012), ("volume_mm3", 600, 8.25))
    ]
    data = with_table(study, "group_differences", rows, Covariates=["age", "sex"])
    page = Page(write_group_page(data, out))
    headings, row = page.tables["group_differences-mean_ppm"]
    assert dict(zip(headings, row, strict=True)) == {
        **{"Nucleus": "DN_L", "Group": "MS", "n, reference": "10", "n, group": "9", "Adjusted mean, reference": "50"},
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


def test_long_tables_are_cut_and_link_to_file(out, study, monkeypatch):
    monkeypatch.setattr(group_tables, "MAX_SCANS", 2)
    page = write_group_page(study, out)
    assert len(Page(page).tables["scans-table"]) == 1 + 2
    assert '2 of 6 rows, all are in <a href="group/group_qc.tsv">' in page.read_text(encoding="utf-8")


def test_correlations_are_drawn_and_tabulated(out, study):
    keys = {"measure": "mean_ppm", "model": "dgm16", "abbreviation": "DN_L", "variable": "UPDRS"}
    relation = keys | {"n": 6, "r": 0.8, "r_low": 0.1, "r_high": 0.97, "slope": 0.0025, "t": 2.6, "df": 4, "p": 0.06}
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
    rows = [row, row | {"measure": "mean_ppm_harmonized"}]
    write_group_page(with_table(study, "group_differences", rows, Covariates=["age", "site"]), out)
    (shown,) = read(out / "group" / "group_results.tsv").to_dict("records")
    assert shown == {
        **{"Measure": "mean susceptibility (ppb)", "Model": "dgm16", "Nucleus": "DN_L"},
        **{"Reference group": "HC", "Group": "MS", "n": "3 / 2"},
        **{"Reference group, mean ± SE": "110.0 ± 12.3", "Group, mean ± SE": "200.0 ± 10.0"},
        **{"Difference [95 % CI]": "12.5 [−1.0, 26.0]", "Standardized [95 % CI]": "0.80"},
        **{"p": "0.040", "q": "0.080"},
    }
    html = (out / "group" / "group_results.html").read_text(encoding="utf-8")
    assert "adjusted for age, site (analysis of covariance, HC3 errors)" in html
    assert re.findall("<td>(.*?)</td>", html)[-1] == "0.080"
