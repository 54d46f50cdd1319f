"""Tables for a paper: participants (Table 1) and results, as TSV and as HTML that word processors open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.io.files import write_bytes, write_json, write_tsv
from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_scans import describe_participants
from bids_dgmseg.report.html import NO_VALUE, format_number, format_p, page_unit

NAMES = ("group_table1", "group_results")

_STYLE = (
    "body{font:10pt Arial,sans-serif}table{border-collapse:collapse}caption{text-align:left;padding-bottom:4pt}"
    "th,td{padding:2pt 6pt;text-align:left;vertical-align:top}thead th{border-top:1.5pt solid;"
    "border-bottom:.75pt solid}tbody tr:last-child td{border-bottom:1.5pt solid}p{font-size:9pt}"
)
"""Three horizontal rules, as journals have them."""

_DECIMALS = {"ppb": 1, "mm³": 1}


def write_paper_tables(data: GroupData, output_dir: Path) -> list[Path]:
    """Write ``group_table1`` and ``group_results``, each as TSV and HTML; return the paths of the TSV files.

    Susceptibilities are in ppb. The results are those of the measures as they were measured: differences between groups
    or, without groups, means.
    """
    first = describe_participants(data)
    participants = pd.DataFrame(
        [[cell.text for cell in row] for row in first.rows], columns=[heading.text or " " for heading in first.headings]
    )
    results, note = _results(data)
    caption = "Volume and mean magnetic susceptibility of the deep gray nuclei"
    paths = []
    for name, table, title, text in (
        (NAMES[0], participants, first.caption, first.note),
        (NAMES[1], results, f"Table 2. {caption}", note),
    ):
        paths.append(write_tsv(table, output_dir / f"{name}.tsv"))
        write_json({"Description": title, "Notes": [text], "Settings": data.settings}, output_dir / f"{name}.json")
        write_bytes(_render(table, title, text).encode(), output_dir / f"{name}.html")
    return paths


def _results(data: GroupData) -> tuple[pd.DataFrame, str]:
    """Return the table of results, with its note."""
    table, measures = data.tables.get("group_differences"), data.settings.get("Measures") or data.quantities
    if table is not None and len(rows := table.rows[table.rows.get("measure", pd.Series()).isin(measures)]):
        covariates = table.dictionary.get("AncovaCovariates") or []
        records = [_difference(record, several=rows["model"].nunique() > 1) for record in rows.to_dict("records")]
        adjusted = f"adjusted for {', '.join(covariates)} (ANCOVA)" if covariates else "unadjusted (Welch's t test)"
        note = (
            f"Differences are group minus reference group, {adjusted}, with 95 % confidence intervals; standardized by "
            "the standard deviation within groups and corrected for small samples. q: p value adjusted for the number "
            "of nuclei (false discovery rate). n: participants of the reference group / group in the test."
        )
        return pd.DataFrame(records), note
    records = []
    for (model, name), rows in data.used.groupby(["model", "abbreviation"], sort=False):
        record: dict[str, Any] = {"Model": model} if len(data.models) > 1 else {}
        record["Nucleus"] = name
        for measure in data.quantities:
            label, _, factor = page_unit(measure)
            people = rows.dropna(subset=[measure]).groupby("person")[measure].mean() * factor
            record[f"{label}: n"] = str(len(people))
            record[label] = _mean(people.mean(), people.std(), page_unit(measure)[1])
        records.append(record)
    return pd.DataFrame(records), "Mean ± standard deviation over participants, whose scans are averaged."


def _difference(record: Mapping[Any, Any], *, several: bool) -> dict[str, str]:
    """Format one comparison: adjusted if it was, otherwise unadjusted."""
    label, unit, factor = page_unit(str(record["measure"]))
    prefix = "ancova_" if pd.notna(record.get("ancova_difference")) else ""
    keys = {"p": "ancova_p", "q": "ancova_q"} if prefix else {"p": "p_t", "q": "q_t"}
    n = [record.get(f"{prefix}n_{which}") for which in ("reference", "group")]
    means = [
        _mean(
            record.get(f"mean_{which}", float("nan")) * factor, record.get(f"std_{which}", float("nan")) * factor, unit
        )
        for which in ("reference", "group")
    ]
    row = {"Measure": label, **({"Model": str(record["model"])} if several else {})}
    return row | {
        "Nucleus": str(record["abbreviation"]),
        "Reference group": str(record["reference"]),
        "Group": str(record["group"]),
        "n": " / ".join("0" if pd.isna(number) else f"{number:.0f}" for number in n),
        "Reference group, mean ± SD": means[0],
        "Group, mean ± SD": means[1],
        "Difference [95 % CI]": _interval(record, f"{prefix}difference", factor, _DECIMALS.get(unit, 3)),
        "Standardized [95 % CI]": _interval(record, f"{prefix}hedges_g", 1.0, 2),
        **{name: format_p(float(record.get(key, float("nan")))) for name, key in keys.items()},
        "Adjusted": "yes" if prefix else "no",
    }


def _mean(mean: Any, std: Any, unit: str) -> str:
    digits = _DECIMALS.get(unit, 3)
    return NO_VALUE if pd.isna(mean) else f"{format_number(mean, digits)} ± {format_number(std, digits)}"


def _interval(record: Mapping[Any, Any], name: str, factor: float, digits: int) -> str:
    values: list[Any] = [record.get(f"{name}{end}", float("nan")) for end in ("", "_low", "_high")]
    value, *limits = values
    if pd.isna(value):
        return NO_VALUE
    text = format_number(value * factor, digits)
    shown = ", ".join(format_number(limit * factor, digits) for limit in limits)
    return text if any(map(pd.isna, limits)) else f"{text} [{shown}]"


def _render(table: pd.DataFrame, caption: str, note: str) -> str:
    """Return a page with one table, whose cells word processors keep."""

    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.to_numpy(object).tolist())
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(caption)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead>{row(list(table.columns), 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        f"<p>{escape(note)}</p>\n</body>\n</html>\n"
    )
