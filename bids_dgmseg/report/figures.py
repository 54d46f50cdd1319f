"""What all figures share, their settings, colours, axes, PNG and SVG; and learning curves."""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bids_dgmseg.io.files import read_tsv, write_bytes
from bids_dgmseg.models.structures import color_of

DPI, WIDTH_IN = 140, 11.0
INK, SOFT, LINE = "#1c2430", "#5a6675", "#b9c2cc"

TEXT: Mapping[str, Any] = {"family": "DejaVu Sans", "parse_math": False}
"""The font comes with matplotlib; "$" in a name does not start a formula."""

with_default_settings = matplotlib.style.context("default")
"""Decorator of every function that draws: figures must not depend on the user's matplotlibrc, nor on other libraries
in the process (nnU-Net's trainer applies a seaborn theme). It covers rendering too, as ticks are created only then."""

_MAX_HORIZONTAL = 60  # characters of all labels together that fit side by side below a panel
_MAX_ROTATED = 22  # characters of one rotated label
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WORD_END = re.compile(r"[\s_/.,:;-]")


def jitter(n: int) -> NDArray[np.float64]:
    """Compute n offsets from -0.5 to 0.5 that keep points apart, always the same (golden ratio); 0 for one point."""
    return np.zeros(1) if n == 1 else np.arange(n, dtype=np.float64) * 0.6180339887 % 1 - 0.5


def style_axes(axes: Axes, *, fontsize: float = 7.5) -> None:
    """Reduce the frame to two spines and add horizontal grid lines."""
    axes.tick_params(labelsize=fontsize, colors=SOFT, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(axis="y", color="#e8ecf0", linewidth=0.6)
    axes.set_axisbelow(True)


def to_png(figure: Figure) -> bytes:
    """Render a figure; the same figure gives the same bytes. Characters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


class ScanMark(NamedTuple):
    """A scan as a point of an interactive plot."""

    label: str
    """Its name, site and group, for the tooltip."""
    href: str
    """Link to its page; empty if there is none."""
    classes: str
    """Classes by which the page's filter finds it."""


class ScanPoints(NamedTuple):
    """Points of a scatter plot that stand for scans."""

    collection: PathCollection
    marker: str
    marks: Sequence[ScanMark]
    texts: Sequence[str]
    """The values in the tooltips."""


_OUTLINES = {
    "^": "M{x:.1f} {top:.1f}l{r:.1f} {d:.1f}h-{d:.1f}z",
    "v": "M{x:.1f} {bottom:.1f}l{r:.1f} -{d:.1f}h-{d:.1f}z",
    "X": "M{left:.1f} {top:.1f}l{d:.1f} {d:.1f}m0 -{d:.1f}l-{d:.1f} {d:.1f}",
}
"""Marker → path of an SVG; all others are circles."""


def to_svg(figure: Figure, points: Sequence[ScanPoints], *, name: str) -> str:
    """Write a figure that was drawn before as an SVG to stand in a page; its points are links to scans with tooltips.

    The same figure gives the same text. Identifiers start with a number made of `name`, as a page has several figures.
    Text is drawn as outlines, so that no name of a user is part of the markup but in the tooltips, where it is escaped.
    The points leave the figure.
    """
    figure.set_layout_engine("none")  # positions are final
    prefix, groups = f"f{zlib.crc32(name.encode()):08x}", {}
    for number, one in enumerate(points):
        pixels = one.collection.get_offset_transform().transform(one.collection.get_offsets())
        positions = (pixels * (1, -1) + (0, figure.bbox.height)) * 72 / figure.dpi
        groups[f"{prefix}-points-{number}"] = _svg_points(one, positions)
        one.collection.set_offsets(np.empty((0, 2)))
        one.collection.set_gid(f"points-{number}")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r"<!--.*?-->|<style.*?</style>", "", drawing, flags=re.DOTALL)  # comments are the outlined texts
    drawing = re.sub(r"\b([1-9]\d*\.\d)\d+|\n *", lambda found: found[1] or " ", drawing)  # 0.1 points are enough
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", drawing)
    drawing = re.sub(rf'<g id="({prefix}-points-\d+)" ?(?:/>|> *</g>)', lambda found: groups[found[1]], drawing)
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}">{drawing}'


def _svg_points(points: ScanPoints, positions: NDArray[np.float64]) -> str:
    """Write the links of one collection; positions are in points from the top left corner of the figure."""
    collection = points.collection
    colours = [
        np.atleast_2d(np.asarray(rgba, float)) for rgba in (collection.get_facecolor(), collection.get_edgecolor())
    ]
    face, edge = (to_hex(tuple(rgba[0].tolist())) for rgba in colours)
    width = float(np.ravel(collection.get_linewidth())[0])
    if points.marker == "X":
        edge, face, width = face, "none", 2
    radius = max(float(collection.get_sizes()[0]) ** 0.5 / 2, 2.0)
    lines = [f'<g class="points" fill="{face}" stroke="{edge}" stroke-width="{width:g}">']
    for mark, text, (x, y) in zip(points.marks, points.texts, positions.tolist(), strict=True):
        ends = {"left": x - radius, "top": y - radius, "bottom": y + radius}
        outline = _OUTLINES.get(points.marker, "").format(x=x, r=radius, d=2 * radius, **ends)
        shape = f'<path d="{outline}"/>' if outline else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.2g}"/>'
        link = f' href="{escape(mark.href)}"' if mark.href else ""
        title = escape(f"{mark.label}: {text}")
        lines.append(f'<a{link} class="{escape(mark.classes)}" tabindex="-1"><title>{title}</title>{shape}</a>')
    return "".join([*lines, "</g>"])


