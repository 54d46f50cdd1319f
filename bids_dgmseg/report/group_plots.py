"""Plots of the group page: violins, age curves and asymmetry per nucleus; panels of change, variables and norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from bids_dgmseg.models.structures import ALL_STRUCTURES, color_of
from bids_dgmseg.report.figures import (
    DPI,
    INK,
    SOFT,
    TEXT,
    WIDTH_IN,
    jitter,
    shorten_labels,
    style_axes,
    to_png,
    to_svg,
    with_default_settings,
)
from bids_dgmseg.report.html import quantity, slug

Floats = NDArray[np.float64]

Links = Mapping[tuple[str, str], str]
"""Scan and model → link that its points open."""

MAX_LEVELS = 12
"""Sites or groups side by side."""

GROUP_COLOURS = ("#1f77b4", "#e6842a", "#2a9d5c", "#a34fb5", "#8c6d46", "#d1495b", "#4fb3bf", "#6b7280")
"""Colours of groups in the order of their sizes; those of two groups differ for colour-blind people, too."""

_MIN_FOR_DENSITY = 5
_MARGIN = 0.05  # share of the range of the values, beyond both ends
_LABEL_SHARE = 0.12  # of a panel's height, for a label at its top or bottom with the space around it
_POINTS: Mapping[str, Any] = {"s": 9, "marker": "o", "alpha": 0.9, "linewidths": 0.35, "zorder": 3}
_RED_POINTS: Mapping[str, Any] = {"s": 30, "marker": "X", "color": "#b3261e", "edgecolors": "white", "zorder": 5}
_LEGEND: Mapping[str, Any] = {"loc": "outside upper left", "fontsize": 9, "frameon": False, "labelcolor": INK}
_NUCLEI = {structure.nucleus: structure for structure in ALL_STRUCTURES if structure.hemisphere == "L"}


@dataclass(frozen=True)
class _Side:
    """How one side of a nucleus is drawn in a panel with both."""

    side: Literal["L", "R"]
    half: Literal["low", "high"]
    """Half of a violin."""
    shift: float
    marker: str
    line: Literal["-", "--"]
    label: str
    colour: str
    """In the legend, which has no nucleus's own colour."""


_SIDES = (
    _Side("L", "low", -0.12, "o", "-", "left (the patient's left)", "#808890"),
    _Side("R", "high", 0.12, "^", "--", "right", "#d5dae0"),
)


class Drawing(NamedTuple):
    """A plot as an image, and as markup whose points open their scans (empty without links)."""

    png: bytes
    svg: str = ""


