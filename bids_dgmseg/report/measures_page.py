"""Page of maps that were measured in the labels of any program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import spell_unit
from bids_dgmseg.measurement.labelled_maps import MeasuredMap
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.html import format_significant, slug, write_page
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.report.slices import WINDOW_PPM

_SHOWN = ("mean", "median", "std", "p05", "p95", "core_mean")
_TITLES = {"mean": "mean", "median": "median", "std": "SD", "p05": "5th %", "p95": "95th %", "core_mean": "core"}


def write_measures_page(
    out: Path,
    measured: Sequence[MeasuredMap],
    labels: Volume,
    structures: Sequence[Structure],
    *,
    labels_name: str,
    notes: Sequence[str] = (),
) -> Path:
    """Draw each map with the outlines of the labels and write ``index.html`` with figures and tables."""
    sections = []
    for one in measured:
        figure = out / "figures" / f"{slug(one.name)}.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_map(one, labels, figure, structures=structures)
        sections.append(
            {
                "map": one,
                "unit": spell_unit(one.unit),
                "figure": f"figures/{figure.name}",
                "rows": _rows(one, structures),
            }
        )
    return write_page(
        "measures.html.j2",
        out / "index.html",
        labels=labels_name,
        sections=sections,
        notes=notes,
        titles=[_TITLES[name] for name in _SHOWN],
    )


def draw_map(one: MeasuredMap, labels: Volume, path: Path, *, structures: Sequence[Structure]) -> Path:
    """Draw axial slices of a map with the outlines of the labels."""
    return draw_mosaic(
        one.values,
        labels,
        path,
        plane="axial",
        structures=structures,
        title=one.path.name,
        window=_window(one, labels),
        unit=spell_unit(one.unit),
    )


def _window(one: MeasuredMap, labels: Volume) -> tuple[float, float]:
    """Return the range of gray values: that of chi maps, or the 1st to 99th percentile around the labels."""
    if one.unit == "ppm":
        return WINDOW_PPM
    boxes = np.argwhere(labels.array > 0)
    low, high = boxes.min(axis=0), boxes.max(axis=0) + 1
    values = one.values.array[tuple(slice(first, last) for first, last in zip(low, high, strict=True))]
    values = values[np.isfinite(values)]
    bottom, top = np.percentile(values, (1, 99)) if len(values) else (0.0, 1.0)
    return float(bottom), float(top) if top > bottom else float(bottom) + 1.0


def _rows(one: MeasuredMap, structures: Sequence[Structure]) -> list[Mapping[str, object]]:
    """Format the table of a map."""
    colors = {structure.abbreviation: structure.color for structure in structures}
    unit = f"_{one.unit}" if one.unit else ""
    return [
        {
            "name": row["name"],
            "abbreviation": row["abbreviation"],
            "color": colors.get(row["abbreviation"], "#888888"),
            "n_voxels": row["n_voxels"],
            "n_valid": row["n_valid"],
            "volume": format_significant(float(row["volume_mm3"])),
            "values": [format_significant(float(row[f"{name}{unit}"])) for name in _SHOWN],
        }
        for row in one.table.to_dict("records")
    ]
