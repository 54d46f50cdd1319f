"""Figure of the steps of a reconstruction, from magnitude to chi map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from skimage.measure import find_contours

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.report.figures import TEXT, to_png, with_default_settings
from bids_dgmseg.report.html import format_significant
from bids_dgmseg.report.slices import LAYOUTS, WINDOW_PPM, MosaicSlices, Plane

if TYPE_CHECKING:
    from bids_dgmseg.qsm.reconstruct import Reconstruction

_AXIAL_LEVELS = (0.08, 0.25, 0.45, 0.65, 0.88)
"""Fractions of the brain's volume below the axial slices: from the dentate nuclei to the vertex."""

_HEAD_SHARE, _MIN_PLANE_SHARE = 0.1, 0.005
"""The head exceeds this fraction of the 99th percentile of the magnitude, in at least this fraction of a plane."""

_WIDTH, _BAR_WIDTH, _HEADER, _GAP = 1800, 150, 62, 4  # pixels
_DPI = 150
_DARK, _PALE, _SOFT = "#14171c", "#e8eaed", "#9aa3ad"
_BRAIN_COLOUR, _MASK_COLOUR = "#ff9d2e", "#39c0ff"
_LABEL = {**TEXT, "color": _PALE, "path_effects": [withStroke(linewidth=1.2, foreground=_DARK)]}


class _Row(NamedTuple):
    """An image of the figure."""

    name: str
    unit: str
    array: NDArray[np.float32]
    """NaN is drawn black."""
    window: tuple[float, float]


class _Panel(NamedTuple):
    """A slice that all rows show."""

    slices: MosaicSlices
    position: int
    width_mm: float
    height_mm: float


@with_default_settings
def draw_reconstruction(result: Reconstruction, grid: Volume, out: Path, *, hz_per_ppm: float, title: str = "") -> Path:
    """Draw magnitude, total field, local field and chi map of a reconstruction below each other, as a PNG.

    All rows show the same slices of the image, five axial ones, a coronal and a sagittal one, scaled to millimetres
    without interpolation; the patient's left is on the left (neurological convention), in the sagittal plane posterior.
    The lines on the magnitude are the borders of the brain mask and of the voxels that have a value. The same input
    gives the same bytes.

    Parameters
    ----------
    result : Reconstruction
        Arrays in RAS+ axes.
    grid : Volume
        An image on their grid, such as the first magnitude.
    out : Path
        The PNG to write.
    hz_per_ppm : float
        Frequency in Hz of a field of 1 ppm, to draw the fields in Hz.
    title : str
        Name of the scan.
    """
    rows, panels = _list_rows(result, hz_per_ppm), _choose_panels(result, grid)
    scale = (_WIDTH - _BAR_WIDTH - _GAP * len(panels)) / sum(panel.width_mm for panel in panels)  # pixels per mm
    row_height = round(max(panel.height_mm for panel in panels) * scale) + _GAP
    height = _HEADER + row_height * len(rows)
    figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor=_DARK)
    _draw_header(figure, f"{title} · reconstruction" if title else "Reconstruction", 1 - _HEADER / 2 / height)
    for number, row in enumerate(rows):
        bottom, left = height - _HEADER - row_height * (number + 1), 0.0
        for panel in panels:
            width_px, height_px = panel.width_mm * scale, panel.height_mm * scale
            low = bottom + (row_height - height_px) / 2
            axes = figure.add_axes((left / _WIDTH, low / height, width_px / _WIDTH, height_px / height))
            image = _draw_section(axes, panel, grid.with_array(row.array), row.window)
            if number == 0:
                for mask, colour in ((result.brain, _BRAIN_COLOUR), (result.mask, _MASK_COLOUR)):
                    _draw_border(axes, panel.slices.cut(grid.with_array(mask), panel.position), colour)
                position = panel.slices.format_position(grid, panel.position)
                axes.text(0.03, 0.97, position, transform=axes.transAxes, va="top", size=6.5, **_LABEL)
            left += width_px + _GAP
        place = (left + 22) / _WIDTH, (bottom + 0.12 * row_height) / height, 16 / _WIDTH, 0.58 * row_height / height
        _draw_scale(figure, image, row, place)
        name = f"{row.name}\n({row.unit})" if row.unit else row.name
        figure.text((left + 14) / _WIDTH, (bottom + 0.86 * row_height) / height, name, va="center", size=7.5, **_LABEL)
    return write_bytes(to_png(figure), out)


def _draw_header(figure: Figure, title: str, height: float) -> None:
    """Write title and legend at a height from 0 to 1."""
    sides = "L, R: the patient's left and right · P, A: back and front"
    for x, text, align, colour, size in (
        (0.01, title, "left", _PALE, 9.0),
        (0.5, "brain mask", "right", _BRAIN_COLOUR, 7.5),
        (0.51, "voxels with a value", "left", _MASK_COLOUR, 7.5),
        (0.99, sides, "right", _SOFT, 7.5),
    ):
        figure.text(x, height, text, ha=align, va="center", size=size, **{**_LABEL, "color": colour})


