"""The group page, from tables made by hand."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bids_dgmseg.errors import InputError
from bids_dgmseg.report import group_figures, group_page, group_scans
from bids_dgmseg.report.figures import write_prints
from bids_dgmseg.report.group_data import read_group_data
from bids_dgmseg.report.group_page import find_study_names, write_group_page
from bids_dgmseg.report.group_scans import describe_participants
from tests.report.conftest import Page
from tests.report.group_tables import KEYS, SCANS, write_table, write_tables


def scan_row(participant: str, *, session: str = "ses-1", model: str = "dgm16", site: str = "A", **columns: Any):
    """One row of a group table: the keys of the scan, then other columns; of DN_L unless they say otherwise."""
    keys = dict(zip(KEYS, (participant, session, "n/a", "n/a", model, site), strict=True))
    return {**keys, "abbreviation": "DN_L", **columns}


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch) -> None:
    """Write one pixel instead of each figure; only the page of `plain` has real, interactive ones."""
    monkeypatch.setattr(group_page, "MAX_INTERACTIVE", 0)
    monkeypatch.setattr(group_figures, "write_prints", lambda _figure, _path: None)
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, format="PNG")
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda _self, file, **_options: file.write(pixel.getvalue()))


@pytest.fixture
def out(tmp_path) -> Path:
    return write_tables(tmp_path / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A page that no test changes: six scans, one model, ratings."""
    return write_group_page(write_tables(tmp_path_factory.mktemp("plain")))


def test_spelling_of_a_group_is_that_of_most_persons(tmp_path):
    """Three people of each of two datasets have PD, four of a third have pd; labels repeat."""
    rows = [
        scan_row(f"sub-{number}", dataset=dataset, volume_mm3=1, mean_ppm=1, group=group)
        for dataset, group, n in (("a", "PD", 3), ("b", "PD", 3), ("c", "pd", 4))
        for number in range(n)
    ]
    keys = ["participant_id", "session_id", "acquisition", "run", "model", "dataset", "site"]
    rows = [{key: row[key] for key in dict.fromkeys([*keys, *row])} for row in rows]
    write_table(tmp_path, "group_stats", rows)
    assert read_group_data(tmp_path, names=[]).levels("group") == ["PD"]


def test_group_with_the_name_of_a_measure(tmp_path):
    rows = [scan_row("sub-1", hemisphere=side, abbreviation=f"DN_{side}", volume_mm3=1, mean_ppm=1) for side in "LR"]
    rows = [row | {"participants_hemisphere": "right"} for row in rows]
    settings = {"Settings": {"GroupColumn": "hemisphere"}, "participants_hemisphere": {"Description": "affected side"}}
    write_table(tmp_path, "group_stats", rows, settings)
    assert read_group_data(tmp_path, names=[]).levels("group") == ["right"]


def test_worst_scans_come_first(plain):
    table = Page(plain).tables["scans-table"]
    assert table[0] == ["Scan", "Site", "Group", "Whole scan", "DN_L", "DN_R", "Not found", "Outliers", "Warnings"]
    # amber as a whole, then a red nucleus, then one not found; others by warnings (sub-04 has 3, sub-02 1, sub-01 0)
    assert [row[0] for row in table[1:]] == [f"sub-0{number}_ses-1" for number in (5, 3, 6)]
    others = Page(plain).tables["other-scans-table"]
    assert [row[0] for row in others[1:]] == [f"sub-0{number}_ses-1" for number in (4, 2, 1)]
    assert table[2] == ["sub-03_ses-1", "A", "MS", "green", "red", "green", "none", "n/a", "2"]
    assert table[3][6] == "DN_R"


def test_nuclei_smaller_than_voxel_are_listed_separately(tmp_path):
    rows = [
        scan_row(name, session="n/a", abbreviation="STN_L", volume_mm3=volume, volume_pv_mm3=weighted, mean_ppm="n/a")
        for name, volume, weighted in (("sub-01", 0, 12.5), ("sub-02", "n/a", "n/a"), ("sub-03", 90, 80))
    ]
    write_table(tmp_path, "group_stats", rows)
    tables = Page(write_group_page(tmp_path)).tables
    table, others = tables["scans-table"], tables["other-scans-table"]
    assert table[0][2:4] == ["Not found", "Smaller than a voxel"]
    assert {row[0]: row[2:4] for row in table[1:] + others[1:]} == {
        "sub-01": ["none", "STN_L"],
        "sub-02": ["STN_L", "none"],
        "sub-03": ["none", "none"],
    }


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
    assert rows["MS", "A"] == ["1", "1", "40.0", "40.0 to 40.0", "n/a", "0"]