class Band(NamedTuple):
    """A line with limits."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    colour: str = INK
    style: str = "-"
    width: float = 1.5


class Panel(NamedTuple):
    """Points, lines and bands of one nucleus."""

    name: str
    """Abbreviation."""
    points: pd.DataFrame
    """``x``, ``y``, ``group`` and, to join the points of a person by a line, ``person``."""
    bands: Sequence[Band] = ()
    text: str = ""


@with_default_settings
def draw_violins(
    values: pd.DataFrame,
    *,
    measure: str,
    levels: Sequence[str],
    factor: str,
    harmonized: pd.DataFrame | None = None,
    links: Links | None = None,
) -> Drawing:
    """Draw the distribution of a measure in each nucleus; the left half of a violin is the patient's left.

    `values` has one row per scan and nucleus (``scan``, ``model``, ``nucleus``, ``side``, ``is_red``, ``excluded``, the
    measure, the factor and, if scans are repeated, ``person``). `levels` are the values of the factor from left to
    right, one violin each. `harmonized` has the same columns; its panels stand beside those of `values`, with the same
    axis. Violins and medians are of the means of each person's scans that are not excluded; axes end at the values that
    are not red.
    """
    nuclei, labels = [name for name in _NUCLEI if (values["nucleus"] == name).any()], shorten_labels(levels)
    versions = {"": values} if harmonized is None else {"raw": values, "harmonized": harmonized}
    versions = {name: rows if "person" in rows else rows.assign(person=rows["scan"]) for name, rows in versions.items()}
    height_in = (2.7 if len(levels) <= 4 else 3.0) + labels.rotated * 0.9
    figure, panels = _make_panels(len(nuclei) * len(versions), columns=2, height_in=height_in)
    for nucleus in nuclei:
        rows_of = {version: rows[rows["nucleus"] == nucleus] for version, rows in versions.items()}
        limits = _find_limits(pd.concat([rows[[measure, "is_red"]] for rows in rows_of.values()]), measure)
        for version, rows in rows_of.items():
            axes = next(panels)
            axes.set_ylim(*limits)
            people = rows[rows["excluded"].isna()].groupby([factor, "side", "person"])[measure].mean().dropna()
            counts: list[list[int]] = [[] for _ in levels]
            for side in _SIDES:
                colour = color_of(f"{nucleus}_{side.side}")
                for place, level in enumerate(levels):
                    numbers = people[
                        (people.index.get_level_values(0) == level) & (people.index.get_level_values(1) == side.side)
                    ].to_numpy(float)
                    counts[place].append(len(numbers))
                    _draw_half_violin(axes, numbers, place, half=side.half, colour=colour)
                    scans = rows[(rows[factor] == level) & (rows["side"] == side.side)].dropna(subset=[measure])
                    x = place + side.shift + 0.14 * jitter(len(scans))
                    _draw_points(axes, x, scans, measure, {**_POINTS, "color": colour}, links)
            separator = "\n" if len(counts) > 1 and not labels.rotated else ", "
            ticks = [
                f"{text}{separator}n {'/'.join(map(str, dict.fromkeys(count)))}"
                for text, count in zip(labels.texts, counts, strict=True)
            ]
            axes.set_xticks(range(len(ticks)), ticks, fontsize=9 if len(ticks) <= 8 else 8, **TEXT)
            if labels.rotated:
                for label in axes.get_xticklabels():
                    label.set(rotation=40, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.6, len(ticks) - 0.4)
            _finish(axes, nucleus, *filter(None, [version]), label=quantity(measure).label)
    look: dict[str, Any] = {"marker": "o", "ms": 9, "color": "#808890", "markerfacecoloralt": "white", "ls": "none"}
    halves = [("left", "left half: left (the patient's left)"), ("right", "right half: right")]
    handles = [Line2D([], [], fillstyle=style, label=text, **look) for style, text in halves]  # type: ignore[arg-type]
    figure.legend(handles=handles, ncols=2, **_LEGEND)
    return _render(figure, links, f"{measure}-{factor}-{values['model'].iloc[0]}")


@with_default_settings
def draw_ageing(
    values: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    measure: str,
    label: str,
    links: Links | None = None,
    groups: Sequence[str] = (),
) -> Drawing:
    """Draw a measure over age with the fitted curves and their confidence bands.

    `values` has one row per scan and nucleus (``scan``, ``model``, ``abbreviation``, ``age_years``, ``is_red`` and the
    measure), `curves` the rows of ``group_ageing_curves.tsv`` of one curve per nucleus. Points have the colours of
    `groups` (column ``group``), if there are any. Axes end at the values that are not red; curves and bands are cut
    there.
    """
    present = {*values["abbreviation"].unique(), *curves["abbreviation"].unique()}
    nuclei = [nucleus for nucleus in _NUCLEI if not present.isdisjoint({f"{nucleus}_L", f"{nucleus}_R"})]
    figure, panels = _make_panels(len(nuclei), columns=2, height_in=2.8)
    for axes, nucleus in zip(panels, nuclei, strict=False):
        names = []
        of_nucleus = values[values["abbreviation"].isin([f"{nucleus}_L", f"{nucleus}_R"])]
        of_nucleus = of_nucleus.dropna(subset=["age_years", measure])
        if len(of_nucleus):
            axes.set_ylim(*_find_limits(of_nucleus, measure))
        for side in _SIDES:
            name = f"{nucleus}_{side.side}"
            rows, curve = (table[table["abbreviation"] == name] for table in (of_nucleus, curves))
            colour = color_of(name)
            colours = rows["group"].map(lambda group: group_colour(groups, group)) if groups else [colour] * len(rows)
            look = {"s": 15, "linewidths": 0.4, "alpha": 0.75, "zorder": 2, "marker": side.marker}
            _draw_points(
                axes, rows["age_years"].to_numpy(float), rows, measure, {**look, "color": list(colours)}, links
            )
            age, low, fit, high = (curve[column].to_numpy(float) for column in ("age", "low", "fit", "high"))
            axes.fill_between(age, low, high, color=colour, alpha=0.4, linewidth=0, zorder=3)
            axes.plot(age, fit, color=INK, linewidth=1.5, linestyle=side.line, zorder=4)
            names += [f"{side.side} {shape}" for shape in curve["curve"].unique()]
        axes.set_xlabel("age (years)", fontsize=9, color=SOFT, **TEXT)
        _finish(axes, nucleus, ", ".join(names), label=label)
    handles = [
        Line2D([], [], color=INK, ls=side.line, marker=side.marker, ms=5, mfc=side.colour, label=side.label)
        for side in _SIDES
    ]
    figure.legend(handles=[*handles, *group_handles(groups)], ncols=4, **_LEGEND)
    return _render(figure, links, f"{measure}-age-{next(iter(values['model']), '')}")


@with_default_settings
def draw_asymmetry(values: pd.DataFrame, *, measures: Sequence[str], links: Links | None = None) -> Drawing:
    """Draw the asymmetry of each nucleus in rows of ``group_asymmetry.tsv`` with ``is_red``, one panel per measure.

    Violins and medians are of the means of each ``person``'s scans; without that column, each scan is of another one.
    """
    values = values if "person" in values else values.assign(person=values.index)
    nuclei = [name for name in _NUCLEI if (values["nucleus"] == name).any()]
    figure, panels = _make_panels(len(measures), columns=1, height_in=3.2)
    for axes, measure in zip(panels, measures, strict=False):
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        of_measure = values[values["measure"] == measure].dropna(subset=["asymmetry"])
        low, high = _find_limits(of_measure, "asymmetry")
        low, high = min(low, 0), max(high, 0)
        # Widen the axis so that the zero line does not cross either label.
        room = _LABEL_SHARE * (high - low) / (1 - 2 * _LABEL_SHARE)
        axes.set_ylim(min(low, -room), max(high, room))
        for x, nucleus in enumerate(nuclei):
            rows, colour = of_measure[of_measure["nucleus"] == nucleus], color_of(f"{nucleus}_L")
            people = rows.groupby("person", sort=False)["asymmetry"].mean().to_numpy(float)
            for side in _SIDES:
                _draw_half_violin(axes, people, x, half=side.half, colour=colour)
            _draw_points(axes, x + 0.14 * jitter(len(rows)), rows, "asymmetry", {**_POINTS, "color": colour}, links)
        _finish(axes, label=f"asymmetry of\n{quantity(measure).name}")
        for y, va, side_label in ((0.98, "top", "left larger ↑"), (0.02, "bottom", "right larger ↓")):
            axes.annotate(side_label, (0.004, y), xycoords="axes fraction", va=va, fontsize=9, color=SOFT, **TEXT)
        axes.set_xticks(range(len(nuclei)), nuclei, fontsize=9.5, **TEXT)
        axes.set_xlim(-1.4, len(nuclei) - 0.4)  # room for the two labels
    return _render(figure, links, f"asymmetry-{next(iter(values['model']), '')}")


@with_default_settings
def draw_panels(
    panels: Sequence[Panel], *, xlabel: str, ylabel: str, groups: Sequence[str] = (), joined: bool = False
) -> Drawing:
    """Draw points with lines and bands, in the colours of the groups; left nuclei are the patient's left."""
    columns = 4
    figure, grid = _make_panels(len(panels), columns=columns, height_in=2.3)
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        points = panel.points.dropna(subset=["x", "y"])
        for group, rows in points.groupby("group", sort=False):
            colour = group_colour(groups, str(group)) if groups else "#4c78a8"
            if joined:
                lines = [part[["x", "y"]].to_numpy(float) for _, part in rows.groupby("person", sort=False)]
                axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.9, alpha=0.6, zorder=2))
            axes.scatter(rows["x"], rows["y"], s=14, color=colour, edgecolors="white", linewidths=0.4, zorder=3)
        for band in panel.bands:
            if band.low is not None and band.high is not None:
                axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.18, linewidth=0, zorder=1)
            axes.plot(band.x, band.y, color=band.colour, linestyle=band.style, linewidth=band.width, zorder=4)
        axes.set_title(f"{panel.name}   {panel.text}".rstrip(), color=INK, fontsize=9.5, loc="left", **TEXT)
        if number % columns == 0:
            axes.set_ylabel(ylabel, fontsize=9, color=SOFT, **TEXT)
        if number >= len(panels) - columns:
            axes.set_xlabel(xlabel, fontsize=9, color=SOFT, **TEXT)
        style_axes(axes, fontsize=9)
    if groups:
        figure.legend(handles=group_handles(groups), ncols=6, **_LEGEND)
    return _render(figure, None, "")


