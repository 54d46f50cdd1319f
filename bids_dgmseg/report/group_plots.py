"""Plots of the group page, one panel per nucleus: violins, age curves, asymmetry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from bids_dgmseg.models.structures import ALL_STRUCTURES, color_of
from bids_dgmseg.report.figures import (
    DPI,
    INK,
    SOFT,
    TEXT,
    WIDTH_IN,
    ScanMark,
    ScanPoints,
    jitter,
    shorten_labels,
    style_axes,
    to_png,
    to_svg,
    with_default_settings,
)
from bids_dgmseg.report.html import format_significant, quantity, slug

Floats = NDArray[np.float64]

MAX_POINTS = 150
"""Points drawn per half violin, or per side of an age panel."""

MAX_LEVELS = 12
"""Sites or groups side by side."""

_COLUMNS = 2
_HALF_WIDTH = 0.4
_MIN_FOR_DENSITY = 5
_MARGIN = 0.05  # share of the range of the values, beyond both ends
_POINTS: Mapping[str, Any] = {"s": 9, "marker": "o", "alpha": 0.9, "linewidths": 0.35, "zorder": 3}
_AGE_POINTS: Mapping[str, Any] = {"s": 15, "linewidths": 0.4, "alpha": 0.75, "zorder": 2}
_RED_POINTS: Mapping[str, Any] = {"s": 30, "color": "#b3261e", "edgecolors": "white", "alpha": 1, "zorder": 5}

_LABEL_SHARE = 0.12
"""Share of a panel's height for a label at its top or bottom, with the space around it."""


@dataclass(frozen=True)
class _SideStyle:
    """How one side of a nucleus is drawn in a panel with both."""

    side: str
    marker: str
    line: Literal["-", "--"]
    label: str
    colour: str
    """In the legend, which has no nucleus's own colour."""


_SIDES = (
    _SideStyle("L", "o", "-", "left (the patient's left)", "#808890"),
    _SideStyle("R", "^", "--", "right", "#d5dae0"),
)

_NUCLEI = {structure.nucleus: structure for structure in ALL_STRUCTURES if structure.hemisphere == "L"}


class Drawing(NamedTuple):
    """A plot as an image, and as markup whose points open their scans (empty if none was asked for)."""

    png: bytes
    svg: str = ""
    figure: Figure | None = None
    """For print."""


Marks = Mapping[tuple[str, str], ScanMark]
"""Scan and model → how it is shown in an interactive plot."""


