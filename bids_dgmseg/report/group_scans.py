"""Scans on the group page: numbers of ratings, participants, the scans to check, and their links and marks in plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.figures import ScanMark
from bids_dgmseg.report.group_data import DATASET, SCAN_KEYS, GroupData, is_true
from bids_dgmseg.report.group_tables import MAX_ROWS, Cell, Heading, PageTable, make_cell
from bids_dgmseg.report.html import NO_VALUE, format_count, format_number, natural_key, scan_anchor

MAX_SCANS = 100
"""Rows of a table of scans."""

_MAX_STRATA = 30  # rows of sites within groups
_NO_RATING = "no rating"
_TITLES = {DATASET: "Dataset", "model": "Model", "site": "Site", "group": "Group"}


def count_ratings(data: GroupData, *, n_failed: int) -> PageTable:
    """Count the ratings of the scans and of each nucleus; failed scans have no results, nuclei were not found."""
    scans = data.scans.set_index(SCAN_KEYS)
    columns = {"Whole scan": data.by_scan("rating").reindex(scans.index)}
    rated = data.by_nucleus("rating").reindex(scans.index)
    columns |= {
        nucleus.abbreviation: rated[nucleus.abbreviation] for nucleus in ALL_STRUCTURES if nucleus.abbreviation in rated
    }
    stats = data.unmasked
    is_empty = ~(stats["volume_mm3"] > 0) & ~(stats["volume_pv_mm3"] > 0)
    failed = stats[is_empty].groupby("abbreviation").size().to_dict() | {"Whole scan": n_failed}
    ratings = ["green", "amber", "red"]
    counts = {name: values.value_counts() for name, values in columns.items()}
    rows = [[Cell(rating), *(make_cell(int(count.get(rating, 0))) for count in counts.values())] for rating in ratings]
    if any(values.isna().any() for values in columns.values()):
        rows.append([Cell(_NO_RATING), *(make_cell(int(values.isna().sum())) for values in columns.values())])
    rows.append([Cell("failed or not found"), *(make_cell(int(failed.get(name, 0))) for name in columns)])
    names = {structure.abbreviation: structure.name for structure in ALL_STRUCTURES}
    headings = [Heading("Rating", kind="text"), *(Heading(name, names.get(name, ""), "ratings") for name in columns)]
    note = "Failed scans have no results; a nucleus that was not found is also counted by its rating, which is red."
    each = ", each once per model" if len(data.models) > 1 else ""
    caption = f"Numbers of scans by rating, as a whole and per nucleus{each}"
    return PageTable("ratings-table", caption, headings, rows, len(rows), note=note)


def describe_participants(data: GroupData) -> PageTable:
    """Tabulate numbers, age and sex of the participants, by group and site ("Table 1")."""
    scans, excluded = data.scans, data.excluded_scans.index
    scans = scans.assign(is_excluded=pd.MultiIndex.from_frame(scans[SCAN_KEYS]).isin(excluded))
    factors = [factor for factor in ("group", "site") if data.levels(factor)]
    levels = {factor: sorted(data.levels(factor), key=natural_key) for factor in factors}
    unknown = {factor: bool((scans[factor] == NO_VALUE).any()) for factor in factors}
    strata: list[dict[str, str]] = [{}]
    n_strata = 1 + sum(map(len, levels.values())) + sum(unknown.values())
    for factor in factors:
        strata += [{factor: level} for level in levels[factor][: MAX_ROWS // 4]]
        strata += [{factor: NO_VALUE}] if unknown[factor] else []
    if all(len(values) > 1 for values in levels.values()) and len(factors) == 2:
        both = list(product(levels["group"], levels["site"]))
        strata += [{"group": group, "site": site} for group, site in both if len(both) <= _MAX_STRATA]
        n_strata += len(both)
    rows = []
    for stratum in strata:
        chosen = np.logical_and.reduce(
            [(scans[factor] == level).to_numpy() for factor, level in stratum.items()] or [scans.index >= 0]
        )
        rows.append(
            [
                *(Cell(stratum.get(factor, "all").replace(NO_VALUE, "not known")) for factor in factors),
                *_describe(scans[chosen]),
            ]
        )
    titles = ("Participants", "Scans", "Age (years), mean ± SD", "Age, range", "Sex", "Excluded scans")
    headings = [Heading(_TITLES[factor], kind="text") for factor in factors] or [Heading("", kind="text")]
    rows = rows if factors else [[Cell("all"), *rows[0]]]
    headings += [Heading(title) for title in titles]
    note = "Participants and scans that enter the statistics; age at a participant's first scan."
    caption = "Table 1. Participants" + "".join(f" by {name}" for name in [" and ".join(factors)] if name)
    return PageTable("participants-table", caption, headings, rows, n_strata, file="group_stats.tsv", note=note)


def _describe(scans: pd.DataFrame) -> Iterator[Cell]:
    """Numbers, age and sex of the participants of scans that are not excluded, and the number of excluded ones."""
    used = scans[~scans["is_excluded"]]
    if "age_years" in used:
        used = used.sort_values("age_years", kind="stable")
    # what is missing in a session is that of another one, as in the analyses
    persons = used.groupby([key for key in (DATASET, "participant_id") if key in used], sort=False).first()
    yield make_cell(len(persons))
    yield make_cell(int(used["scan"].nunique()))
    ages = pd.to_numeric(persons["age_years"], errors="coerce").dropna() if "age_years" in persons else pd.Series([])
    missing = f" ({n} missing)" if (n := len(persons) - len(ages)) and len(ages) else ""
    spread = f" ± {format_number(ages.std(), 1)}" if len(ages) > 1 else ""
    yield Cell(
        f"{format_number(ages.mean(), 1)}{spread}{missing}" if len(ages) else NO_VALUE,
        sort=ages.mean() if len(ages) else None,
    )
    yield Cell(f"{format_number(ages.min(), 1)} to {format_number(ages.max(), 1)}" if len(ages) else NO_VALUE)
    sexes: Mapping[Any, Any] = (
        persons["sex"].fillna(NO_VALUE).value_counts().sort_index().to_dict() if "sex" in persons else {}
    )
    yield Cell(", ".join(f"{sex}: {n}" for sex, n in sexes.items()) or NO_VALUE)
    yield make_cell(int(scans.loc[scans["is_excluded"], "scan"].nunique()))


def list_excluded(data: GroupData, output_dir: Path) -> PageTable | None:
    """List the scans, and nuclei of other scans, that enter no statistics, with the reasons; None if there are none."""
    scans = data.scans.assign(page=data.by_scan("page").reindex(data.scans.set_index(SCAN_KEYS).index).to_numpy())
    whole = data.excluded_scans
    records: list[tuple[tuple[Any, Any], str, Any]] = []
    records += [(key, "whole scan", reason) for key, reason in zip(whole.index.to_list(), whole, strict=True)]
    others = data.stats[
        data.stats["excluded"].notna() & ~pd.MultiIndex.from_frame(data.stats[SCAN_KEYS]).isin(whole.index)
    ]
    for scan, model, nucleus, reason in others[[*SCAN_KEYS, "abbreviation", "excluded"]].itertuples(index=False):
        records.append(((scan, model), nucleus, reason))
    if not records:
        return None
    by_key = {(row["scan"], row["model"]): row for row in scans.to_dict("records")}
    several, classes = len(data.models) > 1, _filter_classes(data)
    rows = [
        [
            Cell(key[0], href=_link(by_key[key], output_dir)),
            *([Cell(key[1])] if several else []),
            Cell(what),
            Cell(str(reason)),
        ]
        for key, what, reason in records[:MAX_ROWS]
    ]
    titles = ("Scan", *(["Model"] if several else []), "Excluded", "Reason")
    headings = [Heading(title, kind="text") for title in titles]
    nuclei = f" and {len(others)} {'nucleus' if len(others) == 1 else 'nuclei'} of other scans" if len(others) else ""
    caption = f"Excluded from all statistics: {format_count(len({scan for scan, _ in whole.index}), 'scan')}{nuclei}"
    row_classes = [classes[key] for key, *_ in records[:MAX_ROWS]]
    return PageTable(
        "excluded-table", caption, headings, rows, len(records), file="group_stats.tsv", classes=row_classes
    )


def filter_levels(data: GroupData) -> Mapping[str, Sequence[str]]:
    """Return the values of site, group and rating by which the page can be filtered, if there are several."""
    levels = {factor: sorted(data.levels(factor), key=natural_key) for factor in ("site", "group")}
    for factor, values in levels.items():
        if factor in data.scans and (data.scans[factor] == NO_VALUE).any():
            values.append(NO_VALUE)
    ratings = set(_scan_ratings(data))
    levels["rating"] = [rating for rating in ("green", "amber", "red", _NO_RATING) if rating in ratings]
    return {factor: values for factor, values in levels.items() if len(values) > 1}


def _scan_ratings(data: GroupData) -> pd.Series:
    return data.by_scan("rating").reindex(data.scans.set_index(SCAN_KEYS).index).fillna(_NO_RATING)


def _filter_classes(data: GroupData) -> dict[tuple[str, str], str]:
    """Return the classes of each scan and model, such as ``s0 g1 r2`` after the places in the filter."""
    levels = filter_levels(data)
    scans = data.scans.assign(rating=_scan_ratings(data).to_numpy())
    places = {factor: {value: place for place, value in enumerate(values)} for factor, values in levels.items()}
    return {
        (row["scan"], row["model"]): " ".join(f"{factor[0]}{places[factor][row[factor]]}" for factor in levels)
        for row in scans.to_dict("records")
    }


def mark_scans(data: GroupData, output_dir: Path) -> dict[tuple[str, str], ScanMark]:
    """Return how each scan and model is shown in interactive plots."""
    pages, classes = data.by_scan("page"), _filter_classes(data)
    marks = {}
    for row in data.scans.to_dict("records"):
        key = (row["scan"], row["model"])
        factors = [f"{factor} {row[factor]}" for factor in ("site", "group") if factor in row]
        label = ", ".join([row["scan"], *([row["model"]] if len(data.models) > 1 else []), *factors])
        marks[key] = ScanMark(label, _link({**row, "page": pages.get(key)}, output_dir), classes[key])
    return marks


def scans_tables(data: GroupData, output_dir: Path) -> tuple[PageTable, PageTable]:
    """Rank the scans by rating, nuclei not found, outliers and warnings; link them to the pages in `output_dir`.

    Returns
    -------
    flagged, others : PageTable
        Scans rated red or amber, with a red nucleus or with one that was not found; all others.
    """
    ranked = _rank_scans(data)
    lists = {"not_found": "Not found"}
    if ranked["without_voxel"].notna().any():
        lists["without_voxel"] = "Smaller than a voxel"
    tables = []
    for is_flagged in (True, False):
        anchor, caption = ("scans", "Scans to check, the worst first") if is_flagged else ("other-scans", "Other scans")
        rows = ranked[ranked["is_flagged"] == is_flagged]
        tables.append(_scans_table(data, rows, output_dir, lists, anchor=f"{anchor}-table", caption=caption))
    return tables[0], tables[1]


def _scans_table(
    data: GroupData, scans: pd.DataFrame, output_dir: Path, lists: Mapping[str, str], *, anchor: str, caption: str
) -> PageTable:
    ratings, reasons = data.by_nucleus("rating"), data.by_nucleus("reasons")
    nuclei = [structure for structure in ALL_STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _TITLES if key in scans and (key not in (DATASET, "model") or data.scans[key].nunique() > 1)]
    has_overall = data.by_scan("rating").notna().any()
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="ratings")] if has_overall else []
    headings += [Heading(nucleus.abbreviation, nucleus.name, kind="ratings") for nucleus in nuclei]
    headings += [Heading(title, kind="text") for title in lists.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    rows = []
    for scan in scans.head(MAX_SCANS).to_dict("records"):
        row = (scan["scan"], scan["model"])
        cells = [Cell(scan["scan"], href=_link(scan, output_dir)), *(Cell(str(scan[key])) for key in keys)]
        cells += [_rating_cell(scan["rating"], "whole scan", scan["reasons"])] if has_overall else []
        for nucleus in nuclei:
            reason = reasons.at[row, nucleus.abbreviation] if nucleus.abbreviation in reasons else None
            cells.append(_rating_cell(ratings.at[row, nucleus.abbreviation], nucleus.name, reason))
        cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in lists]
        rows.append([*cells, make_cell(scan["n_outliers"]), make_cell(scan["n_warnings"])])
    file = "group_qc.tsv" if "group_qc" in data.tables else "group_stats.tsv"
    by_scan = _filter_classes(data)
    classes = [by_scan[key] for key in list(zip(scans["scan"], scans["model"], strict=True))[:MAX_SCANS]]
    return PageTable(anchor, caption, headings, rows, len(scans), file=file, classes=classes)


def _rank_scans(data: GroupData) -> pd.DataFrame:
    """Collect the evidence against each scan, the worst first."""
    scans = data.scans.set_index(SCAN_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings = data.by_nucleus("rating").reindex(scans.index)
    empty = data.unmasked[~(data.unmasked["volume_mm3"] > 0)]
    is_without_voxel = empty["volume_pv_mm3"] > 0
    not_found, without_voxel = empty[~is_without_voxel], empty[is_without_voxel]
    scans["not_found"] = not_found.groupby(SCAN_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["without_voxel"] = without_voxel.groupby(SCAN_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    outliers = data.tables.get("group_outliers")
    scans["n_outliers"] = np.nan  # missing if they were not computed
    if outliers is not None and "outlier" in outliers.rows:
        rows = outliers.rows[~outliers.rows["abbreviation"].isin(data.bilateral.get("abbreviation", []))]
        counts = is_true(rows["outlier"]).groupby([rows[key] for key in SCAN_KEYS]).sum()
        scans["n_outliers"] = counts.reindex(scans.index)
    for column in ("rating", "n_warnings", "page", "reasons"):
        scans[column] = data.by_scan(column).reindex(scans.index)
    ranks = {
        "rating": scans["rating"].map({rating: level for level, rating in enumerate(RATINGS)}).fillna(-1),
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "not_found": not_found.groupby(SCAN_KEYS).size().reindex(scans.index, fill_value=0),
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


def link_scans(table: PageTable, rows: pd.DataFrame, data: GroupData, output_dir: Path) -> PageTable:
    """Link the first cell of each row to its scan on the page of the participant."""
    pages = data.by_scan("page")
    records = rows[["scan", "name", "participant_id", "model", "seg"]].head(len(table.rows)).to_dict("records")
    links = [_link({**row, "page": pages.get((row["scan"], row["model"]))}, output_dir) for row in records]
    linked = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=True)]
    classes = _filter_classes(data)
    return replace(table, rows=linked, classes=[classes[row["scan"], row["model"]] for row in records])


def _link(scan: Mapping[Any, Any], output_dir: Path) -> str:
    """Return the link to a scan on the page of its participant; empty if there is no page."""
    page = scan["page"] if isinstance(scan["page"], str) else f"{scan['participant_id']}.html"
    return f"{path_to_url(page)}#{scan_anchor(scan['name'], scan['seg'])}" if (output_dir / page).is_file() else ""