def test_first_scan_counts_and_sexes_are_counted(tmp_path):
    visits = (("sub-01", "ses-1", 30, "F"), ("sub-01", "ses-2", 40, "F"), ("sub-02", "ses-1", 50, "1"))
    rows = [
        scan_row(name, session=ses, volume_mm3=600, mean_ppm=0.1, age_years=age, gender=sex)
        for name, ses, age, sex in visits
    ]
    write_table(tmp_path, "group_stats", rows, {"Settings": {"SexColumn": "gender"}})
    table = Page(write_group_page(tmp_path, n_failed=4)).tables["participants-table"]
    # ages 30 and 50: SD 14.1
    assert table[1][1:] == ["2", "3", "40.0 ± 14.1", "30.0 to 50.0", "F: 1, n/a: 1", "0"]  # 1 is no sex here


def exclude_scans(out: Path) -> None:
    """Exclude sub-04, with a volume ten times too large, and one nucleus of sub-03."""
    rows = pd.read_csv(out / "group_stats.tsv", sep="\t", dtype=object, keep_default_na=False)
    chosen = rows["participant_id"] == "sub-04"
    rows["excluded"] = "n/a"
    rows.loc[chosen, ["excluded", "volume_mm3", "rating"]] = ["scan rated red: noise", "7000", "red"]
    nucleus = (rows["participant_id"] == "sub-03") & (rows["abbreviation"] == "DN_L")
    rows.loc[nucleus, "excluded"] = "nucleus rated red: in many parts"
    rows.to_csv(out / "group_stats.tsv", sep="\t", index=False)


def test_excluded_scans_are_listed_and_in_no_summary(out):
    exclude_scans(out)
    page = Page(write_group_page(out))
    assert page.tables["excluded-table"][1:] == [
        ["sub-04_ses-1", "whole scan", "scan rated red: noise"],
        ["sub-03_ses-1", "DN_L", "nucleus rated red: in many parts"],
    ]
    # DN_L without sub-03 and sub-04: A 600, 610; B 710, 720
    assert page.tables["medians-volume_mm3_by-site"][:2] == [
        ["Nucleus", "A", "B"],
        ["DN_L", "605.0 (2)", "715.0 (2)"],
    ]
    assert next(row for row in page.tables["nuclei-table"] if row[0] == "DN_L")[1] == "4"
    assert page.tables["participants-table"][1][2:4] == ["5", "5"]
    assert "Crosses are values rated red" in page.text


def test_points_link_to_scans(plain):
    html = plain.read_text(encoding="utf-8")
    point = (
        r'<a href="sub-01.html#sub-01_ses-1_dgm16" class="s0 g0 r0" tabindex="-1">'
        r"<title>sub-01_ses-1, site A, group HC: DN_L 600 mm³</title><circle "
    )
    assert html.count(point) == 2  # by site and by group
    assert "<metadata" not in html
    assert not re.findall(r"<svg[^>]*>.*?https?:", html, re.DOTALL)


def test_same_tables_give_same_page(plain, tmp_path, monkeypatch):
    monkeypatch.undo()  # real figures
    assert write_group_page(write_tables(tmp_path)).read_bytes() == plain.read_bytes().replace(
        plain.parent.name.encode(), tmp_path.name.encode()
    )


def test_scans_link_to_existing_pages(plain):
    page = Page(plain)
    to_scans = {link for link in page.links if link.startswith("sub-")}
    assert sorted(to_scans) == [f"sub-0{number}.html#sub-0{number}_ses-1_dgm16" for number in range(1, 6)]


def test_ratings_have_symbol_word_and_reason(plain):
    html = plain.read_text(encoding="utf-8")
    assert 'title="left dentate nucleus: red, in many parts"' in html
    assert '<span class="rating red" aria-hidden="true">✕</span><span class="hidden">red</span>' in html


def test_nuclei_table_summarizes_all_scans(plain):
    table = Page(plain).tables["nuclei-table"]
    row = next(row for row in table if row[0] == "DN_R")
    # 500 510 520 500 510: mean 508, SD sqrt(280 / 4) = 8.4; 0.10 0.11 0.12 0.14 0.15: mean 0.124
    assert row[1:8] == ["6", "5", "508.0", "8.4", "500.0", "510.0", "520.0"]
    assert row[8:10] == ["5", "0.1240"]


def test_violins_have_medians_as_text_and_table(plain):
    page = Page(plain)
    assert page.tables["medians-volume_mm3_by-site"] == [
        ["Nucleus", "A", "B"],
        ["DN_L", "610.0 (3)", "710.0 (3)"],
        ["DN_R", "510.0 (3)", "505.0 (2)"],
    ]
    alt = page.alts["figures/group_mean_ppm_by-site.png"]
    assert "Medians differ most in DN_L: from 0.11 ppm (A) to 0.21 ppm (B)." in alt
    assert "figures/group_volume_mm3_by-group.png" in page.alts


