"""Tables of the group page that summarize the measures: means per nucleus, medians per site or group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_tables import Cell, Heading, PageTable, make_cell
from bids_dgmseg.report.html import QUANTITIES, Quantity, quantity, slug


def nuclei_tables(data: GroupData) -> list[PageTable]:
    """Summarize volume and susceptibility, and each measure of a further map that was analysed."""
    further = [{measure: shown} for measure, shown in data.quantities.items() if measure not in QUANTITIES]
    return [_nuclei_table(data, quantities) for quantities in (QUANTITIES, *further)]


def _nuclei_table(data: GroupData, quantities: Mapping[str, Quantity]) -> PageTable:
    """Summarize measures of each nucleus, bilateral rows last, over all scans that enter statistics."""
    rows, several = [], len(data.models) > 1
    bilateral = [data.bilateral[data.bilateral["excluded"].isna()]] if len(data.bilateral) else []
    for (model, name), group in pd.concat([data.used, *bilateral]).groupby(["model", "abbreviation"], sort=False):
        cells = [Cell(str(name)), *([Cell(str(model))] if several else []), make_cell(len(group))]
        for measure, shown in quantities.items():
            values = group[measure].dropna()
            numbers = (values.mean(), values.std(), values.min(), values.median(), values.max())
            cells += [make_cell(len(values)), *(make_cell(float(x), digits=shown.digits) for x in numbers)]
        rows.append(cells)
    headings = [Heading(name, kind="text") for name in ("Nucleus", "Model")[: 1 + several]] + [Heading("Scans")]
    titles = {"volume_mm3": "Volume", "mean_ppm": "Mean χ"}
    for title, unit in ((titles.get(measure, shown.name), shown.unit) for measure, shown in quantities.items()):
        headings.append(Heading(f"{title}: n"))
        headings += [Heading(f"{title}: {name} ({unit})") for name in ("mean", "SD", "min", "median", "max")]
    scans = "the scans that are not excluded" if len(data.used) < len(data.stats) else "all scans"
    own = quantities is QUANTITIES
    what = "Volume and mean susceptibility χ" if own else next(iter(quantities.values())).name
    caption = f"{what} per nucleus over {scans}"
    anchor = "nuclei-table" if own else f"nuclei-table-{slug(next(iter(quantities)))}"
    return PageTable(anchor, caption, headings, rows, len(rows), file="group_stats.tsv")


def medians_table(values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str) -> PageTable:
    """Tabulate the medians of a measure per nucleus over participants, one column per site or group."""
    keys = ["abbreviation", factor]
    people = values.dropna(subset=[measure]).groupby([*keys, "person"], sort=False)[measure].mean()
    medians, counts = (people.groupby(level=keys, sort=False).agg(how).to_dict() for how in ("median", "size"))
    names, rows = list(values["abbreviation"].unique()), []
    for name in names:
        cells = [make_cell(medians.get((name, level)), digits=quantity(measure).digits) for level in levels]
        texts = [f"{cell.text} ({counts.get((name, level), 0)})" for cell, level in zip(cells, levels, strict=True)]
        shown = [
            replace(cell, text=text) if cell.sort is not None else cell for cell, text in zip(cells, texts, strict=True)
        ]
        rows.append([Cell(name), *shown])
    headings = [Heading("Nucleus", kind="text"), *(Heading(level) for level in levels)]
    return PageTable(anchor, f"Medians by {factor}, and numbers of participants", headings, rows, len(rows))
