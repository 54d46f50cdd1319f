"""The group page: which scans to trust, and how nuclei differ between sites, groups and ages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.bids.dataset import generators, linked_datasets, read_description, source_datasets
from bids_dgmseg.io.files import url_to_path
from bids_dgmseg.report.clinical_figures import change_figures, correlation_figures, norm_figures, score_tables
from bids_dgmseg.report.group_data import DATASET, GroupData, read_group_data
from bids_dgmseg.report.group_figures import (
    FigureFolder,
    PageFigure,
    ageing_figures,
    asymmetry_figures,
    explain_missing_pairs,
    model_figures,
    violin_figures,
)
from bids_dgmseg.report.group_plots import Marks
from bids_dgmseg.report.group_scans import (
    count_ratings,
    describe_participants,
    filter_levels,
    link_scans,
    list_excluded,
    mark_scans,
    scans_tables,
)
from bids_dgmseg.report.group_summaries import nuclei_tables
from bids_dgmseg.report.group_tables import STATISTICS, PageTable, select_rows, statistic_tables
from bids_dgmseg.report.html import NO_VALUE, format_count, format_value, write_page
from bids_dgmseg.report.paper_tables import write_paper_tables

MAX_WARNINGS = 100
REVIEW_PAGE = "review.html"
MAX_VALUES = 5  # different values of a property of the maps

MAX_INTERACTIVE = 500
"""Results (scans times models) of a page whose points open the scans: with more it would exceed 10 MB."""

_PLOTTED = (
    *("group_qc", "group_asymmetry", "group_ageing_curves", "group_harmonized", "group_correlation_values"),
    *("group_norms", "group_zscores"),
)
"""Tables that are read in addition to those of `STATISTICS`."""

_TITLES = {
    "nuclei": "Nuclei",
    "sites": "Sites",
    "groups": "Groups",
    "age": "Age",
    "sides": "Left and right",
    "change": "Change",
    "clinical": "Clinical variables",
    "norms": "Norms",
    "raters": "Raters",
    "models": "Models",
    "outliers": "Outliers",
}

_MAP_PROPERTIES = {
    "input_units": "Units",
    "input_reference": "Reference region",
    "input_reconstructed_from": "Reconstructed from",
}


class _Section(NamedTuple):
    anchor: str
    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]


def write_group_page(output_dir: Path, *, warnings: Sequence[str] = (), n_failed: int = 0, nprocs: int = 1) -> Path:
    """Write ``group.html`` and ``figures/group_*.png`` from the group tables of an output dataset.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset with the group tables.
    warnings : sequence of str
        Warnings of the group level.
    n_failed : int
        Scans without results.
    nprocs : int
        With 2 or more, a second process renders figures for print meanwhile.

    Returns
    -------
    Path
        The page. It needs ``figures/`` beside it but no network; only sorting, and moving between the points of a plot
        with the keyboard, need JavaScript.

    Raises
    ------
    InputError
        If ``group_stats.tsv`` does not exist or a table cannot be read.
    """
    names = list(dict.fromkeys([*_PLOTTED, *(statistic.name for statistic in STATISTICS)]))
    data = read_group_data(output_dir, names=names)
    has_ratings = bool(data.by_nucleus("rating").notna().any(axis=None) or data.by_scan("rating").notna().any())
    is_interactive = data.scans.shape[0] <= MAX_INTERACTIVE
    marks = mark_scans(data, output_dir) if is_interactive else None
    with FigureFolder(output_dir, nprocs=nprocs) as folder:
        sections = [section for section in _make_sections(data, folder, marks) if section.figures or section.tables]
        flagged, others = scans_tables(data, output_dir)
        paper = write_paper_tables(data, output_dir)
    shown = {figure.plot.href for section in sections for figure in section.figures}
    shown |= {link for section in sections for figure in section.figures for link in figure.plot.prints}
    for path in (output_dir / "figures").glob("group_*"):
        if f"figures/{path.name}" not in shown:  # of an earlier page
            path.unlink(missing_ok=True)
    # equal labels in two datasets are different persons
    persons = data.scans[[key for key in (DATASET, "participant_id") if key in data.scans]].drop_duplicates()
    return write_page(
        "group.html.j2",
        output_dir / "group.html",
        studies=find_study_names(output_dir),
        n_scans=data.scans["scan"].nunique(),
        n_participants=len(persons),
        sites=data.levels("site"),
        groups=data.levels("group"),
        models=data.models,
        ratings=count_ratings(data, n_failed=n_failed),
        participants=describe_participants(data),
        flagged=flagged,
        others=others,
        excluded=list_excluded(data, output_dir),
        filters=filter_levels(data),
        has_review=(output_dir / REVIEW_PAGE).is_file(),
        max_interactive=None if is_interactive else MAX_INTERACTIVE,
        warnings=warnings,
        max_warnings=MAX_WARNINGS,
        omissions=list(_explain_omissions(data, names, has_ratings=has_ratings)),
        facts=_facts(data, output_dir),
        files=sorted(path.name for path in output_dir.glob("group_*.tsv")),
        paper=[(path.name, path.with_suffix(".html").name) for path in paper],
        sections=sections,
        has_ratings=has_ratings,
    )


def _make_sections(data: GroupData, folder: FigureFolder, marks: Marks | None) -> Iterator[_Section]:
    by_site = list(violin_figures(data, folder, factor="site", marks=marks))
    by_group = list(violin_figures(data, folder, factor="group", marks=marks))
    figures = {
        "nuclei": [] if by_site or by_group else list(violin_figures(data, folder, factor="scans", marks=marks)),
        "sites": by_site,
        "groups": by_group,
        "age": list(ageing_figures(data, folder, marks=marks)),
        "sides": list(asymmetry_figures(data, folder, marks=marks)),
        "models": list(model_figures(data, folder)),
        "change": list(change_figures(data, folder)),
        "clinical": list(correlation_figures(data, folder)),
        "norms": list(norm_figures(data, folder)),
    }
    tables: dict[str, list[PageTable]] = {"nuclei": nuclei_tables(data), "norms": list(score_tables(data))}
    for statistic in STATISTICS:
        table = data.tables.get(statistic.name)
        if table is None or (rows := select_rows(table)).empty:
            continue
        for page_table in statistic_tables(statistic, table):
            if page_table.headings[0].text == "Scan":
                page_table = link_scans(page_table, rows, data, folder.page_dir)
            tables.setdefault(statistic.section, []).append(page_table)
    for anchor, title in _TITLES.items():
        yield _Section(anchor, title, figures.get(anchor, []), tables.get(anchor, []))


def _explain_omissions(data: GroupData, names: Sequence[str], *, has_ratings: bool) -> Iterator[str]:
    """Explain why parts of the page are missing."""
    for factor in ("site", "group"):
        if reason := _explain_factor(data, factor):
            yield f"Plots by {factor}: {reason}"
    if len(data.models) < 2:
        yield f"Comparison of models: all scans were segmented by {data.models[0]}"
    yield from (f"Comparison of models: {reason}" for reason in explain_missing_pairs(data))
    if not has_ratings:
        yield "Ratings of the scans: not in group_stats.tsv and group_qc.tsv"
    for name in names:
        yield from (f"{name}.tsv: {reason}" for reason in _explain_table(data, name))


def _explain_factor(data: GroupData, factor: str) -> str:
    """Explain which scans the plots by site or group lack; empty if none."""
    levels = data.levels(factor)
    if not levels:
        return f"group_stats.tsv has no {factor}"
    counts = data.scans.groupby(factor)["scan"].nunique()
    n_without = int(counts.get(NO_VALUE, 0))
    if len(levels) > 1:
        return f"without {format_count(n_without, 'scan')} that have no {factor}" if n_without else ""
    if not n_without:
        return f"all scans have the same {factor}, {levels[0]}"
    return f"{format_count(int(counts[levels[0]]), 'scan')} of {factor} {levels[0]}, {n_without} without a {factor}"


def _explain_table(data: GroupData, name: str) -> Iterator[str]:
    """Explain why nothing of a table is shown, per model if reasons differ."""
    table = data.tables.get(name)
    if table is None:
        yield "not found"
    elif table.rows.empty and (reason := table.dictionary.get("NotComputed")):
        yield str(reason)
    elif name in _REASONS:
        reasons = {model: reason for model in data.models if (reason := _REASONS[name](data, model))}
        if len(reasons) == len(data.models) and len(set(reasons.values())) == 1:
            yield from set(reasons.values())
        else:
            yield from (f"{model}: {reason}" for model, reason in reasons.items())
    elif table.rows.empty:
        yield "has no rows"


def _explain_no_outliers(data: GroupData, model: str, *, name: str = "group_outliers", z: str = "robust_z") -> str:
    """Explain why no outlier of a model is listed; empty if there is one."""
    table = data.tables[name]
    rows = _rows_of(table.rows, model)
    if rows.empty:
        return "has no rows"
    if len(_rows_of(select_rows(table), model)):
        return ""
    if z not in rows or rows[z].notna().any():
        return "no outliers"
    return f"no value was compared with its site ({_most_frequent_note(rows)})"


def _explain_no_curves(data: GroupData, model: str) -> str:
    """Explain why no age curve of a model is drawn; empty if there is one."""
    if len(_rows_of(data.tables["group_ageing_curves"].rows, model)):
        return ""
    fits = data.tables.get("group_ageing")
    note = _most_frequent_note(_rows_of(fits.rows, model)) if fits else ""
    return f"no curve could be fitted ({note})" if note else "has no rows"


_REASONS: Mapping[str, Callable[[GroupData, str], str]] = {
    "group_outliers": _explain_no_outliers,
    "group_scan_outliers": partial(_explain_no_outliers, name="group_scan_outliers", z="z_ratio"),
    "group_ageing_curves": _explain_no_curves,
}
"""Tables that may have rows to show of some models only."""


def _rows_of(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    return rows[rows["model"] == model] if "model" in rows else rows


def _most_frequent_note(rows: pd.DataFrame) -> str:
    """Return the most frequent note, preferably one that says more than that a value is missing."""
    notes = rows["note"].dropna().astype(str) if "note" in rows else pd.Series(dtype=str)
    informative = notes[notes != "missing"]
    found = (informative if len(informative) else notes).mode()
    return found.iloc[0].removeprefix("no z: ") if len(found) else ""


def find_study_names(output_dir: Path, *, visited: frozenset[Path] = frozenset()) -> Sequence[str]:
    """Return the names of the datasets that the results come from, or of the output folder if none is known.

    Names are those of ``dataset_description.json``, or of the folder if it cannot be read. `visited` guards against
    circular links.
    """
    names = []
    for link in linked_datasets(output_dir).values():
        folder = url_to_path(link, output_dir).resolve()
        names.append(str(read_description(folder).get("Name") or folder.name))
    if not names:  # merged from other outputs, which have links themselves
        visited = visited | {output_dir.resolve()}
        sources = [url_to_path(link, output_dir).resolve() for link in source_datasets(output_dir)]
        sources = [source for source in sources if source.is_dir() and source not in visited]
        names = [name for source in sources for name in find_study_names(source, visited=visited)]
    return list(dict.fromkeys(names)) or [output_dir.resolve().name]


def _facts(data: GroupData, output_dir: Path) -> dict[str, dict[str, str]]:
    """Return properties of the maps, settings and versions as headings → names → values."""
    qc = data.tables.get("group_qc")
    rows = qc.rows if qc else pd.DataFrame()
    return {
        "Maps": {title: _count_values(rows[column]) for column, title in _MAP_PROPERTIES.items() if column in rows},
        "Settings of the group level": {
            # such as GroupColumn
            re.sub("(?<=[a-z])(?=[A-Z])", " ", key).capitalize(): format_value(value)
            for key, value in data.settings.items()
        },
        "Versions": {
            **{f"{maker['Name']}, scans": format_value(maker.get("Version")) for maker in generators(output_dir)},
            "bids_dgmseg, this page": __version__,
        },
    }


def _count_values(values: pd.Series) -> str:
    """List the values of a column, with their numbers of scans if they differ.

    >>> _count_values(pd.Series(["ppm", "ppb", "ppm", None]))
    'ppm (2), ppb (1), n/a (1)'
    """
    counts = values.astype(object).where(values.notna(), None).map(format_value).value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    shown = ", ".join(f"{value} ({n})" for value, n in counts.head(MAX_VALUES).items())
    return shown if len(counts) <= MAX_VALUES else f"{shown} and {len(counts) - MAX_VALUES} more values"
