"""What the plots of all pages share: colours, type, axes, PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bids_dgmseg.models.structures import STRUCTURES

DPI = 140

WIDTH_IN = 11.0

INK, SOFT, LINE = "#1c2430", "#5a6675", "#b9c2cc"

TEXT: Mapping[str, Any] = {"family": "DejaVu Sans", "parse_math": False}
"""The font comes with matplotlib; a name with "$" is no formula."""

_COLOURS = {structure.abbreviation: structure.color for structure in STRUCTURES}


def colour_of(abbreviation: str) -> str:
    """Colour of a nucleus; grey for one that is not in the table."""
    return _COLOURS.get(abbreviation, "#888888")


def spread(n: int) -> NDArray[np.float64]:
    """Offsets from -0.5 to 0.5 that keep n points apart, the same each time (golden ratio)."""
    return np.arange(n, dtype=np.float64) * 0.6180339887 % 1 - 0.5


def plain(axes: Axes, *, fontsize: float = 7.5) -> None:
    """Take away what is not read: two spines, dark ticks."""
    axes.tick_params(labelsize=fontsize, colors=SOFT, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(axis="y", color="#e8ecf0", linewidth=0.6)
    axes.set_axisbelow(True)


def to_png(figure: Figure) -> bytes:
    """Draw a figure; the same input gives the same bytes. A letter that the font lacks is an empty box."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
