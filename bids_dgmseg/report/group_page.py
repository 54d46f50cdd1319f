"""The group page: which scans to trust, and how nuclei differ between sites, groups and ages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.bids.dataset import generators, linked_datasets, read_description, source_datasets
from bids_dgmseg.io.files import url_to_path
from bids_dgmseg.report import group_figures
from bids_dgmseg.report.group_data import DATASET, GroupData
from bids_dgmseg.report.group_figures import PageFigure
from bids_dgmseg.report.group_scans import (
    Marks,
    count_ratings,
    describe_participants,
    link_scans,
    list_excluded,
    mark_scans,
    scans_tables,
)
from bids_dgmseg.report.group_tables import (
    STATISTICS,
    PageTable,
    nuclei_tables,
    score_tables,
    select_rows,
    statistic_tables,
)
from bids_dgmseg.report.html import format_value, write_page
from bids_dgmseg.report.paper_tables import write_paper_tables

MAX_WARNINGS = 100
REVIEW_PAGE = "review.html"
MAX_VALUES = 5  # different values of a property of the maps

MAX_INTERACTIVE = 200
"""Results (scans times models) of a page whose points open the scans: with more it would exceed 10 MB."""

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


def write_group_page(data: GroupData, output_dir: Path, *, warnings: Sequence[str] = (), n_failed: int = 0) -> Path:
    """Write ``group.html`` with its figures and the tables for a paper in ``group/``.

    Parameters
    ----------
    data : GroupData
    output_dir : Path
        The derivative dataset with the pages of the participants.
    warnings : sequence of str
        Warnings of the group level.
    n_failed : int
        Scans without results.

    Returns
    -------
    Path
        The page. It needs ``group/`` beside it but no network; sorting, and the names of points of a plot, need
        JavaScript.
    """
    for path in (output_dir / group_figures.FOLDER).glob("group_*.png"):  # of an earlier page
        path.unlink()
    is_interactive = len(data.scans) <= MAX_INTERACTIVE
    marks = mark_scans(data, output_dir)
    sections = list(_make_sections(data, output_dir, marks, is_interactive=is_interactive))
    flagged, others = scans_tables(data, marks)
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
        excluded=list_excluded(data, marks),
        has_review=(output_dir / REVIEW_PAGE).is_file(),
        max_interactive=None if is_interactive else MAX_INTERACTIVE,
        points={mark.href: mark.label for mark in marks.values() if is_interactive},
        warnings=warnings,
        max_warnings=MAX_WARNINGS,
        facts=_facts(data, output_dir),
        files=sorted(path.relative_to(output_dir).as_posix() for path in (output_dir / "group").glob("*.tsv")),
        paper=[path.relative_to(output_dir).as_posix() for path in write_paper_tables(data, output_dir / "group")],
        sections=[section for section in sections if section.figures or section.tables],
        has_ratings=bool(data.by_nucleus("rating").notna().any(axis=None) or data.by_scan("rating").notna().any()),
    )


def _make_sections(data: GroupData, output_dir: Path, marks: Marks, *, is_interactive: bool) -> Iterator[_Section]:
    links = {key: mark.href for key, mark in marks.items() if mark.href} if is_interactive else None
    violins = {
        factor: list(group_figures.violin_figures(data, output_dir, factor=factor, links=links))
        for factor in ("site", "group")
    }
    by_nothing = (
        [] if any(violins.values()) else group_figures.violin_figures(data, output_dir, factor="scans", links=links)
    )
    figures = {
        "nuclei": by_nothing,
        "sites": violins["site"],
        "groups": violins["group"],
        "age": group_figures.ageing_figures(data, output_dir, links=links),
        "sides": group_figures.asymmetry_figures(data, output_dir, links=links),
        "change": group_figures.change_figures(data, output_dir),
        "clinical": group_figures.correlation_figures(data, output_dir),
        "norms": group_figures.norm_figures(data, output_dir),
    }
    tables = {"nuclei": list(nuclei_tables(data)), "norms": list(score_tables(data))}
    for name, statistic in STATISTICS.items():
        table = data.tables.get(name)
        if table is None or (rows := select_rows(table)).empty:
            continue
        for page_table in statistic_tables(name, table):
            if page_table.headings[0].text == "Scan":
                page_table = link_scans(page_table, rows, marks)
            tables.setdefault(statistic.section, []).append(page_table)
    for anchor, title in _TITLES.items():
        yield _Section(anchor, title, list(figures.get(anchor, ())), tables.get(anchor, []))


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
