"""Group level: analysis of the results of many scans, its tables and the page with its figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.bids.dataset import generators, linked_datasets, read_description, source_datasets
from bids_dgmseg.bids.output_dataset import check_writable, write_merged_dataset_files
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import DISK_ADVICE, as_options
from bids_dgmseg.io.files import LOCK, url_to_path, wait_for_lock, write_json, write_text, write_tsv
from bids_dgmseg.report.group_data import DATASET, GroupData, collect_group_data
from bids_dgmseg.report.group_figures import GroupFigures, PageFigure
from bids_dgmseg.report.group_tables import (
    STATISTICS,
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
from bids_dgmseg.report.html import NO_VALUE, format_number, format_p, format_value, quantity, write_page
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.harmonization import check_fits, save_fits
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection
from bids_dgmseg.study.study import FOLDER, list_empty_tables, load_study, scan_tables, with_keys, write_tables

_STYLE = (
    "body{font:10pt Arial,sans-serif}table{border-collapse:collapse}caption{text-align:left;padding-bottom:4pt}"
    "th,td{padding:2pt 6pt;text-align:left;vertical-align:top}thead th{border-top:1.5pt solid;"
    "border-bottom:.75pt solid}tbody tr:last-child td{border-bottom:1.5pt solid}p{font-size:9pt}"
)
"""Three horizontal rules, as journals have them."""

_DIFFERENCES = (
    "Means (with standard errors, SE) and differences, group minus reference group, are adjusted for {covariates} "
    "(analysis of covariance, HC3 errors), with 95 % confidence intervals; standardized by the residual standard "
    "deviation and adjusted for small samples. q: p value adjusted for the number of nuclei (false discovery rate). "
    "n: participants of the reference group / group in the model."
)
_MEANS = "Mean ± standard deviation over participants, whose scans are averaged."


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
    """Return the table of results, with its note."""
    table, measures = data.tables.get("group_differences"), data.settings.get("Measures") or list(data.quantities)
    rows = table.rows if table else pd.DataFrame()
    if "measure" in rows and len(rows := rows[rows["measure"].isin(measures)]):
        covariates = (table.facts if table else {}).get("Covariates") or ["nothing"]
        records = [_difference(record) for record in rows.to_dict("records")]
        return pd.DataFrame(records), _DIFFERENCES.format(covariates=", ".join(covariates))
    records = []
    for (model, name), group in data.used.groupby(["model", "abbreviation"], sort=False):
        record = {"Model": str(model), "Nucleus": str(name)}
        for measure in data.quantities:
            shown = quantity(measure)
            people = group.dropna(subset=[measure]).groupby("person")[measure].mean() * shown.factor
            mean = _mean(people.mean(), people.std(), shown.digits)
            record |= {f"{shown.label}: n": str(len(people)), shown.label: mean}
        records.append(record)
    return pd.DataFrame(records), _MEANS


def _difference(record: Mapping[Any, Any]) -> dict[str, str]:
    """Format one comparison."""
    shown = quantity(str(record["measure"]))
    factor = shown.factor
    values = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    n = [values.get(f"n_{which}", 0.0) for which in ("reference", "group")]
    means = [
        _mean(
            factor * values.get(f"mean_{which}", float("nan")),
            factor * values.get(f"se_{which}", float("nan")),
            shown.digits,
        )
        for which in ("reference", "group")
    ]
    return {
        "Measure": shown.label,
        "Model": str(record["model"]),
        "Nucleus": str(record["abbreviation"]),
        "Reference group": str(record["reference"]),
        "Group": str(record["group"]),
        "n": " / ".join("0" if math.isnan(number) else f"{number:.0f}" for number in n),
        "Reference group, mean ± SE": means[0],
        "Group, mean ± SE": means[1],
        "Difference [95 % CI]": _interval(values, "difference", factor, shown.digits),
        "Standardized [95 % CI]": _interval(values, "hedges_g", 1.0, 2),
        **{name: format_p(values.get(name, float("nan"))) for name in "pq"},
    }


def _mean(mean: float, std: float, digits: int) -> str:
    return NO_VALUE if math.isnan(mean) else f"{format_number(mean, digits)} ± {format_number(std, digits)}"


def _interval(values: Mapping[str, float], name: str, factor: float, digits: int) -> str:
    value, low, high = (factor * values.get(f"{name}{end}", float("nan")) for end in ("", "_low", "_high"))
    texts = [format_number(number, digits) for number in (value, low, high)]
    return texts[0] if NO_VALUE in texts else f"{texts[0]} [{texts[1]}, {texts[2]}]"


MAX_WARNINGS = 100
PAGE, REVIEW_PAGE = "group.html", "review.html"

_TITLES = {
    "nuclei": "Nuclei",
    "sites": "Sites",
    "groups": "Groups",
    "age": "Age",
    "change": "Change",
    "clinical": "Clinical variables",
    "raters": "Raters",
    "outliers": "Outliers",
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
        facts=_facts(data, output_dir),
        files=sorted(path.relative_to(output_dir).as_posix() for path in (output_dir / "group").glob("*.tsv")),
        paper=[path.relative_to(output_dir).as_posix() for path in write_paper_tables(data, output_dir / "group")],
        sections=[section for section in sections if section.figures or section.tables],
        has_ratings=bool(data.by_nucleus("rating").notna().any(axis=None) or data.by_scan("rating").notna().any()),
    )


def _make_sections(data: GroupData, output_dir: Path, marks: Marks) -> Iterator[_Section]:
    figures = GroupFigures(data, output_dir)
    violins = {factor: list(figures.violins(factor)) for factor in ("site", "group")}
    by_section = {
        "nuclei": [] if any(violins.values()) else figures.violins("scans"),
        "sites": violins["site"],
        "groups": violins["group"],
        "age": figures.ageing(),
        "change": figures.changes(),
        "clinical": figures.correlations(),
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
        yield _Section(anchor, title, list(by_section.get(anchor, ())), tables.get(anchor, []))


def find_study_names(output_dir: Path) -> Sequence[str]:
    """Return the names of the datasets that the results come from, or of the output folder if none is known.

    Names are those of ``dataset_description.json``, or of the folder if it cannot be read.
    """
    links = [*linked_datasets(output_dir).values()] or source_datasets(output_dir)
    folders = [url_to_path(link, output_dir).resolve() for link in links]
    names = [str(read_description(folder).get("Name") or folder.name) for folder in folders]
    return list(dict.fromkeys(names)) or [output_dir.resolve().name]


def _facts(data: GroupData, output_dir: Path) -> dict[str, dict[str, str]]:
    """Return settings and versions as headings → names → values."""
    return {
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
    results, analysis_warnings = run_analyses(study)
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
