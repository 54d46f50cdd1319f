"""The page of a cohort: which scans to trust, how nuclei differ between sites, groups and ages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.bids.description import linked_datasets, makers, read_description, source_datasets
from bids_dgmseg.io.files import url_to_path
from bids_dgmseg.report.formatting import open_templates, say
from bids_dgmseg.report.group_data import Cohort, read_cohort
from bids_dgmseg.report.group_figures import (
    PageFigure,
    ageing_figures,
    asymmetry_figures,
    model_figures,
    overall_figures,
    say_not_compared,
    violin_figures,
)
from bids_dgmseg.report.group_statistics import STATISTICS, chosen, statistic_tables
from bids_dgmseg.report.group_tables import PageTable, has_ratings, linked, links_of, nuclei_table, scans_table
from bids_dgmseg.report.page import write_html

N_WARNINGS = 100
"""Most warnings on the page."""

_DRAWN = {
    "group_qc": "scans",
    "group_asymmetry": "sides",
    "group_ageing_curves": "age",
    "group_harmonized": "sites",
}
"""Tables that are drawn, and in which section."""

_TITLES = {
    "scans": "Scans",
    "nuclei": "Nuclei",
    "sites": "Sites",
    "groups": "Groups",
    "age": "Age",
    "sides": "Left and right",
    "change": "Change",
    "models": "Models",
    "outliers": "Outliers",
}

_AT = {"site": "at site", "group": "in group"}


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]


_PERSON = ("dataset", "participant_id")
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
    names = [*_DRAWN, *(statistic.name for statistic in STATISTICS)]
    cohort = read_cohort(output_dir, names=names)
    sections = [section for section in _sections(cohort, output_dir) if section.figures or section.tables]
    _remove_old_figures(output_dir, sections)
    html = (
        open_templates()
        .get_template("group.html.j2")
        .render(
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
            has_ratings=has_ratings(cohort),
            version=__version__,
        )
    )
    return write_html(html, output_dir / "group.html")


def _sections(cohort: Cohort, output_dir: Path) -> Iterator[_Section]:
    by_site = list(violin_figures(cohort, output_dir, factor="site"))
    by_group = list(violin_figures(cohort, output_dir, factor="group"))
    figures = {
        "nuclei": [] if by_site or by_group else list(overall_figures(cohort, output_dir)),
        "sites": by_site,
        "groups": by_group,
        "age": list(ageing_figures(cohort, output_dir)),
        "sides": list(asymmetry_figures(cohort, output_dir)),
        "models": list(model_figures(cohort, output_dir)),
    }
    tables: dict[str, list[PageTable]] = {"scans": [scans_table(cohort, output_dir)], "nuclei": [nuclei_table(cohort)]}
    for statistic in STATISTICS:
        table = cohort.tables.get(statistic.name)
        if table and len(rows := chosen(table)):
            shown = [
                _linked(page_table, rows, cohort, output_dir) for page_table in statistic_tables(statistic, table, rows)
            ]
            tables.setdefault(statistic.section, []).extend(shown)
    for anchor, title in _TITLES.items():
        yield _Section(anchor, title, figures.get(anchor, []), tables.get(anchor, []))


def _linked(table: PageTable, rows: pd.DataFrame, cohort: Cohort, output_dir: Path) -> PageTable:
    """Link rows that are headed by their scan."""
    if table.headings[0].text != "Scan":
        return table
    return linked(table, links_of(rows.head(len(table.rows)), cohort, output_dir))


def _left_out(cohort: Cohort) -> Iterator[str]:
    """Say why a part of the page is not there."""
    for factor in ("site", "group"):
        if why := _say_levels(cohort, factor):
            yield f"Plots by {factor}: {why}"
    if len(cohort.models) < 2:
        yield f"Comparison of models: all scans were segmented by one, {cohort.models[0]}"
    yield from (f"Comparison of models: {why}" for why in say_not_compared(cohort))
    if not has_ratings(cohort):
        yield "Ratings of the scans: group_stats.tsv and group_qc.tsv hold none"
    for name in [*_DRAWN, *(statistic.name for statistic in STATISTICS)]:
        yield from (f"{name}.tsv: {why}" for why in _say_empty(cohort, name))


def _say_levels(cohort: Cohort, factor: str) -> str:
    """Say which scans the plots by site or group lack; empty where none."""
    levels, without = cohort.levels(factor), cohort.n_without(factor)
    if not levels:
        return f"group_stats.tsv tells no {factor}"
    if len(levels) > 1:
        return f"they lack {_scans(without)} without one" if without else ""
    if not without:
        return f"all scans are of one {factor}, {levels[0]}"
    return f"{_scans(cohort.n_of(factor, levels[0]))} {_AT[factor]} {levels[0]}, {without} without a {factor}"


def _say_empty(cohort: Cohort, name: str) -> Iterator[str]:
    """Say why nothing of a table is shown, each model for itself; nothing where all is."""
    table = cohort.tables.get(name)
    if table is None:
        yield "not in this folder"
    elif table.rows.empty and (reason := table.dictionary.get("NotComputed")):
        yield str(reason)
    elif name in _REASONS:
        said = {model: why for model in cohort.models if (why := _REASONS[name](cohort, model))}
        is_common = len(said) == len(cohort.models) and len(set(said.values())) == 1
        yield from {*said.values()} if is_common else [f"{model}: {why}" for model, why in said.items()]
    elif table.rows.empty:
        yield "has no rows"


def _say_no_outliers(cohort: Cohort, model: str) -> str:
    """Say that no value of a model stands out, or why none was looked at; empty where one does."""
    table = cohort.tables["group_outliers"]
    rows = _of_model(table.rows, model)
    if rows.empty:
        return "has no rows"
    if len(_of_model(chosen(table), model)):
        return ""
    if "robust_z" not in rows or rows["robust_z"].notna().any():
        return "no value stands out"
    return f"no value was compared with its site ({_most_frequent(rows)})"


def _say_no_curves(cohort: Cohort, model: str) -> str:
    """Say why no curve over age could be fitted to a model's measures; empty where one was."""
    if len(_of_model(cohort.tables["group_ageing_curves"].rows, model)):
        return ""
    fits = cohort.tables.get("group_ageing")
    note = _most_frequent(_of_model(fits.rows, model)) if fits else ""
    return f"no curve could be fitted ({note})" if note else "has no rows"


