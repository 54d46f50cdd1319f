"""The standard space MNI152NLin2009cAsym: its grid, nuclei, brain and ventricles."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume

_ORIGIN_MM = (-96.0, -132.0, -78.0)

_SHAPES_MM = {1: (193, 229, 193), 2: (97, 115, 97)}
"""Resolution → shape, as in TemplateFlow."""

_VENTRICLES_MM = ((-45.0, -60.0, 2.0), (45.0, 42.0, 38.0))
"""Box around the lateral ventricles; the third and the fourth lie below."""


def standard_grid(resolution: int | None = None) -> Grid:
    """Return the grid of MNI152NLin2009cAsym as in TemplateFlow, at 1 (default) or 2 mm."""
    step = float(resolution or 1)
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = _ORIGIN_MM
    return Grid(_SHAPES_MM[resolution or 1], affine)


@cache
def _balls() -> Mapping[str, NDArray[np.float64]]:
    table = pd.read_csv(str(files("bids_dgmseg").joinpath("data", "mni_shapes.tsv")), sep="\t")
    numbers = ["x_mm", "y_mm", "z_mm", "radius_mm"]
    return {str(name): rows[numbers].to_numpy(float) for name, rows in table.groupby("abbreviation")}


def nucleus_shape(abbreviation: str, grid: Grid) -> NDArray[np.float32]:
    """Draw a nucleus of the standard space as the fraction of each voxel inside it.

    Notes
    -----
    The shape is a union of balls (``data/mni_shapes.tsv``) computed from CIT168 in MNI152NLin2009cAsym and, for the
    cerebellar nuclei, from the Allen Human Reference Atlas in the symmetric space; both are CC BY 4.0.
    """
    balls, step = _balls()[abbreviation], min(grid.voxel_size_mm)
    drawn = np.zeros(grid.shape, np.float32)
    reach = balls[:, 3:] + step
    to_index = np.linalg.inv(grid.affine)
    corners = np.array([(balls[:, :3] - reach).min(axis=0), (balls[:, :3] + reach).max(axis=0)])
    low, high = corners @ to_index[:3, :3].T + to_index[:3, 3]
    start = np.maximum(np.floor(low).astype(int), 0)
    stop = np.minimum(np.ceil(high).astype(int) + 1, grid.shape)
    if (stop <= start).any():
        return drawn
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    x, y, z = (stop - start).tolist()
    centres = Grid((x, y, z), affine).centres_mm()
    depth = np.full((x, y, z), -np.inf)
    for *centre, radius in balls:
        depth = np.maximum(depth, radius - np.linalg.norm(centres - centre, axis=-1))
    block = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    drawn[block] = np.clip(0.5 + depth / step, 0, 1)
    return drawn


@cache
def head_masks() -> Mapping[str, Volume]:
    """Masks of the brain and of the lateral ventricles at 2 mm, from the templates of nilearn.

    These are of the symmetric space MNI152NLin2009aSym, whose outlines differ from those of MNI152NLin2009cAsym by
    about 1 mm.
    """
    brain, gray, white = (
        load(resolution=2) for load in (load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template)
    )
    inside = np.asarray(brain.dataobj) > 0
    fluid = inside & (np.asarray(gray.get_fdata()) + np.asarray(white.get_fdata()) < 0.5)
    centres = Grid(inside.shape, brain.affine).centres_mm()
    low, high = _VENTRICLES_MM
    fluid &= ((centres > low) & (centres < high)).all(axis=-1)
    components, _ = ndimage.label(fluid)
    near = components[(np.abs(centres - (0.0, 0.0, 16.0)) < (14, 20, 8)).all(axis=-1)]
    largest = int(np.bincount(near)[1:].argmax()) + 1
    masks = {"brain": inside, "ventricles": components == largest}
    return {name: Volume(mask.astype(np.float32), brain.affine) for name, mask in masks.items()}


def head_mask(region: str, grid: Grid) -> NDArray[np.float32]:
    """Draw the brain or the lateral ventricles as the fraction of each voxel inside them."""
    return np.asarray(resample(head_masks()[region], grid, antialias=True).array, np.float32)
