"""Scans on the group page: numbers of ratings, participants, the scans to check, and their links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.group_data import DATASET, SCAN_KEYS, GroupData, is_true
from bids_dgmseg.report.group_tables import MAX_ROWS, STATS_FILE, Cell, Heading, PageTable, make_cell
from bids_dgmseg.report.html import NO_VALUE, format_count, format_number, natural_key, scan_anchor

MAX_SCANS = 100
"""Rows of a table of scans."""

_MAX_STRATA = 30  # rows of sites within groups
_NO_RATING = "no rating"
_TITLES = {DATASET: "Dataset", "model": "Model", "site": "Site", "group": "Group"}


class ScanMark(NamedTuple):
    """How the page shows the results of one model for a scan."""

    label: str
    """Name, site and group."""
    href: str
    """Link to its page; empty if there is none."""


Marks = Mapping[tuple[str, str], ScanMark]
"""Scan and model → mark."""


def mark_scans(data: GroupData, output_dir: Path) -> Marks:
    """Return how each scan and model is shown."""
    pages, marks = data.by_scan("page"), {}
    for row in data.scans.to_dict("records"):
        key = (row["scan"], row["model"])
        factors = [f"{factor} {row[factor]}" for factor in ("site", "group") if factor in row]
        page = pages.get(key)
        page = page if isinstance(page, str) else f"{row['participant_id']}.html"
        href = f"{path_to_url(page)}#{scan_anchor(row['name'], row['seg'])}" if (output_dir / page).is_file() else ""
        marks[key] = ScanMark(", ".join([row["scan"], *([row["model"]] * (len(data.models) > 1)), *factors]), href)
    return marks


def count_ratings(data: GroupData, *, n_failed: int) -> PageTable:
    """Count the ratings of the scans and of each nucleus; failed scans have no results, nuclei were not found."""
    scans = data.scans.set_index(SCAN_KEYS)
    rated = data.by_nucleus("rating").reindex(scans.index)
    columns = {"Whole scan": data.by_scan("rating").reindex(scans.index)}
    names = {structure.abbreviation: structure.name for structure in ALL_STRUCTURES}
    columns |= {name: rated[name] for name in names if name in rated}
    stats = data.unmasked
    is_empty = ~(stats["volume_mm3"] > 0) & ~(stats["volume_pv_mm3"] > 0)
    failed = stats[is_empty].groupby("abbreviation").size().to_dict() | {"Whole scan": n_failed}
    counts = {name: values.fillna(_NO_RATING).value_counts() for name, values in columns.items()}
    ratings = [*RATINGS, *([_NO_RATING] if any(_NO_RATING in count for count in counts.values()) else [])]
    rows = [[Cell(rating), *(make_cell(int(count.get(rating, 0))) for count in counts.values())] for rating in ratings]
    rows.append([Cell("failed or not found"), *(make_cell(int(failed.get(name, 0))) for name in columns)])
    headings = [Heading("Rating", kind="text"), *(Heading(name, names.get(name, ""), "ratings") for name in columns)]
    note = "Failed scans have no results; a nucleus that was not found is also counted by its rating, which is red."
    each = ", each once per model" if len(data.models) > 1 else ""
    caption = f"Numbers of scans by rating, as a whole and per nucleus{each}"
    return PageTable("ratings-table", caption, headings, rows, len(rows), note=note)


def describe_participants(data: GroupData) -> PageTable:
    """Tabulate numbers, age and sex of the participants, by group and site ("Table 1")."""
    scans = data.scans
    scans = scans.assign(is_excluded=pd.MultiIndex.from_frame(scans[SCAN_KEYS]).isin(data.excluded_scans.index))
    levels = {factor: sorted(data.levels(factor), key=natural_key) for factor in ("group", "site")}
    levels = {factor: values for factor, values in levels.items() if values}
    strata: list[dict[str, str]] = [{}]
    for factor, values in levels.items():
        unknown = [NO_VALUE] if (scans[factor] == NO_VALUE).any() else []
        strata += [{factor: level} for level in [*values, *unknown]]
    if len(levels) == 2 and all(len(values) > 1 for values in levels.values()):
        both = [{"group": group, "site": site} for group, site in product(*levels.values())]
        strata += both if len(both) <= _MAX_STRATA else []
    rows = []
    for stratum in strata[:MAX_ROWS]:
        inside = np.logical_and.reduce(
            [scans[factor] == level for factor, level in stratum.items()] or [pd.Series(True, scans.index)]
        )
        keys = [Cell(stratum.get(factor, "all").replace(NO_VALUE, "not known")) for factor in levels]
        rows.append([*(keys or [Cell("all")]), *_describe(scans[inside])])
    titles = ("Participants", "Scans", "Age (years), mean ± SD", "Age, range", "Sex", "Excluded scans")
    headings = [Heading(_TITLES[factor], kind="text") for factor in levels] or [Heading("", kind="text")]
    note = "Participants and scans that enter the statistics; age at a participant's first scan."
    caption = "Table 1. Participants" + (f" by {' and '.join(levels)}" if levels else "")
    headings += [Heading(title) for title in titles]
    return PageTable("participants-table", caption, headings, rows, len(strata), file=STATS_FILE, note=note)


def _describe(scans: pd.DataFrame) -> Iterator[Cell]:
    """Numbers, age and sex of the participants of scans that are not excluded, and the number of excluded ones."""
    used = scans[~scans["is_excluded"]]
    if "age_years" in used:
        used = used.sort_values("age_years", kind="stable")
    # what is missing in a session is that of another one, as in the analyses
    persons = used.groupby([key for key in (DATASET, "participant_id") if key in used], sort=False).first()
    yield make_cell(len(persons))
    yield make_cell(int(used["scan"].nunique()))
    ages = pd.to_numeric(persons.get("age_years", pd.Series(dtype=float)), errors="coerce").dropna()
    if len(ages):
        missing = f" ({n} missing)" if (n := len(persons) - len(ages)) else ""
        spread = f" ± {format_number(ages.std(), 1)}" if len(ages) > 1 else ""
        yield Cell(f"{format_number(ages.mean(), 1)}{spread}{missing}", sort=ages.mean())
        yield Cell(f"{format_number(ages.min(), 1)} to {format_number(ages.max(), 1)}")
    else:
        yield from (Cell(NO_VALUE), Cell(NO_VALUE))
    sexes = persons["sex"].fillna(NO_VALUE).value_counts().sort_index() if "sex" in persons else pd.Series(dtype=int)
    yield Cell(", ".join(f"{sex}: {n}" for sex, n in sexes.items()) or NO_VALUE)
    yield make_cell(int(scans.loc[scans["is_excluded"], "scan"].nunique()))


def list_excluded(data: GroupData, marks: Marks) -> PageTable | None:
    """List the scans, and nuclei of other scans, that enter no statistics, with the reasons; None if there are none."""
    whole = data.excluded_scans.rename("excluded").reset_index().assign(abbreviation="whole scan")
    is_whole = pd.MultiIndex.from_frame(data.stats[SCAN_KEYS]).isin(data.excluded_scans.index)
    nuclei = data.stats[data.stats["excluded"].notna() & ~is_whole]
    rows = pd.concat([whole, nuclei])[[*SCAN_KEYS, "abbreviation", "excluded"]]
    if rows.empty:
        return None
    hidden = [] if len(data.models) > 1 else ["model"]
    caption = f"Excluded from all statistics: {format_count(whole['scan'].nunique(), 'scan')}"
    caption += f" and {len(nuclei)} nuclei of other scans" if len(nuclei) else ""
    titles = {"scan": "Scan", "model": "Model", "abbreviation": "Excluded", "excluded": "Reason"}
    shown = rows.drop(columns=hidden)
    table = PageTable(
        "excluded-table",
        caption,
        [Heading(titles[str(column)], kind="text") for column in shown],
        [list(map(Cell, map(str, row))) for row in shown.head(MAX_ROWS).itertuples(index=False)],
        len(rows),
        file=STATS_FILE,
    )
    return link_scans(table, rows, marks)


def scans_tables(data: GroupData, marks: Marks) -> tuple[PageTable, PageTable]:
    """Rank the scans by rating, nuclei not found, outliers and warnings; link them to their pages.

    Returns
    -------
    flagged, others : PageTable
        Scans rated red or amber, with a red nucleus or with one that was not found; all others.
    """
    ranked = _rank_scans(data)
    ratings, reasons = data.by_nucleus("rating"), data.by_nucleus("reasons")
    nuclei = [structure for structure in ALL_STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _TITLES if key in ranked and (key not in (DATASET, "model") or ranked[key].nunique() > 1)]
    lists = {"not_found": "Not found", "without_voxel": "Smaller than a voxel"}
    lists = {column: title for column, title in lists.items() if column == "not_found" or ranked[column].notna().any()}
    has_overall = ranked["rating"].notna().any()
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="ratings")] if has_overall else []
    headings += [Heading(nucleus.abbreviation, nucleus.name, kind="ratings") for nucleus in nuclei]
    headings += [Heading(title, kind="text") for title in lists.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    tables = []
    for is_flagged, caption in ((True, "Scans to check, the worst first"), (False, "Other scans")):
        scans = ranked[ranked["is_flagged"] == is_flagged]
        rows = []
        for key, scan in zip(scans.index, scans.head(MAX_SCANS).to_dict("records"), strict=False):
            cells = [Cell(scan["scan"]), *(Cell(str(scan[column])) for column in keys)]
            cells += [_rating_cell(scan["rating"], "whole scan", scan["reasons"])] if has_overall else []
            for nucleus in nuclei:
                reason = reasons.at[key, nucleus.abbreviation] if nucleus.abbreviation in reasons else None
                cells.append(_rating_cell(ratings.at[key, nucleus.abbreviation], nucleus.name, reason))
            cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in lists]
            rows.append([*cells, make_cell(scan["n_outliers"]), make_cell(scan["n_warnings"])])
        file = data.tables["group_qc"].file if "group_qc" in data.tables else STATS_FILE
        anchor = "scans-table" if is_flagged else "other-scans-table"
        tables.append(link_scans(PageTable(anchor, caption, headings, rows, len(scans), file=file), scans, marks))
    return tables[0], tables[1]


def _rank_scans(data: GroupData) -> pd.DataFrame:
    """Collect the evidence against each scan, the worst first."""
    scans = data.scans.set_index(SCAN_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings = data.by_nucleus("rating").reindex(scans.index)
    empty = data.unmasked[~(data.unmasked["volume_mm3"] > 0)]
    is_small = empty["volume_pv_mm3"] > 0
    for column, rows in (("not_found", empty[~is_small]), ("without_voxel", empty[is_small])):
        scans[column] = rows.groupby(SCAN_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    outliers = data.tables.get("group_outliers")
    scans["n_outliers"] = np.nan  # missing if they were not computed
    if outliers is not None and "outlier" in outliers.rows:
        counts = is_true(outliers.rows["outlier"]).groupby([outliers.rows[key] for key in SCAN_KEYS]).sum()
        scans["n_outliers"] = counts.reindex(scans.index)
    for column in ("rating", "n_warnings", "reasons"):
        scans[column] = data.by_scan(column).reindex(scans.index)
    ranks = {
        "rating": scans["rating"].map({rating: level for level, rating in enumerate(RATINGS)}).fillna(-1),
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "not_found": scans["not_found"].str.count(r"\S+").fillna(0),
        "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }
    scans["is_flagged"] = (ranks["rating"] > 0) | (ranks["red"] > 0) | (ranks["not_found"] > 0)
    order = pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index
    return scans.loc[order]


def _rating_cell(rating: Any, subject: str, reasons: Any) -> Cell:
    """Show a rating with its reasons in the tooltip."""
    if rating not in RATINGS:
        return Cell(NO_VALUE)
    why = f", {reasons}" if isinstance(reasons, str) and rating != "green" else ""
    return Cell(rating, float(RATINGS.index(rating)), rating=rating, title=f"{subject}: {rating}{why}")


def link_scans(table: PageTable, rows: pd.DataFrame, marks: Marks) -> PageTable:
    """Link the first cell of each row to its scan."""
    links = [marks[key].href for key in zip(rows["scan"], rows["model"], strict=True)]
    linked = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=False)]
    return replace(table, rows=linked)
