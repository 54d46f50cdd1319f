"""Plots of how well segmentations agree: measures of overlap, scatter, Bland and Altman."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_dgmseg.report.drawing import DPI, INK, LINE, SOFT, TEXT, WIDTH_IN, colour_of, plain, spread, to_png
from bids_dgmseg.report.numbers import say_short

_NUCLEI_A_ROW = 2
_STYLE: Mapping[str, Any] = {"s": 20, "alpha": 0.8, "linewidths": 0.5, "edgecolors": INK, "zorder": 3}
_MEASURES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "mean_surface_distance_mm": "mean surface\ndistance (mm)"}


def draw_overlap(overlap: pd.DataFrame, *, title: str) -> bytes:
    """Draw Dice, HD95 and mean surface distance of every scan, nucleus by nucleus, as a PNG.

    Parameters
    ----------
    overlap : DataFrame
        Rows of ``overlap.tsv`` of one pair of raters.
    title : str
        Printed above.
    """
    nuclei = list(dict.fromkeys(overlap["abbreviation"]))
    figure = Figure(figsize=(WIDTH_IN, 6.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(_MEASURES), 1, sharex=True)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for axes, (measure, label) in zip(rows, _MEASURES.items(), strict=True):
        for place, nucleus in enumerate(nuclei):
            values = overlap.loc[overlap["abbreviation"] == nucleus, measure].dropna().to_numpy(float)
            width = 0.45 if len(values) > 1 else 0
            axes.scatter(place + width * spread(len(values)), values, color=colour_of(nucleus), **_STYLE)
            if len(values):
                axes.plot([place - 0.3, place + 0.3], [np.median(values)] * 2, color=INK, linewidth=1.6, zorder=4)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        plain(axes)
        if measure == "dice":
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(0, 1.08 * (np.nanmax(overlap[measure]) if overlap[measure].gt(0).any() else 1))
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    return to_png(figure)


def draw_agreement(values: pd.DataFrame, agreement: pd.DataFrame, *, title: str, unit: str) -> bytes:
    """Draw scatter and Bland-Altman plots of one quantity, nucleus by nucleus, as a PNG.

    Parameters
    ----------
    values : DataFrame
        ``abbreviation``, and a column for each of the two raters; a row a scan.
    agreement : DataFrame
        Rows of ``agreement.tsv`` of this quantity and pair, whose limits are drawn.
    title, unit : str
        Printed above and at the axes.
    """
    reference, prediction = agreement[["reference", "prediction"]].iloc[0]
    nuclei = list(agreement["abbreviation"])
    rows = math.ceil(len(nuclei) / _NUCLEI_A_ROW)
    figure = Figure(figsize=(WIDTH_IN, 2.55 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 2 * _NUCLEI_A_ROW, squeeze=False).ravel()
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for place, row in enumerate(agreement.to_dict("records")):
        both = values.loc[values["abbreviation"] == row["abbreviation"], [reference, prediction]].dropna()
        x, y = both.to_numpy(float).T
        _draw_scatter(panels[2 * place], x, y, row, unit)
        _draw_differences(panels[2 * place + 1], x, y, row, unit)
    for axes in panels[2 * len(nuclei) :]:
        axes.set_axis_off()
    return to_png(figure)


def _draw_scatter(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter(x, y, color=colour_of(row["abbreviation"]), **_STYLE)
    low, high = _range([*x, *y])
    axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle="--", zorder=1)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal", adjustable="box")
    axes.set_title(f"{row['abbreviation']}   r {say_short(row['pearson_r'])}   ICC(2,1) {say_short(row['icc21'])}",
                   color=INK, fontsize=8.2, loc="left", **TEXT)  # fmt: skip
    _label(axes, f"{row['reference']} ({unit})", f"{row['prediction']} ({unit})")
    plain(axes)


def _draw_differences(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter((x + y) / 2, y - x, color=colour_of(row["abbreviation"]), **_STYLE)
    axes.axhline(0, color=LINE, linewidth=0.8, zorder=1)
    for name, style in (("loa_lower", "--"), ("bias", "-"), ("loa_upper", "--")):
        if not math.isfinite(row[f"{name}_low"]):
            continue
        axes.axhspan(row[f"{name}_low"], row[f"{name}_high"], color=LINE, alpha=0.25, linewidth=0, zorder=0)
        axes.axhline(row[name], color=INK, linewidth=1, linestyle=style, zorder=2)
    bounds = [row[key] for key in ("loa_lower_low", "loa_upper_high") if math.isfinite(row[key])]
    axes.set_ylim(*_range([*(y - x), *bounds, 0.0]))
    limits = f"{say_short(row['loa_lower'])} to {say_short(row['loa_upper'])}"
    axes.set_title(f"bias {say_short(row['bias'])}   limits {limits}", color=INK, fontsize=8.2, loc="left", **TEXT)
    _label(axes, f"mean of both ({unit})", f"difference ({unit})")
    plain(axes)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def _label(axes: Axes, x: str, y: str) -> None:
    shorten = 34
    for text, put in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        put(text if len(text) <= shorten else f"…{text[-shorten:]}", fontsize=7.5, color=SOFT, **TEXT)
