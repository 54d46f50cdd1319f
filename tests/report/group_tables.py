"""Group tables by hand: six scans at two sites in two groups, the dentate nucleus on both sides."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

SCANS = (  # participant, site, group, age; volume of DN_L and DN_R (mm3), mean of DN_L and DN_R (ppm)
    ("sub-01", "A", "HC", 20, 600, 500, 0.10, 0.10),
    ("sub-02", "A", "HC", 30, 610, 510, 0.11, 0.11),
    ("sub-03", "A", "MS", 40, 620, 520, 0.12, 0.12),
    ("sub-04", "B", "HC", 50, 700, 500, 0.20, 0.14),
    ("sub-05", "B", "MS", 60, 710, 510, 0.21, 0.15),
    ("sub-06", "B", "MS", 70, 720, "n/a", 0.22, "n/a"),
)
"""DN_L's median volume is 610 at A and 710 at B; its median susceptibility 0.11 and 0.21."""
KEYS = ("participant_id", "session_id", "acquisition", "run", "model", "site")
"""The site comes last, after the entities of the name of a scan."""


def write_tables(
    out: Path,
    *,
    models: Sequence[str] = ("dgm16",),
    descriptions: Sequence[str] = (),
    ratings: bool = True,
    sites: bool = True,
) -> Path:
    """Write group_stats.tsv, group_qc.tsv and pages of all participants but the last."""
    out.mkdir(parents=True, exist_ok=True)
    rows, quality = [], []
    for model, description in product(models, descriptions or [""]):
        for place, (participant, site, group, age, *measures) in enumerate(SCANS):
            keys = {"description": description} if description else {}
            keys |= dict(zip(KEYS, (participant, "ses-1", "n/a", "n/a", model, site if sites else "n/a"), strict=True))
            for side, volume, mean in zip("LR", measures[:2], measures[2:], strict=True):
                values = {"age_years": age, "abbreviation": f"DN_{side}", "volume_mm3": volume, "mean_ppm": mean}
                rows.append({**keys, **values, "diagnosis": group})
                if ratings:
                    red = (participant, side) == ("sub-03", "L")
                    rows[-1] |= {"rating": "red" if red else "green", "reasons": "in many parts" if red else "n/a"}
            quality.append({**keys, "page": f"{participant}.html", "n_warnings": place, "input_units": "ppm"})
            if ratings:
                quality[-1] |= {"rating": "amber" if participant == "sub-05" else "green"}
            if participant != "sub-06":
                (out / f"{participant}.html").write_text(f'<p id="{participant}_ses-1_{model}">a scan</p>')
    write_table(out, "group_stats", rows, {"Settings": {"GroupColumn": "diagnosis"}})
    write_table(out, "group_qc", quality)
    return out


def write_table(
    out: Path, name: str, rows: Sequence[Mapping[str, Any]], dictionary: Mapping[str, Any] | None = None
) -> None:
    """Write a table and its dictionary; without rows there is a header of one column."""
    table = pd.DataFrame(rows, dtype=object) if rows else pd.DataFrame(columns=["measure"])
    table.to_csv(out / f"{name}.tsv", sep="\t", index=False)
    (out / f"{name}.json").write_text(json.dumps(dictionary or {}))
