"""Interactive three-plane viewer of one scan, made by nilearn; one HTML file that works offline."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from nibabel import Nifti1Image
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import with_default_settings
from bids_dgmseg.report.html import render, scan_anchor
from bids_dgmseg.report.slices import WINDOW_PPM

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
        raise RuntimeError("nilearn.plotting.view_img: the HTML has changed; adapt bids_dgmseg.report.viewer")
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
