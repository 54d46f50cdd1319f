"""Plots of change per person, of clinical variables and of norms: one panel per nucleus and side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bids_dgmseg.report.figures import DPI, INK, SOFT, TEXT, WIDTH_IN, style_axes, to_png, with_default_settings
from bids_dgmseg.report.group_plots import Drawing, group_colour, group_handles

_COLUMNS = 4
_HEIGHT_IN = 2.3


@dataclass(frozen=True)
class Band:
    """A line with limits."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    colour: str = INK
    style: str = "-"
    width: float = 1.5


@dataclass(frozen=True)
class Panel:
    """What is drawn of one nucleus."""

    name: str
    """Abbreviation."""
    points: pd.DataFrame
    """``x``, ``y``, ``group`` and, to join the points of a person by a line, ``person``."""
    bands: Sequence[Band] = field(default_factory=tuple)
    text: str = ""


@with_default_settings
def draw_panels(
    panels: Sequence[Panel], *, xlabel: str, ylabel: str, groups: Sequence[str] = (), joined: bool = False
) -> Drawing:
    """Draw points with lines and bands, in the colours of the groups; left nuclei are the patient's left."""
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, _HEIGHT_IN * rows + 0.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _draw_points(axes, panel.points.dropna(subset=["x", "y"]), groups, joined=joined)
        for band in panel.bands:
            if band.low is not None and band.high is not None:
                axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.18, linewidth=0, zorder=1)
            axes.plot(band.x, band.y, color=band.colour, linestyle=band.style, linewidth=band.width, zorder=4)
        axes.set_title(f"{panel.name}   {panel.text}".rstrip(), color=INK, fontsize=9.5, loc="left", **TEXT)
        if number % _COLUMNS == 0:
            axes.set_ylabel(ylabel, fontsize=9, color=SOFT, **TEXT)
        if number >= len(panels) - _COLUMNS:
            axes.set_xlabel(xlabel, fontsize=9, color=SOFT, **TEXT)
        style_axes(axes, fontsize=9)
    if handles := group_handles(groups):
        figure.legend(handles=handles, loc="outside upper left", ncols=6, fontsize=9, frameon=False, labelcolor=INK)
    return Drawing(to_png(figure), "", figure)


def _draw_points(axes: Axes, points: pd.DataFrame, groups: Sequence[str], *, joined: bool) -> None:
    """Draw points in the colours of their groups, those of a person joined by a line if asked for."""
    for group in [*groups, None]:
        own = points[points["group"] == group] if group is not None else points[~points["group"].isin(list(groups))]
        if own.empty:
            continue
        colour = group_colour(groups, str(group)) if groups else "#4c78a8"
        if joined:
            lines = [part[["x", "y"]].to_numpy(float) for _, part in own.groupby("person", sort=False)]
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.9, alpha=0.6, zorder=2))
        look: dict[str, Any] = {"s": 14, "edgecolors": "white", "linewidths": 0.4, "alpha": 0.9, "zorder": 3}
        axes.scatter(own["x"], own["y"], color=colour, **look)
