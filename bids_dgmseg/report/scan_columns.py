"""Columns of the tables of a participant's page, and what it says about further maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bids_dgmseg.measurement.columns import describe_sampled
from bids_dgmseg.report.html import format_value

Row = Mapping[str, str]
"""Row of ``_stats.tsv`` as text."""

_TITLES = {"mean": "mean", "median": "median", "std": "SD"}


class MeasureColumn(NamedTuple):
    """A column of a table on the page."""

    key: str
    """Column of ``_stats.tsv``."""
    title: str
    digits: int
    """Decimals shown; the tooltip has the full value."""


MEASURES: Mapping[str, Sequence[MeasureColumn]] = {
    "Voxels": (MeasureColumn("n_voxels", "count", 0),),
    "Volume (mm³)": (MeasureColumn("volume_mm3", "label", 1), MeasureColumn("volume_pv_mm3", "weighted", 1)),
    "Between sessions": (
        MeasureColumn("volume_longitudinal_mm3", "volume (mm³)", 1),
        MeasureColumn("volume_change_percent", "from their mean (%)", 1),
    ),
    "Susceptibility (ppm)": (
        MeasureColumn("mean_ppm", "mean", 3),
        MeasureColumn("median_ppm", "median", 3),
        MeasureColumn("std_ppm", "SD", 3),
        MeasureColumn("p05_ppm", "5th %", 3),
        MeasureColumn("p95_ppm", "95th %", 3),
        MeasureColumn("mean_pv_ppm", "weighted", 3),
        MeasureColumn("core_mean_ppm", "core", 3),
    ),
    "Relative to the reference region (ppm)": (
        MeasureColumn("mean_ref_ppm", "mean", 3),
        MeasureColumn("core_mean_ref_ppm", "core", 3),
    ),
    "Probability": (MeasureColumn("mean_probability", "mean", 2),),
}
"""By the heading that neighbouring columns share, with the unit."""

MAPS: Mapping[str, Sequence[MeasureColumn]] = {"": ()}
"""Stands for the measures of further maps, which differ between scans."""

QC_MEASURES: Mapping[str, Sequence[MeasureColumn]] = {
    "Segmentation": (
        MeasureColumn("n_components", "components", 0),
        MeasureColumn("mean_entropy_bits", "entropy (bit)", 2),
        MeasureColumn("mass_outside_fraction", "outside", 2),
        MeasureColumn("expected_dice", "expected Dice", 2),
        MeasureColumn("detached_volume_mm3", "detached (mm³)", 0),
        MeasureColumn("misplaced_volume_mm3", "misplaced (mm³)", 0),
        MeasureColumn("medial_volume_mm3", "medial (mm³)", 0),
        MeasureColumn("caudate_ratio", "ratio", 2),
    ),
    "Excluded": (MeasureColumn("excluded_fraction", "fraction", 2),),
    "Strong sources (mm³)": (
        MeasureColumn("paramagnetic_blob_mm3", "paramagnetic", 0),
        MeasureColumn("diamagnetic_blob_mm3", "diamagnetic", 0),
    ),
    "Manual correction": (MeasureColumn("automatic_dice", "Dice with automatic", 2),),
    "Surrounding map": (
        MeasureColumn("rim_contrast_ppm", "contrast (ppm)", 3),
        MeasureColumn("boundary_gradient_ppm_per_mm", "gradient (ppm/mm)", 3),
        MeasureColumn("edge_distance_mm", "to the edge (mm)", 1),
    ),
    "Literature norms (SD)": (
        MeasureColumn("volume_z", "volume", 1),
        MeasureColumn("mean_ppm_z", "susceptibility", 1),
    ),
    "(Left − right) / mean": (
        MeasureColumn("volume_asymmetry", "volume", 2),
        MeasureColumn("mean_ppm_asymmetry", "susceptibility", 2),
    ),
}
"""Measures behind the ratings, in the same way."""


def map_columns(present: Row) -> dict[str, list[MeasureColumn]]:
    """Return the measures of further maps in a table, by map and unit.

    >>> map_columns({"mean_ppm": "0.1", "T1map_n_valid": "9", "T1map_mean_s": "1.1"})
    {'T1map (s)': [MeasureColumn(key='T1map_mean_s', title='mean', digits=3)]}
    """
    groups: dict[str, list[MeasureColumn]] = {}
    for column in present:
        entry, match = describe_sampled(column), re.fullmatch(r"(.+)_(mean|median|std)(?:_.*)?", column)
        if entry and match:
            unit = f" ({entry['Units']})" if "Units" in entry else ""
            title = f"{match[1].replace('_', ' ')}{unit}"
            groups.setdefault(title, []).append(MeasureColumn(column, _TITLES[match[2]], 3))
    return groups


def describe_map(about: Mapping[str, Any]) -> str:
    """Describe how a further map was measured, or why it was not."""
    if about.get("problem"):
        return f"not measured: {about['problem']}"
    parts = [
        format_value(about.get("file")),
        str(about.get("unit") or "no unit"),
        "resampled to the grid of the labels" if about.get("resampled") else "same grid",
        *(["sign changed: measured as |χ−|"] if about.get("negated") else []),
    ]
    return ", ".join(parts)
