"""What all figures share: settings, colours, axes, PNG and SVG."""

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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bids_dgmseg.io.files import write_bytes

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
    """
    figure.set_layout_engine("none")  # positions are final
    prefix, groups = f"f{zlib.crc32(name.encode()):08x}", {}
    offsets = [np.asarray(one.collection.get_offsets()) for one in points]
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
    for one, own in zip(points, offsets, strict=True):
        one.collection.set_offsets(own)
    figure.set_layout_engine("constrained")
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r"<!--.*?-->|<style.*?</style>", "", drawing, flags=re.DOTALL)  # comments are the outlined texts
    drawing = re.sub(r"\b([1-9]\d*\.\d)\d+|\n *", lambda found: found[1] or " ", drawing)  # 0.1 points are enough
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", drawing)
    drawing = re.sub(rf'<g id="({prefix}-points-\d+)" ?(?:/>|> *</g>)', lambda found: groups[found[1]], drawing)
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}">{drawing}'


PRINT_WIDTHS_MM = {"": 180.0, "_column": 85.0}
"""Ending of the file name → width of a printed figure: a page and a column of a journal."""

PRINT_ENDINGS = tuple(ending + kind for ending in PRINT_WIDTHS_MM for kind in (".pdf", ".svg"))
"""Of the names of the files of a printed figure."""

_PRINT_SCALES = {"": 0.72, "_column": 0.62}
"""Of text, lines and points; a text of 9 points has at least 5.5 in print."""

_MM_PER_INCH = 25.4

_MANY, _PRINT_DPI = 500, 300
"""Points or lines of one panel above which they are pixels in print, and their resolution: a study of 10,000 scans has
half a million points, which few programs open."""


@with_default_settings
def to_print(figure: Figure) -> dict[str, bytes]:
    """Render a figure of a page for print, as PDF and SVG (file ending → content). The figure is changed.

    Texts are not outlined, so that they can be edited. The same figure gives the same bytes. More than 500 points or
    lines of a panel are pixels.
    """
    files: dict[str, bytes] = {}
    _rasterize_many(figure)
    width_in, height_in = figure.get_size_inches()
    done = 1.0
    for ending, width_mm in PRINT_WIDTHS_MM.items():
        scale = _PRINT_SCALES[ending]
        _scale_artists(figure, scale / done)
        done = scale
        width = width_mm / _MM_PER_INCH
        # narrower panels keep the height that their texts need
        figure.set_size_inches(width, height_in * max(width / width_in, 0.75 * scale))
        figure.set_layout_engine("constrained")
        with (
            matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "print"}),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
            warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
            pdf, svg = io.BytesIO(), io.BytesIO()
            FigureCanvasPdf(figure)
            if layout := figure.get_layout_engine():  # takes most of the time: once per width
                layout.execute(figure)
            figure.set_layout_engine("none")
            FigureCanvasPdf(figure).print_pdf(pdf, metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(svg, metadata=nothing)
        files |= {f"{ending}.pdf": pdf.getvalue(), f"{ending}.svg": svg.getvalue()}
    return files


def write_prints(figure: Figure, path: Path) -> None:
    """Write a figure for print; the path lacks the endings. The figure is changed."""
    for ending, content in to_print(figure).items():
        write_bytes(content, path.with_name(path.name + ending))


def _rasterize_many(figure: Figure) -> None:
    """Draw the points and lines of crowded panels as pixels."""
    figure.set_dpi(_PRINT_DPI)
    for axes in figure.axes:
        crowded = [
            one for one in axes.collections if max(len(np.asarray(one.get_offsets())), len(one.get_paths())) > _MANY
        ]
        for artist in [*crowded, *(axes.lines if len(axes.lines) > _MANY else ())]:
            artist.set_rasterized(True)


def _scale_artists(figure: Figure, scale: float) -> None:
    """Scale texts, lines and points of a figure."""
    for axes in figure.axes:
        ticks = [tick for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()[:1]]
        size = next((float(tick.label1.get_fontsize()) for tick in ticks), 9.0)
        axes.tick_params(labelsize=size * scale, length=2.5 * scale, pad=3 * scale, width=0.8 * scale)
        for spine in axes.spines.values():
            spine.set_linewidth(spine.get_linewidth() * scale)
        for collection in axes.collections:
            collection.set_linewidth((np.asarray(collection.get_linewidth()) * scale).tolist())
            if isinstance(collection, PathCollection):
                collection.set_sizes(collection.get_sizes() * scale**2)
        for line in axes.lines:
            line.set(linewidth=line.get_linewidth() * scale, markersize=line.get_markersize() * scale)
        for text in (axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *axes.texts):  # type: ignore[attr-defined]
            text.set_fontsize(float(text.get_fontsize()) * scale)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_fontsize(float(text.get_fontsize()) * scale)


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
