"""Study by hand: six scans at two sites in two groups, the dentate nucleus on both sides."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.study.study import ResultTable

SCANS = (  # participant, site, group, age; volume of DN_L and DN_R (mm3), mean of DN_L and DN_R (ppm)
    ("sub-01", "A", "HC", 20, 600, 500, 0.10, 0.10),
    ("sub-02", "A", "HC", 30, 610, 510, 0.11, 0.11),
    ("sub-03", "A", "MS", 40, 620, 520, 0.12, 0.12),
    ("sub-04", "B", "HC", 50, 700, 500, 0.20, 0.14),
    ("sub-05", "B", "MS", 60, 710, 510, 0.21, 0.15),
    ("sub-06", "B", "MS", 70, 720, np.nan, 0.22, np.nan),
)
"""DN_L's median volume is 610 at A and 710 at B; its median susceptibility 0.11 and 0.21."""


HOSTILE = (
    "<script>hit(1)</script>",
    '"><img src=x onerror=hit(2)>',
    "javascript:hit(3)",
    "</title></a></svg><svg onload=hit(4)>",
    "'\" onmouseover=hit(5) x='",
    "--><script>hit(6)</script><!--",
)
"""Names that must not become markup."""


def scan_row(participant: str, *, session: str = "ses-1", model: str = "dgm16", **columns: Any) -> dict[str, Any]:
    """Row of a table: the scan, then other columns; DN_L unless they say otherwise."""
    name = f"{participant}_{session}" if session else participant
    keys = {"participant_id": participant, "name": name, "scan": name, "seg": model, "model": model}
    return {**keys, "person": participant, "site": "A", "abbreviation": "DN_L", **columns}


def make_data(
    rows: Iterable[Mapping[str, Any]], quality: Sequence[Mapping[str, Any]] = (), **tables: Sequence[Mapping[str, Any]]
) -> GroupData:
    """Return what the page shows of measures, fields of ``_qc.json`` and results (name without ``group_`` → rows)."""
    stats = pd.DataFrame(list(rows))
    structures = {structure.abbreviation: structure for structure in ALL_STRUCTURES}
    stats["nucleus"] = stats["abbreviation"].map(lambda name: structures[name].nucleus)
    stats["side"] = stats["abbreviation"].map(lambda name: structures[name].hemisphere)
    for column, value in {"volume_pv_mm3": np.nan, "mean_ppm": 0.1, "volume_mm3": 600.0, "excluded": None}.items():
        if column not in stats:
            stats[column] = value
    content = {f"group_{name}": table_of(f"group_{name}", part) for name, part in tables.items()}
    if quality:
        content["group_qc"] = table_of("group_qc", quality)
    return GroupData(stats, content)


def table_of(name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> ResultTable:
    """Return a table as the page gets it."""
    return ResultTable(name, pd.DataFrame(list(rows)), facts)


def make_study(
    out: Path, *, models: Sequence[str] = ("dgm16",), ratings: bool = True, **tables: Sequence[Mapping[str, Any]]
) -> GroupData:
    """Return the data of `SCANS`, and write pages of all participants but the last."""
    out.mkdir(parents=True, exist_ok=True)
    rows, quality = [], []
    for model in models:
        for place, (participant, site, group, age, *measures) in enumerate(SCANS):
            scan = scan_row(participant, model=model, site=site, group=group, age_years=age)
            for side, volume, mean in zip("LR", measures[:2], measures[2:], strict=True):
                rows.append(scan | {"abbreviation": f"DN_{side}", "volume_mm3": volume, "mean_ppm": mean})
                if ratings:
                    red = (participant, side) == ("sub-03", "L")
                    rows[-1] |= {"rating": "red" if red else "green", "reasons": "in many parts" if red else None}
            quality.append(scan | {"page": f"{participant}.html", "n_warnings": place, "input_units": "ppm"})
            if ratings:
                quality[-1] |= {"rating": "amber" if participant == "sub-05" else "green"}
            if participant != "sub-06":
                (out / f"{participant}.html").write_text(f'<p id="{participant}_ses-1_{model}">a scan</p>')
    return make_data(rows, quality, **tables)


def with_table(data: GroupData, name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> GroupData:
    """Add a table with its facts."""
    return replace(data, tables={**data.tables, name: table_of(name, rows, **facts)})