def group_colour(groups: Sequence[str], group: str) -> str:
    """Return the colour of a group; light grey if it is none of them."""
    return GROUP_COLOURS[list(groups).index(group) % len(GROUP_COLOURS)] if group in groups else "#d5dae0"


def group_handles(groups: Sequence[str]) -> list[Line2D]:
    """Return the entries of groups in a legend."""
    return [
        Line2D([], [], linestyle="none", marker="s", ms=6, color=group_colour(groups, group), label=label)
        for group, label in zip(groups, shorten_labels(groups).texts, strict=True)
    ]


def _render(figure: Figure, links: Links | None, name: str) -> Drawing:
    return Drawing(to_png(figure), to_svg(figure, name=slug(name)) if links else "")


def _find_limits(rows: pd.DataFrame, measure: str) -> tuple[float, float]:
    """Return the ends of an axis for all values that are not red, or for all if there is no other."""
    rows = rows.dropna(subset=[measure])
    values = rows.loc[~rows["is_red"], measure].to_numpy(float)
    if not len(values):
        values = rows[measure].to_numpy(float) if len(rows) else np.array([0.0, 1.0])
    low, high = float(values.min()), float(values.max())
    margin = _MARGIN * (high - low) or _MARGIN * abs(high) or 1.0
    return low - margin, high + margin


