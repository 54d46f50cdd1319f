"""The scans of a cohort, the worst first, with the light of every nucleus and a link to each scan's page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.links import make_link
from bids_dgmseg.measure.flags import LIGHTS
from bids_dgmseg.report.group_cells import Cell, Heading, PageTable, to_cell
from bids_dgmseg.report.group_read import Cohort
from bids_dgmseg.report.numbers import NO_VALUE
from bids_dgmseg.structures import STRUCTURES

N_SCANS = 100
"""Most scans on the page."""
_KEYS = ["scan", "model"]
_NO_SCANS = pd.MultiIndex.from_arrays([[], []], names=_KEYS)
_IF_SEVERAL = ("tree", "model")
_TITLES = {"tree": "Output", "model": "Model", "site": "Site", "group": "Group"}


def has_lights(cohort: Cohort) -> bool:
    """Whether any nucleus or scan was given a light."""
    lights, overall = _nucleus_lights(cohort), _scan_lights(cohort)
    return bool(lights.notna().any(axis=None)) or bool(overall.notna().any())


def scans_table(cohort: Cohort, output_dir: Path) -> PageTable:
    """Rank the scans by their lights, nuclei not found, outliers and warnings.

    Parameters
    ----------
    cohort : Cohort
        As `bids_dgmseg.report.group_read.read_cohort` gives it.
    output_dir : Path
        Where the page will lie; scans are linked to pages that exist there.
    """
    scans = _judged(cohort)
    lights, reasons = _nucleus_lights(cohort), _wide(cohort, "reasons")
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in lights]
    keys = [key for key in _TITLES if key in scans and (key not in _IF_SEVERAL or scans[key].nunique() > 1)]
    overall = "light" if scans["light"].notna().any() else ""
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="lit")] if overall else []
    headings += [Heading(nucleus, STRUCTURES.named(nucleus).name, kind="lit") for nucleus in nuclei]
    blank = {"missing": "Not found", **({"unfilled": "Fills no voxel"} if scans["unfilled"].notna().any() else {})}
    headings += [Heading(title, kind="text") for title in blank.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    rows = []
    for scan in scans.head(N_SCANS).to_dict("records"):
        row = (scan["scan"], scan["model"])
        cells = [Cell(scan["scan"], href=_link(scan, output_dir)), *(Cell(str(scan[key])) for key in keys)]
        cells += [_light(scan["light"], "whole scan", scan["reasons"])] if overall else []
        cells += [
            _light(lights.at[row, nucleus], STRUCTURES.named(nucleus).name,
                   reasons.at[row, nucleus] if nucleus in reasons else None)
            for nucleus in nuclei
        ]  # fmt: skip
        cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in blank]
        rows.append([*cells, to_cell(scan["n_outliers"]), to_cell(scan["n_warnings"])])
    file = "group_quality.tsv" if "group_quality" in cohort.tables else "group_stats.tsv"
    return PageTable("scans-table", "Scans, the worst first", headings, rows, len(scans), file=file)


def _judged(cohort: Cohort) -> pd.DataFrame:
    """Gather what speaks against each scan, the worst first."""
    scans = cohort.scans.set_index(_KEYS, drop=False)
    scans.index.names = [None, None]
    lights = _nucleus_lights(cohort).reindex(scans.index)
    blank = cohort.stats[~(cohort.stats["volume_mm3"] > 0)]
    is_unfilled = blank["volume_pv_mm3"] > 0
    absent, unfilled = blank[~is_unfilled], blank[is_unfilled]
    scans["light"] = _scan_lights(cohort).reindex(scans.index)
    scans["missing"] = absent.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["unfilled"] = unfilled.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["n_missing"] = absent.groupby(_KEYS).size().reindex(scans.index, fill_value=0)
    scans["n_outliers"] = _count_outliers(cohort).reindex(scans.index)
    for column in ("n_warnings", "page", "reasons"):
        scans[column] = _of_quality(cohort, column).reindex(scans.index)
    level = scans["light"].map({light: place for place, light in enumerate(LIGHTS)}).fillna(-1)
    ranks = {
        "level": level, "red": (lights == "red").sum(axis=1), "amber": (lights == "amber").sum(axis=1),
        "n_missing": scans["n_missing"], "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }  # fmt: skip
    order = pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index
    return scans.loc[order]


def _nucleus_lights(cohort: Cohort) -> pd.DataFrame:
    """Light of each nucleus by scan and model, a column a nucleus; no column where nobody gave one."""
    lights = _wide(cohort, "light")
    return lights.where(lights.isin(LIGHTS)).dropna(axis=1, how="all")


def _wide(cohort: Cohort, column: str) -> pd.DataFrame:
    if column not in cohort.stats:
        return pd.DataFrame(index=_NO_SCANS)
    keys = [*_KEYS, "abbreviation"]
    return cohort.stats.drop_duplicates(keys).set_index(keys)[column].unstack("abbreviation")


def _scan_lights(cohort: Cohort) -> pd.Series:
    lights = _of_quality(cohort, "light")
    return lights.where(lights.isin(LIGHTS))


def _of_quality(cohort: Cohort, column: str) -> pd.Series:
    table = cohort.tables.get("group_quality")
    if table is None or column not in table.rows:
        return pd.Series(index=_NO_SCANS, dtype=object)
    return table.rows.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def _count_outliers(cohort: Cohort) -> pd.Series:
    """Values of each scan that stand out from their site; missing where nobody looked."""
    table = cohort.tables.get("group_outliers")
    if table is None or "outlier" not in table.rows:
        return pd.Series(index=_NO_SCANS, dtype=float)
    is_outlier = table.rows["outlier"].astype(str).str.lower() == "true"
    return is_outlier.groupby([table.rows[key] for key in _KEYS]).sum()


def _light(light: Any, where: str, reasons: Any) -> Cell:
    """Show a light; why it is not green stands in the cell's title."""
    if light not in LIGHTS:
        return Cell(NO_VALUE)
    why = f", {reasons}" if isinstance(reasons, str) and light != "green" else ""
    return Cell(light, float(LIGHTS.index(light)), light=light, title=f"{where}: {light}{why}")


def _link(scan: Mapping[Any, Any], output_dir: Path) -> str:
    """Link to the scan on its participant's page, from the folder of this page; empty where there is no page."""
    page = scan["page"] if isinstance(scan["page"], str) else f"{scan['participant_id']}.html"
    anchor = re.sub(r"[^A-Za-z0-9_-]", "-", f"{scan['name']}_{scan['seg']}")
    return f"{make_link(page)}#{anchor}" if (output_dir / page).is_file() else ""


def links_of(rows: pd.DataFrame, cohort: Cohort, output_dir: Path) -> Sequence[str]:
    """Link each row of a table to its scan's page."""
    pages = _of_quality(cohort, "page")
    records = rows[["scan", "name", "participant_id", "model", "seg"]].to_dict("records")
    return [_link({**row, "page": pages.get((row["scan"], row["model"]))}, output_dir) for row in records]
