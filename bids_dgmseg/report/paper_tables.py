"""Tables for a paper: participants (Table 1) and results, as TSV and as HTML that word processors open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.io.files import write_json, write_text, write_tsv
from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_scans import describe_participants
from bids_dgmseg.report.html import NO_VALUE, format_number, format_p, page_unit

_STYLE = (
    "body{font:10pt Arial,sans-serif}table{border-collapse:collapse}caption{text-align:left;padding-bottom:4pt}"
    "th,td{padding:2pt 6pt;text-align:left;vertical-align:top}thead th{border-top:1.5pt solid;"
    "border-bottom:.75pt solid}tbody tr:last-child td{border-bottom:1.5pt solid}p{font-size:9pt}"
)
"""Three horizontal rules, as journals have them."""

_DECIMALS = {"ppb": 1, "mm³": 1}

_DIFFERENCES = (
    "Differences are group minus reference group, {adjusted}, with 95 % confidence intervals; standardized by the "
    "standard deviation within groups and adjusted for small samples. q: p value adjusted for the number of nuclei "
    "(false discovery rate). n: participants of the reference group / group in the test."
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
        covariates = (table.dictionary if table else {}).get("AncovaCovariates") or []
        adjusted = f"adjusted for {', '.join(covariates)} (ANCOVA)" if covariates else "unadjusted (Welch's t test)"
        records = [_difference(record) for record in rows.to_dict("records")]
        return pd.DataFrame(records), _DIFFERENCES.format(adjusted=adjusted)
    records = []
    for (model, name), group in data.used.groupby(["model", "abbreviation"], sort=False):
        record = {"Model": str(model), "Nucleus": str(name)}
        for measure in data.quantities:
            label, unit, factor = page_unit(measure)
            people = group.dropna(subset=[measure]).groupby("person")[measure].mean() * factor
            record |= {f"{label}: n": str(len(people)), label: _mean(people.mean(), people.std(), unit)}
        records.append(record)
    return pd.DataFrame(records), _MEANS


def _difference(record: Mapping[Any, Any]) -> dict[str, str]:
    """Format one comparison: adjusted if it was, otherwise unadjusted."""
    label, unit, factor = page_unit(str(record["measure"]))
    prefix = "ancova_" if pd.notna(record.get("ancova_difference")) else ""
    keys = {"p": "ancova_p", "q": "ancova_q"} if prefix else {"p": "p_t", "q": "q_t"}
    values = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    n = [values.get(f"{prefix}n_{which}", 0.0) for which in ("reference", "group")]
    means = [
        _mean(factor * values.get(f"mean_{which}", float("nan")), factor * values.get(f"std_{which}", 0.0), unit)
        for which in ("reference", "group")
    ]
    return {
        "Measure": label,
        "Model": str(record["model"]),
        "Nucleus": str(record["abbreviation"]),
        "Reference group": str(record["reference"]),
        "Group": str(record["group"]),
        "n": " / ".join("0" if math.isnan(number) else f"{number:.0f}" for number in n),
        "Reference group, mean ± SD": means[0],
        "Group, mean ± SD": means[1],
        "Difference [95 % CI]": _interval(values, f"{prefix}difference", factor, _DECIMALS.get(unit, 3)),
        "Standardized [95 % CI]": _interval(values, f"{prefix}hedges_g", 1.0, 2),
        **{name: format_p(values.get(key, float("nan"))) for name, key in keys.items()},
        "Adjusted": "yes" if prefix else "no",
    }


def _mean(mean: float, std: float, unit: str) -> str:
    digits = _DECIMALS.get(unit, 3)
    return NO_VALUE if math.isnan(mean) else f"{format_number(mean, digits)} ± {format_number(std, digits)}"


def _interval(values: Mapping[str, float], name: str, factor: float, digits: int) -> str:
    value, low, high = (factor * values.get(f"{name}{end}", float("nan")) for end in ("", "_low", "_high"))
    texts = [format_number(number, digits) for number in (value, low, high)]
    return texts[0] if NO_VALUE in texts else f"{texts[0]} [{texts[1]}, {texts[2]}]"