def _make_panels(n: int, *, columns: int, height_in: float) -> tuple[Figure, Iterator[Axes]]:
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, iter(panels[:n])


def _draw_half_violin(axes: Axes, values: Floats, x: float, *, half: Literal["low", "high"], colour: str) -> None:
    """Draw the density of the values, if they are enough, and their median."""
    if not len(values):
        return
    if len(values) >= _MIN_FOR_DENSITY and np.ptp(values) > 0:
        violin = axes.violinplot([values], [x], side=half, widths=0.8, showextrema=False)
        for body in violin["bodies"]:  # type: ignore[attr-defined]  # a list
            body.set(color=colour, alpha=0.45, linewidth=0, zorder=2)
    end = x - 0.3 if half == "low" else x + 0.3
    axes.plot([x, end], [np.median(values)] * 2, color=INK, linewidth=1.8, solid_capstyle="butt", zorder=4)


def _draw_points(
    axes: Axes, x: Floats, rows: pd.DataFrame, measure: str, style: Mapping[str, Any], links: Links | None
) -> None:
    """Draw scans with their links: red ones as crosses, at the end of the axis if they lie beyond it."""
    (low, high), values, is_red = axes.get_ylim(), rows[measure].to_numpy(float), rows["is_red"].to_numpy(bool)
    edge = 0.02 * (high - low)
    heights = np.where(is_red, np.clip(values, low + edge, high - edge), values)
    urls = [links.get(key) for key in zip(rows["scan"], rows["model"], strict=True)] if links else []
    colours = style["color"]
    for red in dict.fromkeys(is_red.tolist()):
        look: dict[str, Any] = {**style, "edgecolors": INK}
        if isinstance(colours, list):
            look["color"] = np.array(colours, object)[is_red == red].tolist()
        points = axes.scatter(x[is_red == red], heights[is_red == red], **{**look, **(_RED_POINTS if red else {})})
        if links:
            points.set_urls(np.array(urls, object)[is_red == red].tolist())


def _finish(axes: Axes, *titles: str, label: str) -> None:
    """Label a panel; its titles are a nucleus and what else stands above it."""
    if titles:
        nucleus, *extra = titles
        title = "   ".join([f"{nucleus}  {_NUCLEI[nucleus].name.removeprefix('left ')}", *extra])
        axes.set_title(title, color=INK, fontsize=10, loc="left", **TEXT)
    axes.set_ylabel(label, fontsize=9, color=SOFT, **TEXT)
    style_axes(axes, fontsize=9)
