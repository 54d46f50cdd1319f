"""Group level: analysis of the results of many scans, its tables and the page with its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bids_dgmseg.bids.dataset import linked_datasets, read_description, source_datasets
from bids_dgmseg.bids.output_dataset import check_writable, write_group_citation, write_merged_dataset_files
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import DISK_ADVICE, as_options
from bids_dgmseg.io.files import LOCK, url_to_path, wait_for_lock, write_json, write_text, write_tsv
from bids_dgmseg.methods_text import GROUP_SENTENCES
from bids_dgmseg.report.group_data import DATASET, SCAN_KEYS, GroupData, collect_group_data
from bids_dgmseg.report.group_figures import GroupFigures, PageFigure, covariates_of
from bids_dgmseg.report.group_tables import (
    STATISTICS,
    TEXTS,
    Marks,
    PageTable,
    count_ratings,
    describe_participants,
    link_scans,
    list_excluded,
    mark_scans,
    scans_table,
    select_rows,
    statistic_tables,
)
from bids_dgmseg.report.html import format_number, format_p, format_significant, quantity, write_page
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.cohort import include_excluded
from bids_dgmseg.study.harmonization import check_fits, save_fits
from bids_dgmseg.study.reliability import ALPHA
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection
from bids_dgmseg.study.study import (
    FOLDER,
    add_constants,
    build_study,
    list_empty_tables,
    load_study,
    mean_of_sides,
    scan_tables,
    with_keys,
    write_tables,
)

_STYLE = (
    "body{font:10pt Arial,sans-serif}table{border-collapse:collapse}caption{text-align:left;padding-bottom:4pt}"
    "th,td{padding:2pt 6pt;text-align:left;vertical-align:top}thead th{border-top:1.5pt solid;"
    "border-bottom:.75pt solid}tbody tr:last-child td{border-bottom:1.5pt solid}p{font-size:9pt}"
)
"""Three horizontal rules, as journals have them."""

_MOST_NAMED = 3  # nuclei with their differences in a sentence


def write_paper_tables(data: GroupData, folder: Path) -> list[Path]:
    """Write ``group_table1`` and ``group_results``, each as TSV and HTML; return the paths of the HTML files.

    Susceptibilities are in ppb. The results are differences between groups or, without groups, means.
    """
    first = describe_participants(data)
    headings = [heading.text or " " for heading in first.headings]
    participants = pd.DataFrame([[cell.text for cell in row] for row in first.rows], columns=headings)
    results, note = _results(data)
    caption = "Table 2. Volume and mean magnetic susceptibility of the deep gray nuclei"
    paths = []
    for name, table, title, text in (
        ("group_table1", participants, first.caption, first.note),
        ("group_results", results, caption, note),
    ):
        write_tsv(table, folder / f"{name}.tsv")
        write_json({"Description": title, "Notes": [text], "Settings": data.settings}, folder / f"{name}.json")
        rows = table.to_html(index=False, border=0).replace(">", f">\n<caption>{escape(title)}</caption>", 1)
        page = (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n{rows}\n<p>{escape(text)}</p>\n</body>\n</html>\n"
        )
        paths.append(write_text(page, folder / f"{name}.html"))
    return paths


def _results(data: GroupData) -> tuple[pd.DataFrame, str]:
    """Return the table of results, which has the cells of the page, with its note."""
    table = data.tables.get("group_differences")
    if table is not None and len(table.rows):
        parts = []
        for part in statistic_tables("group_differences", table):
            headings = [heading.text for heading in part.headings]
            texts = pd.DataFrame([[cell.text for cell in row] for row in part.rows], columns=headings)
            parts.append(add_constants(texts, Measure=quantity(part.measure).label))
        return pd.concat(parts, ignore_index=True), TEXTS["paper"]["differences"].format(
            covariates=covariates_of(table), tests=_count_tests(data)
        )
    used = mean_of_sides(data.used, [*data.quantities], SCAN_KEYS)
    people = used.groupby(["model", "abbreviation", "person"], sort=False)[[*data.quantities]].mean()
    columns: dict[str, pd.Series] = {}
    for measure in data.quantities:
        shown, values = quantity(measure), people[measure].groupby(["model", "abbreviation"], sort=False)
        show = partial(format_number, digits=shown.digits)
        means, spreads = ((shown.factor * part).map(show).astype(str) for part in (values.mean(), values.std()))
        columns |= {f"{shown.label}: n": values.count().astype(str), shown.label: means + " ± " + spreads}
    return pd.DataFrame(columns).reset_index(names=["Model", "Nucleus"]), TEXTS["paper"]["means"]


def describe_results(data: GroupData) -> dict[str, str]:
    """Say who was compared, what differs, by how much and how surely, and how many tests were made.

    Returns the question → sentences; q values below 0.05 are named, otherwise the smallest one.
    """
    answers = {"Groups": _describe_groups(data), "Age": _describe_ageing(data)}
    changes, scores = _rows(data, "group_change"), _rows(data, "group_correlations")
    if "p" in changes:
        everybody = changes[changes["group"] == changes["group"].iloc[0]].assign(group=np.nan)
        answers["Change"] = f"{everybody['n'].max():.0f} participants were scanned at several times"
        answers["Change"] += _describe_tests(everybody, "change_per_year", "changes in", "change") + "."
        compared = changes.drop(columns=["p", "q"]).rename(columns={"p_difference": "p", "q_difference": "q"})
        if text := _describe_tests(compared, "difference", "changes differently in", "difference in change"):
            answers["Change"] += f" Groups{text}."
    for variable, part in scores.groupby("variable", sort=False) if len(scores) else ():
        text = f"n {part['n'].max():.0f}" + _describe_tests(part, "r", "is related in", "relation") + "."
        answers[str(variable)] = text
    answers["Tests"] = _count_tests(data)
    return {question: text for question, text in answers.items() if text}


def _rows(data: GroupData, name: str) -> pd.DataFrame:
    """Return the rows of a table, with the names of models if there are several; none if it was not computed."""
    rows = data.tables[name].rows if name in data.tables else pd.DataFrame()
    if "abbreviation" in rows and len(data.models) > 1:
        rows = rows.assign(abbreviation=rows["abbreviation"].astype(str) + " (" + rows["model"].astype(str) + ")")
    return rows


def _describe_groups(data: GroupData) -> str:
    table, rows = data.tables.get("group_differences"), _rows(data, "group_differences")
    if table is None or "p" not in rows:
        is_needed = table is not None and len(data.levels("group")) > 1
        return f"Not compared: {table.not_computed.removeprefix('not tested: ')}." if table and is_needed else ""
    reference = rows["reference"].iloc[0]
    shown = ", ".join(f"{n:.0f} {name}" for name, n in rows.groupby("group", sort=False)["n_group"].max().items())
    text = f"{shown} were compared with {rows['n_reference'].max():.0f} {reference} at equal {covariates_of(table)}"
    text += _describe_tests(rows, "difference", "differs in", "difference") + "."
    if len(changed := _rows(data, "group_sensitivity")):
        n = int(((changed["p"] < ALPHA) != (changed["all_p"] < ALPHA)).sum())
        text += f" With the excluded values, p of {n} of {len(changed)} differences is on the other side of {ALPHA}."
    return text


def _describe_ageing(data: GroupData) -> str:
    rows, texts = _rows(data, "group_ageing"), []
    if "alpha_low" not in rows:
        return ""
    lines = rows[(rows["scans"] == rows["scans"].iloc[0]) & (rows["curve"] == "linear")].dropna(subset=["alpha_low"])
    for measure, part in lines.groupby("measure", sort=False):
        shown, certain = quantity(str(measure)), part[part["alpha_low"] * part["alpha_high"] > 0]
        steepest = (part if certain.empty else certain).sort_values("alpha", key=abs).iloc[-1]
        effect = _with_limits(steepest, "alpha", 10 * shown.factor, f"{shown.unit} per 10 years")
        texts.append(
            f"{shown.name} in {len(certain)} of {len(part)} nuclei, most in {steepest['abbreviation']} ({effect})"
        )
    limits = "95 % CI of a line excludes 0, not adjusted for the number of nuclei"
    return f"Effect of age in {rows['scans'].iloc[0]} ({limits}): {'; '.join(texts)}." if texts else ""


def _describe_tests(rows: pd.DataFrame, column: str, effect: str, nothing: str) -> str:
    """Name the nuclei with q below 0.05 per measure, those with the smallest p first; the text continues a sentence."""
    texts = []
    for measure, part in rows.dropna(subset=["p"]).groupby("measure", sort=False):
        certain, shown = part[part["q"] < ALPHA].sort_values("p", kind="stable"), quantity(str(measure))
        if certain.empty:
            texts.append(f"no {nothing} of {shown.name} is shown (smallest q {format_p(float(part['q'].min()))})")
            continue
        unit = {"r": "", "difference": shown.unit}.get(column, f"{shown.unit} per year")
        names = []
        for _, row in certain.head(_MOST_NAMED).iterrows():
            of_group = f" of {row['group']}" if isinstance(row.get("group"), str) else ""
            estimate = _with_limits(row, column, 1.0 if column == "r" else shown.factor, unit)
            names.append(f"{row['abbreviation']}{of_group} ({estimate}, q {format_p(row['q'])})")
        more = f" and {len(certain) - _MOST_NAMED} more" if len(certain) > _MOST_NAMED else ""
        texts.append(f"{shown.name} {effect} {', '.join(names)}{more}")
    return f": {'; '.join(texts)}" if texts else ""


def _with_limits(row: pd.Series, column: str, factor: float, unit: str) -> str:
    """Format an estimate with its sign, limits and, of a difference between groups, Hedges' g."""
    stem = next(stem for stem in (column, "change") if f"{stem}_low" in row)
    value, low, high = (factor * float(row[name]) for name in (column, f"{stem}_low", f"{stem}_high"))
    sign = "r " * (column == "r") + "+" * (value > 0)
    text = f"{sign}{format_significant(value)} {unit}".strip()
    text += f", 95 % CI {format_significant(low)} to {format_significant(high)}"
    return text + (f", g {format_number(row['hedges_g'], 2)}" if column == "difference" and "hedges_g" in row else "")