def test_figures_of_earlier_page_are_removed(out):
    write_group_page(out)
    old = out / "figures" / "group_volume_mm3_by-site.png"
    assert old.exists()
    write_group_page(write_tables(out, sites=False))
    assert not old.exists()


def test_every_entity_distinguishes_scans(tmp_path):
    scan = {"participant_id": "sub-01", "session_id": "n/a", "run": "1", "model": "dgm16"}
    values = {"site": "A", "abbreviation": "DN_L", "volume_mm3": 600, "mean_ppm": 0.1, "cohort": "old"}
    rows = [
        {**scan, "space": space, "echo": echo, **values}
        for space, echo in (("n/a", "n/a"), ("T1w", "n/a"), ("T1w", "2"))
    ]
    write_table(tmp_path, "group_stats", rows)
    (tmp_path / "sub-01.html").write_text("")
    page = Page(write_group_page(tmp_path))
    # BIDS: run, echo, space; cohort is an entity too, but a column after site is a participant's
    names = ["sub-01_run-1", "sub-01_run-1_space-T1w", "sub-01_run-1_echo-2_space-T1w"]
    assert [row[0] for row in page.tables["other-scans-table"][1:]] == names
    assert [link for link in page.links if "#sub-01" in link] == [f"sub-01.html#{name}_dgm16" for name in names]


def test_numeric_sites_keep_their_spelling(tmp_path):
    sites = {"sub-01": "01", "sub-02": "01", "sub-03": "1", "sub-04": "n/a"}
    keys = [scan_row(name, session="n/a", site=site) for name, site in sites.items()]
    write_table(tmp_path, "group_stats", [key | {"volume_mm3": 600, "mean_ppm": 0.1} for key in keys])
    write_table(
        tmp_path,
        "group_harmonized",
        [
            key | {"measure": "mean_ppm", "harmonized": "n/a" if key["site"] == "n/a" else value}
            for key, value in zip(keys, (0.1, 0.2, 0.4, 0.8), strict=True)
        ],
    )
    tables = Page(write_group_page(tmp_path)).tables
    # the median of 0.1 and 0.2 at 01, the one value at 1
    assert tables["medians-mean_ppm_by-site_harmonized"] == [
        ["Nucleus", "01", "1"],
        ["DN_L", "0.1500 (2)", "0.4000 (1)"],
    ]


def test_scans_without_site_are_counted(tmp_path):
    rows = [
        scan_row(f"sub-0{number}", session="n/a", site=site, volume_mm3=600, mean_ppm=0.1)
        for number, site in enumerate(("n/a", "3T", "n/a", "n/a"))
    ]
    write_table(tmp_path, "group_stats", rows)
    items = Page(write_group_page(tmp_path)).items
    assert "Plots by site: 1 scan of site 3T, 3 without a site" in items


def test_omissions_are_explained(tmp_path):
    out = write_tables(tmp_path / "out", ratings=False)
    write_table(out, "group_longitudinal", [], {"NotComputed": "nobody has scans at two ages"})
    page = Page(write_group_page(out))
    assert page.tables["other-scans-table"][0] == ["Scan", "Site", "Group", "Not found", "Outliers", "Warnings"]
    assert {
        "Ratings of the scans: not in group_stats.tsv and group_qc.tsv",
        "group_longitudinal.tsv: nobody has scans at two ages",
        "group_ageing.tsv: not found",
        "Comparison of models: all scans were segmented by dgm16",
    } <= set(page.items)


def test_first_hundred_warnings_are_shown(out):
    html = write_group_page(out, warnings=[f"age of sub-{n} is <old>" for n in range(120)])
    text = html.read_text(encoding="utf-8")
    assert "120 warnings at the group level" in text
    assert "age of sub-99 is &lt;old&gt;" in text
    assert "sub-100 is" not in text
    assert "… and 20 more" in text


def test_study_settings_and_versions_are_shown(out, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "dataset_description.json").write_text(json.dumps({"Name": "Iron & age"}))
    described = {"DatasetLinks": {"raw": "../raw"}, "GeneratedBy": [{"Name": "bids_dgmseg", "Version": "0.0.9"}]}
    (out / "dataset_description.json").write_text(json.dumps(described))
    text = write_group_page(out).read_text(encoding="utf-8")
    assert "<h1>Iron &amp; age</h1>" in text
    assert "6 scans of 6 participants at 2 sites in 2 groups" in text
    assert "<dt>bids_dgmseg, scans</dt><dd>0.0.9</dd>" in text
    assert "<dt>Group column</dt><dd>diagnosis</dd>" in text


