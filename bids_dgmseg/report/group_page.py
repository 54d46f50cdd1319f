"""The page of a cohort: which scans to trust, how nuclei differ between sites, groups and ages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.report.group_cells import PageTable, linked, make_table, nuclei_table
from bids_dgmseg.report.group_facts import name_studies, say_facts
from bids_dgmseg.report.group_figures import (
    PageFigure,
    ageing_figures,
    asymmetry_figures,
    model_figures,
    overall_figures,
    violin_figures,
)
from bids_dgmseg.report.group_read import Cohort, GroupTable, read_cohort
from bids_dgmseg.report.group_scans import has_lights, links_of, scans_table
from bids_dgmseg.report.page import write_html
from bids_dgmseg.report.templating import open_templates

N_WARNINGS = 100
"""Most warnings on the page."""
_MEASURE = {"measure": "Measure", "model": "Model", "abbreviation": "Nucleus"}


@dataclass(frozen=True)
class _Statistic:
    """A table of the group level that is shown as it is."""

    name: str
    section: str
    caption: str
    columns: Mapping[str, str]
    note: str = ""


_STATISTICS = (
    _Statistic("group_ageing", "age", "Curves over age: the best of each nucleus", {
        **_MEASURE, "labels": "Labels", "scans": "Scans", "curve": "Curve", "n": "n", "alpha": "α",
        "alpha_low": "α: low", "alpha_high": "α: high", "beta_per_year": "β (1/year)", "beta_per_year_low": "β: low",
        "beta_per_year_high": "β: high", "gamma": "γ", "gamma_low": "γ: low", "gamma_high": "γ: high", "r2": "R²",
        "note": "Note",
    }, "exponential: α(1 − e^(−β·age)) + γ; linear: α·age + γ; logarithmic: α·ln(age) + γ. α and γ are in the unit of "
       "the measure, or per year of it; limits are of 95 %."),
    _Statistic("group_site_variance", "sites", "Variance between sites before and after harmonization", {
        **_MEASURE, "n": "n", "site_variance_before": "Before", "site_variance_after": "After",
        "reduction": "Reduction", "p_site_before": "p before", "p_site_after": "p after",
    }, "Variance of the sites' means at equal covariates, in squares of the measure's unit; reduction is "
       "1 − after / before."),
    _Statistic("group_differences", "groups", "Differences between groups", {
        **_MEASURE, "reference": "Reference", "group": "Group", "n_reference": "n reference", "n_group": "n group",
        "mean_reference": "Mean reference", "mean_group": "Mean group", "difference": "Difference",
        "difference_low": "Difference: low", "difference_high": "Difference: high", "hedges_g": "Hedges' g",
        "hedges_g_low": "g: low", "hedges_g_high": "g: high", "q_t": "q (t)", "q_mannwhitney": "q (Mann-Whitney)",
        "ancova_difference": "At equal age and sex", "ancova_q": "q (ANCOVA)", "note": "Note",
    }, "The difference is group minus reference, with limits of 95 %; q is the false discovery rate over the nuclei."),
    _Statistic("group_longitudinal", "change", "Change per year over the participants", {
        **_MEASURE, "n": "Participants", "n_scans": "Scans", "years_median": "Years, median",
        "change_per_year": "Change per year", "change_low": "Change: low", "change_high": "Change: high", "p": "p",
        "q": "q", "note": "Note",
    }, "Mean of the participants' slopes in the unit of the measure, with limits of 95 %."),
    _Statistic("group_outliers", "outliers", "Values that stand out from their site", {
        "scan": "Scan", **_MEASURE, "site": "Site", "value": "Value", "median": "Median of the site",
        "robust_z": "Robust z", "n_site": "n of the site",
    }, "Robust z: distance from the median of the site in units of 1.4826 times the median absolute deviation."),
)  # fmt: skip
_DRAWN = {
    "group_quality": "scans", "group_asymmetry": "sides", "group_ageing_curves": "age", "group_harmonized": "sites",
}  # fmt: skip
"""Tables that are drawn, and in which section."""
_TITLES = {
    "scans": "Scans", "nuclei": "Nuclei", "sites": "Sites", "groups": "Groups", "age": "Age", "sides": "Left and right",
    "change": "Change", "models": "Models", "outliers": "Outliers",
}  # fmt: skip
_AT = {"site": "at site", "group": "in group"}


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]


_PERSON = ("tree", "participant_id")
"""Equal labels in two output folders are different people."""


def write_group_page(output_dir: Path, *, warnings: Sequence[str] = ()) -> Path:
    """Write ``group.html`` and ``figures/group_*.png`` from the group tables of an output tree.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset with the group tables.
    warnings : sequence of str
        What the group level said, one line each.

    Returns
    -------
    Path
        The page. It needs ``figures/`` beside it and no network; its tables can be read without a script.

    Raises
    ------
    InputError
        If there is no ``group_stats.tsv``, or a table is damaged.
    """
    names = [*_DRAWN, *(statistic.name for statistic in _STATISTICS)]
    cohort = read_cohort(output_dir, names=names)
    sections = [section for section in _sections(cohort, output_dir) if section.figures or section.tables]
    _remove_old_figures(output_dir, sections)
    html = open_templates().get_template("group.html.j2").render(
        studies=name_studies(output_dir),
        n_scans=cohort.scans["scan"].nunique(),
        n_participants=len(cohort.scans[[key for key in _PERSON if key in cohort.scans]].drop_duplicates()),
        sites=cohort.levels("site"),
        groups=cohort.levels("group"),
        models=cohort.models,
        warnings=warnings,
        n_warnings=N_WARNINGS,
        left_out=list(_left_out(cohort)),
        facts=say_facts(cohort, output_dir),
        files=sorted(path.name for path in output_dir.glob("group_*.tsv")),
        sections=sections,
        has_lights=has_lights(cohort),
        version=__version__,
    )
    return write_html(html, output_dir / "group.html")


def _sections(cohort: Cohort, output_dir: Path) -> Iterator[_Section]:
    by_site = list(violin_figures(cohort, output_dir, factor="site"))
    by_group = list(violin_figures(cohort, output_dir, factor="group"))
    figures = {
        "nuclei": [] if by_site or by_group else list(overall_figures(cohort, output_dir)),
        "sites": by_site, "groups": by_group,
        "age": list(ageing_figures(cohort, output_dir)),
        "sides": list(asymmetry_figures(cohort, output_dir)),
        "models": list(model_figures(cohort, output_dir)),
    }  # fmt: skip
    tables: dict[str, list[PageTable]] = {"scans": [scans_table(cohort, output_dir)], "nuclei": [nuclei_table(cohort)]}
    for statistic in _STATISTICS:
        table = cohort.tables.get(statistic.name)
        if table and len(rows := _chosen(table)):
            tables.setdefault(statistic.section, []).append(_show(statistic, table, rows, cohort, output_dir))
    for anchor, title in _TITLES.items():
        yield _Section(anchor, title, figures.get(anchor, []), tables.get(anchor, []))


def _show(
    statistic: _Statistic, table: GroupTable, rows: pd.DataFrame, cohort: Cohort, output_dir: Path
) -> PageTable:
    columns = {key: title for key, title in statistic.columns.items() if key != "model" or len(cohort.models) > 1}
    # A row's heading is what comes first: the nucleus, where it is not the scan.
    columns = {key: columns[key] for key in sorted(columns, key=lambda key: key not in ("scan", "abbreviation"))}
    shown = make_table(replace(table, rows=rows), anchor=f"{statistic.name}-table", caption=statistic.caption,
                       columns=columns, note=statistic.note)  # fmt: skip
    return linked(shown, links_of(rows.head(len(shown.rows)), cohort, output_dir)) if "scan" in columns else shown


def _chosen(table: GroupTable) -> pd.DataFrame:
    """Rows that the page shows of a table: of curves the best, of values the outliers, the largest first."""
    rows = table.rows
    for column in ("best", "outlier"):
        if column in rows:
            rows = rows[rows[column].astype(str).str.lower() == "true"]
    if "robust_z" in rows:
        rows = rows.sort_values("robust_z", key=abs, ascending=False, kind="stable")
    return rows


def _left_out(cohort: Cohort) -> Iterator[str]:
    """Say why a part of the page is not there."""
    for factor in ("site", "group"):
        levels, without = cohort.levels(factor), cohort.n_without(factor)
        if not levels:
            yield f"Plots by {factor}: group_stats.tsv tells no {factor}"
        elif len(levels) < 2 and without:
            there = f"{_scans(cohort.n_of(factor, levels[0]))} {_AT[factor]} {levels[0]}"
            yield f"Plots by {factor}: {there}, {without} without a {factor}"
        elif len(levels) < 2:
            yield f"Plots by {factor}: all scans are of one {factor}, {levels[0]}"
        elif without:
            yield f"Plots by {factor}: they lack {_scans(without)} without one"
    if len(cohort.models) < 2:
        yield f"Comparison of models: all scans were segmented by one, {cohort.models[0]}"
    if not has_lights(cohort):
        yield "Lights of the scans: group_stats.tsv and group_quality.tsv hold none"
    for name in [*_DRAWN, *(statistic.name for statistic in _STATISTICS)]:
        table = cohort.tables.get(name)
        if table is None:
            yield f"{name}.tsv: not in this folder"
        elif table.rows.empty:
            yield f"{name}.tsv: {table.dictionary.get('NotComputed') or 'has no rows'}"
        elif name == "group_outliers" and _chosen(table).empty:
            yield f"{name}.tsv: no value stands out"


def _scans(n: int) -> str:
    return f"{n} scan" if n == 1 else f"{n} scans"


def _remove_old_figures(output_dir: Path, sections: Sequence[_Section]) -> None:
    """Delete the pictures of an earlier page that this one does not show."""
    shown = {figure.href for section in sections for figure in section.figures}
    for path in (output_dir / "figures").glob("group_*.png"):
        if f"figures/{path.name}" not in shown:
            path.unlink(missing_ok=True)