def _draw_section(axes: Axes, panel: _Panel, volume: Volume, window: tuple[float, float]) -> AxesImage:
    """Draw a slice with its sides; axes are in voxels from the upper left corner."""
    section = panel.slices.cut(volume, panel.position)
    n_rows, n_columns = section.shape
    grey, extent = colormaps["gray"].with_extremes(bad="black"), (0, n_columns, n_rows, 0)
    masked, norm = np.ma.masked_invalid(section), Normalize(*window)
    image = axes.imshow(masked, cmap=grey, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    for x, side, align in ((0.02, panel.slices.layout.left, "left"), (0.98, panel.slices.layout.right, "right")):
        axes.text(x, 0.5, side, transform=axes.transAxes, ha=align, va="center", size=6.5, **_LABEL)
    return image


def _draw_border(axes: Axes, inside: NDArray[np.bool_], colour: str) -> None:
    limits = axes.axis()
    for outline in find_contours(np.pad(inside, 1).astype(np.float32), 0.5):
        rows, columns = outline.T - 0.5  # from centres of the padded section to edges of the voxels
        axes.plot(columns, rows, color=colour, linewidth=0.7)
    axes.axis(limits)


def _draw_scale(figure: Figure, image: AxesImage, row: _Row, place: tuple[float, float, float, float]) -> None:
    bar = figure.add_axes(place)
    scale = figure.colorbar(image, cax=bar)
    low, high = row.window
    zero = [0.0] if min(-low, high) > 0.15 * (high - low) else []
    ticks = [low, *zero, high]
    scale.set_ticks(ticks, labels=[format_significant(tick) for tick in ticks] if row.unit else ["dark", "bright"])
    scale.outline.set(edgecolor=_SOFT, linewidth=0.5)
    bar.tick_params(labelsize=7, labelcolor=_PALE, labelfontfamily=TEXT["family"], length=2, color=_SOFT, pad=3)


def _list_rows(result: Reconstruction, hz_per_ppm: float) -> list[_Row]:
    """Return the images with their windows: fields and map have no value outside their masks."""
    reliable = result.total_field_ppm != 0
    total = np.where(reliable, hz_per_ppm * result.total_field_ppm, np.float32(np.nan))
    local = np.where(result.mask, hz_per_ppm * result.local_field_ppm, np.float32(np.nan))
    chi = np.where(result.mask, result.chi_ppm, np.float32(np.nan))
    brightest = float(np.percentile(result.magnitude, 99.5)) or 1.0
    low, high = (_round(hz_per_ppm * value) for value in np.percentile(result.total_field_ppm[result.mask], (1, 99)))
    local_hz = max(0.1, _round(hz_per_ppm * np.percentile(np.abs(result.local_field_ppm[result.mask]), 99)))
    return [
        _Row("Magnitude", "", result.magnitude, (0, brightest)),
        _Row("Total field", "Hz", total, (low, max(high, low + 1))),
        _Row("Local field", "Hz", local, (-local_hz, local_hz)),
        _Row("Chi map", "ppm", chi, WINDOW_PPM),
    ]


def _round(value: float) -> float:
    """Round to two significant digits."""
    return float(f"{value:.1e}")


def _choose_panels(result: Reconstruction, grid: Volume) -> list[_Panel]:
    """Choose slices through the brain, and show the whole head in them."""
    head = (result.magnitude > _HEAD_SHARE * np.percentile(result.magnitude, 99)) | result.brain
    extents, below = [], []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        areas = result.brain.sum(axis=others)
        used = np.flatnonzero((head.mean(axis=others) > _MIN_PLANE_SHARE) | (areas > 0))
        extents.append(slice(int(used[0]), int(used[-1]) + 1))
        below.append(np.cumsum(areas) / areas.sum())  # fraction of the brain up to each plane
    levels = np.searchsorted(below[2], _AXIAL_LEVELS).tolist()
    y, x = (int(np.searchsorted(below[axis], 0.5)) for axis in (1, 0))
    chosen: list[tuple[Plane, int]] = [*(("axial", z) for z in levels), ("coronal", y), ("sagittal", x)]
    sizes_mm = [step * (extent.stop - extent.start) for step, extent in zip(grid.voxel_size_mm, extents, strict=True)]
    panels = []
    for plane, position in chosen:
        layout = LAYOUTS[plane]
        slices = MosaicSlices(layout, (position,), extents[layout.across], extents[layout.up])
        panels.append(_Panel(slices, position, sizes_mm[layout.across], sizes_mm[layout.up]))
    return panels
