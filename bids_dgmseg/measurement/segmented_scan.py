"""A map with its segmentation: labels, field of view and lesion masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch, fit_similarity, resample
from bids_dgmseg.image.masks import is_valid, outside_field_of_view
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.further_maps import share_outside
from bids_dgmseg.measurement.nuclei import find_regions
from bids_dgmseg.models.structures import Structure


@dataclass(frozen=True)
class FieldOfView:
    """Region of an image that holds valid voxels."""

    inside: NDArray[np.bool_]
    """Valid voxels and the small holes among them; shape (X, Y, Z)."""
    edge: NDArray[np.intp]
    """Voxels (N, 3) of the region that touch its outside; a gap is the distance of centres to the nearest."""
    voxel_size_mm: tuple[float, float, float]

    @classmethod
    def of(cls, valid: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]) -> FieldOfView:
        """Find the field of view of the valid voxels (X, Y, Z) of a map, on its whole grid.

        Everything beyond the image is outside, and so are holes that contain a cube of 3 voxels.
        """
        outside = outside_field_of_view(valid)
        # The gap between two voxels is the distance of their centres once one of them is dilated by a layer.
        dilated = ndimage.maximum_filter(outside, 3, mode="constant", cval=True)
        return cls(~outside, np.argwhere(dilated & ~outside), voxel_size_mm)

    def crop(self, block: tuple[slice, slice, slice]) -> FieldOfView:
        """Crop to a block of voxels; the edge remains that of the whole image."""
        return FieldOfView(self.inside[block], self.edge - [piece.start for piece in block], self.voxel_size_mm)

    def distance_to_edge(self, region: NDArray[np.bool_]) -> float:
        """Compute the smallest gap in mm between a voxel of a region and a voxel outside.

        From surface to surface, so that it does not depend on the slice thickness; 0 if they touch, NaN for an empty
        region.

        >>> fov = FieldOfView.of(np.ones((9, 9, 9), bool), voxel_size_mm=(1.0, 1.0, 1.0))
        >>> region = np.zeros((9, 9, 9), bool)
        >>> region[4, 4, 2:7] = True
        >>> fov.distance_to_edge(region)
        2.0
        """
        if not region.any():
            return np.nan
        if (region & ~self.inside).any():
            return 0.0
        points = np.argwhere(region) * self.voxel_size_mm
        edge = self.edge * np.asarray(self.voxel_size_mm)
        # Only edge voxels within reach of the nearest one so far can be nearer; querying a tree for all is slow.
        centre = points.mean(axis=0)
        radius = np.linalg.norm(points - centre, axis=1).max()
        from_centre = np.linalg.norm(edge - centre, axis=1)
        upper_bound = np.linalg.norm(points - edge[from_centre.argmin()], axis=1).min()
        gaps, _ = KDTree(points).query(edge[from_centre <= upper_bound + radius + 1e-6])
        return round(float(gaps.min()), 6)  # voxel sizes from headers are inexact, limits of ratings are not


@dataclass(frozen=True, kw_only=True)
class SegmentedScan:
    """A chi map and its segmentation."""

    chi: Volume
    """In ppm, NaN where not valid."""
    dseg: Volume
    """Integers of ``structures.tsv``, on the same grid."""
    probseg: NDArray[np.float32]
    """Probabilities (C, x, y, z) in `block`, in the order of `structures`."""
    block: tuple[slice, slice, slice]
    """Part of the map that the probabilities cover; everything else is background."""
    structures: Sequence[Structure]
    labelled: Collection[str]
    """Abbreviations of the nuclei that the network labelled on its own grid."""
    r2star_per_s: NDArray[np.floating] | None = None
    """R2* in 1/s on the same grid, if it was measured."""
    edited: Mapping[str, float] | None = None
    """If the labels were edited by hand: nuclei that differ from the automatic labels → Dice with them."""

    session_volumes: Mapping[str, Mapping[str, float]] | None = None
    """If the sessions of the participant were labelled together: volumes of the nuclei in this one, see
    `bids_dgmseg.measurement.volume_change.measure_session_volumes`."""

    lesions: NDArray[np.bool_] | None = None
    """Voxels of the map that are left out of all measures."""

    @cached_property
    def fov(self) -> FieldOfView:
        """Field of view of the map."""
        return FieldOfView.of(is_valid(self.chi.array), voxel_size_mm=self.chi.voxel_size_mm)


_TOLERANCE_MM = 8.0
"""Radius of a nucleus plus the variation of its position between heads."""

_FACES = (("leftmost", "rightmost"), ("most posterior", "most anterior"), ("lowest", "highest"))


@dataclass(frozen=True)
class Coverage:
    """Nuclei that the segmentation lacks or that the field of view cuts."""

    missing: tuple[str, ...]
    """Abbreviations of nuclei without any value."""
    warnings: tuple[str, ...]
    """One sentence per nucleus, without the name of the scan."""
    exchanged: tuple[tuple[str, str], ...] = ()
    """Pairs of abbreviations of which the left one lies to the right of the other."""


def check_coverage(
    dseg: Volume,
    *,
    structures: Sequence[Structure],
    voxels_pv: NDArray[np.float64],
    valid: NDArray[np.bool_],
    labelled: Collection[str],
) -> Coverage:
    """Find nuclei that are outside the field of view, cut by its edge, smaller than a voxel, or not found.

    `dseg` and the `valid` voxels cover the whole grid of the map; `voxels_pv` are the sums of the probabilities of each
    nucleus over the voxels. A nucleus without a voxel was lost in resampling if it is one of those that the network
    `labelled` on its own grid and its probabilities still sum to half a voxel; otherwise it is missing. Probabilities
    alone are not enough: low values everywhere sum to many voxels.

    The expected position of a missing nucleus follows from the others: the similarity transform (least squares) from
    typical positions in the MNI152 brain to the centres found. It is outside the field of view if it lies beyond the
    bounding box of the valid voxels or closer than 8 mm to its faces, or if most voxels within 8 mm are not valid.
    """
    boxes = ndimage.find_objects(dseg.array, max_label=max(structure.index for structure in structures))
    found = [structure for structure in structures if boxes[structure.index - 1] is not None]
    absent = [structure for structure in structures if boxes[structure.index - 1] is None]
    half_voxel = {structure for structure, voxels in zip(structures, voxels_pv, strict=True) if voxels >= 0.5}
    too_small = [structure for structure in absent if structure in half_voxel and structure.abbreviation in labelled]
    missing = [structure for structure in absent if structure not in too_small]
    box = next(iter(ndimage.find_objects(valid.astype(np.uint8))), [slice(0, size) for size in valid.shape])
    bounds = np.array([(piece.start, piece.stop - 1) for piece in box])  # first and last valid voxel along each axis
    size = " x ".join(f"{edge:.3g}" for edge in dseg.voxel_size_mm)
    # The first axis runs to the right.
    centres = {each.abbreviation: np.nonzero(dseg.array == each.index)[0].mean() for each in found}
    warnings = [
        *(f"{each.abbreviation} {_explain(dseg, each, found, valid, bounds)}; its values are n/a" for each in missing),
        *(
            f"{each.abbreviation} was found, but fills no voxel of {size} mm: its label volume is 0, see volume_pv_mm3"
            for each in too_small
        ),
        *(
            f"{each.abbreviation} touches the edge of the field of view; its volume may be too small"
            for each in found
            if any(
                piece.start <= first or piece.stop > last
                for piece, (first, last) in zip(boxes[each.index - 1], bounds, strict=True)
            )
        ),
    ]
    pairs = ((name, f"{name[:-1]}R") for name in centres if name.endswith("_L"))
    exchanged = tuple((left, right) for left, right in pairs if centres[left] > centres.get(right, np.inf))
    return Coverage(tuple(structure.abbreviation for structure in missing), tuple(warnings), exchanged)


def _explain(
    dseg: Volume,
    structure: Structure,
    found: Sequence[Structure],
    valid: NDArray[np.bool_],
    bounds: NDArray[np.intp],
) -> str:
    """Explain why a nucleus is missing, with the face beyond which it lies, such as ``lowest slice at z = -20 mm``."""
    if len({other.nucleus for other in found}) < 3 or len({other.hemisphere for other in found}) < 2:
        return "was not found"  # nuclei in a plane or on a line do not determine the position of the head
    centres = np.array([np.argwhere(dseg.array == other.index).mean(axis=0) for other in found])
    centres_mm = centres @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    to_head = fit_similarity(np.array([other.mni_mm for other in found]), centres_mm)
    expected = (np.linalg.inv(dseg.affine) @ [*to_head(np.array(structure.mni_mm)), 1.0])[:3]
    sizes_mm = np.array(dseg.voxel_size_mm)
    beyond_mm = np.stack([bounds[:, 0] - 0.5 - expected, expected - bounds[:, 1] - 0.5], axis=1) * sizes_mm[:, None]
    axis, side = (int(number) for number in np.unravel_index(int(beyond_mm.argmax()), beyond_mm.shape))
    if beyond_mm[axis, side] < -_TOLERANCE_MM:
        reach = _TOLERANCE_MM / sizes_mm
        low, high = np.floor(expected - reach).astype(int), np.ceil(expected + reach).astype(int) + 1
        x, y, z = (slice(max(start, 0), max(stop, 0)) for start, stop in zip(low, high, strict=True))
        around = valid[x, y, z]
        covered = around.size > 0 and float(around.mean()) >= 0.5
        return "was not found" if covered else "lies where the map has no valid voxels"
    middle = bounds.mean(axis=1)
    middle[axis] = bounds[axis, side]
    face_mm = (dseg.affine @ [*middle, 1.0])[axis]
    return f"lies outside the field of view ({_FACES[axis][side]} slice at {'xyz'[axis]} = {face_mm:.0f} mm)"


def read_lesion_masks(paths: Sequence[Path], grid: Volume) -> NDArray[np.bool_] | None:
    """Read masks of lesions and combine them on the grid of a map; None without a mask.

    Voxels above 0.5 are lesions. A mask on another grid is resampled: a voxel counts if half of it, or more, lies in
    the mask.

    Raises
    ------
    InputError
        If a mask cannot be read, or most of it lies outside of the map.
    """
    if not paths:
        return None
    lesions = np.zeros(grid.shape, bool)
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
        lesions |= inside.array >= 0.5
    return lesions


def measure_lesions(
    lesions: NDArray[np.bool_], dseg: NDArray[np.integer], *, structures: Sequence[Structure]
) -> pd.DataFrame:
    """Return ``abbreviation`` and ``excluded_fraction`` of each structure, NaN without voxels."""
    rows = [
        (structure.abbreviation, float(lesions[box][region].mean()) if region.any() else np.nan)
        for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True)
    ]
    return pd.DataFrame(rows, columns=["abbreviation", "excluded_fraction"])
