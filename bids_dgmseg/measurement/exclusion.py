"""Voxels that are left out of all measures, such as lesions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.maps import share_outside
from bids_dgmseg.models.structures import Structure


def read_exclusion(paths: Sequence[Path], grid: Volume) -> NDArray[np.bool_] | None:
    """Read masks of excluded voxels and combine them on the grid of a map; None without a mask.

    Voxels above 0.5 are excluded. A mask on another grid is resampled: a voxel is excluded if half of it, or more, lies
    in the mask.

    Raises
    ------
    InputError
        If a mask cannot be read, or most of it lies outside of the map.
    """
    if not paths:
        return None
    excluded = np.zeros(grid.shape, bool)
    for path in paths:
        mask = Volume.read(path)
        check_intact(path)
        inside = mask.with_array((mask.array > 0.5).astype(np.float32))  # false for NaN
        if describe_grid_mismatch(grid, mask):
            if inside.array.any() and (outside := share_outside(inside, grid)):
                raise InputError(
                    f"{path.name}: {outside:.0%} of the mask lie outside of the map; register it to the map first"
                )
            inside = resample(inside, Grid(grid.shape, grid.affine), antialias=True)
        excluded |= inside.array >= 0.5
    return excluded


def measure_exclusion(
    exclude: NDArray[np.bool_] | None, dseg: NDArray[np.integer], *, structures: Sequence[Structure]
) -> pd.DataFrame:
    """Return ``index``, ``abbreviation`` and ``excluded_fraction`` of each nucleus, NaN without voxels."""
    rows = []
    for one in structures:
        region = dseg == one.index
        fraction = float(np.mean(exclude[region])) if exclude is not None and region.any() else 0.0
        rows.append((one.index, one.abbreviation, fraction if region.any() else np.nan))
    return pd.DataFrame(rows, columns=["index", "abbreviation", "excluded_fraction"])