def test_merged_outputs_have_names_of_their_sources(tmp_path):
    """Circular links end; a source without links has the name of its folder."""
    for folder, described in {
        "bern": {"Name": "Bern"},
        "out": {"Name": "tables", "DatasetLinks": {"raw": "../bern"}},
        "merged": {"SourceDatasets": [{"URL": link} for link in (".", "../out", "../graz", "https://example.org")]},
        "graz": {"SourceDatasets": [{"URL": "../merged"}]},
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dataset_description.json").write_text(json.dumps(described))
    assert find_study_names(tmp_path / "merged") == ["Bern", "graz"]


def test_named_group_column_replaces_group(tmp_path):
    rows = [
        scan_row(f"sub-0{number}", volume_mm3=600, mean_ppm=0.1, group="one", arm=arm)
        for number, arm in enumerate(("A", "A", "B"))
    ]
    write_table(tmp_path, "group_stats", rows, {"Settings": {"GroupColumn": "arm"}})
    tables = Page(write_group_page(tmp_path)).tables
    assert tables["medians-volume_mm3_by-group"] == [["Nucleus", "A", "B"], ["DN_L", "600.0 (2)", "600.0 (1)"]]


def test_outliers_link_to_scans_largest_first(out):
    values: dict[str, Any] = {"measure": "mean_ppm", "value": 0.1, "n_site": 9, "median": 0.2}
    rows = [
        scan_row(f"sub-0{number}", **values, robust_z=z, outlier=str(abs(z) > 3.5).lower())
        for number, z in ((1, 4.0), (2, 1.0), (3, -6.0))
    ]
    write_table(out, "group_outliers", rows)
    page = Page(write_group_page(out))
    assert [row[0] for row in page.tables["group_outliers-table"]] == ["Scan", "sub-03_ses-1", "sub-01_ses-1"]
    assert page.links.count("sub-03.html#sub-03_ses-1_dgm16") == 2
    assert page.tables["scans-table"][2][7] == "1"  # sub-03


FEW = "no z: 4 values, a site needs 5"
NOT_COMPARED = "no value was compared with its site (4 values, a site needs 5)"


@pytest.mark.parametrize(
    ("notes", "reasons"),
    [
        pytest.param({"dgm16": FEW, "other": FEW}, [NOT_COMPARED], id="same reason"),
        pytest.param({"dgm16": "", "other": FEW}, ["dgm16: no outliers", f"other: {NOT_COMPARED}"], id="per model"),
    ],
)
def test_missing_outliers_are_explained_per_model(tmp_path, notes, reasons):
    out = write_tables(tmp_path / "out", models=tuple(notes))
    values: dict[str, Any] = {"measure": "mean_ppm", "value": 0.1, "outlier": "false"}
    rows = [
        scan_row(f"sub-0{number}", model=model, **values, robust_z="n/a" if note else 1.0, note=note or "n/a")
        for model, few in notes.items()
        for number, note in enumerate(["missing", few, few, few, few])
    ]
    write_table(out, "group_outliers", rows)
    start = "group_outliers.tsv: "
    items = [item for item in Page(write_group_page(out)).items if item.startswith(start)]
    assert items == [start + why for why in reasons]


KEY = {"measure": "mean_ppm", "labels": "predicted", "scans": "all", "model": "dgm16", "abbreviation": "DN_L"}
SLOPES = {"exponential": -0.002, "linear": 0.002}


def write_curves(out: Path, notes: dict[str, str], *, measures: tuple[str, ...] = ("mean_ppm",)) -> None:
    """Write two curves of DN_L with their notes: a falling one with the lower AICc, and a rising one."""
    keys = [KEY | {"measure": measure} for measure in measures]
    write_table(
        out,
        "group_ageing",
        [
            {**key, "curve": curve, "n": 6, "alpha": 12050130, "alpha_low": -70009350, "alpha_high": 70009350}
            | {"aicc": aicc, "best": str(curve == "exponential").lower(), "note": notes.get(curve, "n/a")}
            for key in keys
            for curve, aicc in (("exponential", -9), ("linear", -8))
        ],
    )
    write_table(
        out,
        "group_ageing_curves",
        [
            {**key, "curve": curve, "age": age, "fit": slope * age, "low": slope * age - 1, "high": slope * age + 1}
            for key in keys
            for curve, slope in SLOPES.items()
            for age in (20, 70)
        ],
    )


def test_best_curve_is_drawn_and_tabulated(out):
    write_curves(out, {})
    page = Page(write_group_page(out))
    assert page.tables["group_ageing-mean_ppm"] == [
        ["Nucleus", "Curve", "n", "α"],
        ["DN_L", "exponential", "6", "1.21 × 10¹⁰ [−7 × 10¹⁰, 7 × 10¹⁰]"],
    ]
    assert "From 20 to 70 years the curve falls in DN_L." in page.alts["figures/group_mean_ppm_age.png"]


def test_unidentified_curve_is_replaced_by_next_best(out):
    write_curves(out, {"exponential": "beta reaches 1 per year: alpha, beta, gamma are not identified"})
    html = write_group_page(out)
    page = Page(html)
    assert page.tables["group_ageing-mean_ppm"][1][3] == "not identified"
    assert "the curve rises in DN_L." in page.alts["figures/group_mean_ppm_age.png"]
    assert "lowest AICc, of those with identifiable parameters;" in html.read_text(encoding="utf-8")


def test_harmonized_values_are_drawn_over_age(out):
    write_curves(out, {}, measures=("mean_ppm", "mean_ppm_harmonized"))
    write_table(
        out,
        "group_harmonized",
        [scan_row(participant, site=site, measure="mean_ppm", harmonized=0.1) for participant, site, *_ in SCANS],
    )
    html = write_group_page(out)
    drawn = [name for name in Page(html).alts if "_age" in name]
    assert drawn == ["figures/group_mean_ppm_age_harmonized.png"]
    assert "Values are harmonized over sites (ComBat). Groups are pooled." in html.read_text(encoding="utf-8")


def test_missing_curves_are_explained_per_model(tmp_path):
    out, key = write_tables(tmp_path / "out", models=("dgm16", "other")), KEY | {"curve": "linear"}
    note = "not fitted: 3 scans, the linear curve needs 6"
    fits = [key | {"n": 6, "aicc": -8, "best": "true", "note": "n/a"}]
    fits += [key | {"model": "other", "n": 3, "aicc": "n/a", "best": "false", "note": note}]
    write_table(out, "group_ageing", fits)
    write_table(
        out, "group_ageing_curves", [key | dict.fromkeys(("age", "fit", "low", "high"), age) for age in (20, 70)]
    )
    reason = f"group_ageing_curves.tsv: other: no curve could be fitted ({note})"
    items = [item for item in Page(write_group_page(out)).items if item.startswith("group_ageing_curves.tsv: ")]
    assert items == [reason]


def test_differences_have_limits_and_covariates(out):
    rows = [
        {"measure": measure, "model": "dgm16", "abbreviation": "DN_L", "reference": "HC", "group": "MS"}
        | {"n_reference": 10, "n_group": 9, "mean_reference": mean, "std_reference": mean / 10, "q_t": 0.3}
        | {"difference": difference, "difference_low": -2 * difference, "difference_high": 4 * difference}
        | {"hedges_g": 0.5, "hedges_g_low": -1, "hedges_g_high": 2}
        | {"ancova_difference": difference, "ancova_difference_low": "n/a", "ancova_difference_high": "n/a"}
        | {"ancova_n_reference": 7, "ancova_n_group": 9, "ancova_p": 0.0004, "ancova_q": 0.02}
        for measure, mean, difference in (("mean_ppm", 0.05, 0.012), ("volume_mm3", 600, 8.25))
    ]
    write_table(out, "group_differences", rows, {"AncovaCovariates": ["age", "sex", "education"]})
    html = write_group_page(out)
    tables = Page(html).tables
    headings, row = tables["group_differences-mean_ppm"]
    assert dict(zip(headings, row, strict=True)) == {
        **{"Nucleus": "DN_L", "Group": "MS", "Difference": "12.0 [−24.0, 48.0]", "Hedges' g": "0.50 [−1.00, 2.00]"},
        **{"q (t)": "0.300", "Mean ± SD, HC": "50.0 ± 5.0", "n, HC / group": "10 / 9"},
    }
    headings, row = tables["group_differences-adjusted-mean_ppm"]
    assert dict(zip(headings, row, strict=True)) == {
        **{"Nucleus": "DN_L", "Group": "MS", "n, HC / group": "7 / 9", "Adjusted difference": "12.0"},
        **{"p": "< 0.001", "q": "0.020"},
    }
    headings, row = tables["group_differences-volume_mm3"]
    assert row[headings.index("Difference")] == "8.2 [−16.5, 33.0]"
    text = html.read_text(encoding="utf-8")
    title = (
        "Differences between groups adjusted for age, sex and education (ANCOVA), relative to HC: mean susceptibility"
    )
    assert f"{title} (ppb)<" in text
    assert text.index("figures/group_mean_ppm_by-group.png") < text.index("group_differences-mean_ppm")


def test_notes_and_changes_of_groups_are_shown(out):
    shared = {"measure": "mean_ppm", "model": "dgm16", "reference": "HC", "group": "PD", "difference": 0.01}
    note = "group and site are confounded (column site, all PD are at site B): compare within sites"
    rows = [shared | {"abbreviation": name, "note": note, "ancova_note": note} for name in ("DN_L", "DN_R")]
    write_table(out, "group_differences", rows)
    change = shared | {"abbreviation": "DN_L", "change_per_year": 0.004, "n_site_change": 2, "q_difference": 0.02}
    rows = [change | {"group": "HC", "reference": "n/a", "difference": "n/a", "q_difference": "n/a"}, change]
    write_table(out, "group_longitudinal", rows)
    html = write_group_page(out)
    text = html.read_text(encoding="utf-8")
    assert text.count(f"All rows: {note}.") == 2  # of the adjusted and of the unadjusted differences
    assert all(note not in "".join(row) for rows in Page(html).tables.values() for row in rows)
    adjusted = "Differences between groups adjusted for covariates (ANCOVA), relative to HC: mean"
    assert text.index(f"All rows: {note}.") < text.index(adjusted)  # above the table, where nothing is clipped
    headings, *cells = Page(html).tables["group_longitudinal-mean_ppm"]
    shown = [dict(zip(headings, row, strict=True)) for row in cells]
    assert [row["Group"] for row in shown] == ["HC", "PD"]
    assert [row["q (diff.)"] for row in shown] == ["n/a", "0.020"]
    assert shown[1]["Site changes"] == "2"


def test_changes_without_a_comparison_name_no_reference(out):
    rows = [
        {"measure": "mean_ppm", "model": "dgm16", "abbreviation": "DN_L", "group": group, "reference": "n/a"}
        | {"change_per_year": 0.004}
        for group in ("all", "HC")
    ]
    write_table(out, "group_longitudinal", rows)
    assert "Mean change per year: mean susceptibility (ppb)<" in write_group_page(out).read_text(encoding="utf-8")


def test_each_note_is_written_once_with_its_nuclei(out):
    row = {"measure": "mean_ppm", "model": "dgm16", "reference": "HC", "group": "PD", "difference": 0.01}
    notes = {"DN_L": "few; odd", "DN_R": "few", "SN_L": "n/a"}
    write_table(out, "group_differences", [row | {"abbreviation": name, "note": note} for name, note in notes.items()])
    text = Page(write_group_page(out)).text
    assert "Note DN_L, DN_R: few." in text
    assert "Note DN_L: odd." in text


def test_unknown_sites_and_groups_have_a_row(tmp_path):
    rows = [
        scan_row(f"sub-{number}", session="n/a", site=site, volume_mm3=600, mean_ppm=0.1, group=group)
        for number, (site, group) in enumerate([("A", "HC"), ("A", "PD"), ("n/a", "PD"), ("A", "n/a")])
    ]
    write_table(tmp_path, "group_stats", rows, {"Settings": {"GroupColumn": "group"}})
    table = Page(write_group_page(tmp_path)).tables["participants-table"]
    assert {tuple(row[:2]): row[2] for row in table[1:]} == {
        ("all", "all"): "4",
        **{("HC", "all"): "1", ("PD", "all"): "2", ("not known", "all"): "1"},
        **{("all", "A"): "3", ("all", "not known"): "1"},
    }


def test_repeated_scans_count_once_in_medians(tmp_path):
    """sub-01 has 600 and 640, so 620; the median of 620, 700 and 720 is 700, that of the scans would be 670."""
    values = [("sub-01", "ses-1", 600), ("sub-01", "ses-2", 640), ("sub-02", "n/a", 700), ("sub-03", "n/a", 720)]
    rows = [scan_row(who, session=ses, volume_mm3=value, mean_ppm=0.1, group="HC") for who, ses, value in values]
    rows.append(scan_row("sub-04", session="n/a", volume_mm3=500, mean_ppm=0.1, group="PD"))
    write_table(tmp_path, "group_stats", rows, {"Settings": {"GroupColumn": "group"}})
    table = Page(write_group_page(tmp_path)).tables["medians-volume_mm3_by-group"]
    assert table == [["Nucleus", "HC", "PD"], ["DN_L", "700.0 (3)", "500.0 (1)"]]


def test_thinned_points_are_mentioned(tmp_path):
    for n, is_mentioned in ((150, False), (151, True)):
        rows = [scan_row(f"sub-{number:03}", session="n/a", volume_mm3=number, mean_ppm=0.1) for number in range(n)]
        write_table(tmp_path, "group_stats", rows)
        text = write_group_page(tmp_path).read_text(encoding="utf-8")
        assert ("At most 150 points are drawn" in text) == is_mentioned


def test_models_with_shared_scans_are_compared(tmp_path):
    """At most three pairs of models."""
    page = Page(write_group_page(write_tables(tmp_path / "out", models=("dgm16", "other", "c", "d"))))
    assert "Comparison of models: only the first 3 of 6 pairs of models are compared" in page.items
    table = page.tables["agreement-volume_mm3-dgm16-other"]
    assert table[1][:3] == ["DN_L", "6", "0"]  # both models have the same values: no bias
    assert "figures/group_volume_mm3_dgm16_other.png" in page.alts


def test_models_with_few_shared_scans_are_mentioned(tmp_path):
    rows = [
        scan_row(f"sub-0{number}", session="n/a", model=model, volume_mm3=600 + number, mean_ppm=0.1)
        for model, numbers in {"dgm16": range(4), "other": range(2, 6)}.items()
        for number in numbers
    ]
    write_table(tmp_path, "group_stats", rows)
    page = Page(write_group_page(tmp_path))
    assert "Comparison of models: dgm16 and other have 2 scans in common, 3 are needed" in page.items
    assert "#models" not in page.links


def test_reconstructions_are_never_pooled(tmp_path):
    out = write_tables(tmp_path / "out", descriptions=("rts", "tkd"))
    html = write_group_page(out)
    page = Page(html)
    assert [row[:3] for row in page.tables["nuclei-table"]][1:] == [
        [f"DN_{side}", f"dgm16 desc-{description}", "6"] for description in ("rts", "tkd") for side in "LR"
    ]
    assert "sub-01.html#sub-01_ses-1_desc-rts_dgm16" in page.links
    identifiers = re.findall(r' id="([^"]+)"', html.read_text(encoding="utf-8"))
    assert len(identifiers) == len(set(identifiers))


def test_long_tables_are_cut_and_link_to_file(out, monkeypatch):
    monkeypatch.setattr(group_scans, "MAX_SCANS", 2)
    page = write_group_page(out)
    assert len(Page(page).tables["scans-table"]) == 1 + 2
    assert '2 of 3 rows, all are in <a href="group_qc.tsv">' in page.read_text(encoding="utf-8")


def test_asymmetry_figure_states_median(out):
    rows = [
        scan_row(scan[0], site=scan[1], nucleus="DN", measure="volume_mm3", left=1, right=1, asymmetry=index)
        for scan, index in zip(SCANS, (0.1, 0.2, 0.3, 0.4, 0.5, "n/a"), strict=True)
    ]
    write_table(out, "group_asymmetry", rows)
    alt = Page(write_group_page(out)).alts["figures/group_asymmetry.png"]
    assert "Median asymmetry of volume: DN 0.3." in alt


def test_sex_of_a_later_session_counts(tmp_path):
    rows = [
        scan_row("sub-01", session=session, age_years=age, volume_mm3=1, mean_ppm=1, sex=sex)
        for session, age, sex in (("ses-1", 60, "n/a"), ("ses-2", 62, "F"))
    ]
    write_table(tmp_path, "group_stats", rows, {"Settings": {"SexColumn": "sex"}})
    table = describe_participants(read_group_data(tmp_path, names=[]))
    texts = {heading.text: cell.text for heading, cell in zip(table.headings, table.rows[0], strict=True)}
    assert (texts["Participants"], texts["Scans"], texts["Sex"]) == ("1", "2", "F: 1")
    assert texts["Age (years), mean ± SD"] == "60.0"


def test_asymmetry_counts_each_participant_once(out):
    """Means of the participants are 0.4 (of three scans), 0.1 and 0; the median of all scans is 0.3."""
    rows = [
        scan_row(participant, session=session, nucleus="DN", measure="volume_mm3", left=1, right=1, asymmetry=index)
        for participant, session, index in (
            *(("sub-01", f"ses-{number}", index) for number, index in enumerate((0.3, 0.4, 0.5))),
            *(("sub-02", "ses-1", 0.1), ("sub-03", "ses-1", 0)),
        )
    ]
    write_table(out, "group_asymmetry", rows)
    alt = Page(write_group_page(out)).alts["figures/group_asymmetry.png"]
    assert "Median asymmetry of volume: DN 0.1." in alt


def test_page_needs_group_stats(tmp_path):
    with pytest.raises(InputError, match=r"group_stats.tsv not found; run the group level first"):
        write_group_page(tmp_path)


STATISTIC = {"measure": "mean_ppm", "model": "dgm16", "abbreviation": "DN_L"}


def test_correlations_are_drawn_and_tabulated(out):
    relation = STATISTIC | {"variable": "UPDRS", "n": 6, "r": 0.8, "r_low": 0.1, "r_high": 0.97, "slope": 0.0025}
    relation |= {"slope_low": 0.001, "slope_high": 0.004, "t": 2.6, "df": 4, "p": 0.06, "q": 0.06, "note": "n/a"}
    write_table(out, "group_correlations", [relation], {"CorrelationCovariates": ["age", "sex"]})
    points = [
        STATISTIC
        | {"variable": "UPDRS", "participant_id": f"sub-{n}", "group": "MS", "x": 10 * n}
        | {"value": 0.1 + 0.02 * n, "value_adjusted": 0.1 + 0.02 * n + 0.001 * (-1) ** n}
        for n in range(6)
    ]
    write_table(out, "group_correlation_values", points)
    page = Page(write_group_page(out))
    headings, row = page.tables["group_correlations-mean_ppm"]
    shown = dict(zip(headings, row, strict=True))
    assert shown["Partial r"] == "0.80 [0.10, 0.97]"
    assert shown["Slope per unit"] == "2.5 [1, 4]"  # ppb per point
    assert "Relation to clinical variables at equal age, sex: mean susceptibility (ppb)" in page.source
    alt = page.alts["figures/group_mean_ppm_variable_UPDRS.png"]
    assert alt.endswith("The partial correlation is largest in DN_L: 0.80.")


def test_change_is_drawn_per_person(tmp_path):
    rows = [
        scan_row(
            f"sub-{who}", session=f"ses-{ses}", volume_mm3=600 + who + ses, mean_ppm=0.1, years_since_first=2 * ses
        )
        for who in range(3)
        for ses in range(2 if who else 1)
    ]
    write_table(tmp_path, "group_stats", rows)
    page = Page(write_group_page(tmp_path))
    assert "one line per person with repeated scans (2)." in page.alts["figures/group_volume_mm3_change.png"]


def test_unusual_scores_are_marked_first(out):
    rows = [
        scan_row(name, site=site, measure="mean_ppm", control="true", z=z)
        for name, site, z in (("sub-01", "A", 0.31), ("sub-05", "B", -2.62))
    ]
    write_table(out, "group_zscores", rows)
    html = write_group_page(out)
    table = Page(html).tables["zscores-mean_ppm-dgm16"]
    assert table == [
        ["Scan", "Control", "DN_L"],
        ["sub-05_ses-1", "yes", "−2.6"],
        ["sub-01_ses-1", "yes", "0.3"],
    ]
    assert '<strong class="flag">−2.6</strong>' in html.read_text(encoding="utf-8")


def test_raters_agreement_is_shown(out):
    row = {"rater_1": "AB", "rater_2": "CD", "nucleus": "all nuclei", "n": 10, "n_agree": 7, "agreement": 0.7}
    write_table(out, "group_raters", [row | {"kappa": 0.4, "kappa_low": -0.16, "kappa_high": 0.96, "note": "n/a"}])
    headings, shown = Page(write_group_page(out)).tables["group_raters-table"]
    assert dict(zip(headings, shown, strict=True)) == {
        **{"Rater": "AB", "and": "CD", "Nucleus": "all nuclei", "n": "10", "Equal": "7"},
        **{"Agreement": "0.70", "Cohen's κ": "0.40 [−0.16, 0.96]"},
    }


def test_figures_are_also_written_for_print(tmp_path, monkeypatch):
    monkeypatch.setattr(group_figures, "write_prints", write_prints)
    out = write_tables(tmp_path / "out")
    html = write_group_page(out)
    for ending, width in (("", 180), ("_column", 85)):
        svg = (out / "figures" / f"group_mean_ppm_by-group{ending}.svg").read_text(encoding="utf-8")
        found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)
        assert found
        assert float(found[1]) == pytest.approx(width / 25.4 * 72, abs=0.5)
        sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", svg)]
        assert min(sizes) >= 5.4  # points
        assert "left half: left (the patient's left)" in svg.replace("&#39;", "'")
        assert (out / "figures" / f"group_mean_ppm_by-group{ending}.pdf").read_bytes().startswith(b"%PDF")
        assert f"figures/group_mean_ppm_by-group{ending}.pdf" in html.read_text(encoding="utf-8")


def test_second_process_prints_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(group_figures, "write_prints", write_prints)
    folders = [write_tables(tmp_path / name / "out") for name in ("one", "two")]
    pages = [write_group_page(folder, nprocs=nprocs).read_bytes() for nprocs, folder in enumerate(folders, start=1)]
    one, two = ({path.name: path.read_bytes() for path in (folder / "figures").iterdir()} for folder in folders)
    assert any(name.endswith("_column.pdf") for name in one)
    assert one == two
    assert pages[0] == pages[1]


def test_figure_that_cannot_be_printed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(group_figures, "write_prints", write_prints)
    out = write_tables(tmp_path / "out")
    (out / "figures" / "group_mean_ppm_by-group.pdf").mkdir(parents=True)
    with pytest.raises(OSError, match="group_mean_ppm_by-group"):
        write_group_page(out, nprocs=2)