_REASONS: Mapping[str, Callable[[Cohort, str], str]] = {
    "group_outliers": _say_no_outliers,
    "group_ageing_curves": _say_no_curves,
}
"""Tables that may lack what is shown of one of several models."""


def _of_model(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    return rows[rows["model"] == model] if "model" in rows else rows


def _most_frequent(rows: pd.DataFrame) -> str:
    """Give the most frequent note, one that tells more than that a value is missing if there is any."""
    notes = rows["note"].dropna().astype(str) if "note" in rows else pd.Series(dtype=str)
    telling = notes[notes != "missing"]
    found = (telling if len(telling) else notes).mode()
    return found.iloc[0].removeprefix("no z: ") if len(found) else ""


def _scans(n: int) -> str:
    return f"{n} scan" if n == 1 else f"{n} scans"


def _remove_old_figures(output_dir: Path, sections: Sequence[_Section]) -> None:
    """Delete the pictures of an earlier page that this one does not show."""
    shown = {figure.href for section in sections for figure in section.figures}
    for path in (output_dir / "figures").glob("group_*.png"):
        if f"figures/{path.name}" not in shown:
            path.unlink(missing_ok=True)


_INPUT = {
    "input_units": "Units of the maps",
    "input_reference": "Reference of the maps",
    "input_reconstructed_from": "Made here of",
}

_SHOWN = 5


def name_studies(output_dir: Path) -> Sequence[str]:
    """Name the datasets that the output was made from, or its own folder where none is known.

    Their names are those of their ``dataset_description.json``, or of their folders where that cannot be read.
    """
    return _name_sources(output_dir, frozenset()) or [output_dir.resolve().name]


def _name_sources(output_dir: Path, seen: frozenset[Path]) -> list[str]:
    """Name what an output was made from; of those in `seen`, which may name each other in turn, nothing."""
    names = []
    for link in linked_datasets(output_dir).values():
        folder = url_to_path(link, output_dir).resolve()
        names.append(str(read_description(folder).get("Name") or folder.name))
    if not names:  # merged from other outputs, which know theirs
        known = seen | {output_dir.resolve()}
        trees = [url_to_path(link, output_dir).resolve() for link in source_datasets(output_dir)]
        names = [
            name
            for tree in trees
            if tree.is_dir() and tree not in known
            for name in _name_sources(tree, known) or [tree.name]
        ]
    return list(dict.fromkeys(names))


def say_facts(cohort: Cohort, output_dir: Path) -> dict[str, dict[str, str]]:
    """Gather headings, then names and values: the maps, settings of the group level, versions."""
    quality = cohort.tables.get("group_qc")
    rows = quality.rows if quality else pd.DataFrame()
    settings: dict[str, Any] = {}
    for table in cohort.tables.values():
        settings |= table.dictionary.get("Settings") or {}
    return {
        "Maps": {title: _say_values(rows[column]) for column, title in _INPUT.items() if column in rows},
        "Settings of the group level": {_spell(key): say(value) for key, value in settings.items()},
        "Versions": {
            **{f"{maker['Name']}, scans": say(maker.get("Version")) for maker in makers(output_dir)},
            "bids_dgmseg, this page": __version__,
        },
    }


def _spell(key: str) -> str:
    """Write a name of the data dictionaries as words.

    >>> _spell("GroupColumn")
    'Group column'
    """
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", key).capitalize()


def _say_values(values: pd.Series) -> str:
    """Say the values of a column, with their number of scans where they differ.

    >>> _say_values(pd.Series(["ppm", "ppb", "ppm", None]))
    'ppm (2), ppb (1), n/a (1)'
    """
    counts = values.astype(object).where(values.notna(), None).map(say).value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    shown = ", ".join(f"{value} ({n})" for value, n in counts.head(_SHOWN).items())
    return shown if len(counts) <= _SHOWN else f"{shown} and {len(counts) - _SHOWN} more values"