@dataclass(frozen=True)
class TickLabels:
    """Labels of sites or groups below a panel."""

    texts: tuple[str, ...]
    rotated: bool
    """Whether they are too long to stand side by side."""
    key: str
    """What shortened labels stand for, such as ``1: Bern, Prisma; 2: Bern, Skyra``; empty if nothing was shortened."""


def shorten_labels(names: Sequence[str]) -> TickLabels:
    r"""Shorten different names so that they fit below a panel and stay different.

    First the start and end that all names share are removed, then the middle of long names; if two names would then be
    alike, all are replaced by numbers. Control characters are written as ``\x00``.

    >>> shorten_labels(["Site A", "Site B"]).texts
    ('Site A', 'Site B')
    >>> shorten_labels([f"University Hospital {city}" for city in ("Bern", "Graz", "Vaud")]).texts
    ('Bern', 'Graz', 'Vaud')
    """
    names = [_CONTROL_CHARACTER.sub(lambda match: f"\\x{ord(match[0]):02x}", name) for name in names]
    max_horizontal = max(4, _MAX_HORIZONTAL // max(len(names), 1))
    if max(map(len, names), default=0) <= max_horizontal:
        return TickLabels(tuple(names), rotated=False, key="")
    start = _common_start(names)
    rest = [name[start:] for name in names]
    end = _common_start([name[::-1] for name in rest])
    bare = [name[: len(name) - end] for name in rest]
    rotated = max(map(len, bare)) > max_horizontal
    texts = bare
    if rotated:
        half = (_MAX_ROTATED - 1) // 2
        texts = [
            name if len(name) <= _MAX_ROTATED else f"{name[: _MAX_ROTATED - 1 - half]}…{name[-half:]}" for name in bare
        ]
    if len(set(texts)) < len(texts):
        texts, rotated = [str(number) for number in range(1, len(names) + 1)], False
    if texts == bare:
        common = [f"“{part.strip()}”" for part in (names[0][:start], rest[0][len(bare[0]) :]) if part.strip()]
        return TickLabels(tuple(texts), rotated, f"Names without {' and '.join(common)}" if common else "")
    pairs = [f"{text}: {name}" for text, name in zip(texts, names, strict=True) if text != name]
    return TickLabels(tuple(texts), rotated, "; ".join(pairs))


def _common_start(names: Sequence[str]) -> int:
    """Count the characters that all names start with, up to the end of a word and leaving no name empty."""
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in shared)
    ends = [match.end() for match in _WORD_END.finditer(common) if match.end() < min(map(len, names))]
    return ends[-1] if ends and len(names) > 1 else 0


def write_learning_curve(table: Path) -> Path | None:
    """Plot ``PART_curve.tsv`` of a training that counts steps, beside the table.

    The Dice of the averaged weights on fixed maps is added as dots if there is a ``PART_validation.tsv``.

    Returns
    -------
    path or None
        ``PART_curve.png``; None if the table has no rows yet.
    """
    part = table.stem.removesuffix("_curve")
    fixed = table.with_name(f"{part}_validation.tsv")
    curves, *others = (
        read_tsv(path, index_col="step").drop(columns="seconds", errors="ignore").astype(float)
        for path in ([table, fixed] if fixed.is_file() else [table])
    )
    if curves.empty:
        return None
    validation = others[0] if others else None
    losses = {"training": curves.pop("loss").tolist()}
    png = draw_learning_curve(
        losses,
        {str(name): curves[name].tolist() for name in curves},
        best=None,
        title=part,
        x=("step", curves.index.tolist()),
        validation=validation,
        samples="training maps" + ("" if validation is None else " (dots: fixed maps)"),
    )
    return write_bytes(png, table.with_suffix(".png"))


@with_default_settings
def draw_learning_curve(
    loss: Mapping[str, Sequence[float]],
    dice: Mapping[str, Sequence[float]],
    *,
    best: int | None,
    title: str,
    x: tuple[str, Sequence[int]] | None = None,
    samples: str = "validation samples",
    validation: pd.DataFrame | None = None,
) -> bytes:
    """Plot losses, and the Dice of each class, over a training as a PNG.

    Parameters
    ----------
    loss, dice : mapping of str to sequence of float
        Name of the curve or class → values; NaN is not drawn.
    best : int or None
        Epoch, from 1, whose weights are kept.
    title : str
        Title of the figure.
    x : tuple of str and sequence of int, optional
        Label and values of the horizontal axis; by default epochs from 1.
    samples : str
        Samples whose Dice it is.
    validation : DataFrame, optional
        Dice on other samples, drawn as dots: one column per class, indexed like `x`.
    """
    unit, steps = x or ("epoch", range(1, 1 + len(next(iter(loss.values())))))
    figure = Figure(figsize=(WIDTH_IN, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for (name, values), line in zip(loss.items(), ("-", "--", ":"), strict=False):
        left.plot(steps, values, color=INK, linewidth=1.3, linestyle=line, label=name)
    for name, values in dice.items():
        right.plot(steps, values, color=_class_colour(name), linewidth=1.3, label=name)
    if validation is not None:
        for name in map(str, validation):
            dots = {"color": _class_colour(name), "linestyle": "", "marker": "o", "markersize": 3}
            right.plot(validation.index, validation[name], **dots)
    right.set_ylim(-0.03, 1.03)
    for axes, label in ((left, "loss"), (right, f"Dice of {samples}")):
        if best is not None:
            axes.axvline(best, color=SOFT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(unit, color=INK, fontsize=8, **TEXT)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        style_axes(axes)
    return to_png(figure)


def _class_colour(name: str) -> str:
    """Return the colour of a class, which may have no side, such as ``DN`` or ``CN-PUT``."""
    return color_of(name if "_" in name else f"{name.split('-')[0]}_L")
