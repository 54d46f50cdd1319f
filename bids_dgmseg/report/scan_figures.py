"""Figure of the steps of a reconstruction, and interactive viewer of one scan (one HTML file, made by nilearn)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from nibabel import Nifti1Image
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from skimage.measure import find_contours

from bids_dgmseg.image.grids import Box, Grid, resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import TEXT, to_png, with_default_settings
from bids_dgmseg.report.html import format_significant, render, scan_anchor
from bids_dgmseg.report.mosaic import LAYOUTS, WINDOW_PPM, MosaicSlices, Plane

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


MAX_BYTES = 3_000_000
"""Largest viewer; the images are sampled more coarsely until the file is smaller."""

_MARGIN_MM = 15.0
_MAX_VOXELS = 1.5e6
_OPACITY = 0.5


@with_default_settings
def write_viewer(
    chi: Volume, dseg: Volume, out: Path, *, structures: Sequence[Structure], scan: str, model: str
) -> Path:
    """Write an HTML file that shows the nuclei on the chi map in three linked planes.

    The images are cropped to the nuclei and resampled to isotropic voxels along the scanner's axes, with the patient's
    left on the left. The same input gives the same bytes.

    Parameters
    ----------
    chi : Volume
        Map in ppm; NaN where it has no value.
    dseg : Volume
        Labels on the grid of `chi`, numbered as in structures.tsv.
    out : Path
        The HTML file to write, at most `MAX_BYTES`.
    structures : sequence of Structure
        The nuclei of the model, whose colours are shown.
    scan, model : str
        Name of the scan, such as ``sub-01_ses-1``, and of the model: the heading, and the link back to the page of the
        participant, which lies one folder above.
    """
    shown = dseg.array > 0  # the nuclei, or all voxels with a value if none was found
    if not shown.any():
        shown = np.isfinite(chi.array) & (chi.array != 0)
    points_mm = apply_affine(chi.affine, np.argwhere(shown if shown.any() else np.ones(chi.shape, bool)))
    low, high = points_mm.min(axis=0) - _MARGIN_MM, points_mm.max(axis=0) + _MARGIN_MM
    box = Box(tuple(low.tolist()), tuple(high.tolist()))
    spacing_mm = max(min(chi.voxel_size_mm), float(np.cbrt(np.prod(box.size_mm) / _MAX_VOXELS)))
    while len(html := _render(chi, dseg, box, spacing_mm, structures, scan=scan, model=model)) > MAX_BYTES:
        spacing_mm *= 1.15
    return write_bytes(html, out)


def _render(
    chi: Volume, dseg: Volume, box: Box, spacing_mm: float, structures: Sequence[Structure], *, scan: str, model: str
) -> bytes:
    grid = world_grid(box, (spacing_mm,) * 3)
    labels = resample(dseg, grid, order=0).array
    low, high = WINDOW_PPM
    sampled = resample(chi.with_array(np.nan_to_num(chi.array, nan=low)), grid, fill=low).array
    grey = np.clip((sampled - low) / (high - low), 0, 1).astype(np.float32)
    grey[0, 0, 0], grey[-1, -1, -1] = 0, 1  # nilearn scales greys by the extremes
    viewer = _view(grey, labels, grid, structures)
    nuclei: dict[str, list[tuple[Structure, list[int] | None]]] = {}
    for structure in structures:
        centre = _find_centre(labels == structure.index)
        nuclei.setdefault(structure.name.partition(" ")[2], []).append((structure, centre))
    page = f"../{scan.partition('_')[0]}.html#{scan_anchor(scan, model)}"
    return render("viewer.html.j2", scan=scan, model=model, page=page, viewer=viewer, nuclei=nuclei, window=WINDOW_PPM)


def _view(grey: NDArray[np.float32], labels: NDArray[np.integer], grid: Grid, structures: Sequence[Structure]) -> str:
    """Return the body of nilearn's page; its head loads an icon from the network."""
    from nilearn.plotting import view_img  # imported here because it takes seconds

    number = np.zeros(labels.shape, np.float32)
    for place, structure in enumerate(structures, start=1):
        number[labels == structure.index] = place
    sizes = np.bincount(number.astype(int).ravel(), minlength=len(structures) + 1)[1:]
    largest = _find_centre(number == 1 + sizes.argmax())
    colours = [structure.color for structure in structures]
    if len(colours) == 1:
        colours *= 2  # nilearn 0.14 cannot cut a colour map of one colour at the threshold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nilearn, if no voxel is labelled
        view = view_img(
            Nifti1Image(number, grid.affine),
            bg_img=Nifti1Image(grey, grid.affine),
            cut_coords=apply_affine(grid.affine, largest or [(size - 1) / 2 for size in labels.shape]),
            cmap=ListedColormap(colours),
            symmetric_cmap=False,
            vmin=0.5,
            vmax=len(structures) + 0.5,
            threshold=0.5,
            dim=0,
            black_bg=True,
            colorbar=False,
            opacity=_OPACITY,
            resampling_interpolation="nearest",
        )
    body = re.search(r"<body>(.*)</body>", view.html, re.DOTALL)
    unique_id = re.search(r"div_viewer-(\w+)", view.html)
    if body is None or unique_id is None:
        raise RuntimeError("nilearn.plotting.view_img: the HTML has changed; adapt bids_dgmseg.report.scan_figures")
    text = body[1].replace(f"-{unique_id[1]}", "")  # random, would make each file different
    text = text.replace('value="100"', f'value="{100 * _OPACITY:.0f}"')
    return text.replace("brain = brainsprite(", "brain = window.nuclei = brainsprite(")  # for the buttons


def _find_centre(mask: NDArray[np.bool_]) -> list[int] | None:
    """Find the voxel of a mask that is closest to its centre of mass; None if the mask is empty."""
    indices = np.argwhere(mask)
    if not len(indices):
        return None
    distances = np.linalg.norm(indices - indices.mean(axis=0), axis=1)
    centre: list[int] = indices[distances.argmin()].tolist()
    return centre