@with_default_settings
def draw_violins(
    values: pd.DataFrame,
    *,
    measure: str,
    levels: Sequence[str],
    factor: str,
    harmonized: pd.DataFrame | None = None,
    marks: Marks | None = None,
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
    columns = ["scan", "person", "model", "nucleus", "side", "is_red", "excluded", measure, factor]
    texts = dict.fromkeys(["scan", "person", "nucleus", "side", factor], "category")
    versions = {name: rows if "person" in rows else rows.assign(person=rows["scan"]) for name, rows in versions.items()}
    # few columns, whose texts are compared as numbers, as rows are selected many times
    versions = {version: rows[columns].astype(texts) for version, rows in versions.items()}
    height_in = (2.7 if len(levels) <= 4 else 3.0) + labels.rotated * 0.9
    figure, panels = _make_panels(len(nuclei) * len(versions), height_in=height_in)
    points: list[ScanPoints] = []
    for nucleus in nuclei:
        rows_of = {version: rows[rows["nucleus"] == nucleus] for version, rows in versions.items()}
        limits = _find_limits(pd.concat([rows[[measure, "is_red"]] for rows in rows_of.values()]), measure)
        for (version, rows), axes in zip(rows_of.items(), panels, strict=False):
            axes.set_ylim(*limits)
            numbers = rows[measure].to_numpy(float)
            used = rows["excluded"].isna().to_numpy() & ~np.isnan(numbers)
            people = rows[used].groupby([factor, "side", "person"], observed=True)[measure].mean()
            sizes = people.groupby(level=[factor, "side"], observed=True).size().to_dict()
            counts = [[int(sizes.get((level, side), 0)) for side in "LR"] for level in levels]
            means = {key: part.to_numpy(float) for key, part in people.groupby(level=[factor, "side"], observed=True)}
            found = rows.groupby([factor, "side"], observed=True).indices
            for side, shift in (("L", -0.12), ("R", 0.12)):
                name, colour = f"{nucleus}_{side}", color_of(f"{nucleus}_{side}")
                places = [np.asarray(found.get((level, side), []), np.intp) for level in levels]
                halves = [means.get((level, side), np.empty(0)) for level in levels]
                _draw_half_violins(axes, halves, side=side, colours=[colour] * len(levels))
                shown = [place[_thin(numbers[place], numbers[place])] for place in places]
                x = np.hstack([level + shift + 0.14 * jitter(len(place)) for level, place in enumerate(shown)])
                # all levels together, as each scatter plot takes milliseconds
                points += _draw_points(
                    axes, x, rows.iloc[np.hstack(shown)], measure, name, colour, marks=marks, style=_POINTS
                )
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
    _add_side_key(figure)
    return _render(figure, points, marks, f"{measure}-{factor}-{values['model'].iloc[0]}")


@with_default_settings
def draw_ageing(
    values: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    measure: str,
    label: str,
    marks: Marks | None = None,
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
    figure, panels = _make_panels(len(nuclei), height_in=2.8)
    points: list[ScanPoints] = []
    for axes, nucleus in zip(panels, nuclei, strict=False):
        names = []
        of_nucleus = values[values["abbreviation"].isin([f"{nucleus}_L", f"{nucleus}_R"])].dropna(subset=["age_years"])
        if of_nucleus[measure].notna().any():
            axes.set_ylim(*_find_limits(of_nucleus, measure))
        for style in _SIDES:
            name = f"{nucleus}_{style.side}"
            colour, curve = color_of(name), curves[curves["abbreviation"] == name]
            rows = of_nucleus[of_nucleus["abbreviation"] == name]
            ages = rows["age_years"].to_numpy(float)
            shown, look = _thin(ages, rows[measure].to_numpy(float)), {**_AGE_POINTS, "marker": style.marker}
            parts = {"": np.full(len(shown), True)}
            if groups:
                names_of = rows["group"].to_numpy(object)[shown]
                parts = {group: names_of == group for group in groups}
                parts[""] = ~np.isin(names_of, list(groups))
            for group, own in parts.items():
                chosen, fill = shown[own], group_colour(groups, group) if groups else colour
                if len(chosen):
                    points += _draw_points(
                        axes, ages[chosen], rows.iloc[chosen], measure, name, fill, marks=marks, style=look
                    )
            axes.fill_between(curve["age"], curve["low"], curve["high"], color=colour, alpha=0.4, linewidth=0, zorder=3)
            axes.plot(curve["age"], curve["fit"], color=INK, linewidth=1.5, linestyle=style.line, zorder=4)
            names += [f"{style.side} {fitted}" for fitted in curve["curve"].unique()]
        axes.set_xlabel("age (years)", fontsize=9, color=SOFT, **TEXT)
        _finish(axes, nucleus, ", ".join(names), label=label)
    handles = [
        Line2D(
            [], [], color=INK, linestyle=one.line, marker=one.marker, ms=5, markerfacecolor=one.colour, label=one.label
        )
        for one in _SIDES
    ]
    handles += group_handles(groups)
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=9, frameon=False, labelcolor=INK)
    return _render(figure, points, marks, f"{measure}-age-{next(iter(values['model']), '')}")


@with_default_settings
def draw_asymmetry(values: pd.DataFrame, *, measures: Sequence[str], marks: Marks | None = None) -> Drawing:
    """Draw the asymmetry of each nucleus in rows of ``group_asymmetry.tsv`` with ``is_red``, one panel per measure.

    Violins and medians are of the means of each ``person``'s scans; without that column, each scan is of another one.
    """
    values = values if "person" in values else values.assign(person=values.index)
    nuclei = [name for name in _NUCLEI if (values["nucleus"] == name).any()]
    figure = Figure(figsize=(WIDTH_IN, 3.2 * len(measures)), dpi=DPI, layout="constrained")
    points: list[ScanPoints] = []
    for axes, measure in zip(figure.subplots(len(measures), 1, squeeze=False).ravel(), measures, strict=True):
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        of_measure = values[values["measure"] == measure]
        low, high = _find_limits(of_measure, "asymmetry")
        low, high = min(low, 0), max(high, 0)
        # Widen the axis so that the zero line does not cross either label.
        room = _LABEL_SHARE * (high - low) / (1 - 2 * _LABEL_SHARE)
        axes.set_ylim(min(low, -room), max(high, room))
        parts = [of_measure[of_measure["nucleus"] == nucleus] for nucleus in nuclei]
        colours = [color_of(f"{nucleus}_L") for nucleus in nuclei]
        for side in "LR":
            means = (part.groupby("person", sort=False)["asymmetry"].mean() for part in parts)
            halves = (people.dropna().to_numpy(float) for people in means)
            _draw_half_violins(axes, halves, side=side, colours=colours)
        for x, (nucleus, part, colour) in enumerate(zip(nuclei, parts, colours, strict=True)):
            numbers = part["asymmetry"].to_numpy(float)
            rows = part.iloc[_thin(numbers, numbers)]
            positions = x + 0.14 * jitter(len(rows))
            points += _draw_points(axes, positions, rows, "asymmetry", nucleus, colour, marks=marks, style=_POINTS)
        _finish(axes, label=f"asymmetry of\n{quantity(measure).name}")
        for y, va, side in ((0.98, "top", "left larger ↑"), (0.02, "bottom", "right larger ↓")):
            axes.annotate(side, (0.004, y), xycoords="axes fraction", va=va, fontsize=9, color=SOFT, **TEXT)
        axes.set_xticks(range(len(nuclei)), nuclei, fontsize=9.5, **TEXT)
        axes.set_xlim(-1.4, len(nuclei) - 0.4)  # room for the two labels
    return _render(figure, points, marks, f"asymmetry-{next(iter(values['model']), '')}")


def _add_side_key(figure: Figure) -> None:
    """Explain the halves of violins above the panels."""
    look: dict[str, Any] = {
        "marker": "o",
        "ms": 9,
        "color": "#808890",
        "markerfacecoloralt": "white",
        "linestyle": "none",
    }
    handles = [
        Line2D([], [], fillstyle="left", label="left half: left (the patient's left)", **look),
        Line2D([], [], fillstyle="right", label="right half: right", **look),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=9, frameon=False, labelcolor=INK)


GROUP_COLOURS = ("#1f77b4", "#e6842a", "#2a9d5c", "#a34fb5", "#8c6d46", "#d1495b", "#4fb3bf", "#6b7280")
"""Of points by group, in the order of the groups' sizes; also distinguishable in the common forms of colour blindness
for two groups."""


def group_colour(groups: Sequence[str], group: str) -> str:
    """Return the colour of a group; light grey if it is none of them."""
    return GROUP_COLOURS[list(groups).index(group) % len(GROUP_COLOURS)] if group in groups else "#d5dae0"


def group_handles(groups: Sequence[str]) -> list[Line2D]:
    """Return the entries of groups in a legend."""
    labels = shorten_labels(list(groups)).texts if groups else ()
    return [
        Line2D([], [], linestyle="none", marker="s", ms=6, color=group_colour(groups, group), label=label)
        for group, label in zip(groups, labels, strict=True)
    ]


def _render(figure: Figure, points: Sequence[ScanPoints], marks: Marks | None, name: str) -> Drawing:
    return Drawing(to_png(figure), to_svg(figure, points, name=slug(name)) if marks else "", figure)


def _find_limits(rows: pd.DataFrame, measure: str) -> tuple[float, float]:
    """Return the ends of an axis for all values that are not red, or for all if there is no other."""
    rows = rows.dropna(subset=[measure])
    values = rows.loc[~rows["is_red"], measure].to_numpy(float)
    if not len(values):
        values = rows[measure].to_numpy(float) if len(rows) else np.array([0.0, 1.0])
    low, high = float(values.min()), float(values.max())
    margin = _MARGIN * (high - low) or _MARGIN * abs(high) or 1.0
    return low - margin, high + margin


def _thin(order: Floats, values: Floats) -> NDArray[np.intp]:
    """Select at most `MAX_POINTS` rows with a value, evenly over the ranks of `order` and with both ends."""
    known = np.flatnonzero(~np.isnan(values))
    ranked = known[np.argsort(order[known], kind="stable")]
    chosen = np.linspace(0, len(ranked) - 1, min(len(ranked), MAX_POINTS)).round().astype(np.intp)
    return ranked[np.unique(chosen)]


def _make_panels(n: int, *, height_in: float) -> tuple[Figure, Iterator[Axes]]:
    rows = math.ceil(n / _COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, iter(panels)


def _draw_half_violins(axes: Axes, values: Iterable[Floats], *, side: str, colours: Sequence[str]) -> None:
    """Draw the left (L) or right halves of violins at 0, 1, … with their medians.

    They are few collections, as each artist of matplotlib takes milliseconds.
    """
    reach = -_HALF_WIDTH if side == "L" else _HALF_WIDTH
    outlines, filled, medians = [], [], []
    for x, (numbers, colour) in enumerate(zip(values, colours, strict=True)):
        if len(numbers) >= _MIN_FOR_DENSITY and np.ptp(numbers) > 0:
            heights = np.linspace(numbers.min(), numbers.max(), 80)
            width = gaussian_kde(numbers)(heights)
            edge = np.column_stack([x + reach * width / width.max(), heights])
            outlines.append(np.vstack([[x, heights[0]], edge, [x, heights[-1]]]))
            filled.append(colour)
        if len(numbers):
            medians.append([(x, median := float(np.median(numbers))), (x + 0.75 * reach, median)])
    axes.add_collection(PolyCollection(outlines, color=filled, alpha=0.45, linewidth=0, zorder=2), autolim=False)
    axes.add_collection(LineCollection(medians, color=INK, linewidth=1.8, zorder=4), autolim=False)


def _draw_points(
    axes: Axes,
    x: Floats,
    rows: pd.DataFrame,
    measure: str,
    name: str,
    colour: str,
    *,
    marks: Marks | None,
    style: Mapping[str, Any],
) -> list[ScanPoints]:
    """Draw scans: red ones as crosses, or as triangles at the end of the axis that they exceed."""
    (low, high), values, is_red = axes.get_ylim(), rows[measure].to_numpy(float), rows["is_red"].to_numpy(bool)
    usual = style["marker"]
    markers = np.select([~is_red, values > high, values < low], [usual, "^", "v"], "X")
    edge = 0.02 * (high - low)
    heights = np.where(is_red, np.clip(values, low + edge, high - edge), values)
    drawn = []
    unit = "" if measure == "asymmetry" else quantity(measure).unit
    for marker, red in dict.fromkeys(zip(markers.tolist(), is_red.tolist(), strict=True)):
        chosen = (markers == marker) & (is_red == red)
        look = {**style, "marker": marker, **(_RED_POINTS if red else {"color": colour, "edgecolors": INK})}
        collection = axes.scatter(x[chosen], heights[chosen], **look)
        if marks is not None:
            keys = rows.loc[chosen, ["scan", "model"]].itertuples(index=False, name=None)
            texts = [f"{name} {format_significant(value)} {unit}{', red' * red}" for value in values[chosen].tolist()]
            drawn.append(ScanPoints(collection, marker, [marks[key] for key in keys], texts))
    return drawn


def _finish(axes: Axes, *titles: str, label: str) -> None:
    """Label a panel; its titles are a nucleus and what else stands above it."""
    if titles:
        nucleus, *extra = titles
        title = "   ".join([f"{nucleus}  {_NUCLEI[nucleus].name.removeprefix('left ')}", *extra])
        axes.set_title(title, color=INK, fontsize=10, loc="left", **TEXT)
    axes.set_ylabel(label, fontsize=9, color=SOFT, **TEXT)
    style_axes(axes, fontsize=9)