def _count_tests(data: GroupData) -> str:
    """Return the sentence on multiplicity."""
    tables = [_rows(data, name) for name in ("group_differences", "group_change", "group_correlations")]
    n = sum(int(rows[name].notna().sum()) for rows in tables for name in ("p", "p_difference") if name in rows)
    return str(TEXTS["paper"]["tests"]).format(n=n, expected=n * ALPHA, alpha=ALPHA) if n else "Nothing was tested."


MAX_WARNINGS = 100
PAGE, REVIEW_PAGE = "group.html", "review.html"

_TITLES = {
    "groups": "Groups",
    "age": "Age",
    "change": "Change",
    "scores": "Clinical scores",
    "sites": "Sites",
    "planning": "Next study",
    "raters": "Raters",
    "outliers": "Outliers",
}

_FIRST_MEASURE = "mean_ppm"
"""Measure whose figure and table are open."""


class _Section(NamedTuple):
    anchor: str
    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]
    more_figures: Sequence[PageFigure]
    more_tables: Sequence[PageTable]


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
        The page. It needs ``group/`` beside it but no network; sorting needs JavaScript.
    """
    marks = mark_scans(data, output_dir)
    sections = list(_make_sections(data, output_dir, marks))
    # equal labels in two datasets are different persons
    persons = data.scans[[key for key in (DATASET, "participant_id") if key in data.scans]].drop_duplicates()
    return write_page(
        "group.html.j2",
        output_dir / PAGE,
        studies=find_study_names(output_dir),
        n_scans=data.scans["scan"].nunique(),
        n_participants=len(persons),
        sites=data.levels("site"),
        groups=data.levels("group"),
        models=data.models,
        ratings=count_ratings(data, n_failed=n_failed),
        participants=describe_participants(data),
        scans=scans_table(data, marks),
        excluded=list_excluded(data, marks),
        has_review=(output_dir / REVIEW_PAGE).is_file(),
        warnings=warnings,
        max_warnings=MAX_WARNINGS,
        files=sorted(path.relative_to(output_dir).as_posix() for path in (output_dir / "group").glob("*.tsv")),
        paper=[path.relative_to(output_dir).as_posix() for path in write_paper_tables(data, output_dir / "group")],
        sections=[section for section in sections if any(section[2:])],
        results=describe_results(data),
        has_ratings=bool(data.by_nucleus("rating").notna().any(axis=None) or data.by_scan("rating").notna().any()),
    )


def _make_sections(data: GroupData, output_dir: Path, marks: Marks) -> Iterator[_Section]:
    drawn = GroupFigures(data, output_dir)
    by_section = {
        "groups": drawn.differences(),
        "age": drawn.ageing(),
        "change": drawn.changes(),
        "scores": drawn.correlations(),
        "sites": drawn.sites(),
        "planning": drawn.planning(),
    }
    tables: dict[str, list[PageTable]] = {}
    for name, statistic in STATISTICS.items():
        table = data.tables.get(name)
        if table is None or (rows := select_rows(table)).empty:
            continue
        for page_table in statistic_tables(name, table):
            if page_table.headings[0].text == "Scan":
                page_table = link_scans(page_table, rows, marks)
            tables.setdefault(statistic.section, []).append(page_table)
    for anchor, title in _TITLES.items():
        items: tuple[list[Any], list[Any]] = (list(by_section.get(anchor, ())), tables.get(anchor, []))
        n_open = int(anchor in by_section)  # figures and tables of a question: those of the first measure
        for part in items:
            part.sort(key=lambda item: item.measure != _FIRST_MEASURE)
        (figures, more_figures), (tables_shown, more_tables) = ((part[:n_open], part[n_open:]) for part in items)
        yield _Section(anchor, title, figures, tables_shown, more_figures, more_tables)


def find_study_names(output_dir: Path) -> Sequence[str]:
    """Return the names of the datasets that the results come from, or of the output folder if none is known.

    Names are those of ``dataset_description.json``, or of the folder if it cannot be read.
    """
    links = [*linked_datasets(output_dir).values()] or source_datasets(output_dir)
    folders = [url_to_path(link, output_dir).resolve() for link in links]
    names = [str(read_description(folder).get("Name") or folder.name) for folder in folders]
    return list(dict.fromkeys(names)) or [output_dir.resolve().name]


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What `analyse_group` has written."""

    tables: tuple[Path, ...]
    """Tables, each with a data dictionary beside it (``.json``)."""
    page: Path | None
    """None if it cannot be written."""
    reference_group: str
    """Group that the others are compared with, and why; empty unless there are several groups."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """Why tables are not written."""
    n_unusable: int
    """Damaged tables and scans whose results are out of date."""


def analyse_group(
    folders: Sequence[ResultsFolder],
    out_dir: Path,
    *,
    options: GroupOptions,
    selection: ResultsSelection | None = None,
    warnings: Sequence[str] = (),
    n_missing: int = 0,
) -> GroupReport:
    """Analyse a study; write its tables, ``group/group_*.tsv`` with their ``.json``, and the page ``group.html``.

    An output folder that is not the only folder of results also gets a ``dataset_description.json``, if it has none.

    Parameters
    ----------
    folders : sequence of ResultsFolder
        Output folders of the participant level, see `find_results_folders`.
    out_dir : Path
        Derivative dataset, created if it does not exist. Nothing is written if an option does not fit the data.
    options : GroupOptions
    selection : ResultsSelection, optional
        Scans to use; by default all.
    warnings : sequence of str
        Further warnings, to be shown on the page.
    n_missing : int
        Scans of the study without results.

    Raises
    ------
    InputError
        If there are no results, an option does not fit the data, or a table cannot be read or written.
    """
    cohort, study = load_study(folders, options, selection)
    check_writable(out_dir)
    has_excluded = bool(cohort.stats["excluded"].notna().any())
    everybody = build_study(include_excluded(cohort), options) if has_excluded else None
    results, analysis_warnings = run_analyses(study, everybody)
    check_fits(results, options)
    measures = scan_tables(cohort)
    tables = [*(with_keys(table, cohort.keys) for table in measures)]
    tables += [with_keys(table, study.cohort.keys) for table in results]
    lines = [*warnings, *cohort.warnings, *analysis_warnings]
    data = collect_group_data(cohort, study.cohort, results, study.settings)
    with wait_for_lock(out_dir / FOLDER / LOCK):  # tables and page are of one run
        paths = write_tables(out_dir / FOLDER, tables, settings=study.settings, page=out_dir / PAGE)
        if [folder.path for folder in folders] != [out_dir]:
            write_merged_dataset_files(out_dir, [folder.path for folder in folders])
        save_fits(results, study)
        write_group_citation(out_dir, _describe_methods(data))
        page, problems = _write_page(data, out_dir, lines, n_missing + cohort.n_damaged)
    several = bool(study.reference) and cohort.demographics["group"].nunique() > 1
    return GroupReport(
        tables=tuple(paths),
        page=page,
        reference_group=f"{study.reference} ({study.reference_from})" if several else "",
        warnings=(*lines, *problems),
        notes=tuple(list_empty_tables(results, analysis_warnings)),
        n_unusable=cohort.n_damaged + cohort.n_outdated,
    )


def _describe_methods(data: GroupData) -> str:
    """Return the paragraph on the group level for a methods section."""
    settings, parts = data.settings, []
    for name, part in GROUP_SENTENCES.items():
        table = data.tables.get(name)
        if table is None or not len(table.rows):
            continue
        parts.append(part.format(reference=settings.get("ReferenceGroup"), covariates=covariates_of(table)))
    n_excluded = settings.get("ExcludedScans", 0), settings.get("ExcludedNuclei", 0)
    excluded = "{} scans and {} nuclei of other scans were left out after quality control.".format(*n_excluded)
    return " ".join([GROUP_SENTENCES["always"], excluded, *parts, _count_tests(data)])


def _write_page(
    data: GroupData, out_dir: Path, warnings: Sequence[str], n_failed: int
) -> tuple[Path | None, list[str]]:
    """Write the page; a failure is a warning."""
    try:
        lines = list(map(as_options, warnings))
        return write_group_page(data, out_dir, warnings=lines, n_failed=n_failed), []
    except Exception as error:  # noqa: BLE001 - whatever it is, the tables are complete and the user must know
        what_to_do = DISK_ADVICE if isinstance(error, OSError) else "please report this as a bug"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, [f"group.html: cannot be written ({reason}); the tables are complete; {what_to_do}"]
