"""What a map shows: the measured part of its image, and how far a region lies from where that ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from bids_dgmseg.image.masks import find_outside
from bids_dgmseg.image.similarity import fit_similarity
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure


@dataclass(frozen=True)
class View:
    """The measured part of an image."""

    inside: NDArray[np.bool_]
    """Measured voxels and the small holes among them; shape (X, Y, Z)."""
    ends: NDArray[np.intp]
    """Voxels (N, 3) of it that touch what was not measured: a gap is the distance of centres to the nearest."""
    voxel_size_mm: tuple[float, float, float]

    @classmethod
    def of(cls, measured: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]) -> View:
        """Find the view of a map.

        Parameters
        ----------
        measured : ndarray of bool, shape (X, Y, Z)
            Voxels with a measurement, on the whole grid of the map.
        voxel_size_mm : tuple of 3 float
            Edge lengths of a voxel in mm.

        Returns
        -------
        View
            Beyond the image is outside, and so are holes that hold a cube of 3 voxels.
        """
        outside = find_outside(measured)
        # The gap between two boxes is the distance of their centres once one of them has grown by a layer.
        grown = ndimage.maximum_filter(outside, 3, mode="constant", cval=True)
        return cls(~outside, np.argwhere(grown & ~outside), voxel_size_mm)

    def cut(self, block: tuple[slice, slice, slice]) -> View:
        """Show a block of voxels only; it ends where the whole image does."""
        starts = [piece.start for piece in block]
        return View(self.inside[block], self.ends - starts, self.voxel_size_mm)

    def measure_gap(self, region: NDArray[np.bool_]) -> float:
        """Measure how far a region lies from where the measurement ends.

        Parameters
        ----------
        region : ndarray of bool, shape (X, Y, Z)
            On the grid of `inside`.

        Returns
        -------
        float
            Smallest gap in mm between a voxel of the region and a place outside, 0 where they touch, from surface to
            surface, so that thick slices do not make it larger. NaN for an empty region.

        Examples
        --------
        >>> shown = View.of(np.ones((9, 9, 9), bool), voxel_size_mm=(1.0, 1.0, 1.0))
        >>> region = np.zeros((9, 9, 9), bool)
        >>> region[4, 4, 2:7] = True
        >>> shown.measure_gap(region)
        2.0
        """
        if not region.any():
            return np.nan
        if (region & ~self.inside).any():
            return 0.0
        points = np.argwhere(region) * self.voxel_size_mm
        ends = self.ends * np.asarray(self.voxel_size_mm)
        # Only the ends within reach of the nearest one so far can be nearer; a tree of all of them is slow to ask.
        middle = points.mean(axis=0)
        reach = np.linalg.norm(points - middle, axis=1).max()
        away = np.linalg.norm(ends - middle, axis=1)
        nearest = np.linalg.norm(points - ends[away.argmin()], axis=1).min()
        gaps, _ = KDTree(points).query(ends[away <= nearest + reach + 1e-6])
        return float(gaps.min())


_REACH_MM = 8.0  # a nucleus's radius and what heads differ by

_FACES = (("leftmost", "rightmost"), ("hindmost", "foremost"), ("lowest", "highest"))


@dataclass(frozen=True)
class Coverage:
    """What is said about nuclei that could not be measured in full."""

    missing: tuple[str, ...]
    """Abbreviations of nuclei without any value."""
    warnings: tuple[str, ...]
    """One sentence a nucleus, without the scan's name."""


def find_gaps(
    dseg: Volume,
    *,
    structures: Sequence[Structure],
    voxels_pv: NDArray[np.float64],
    measured: NDArray[np.bool_],
    seen: Collection[str],
) -> Coverage:
    """Tell which nuclei are outside what was measured, cut by its edge, lost between voxels, or not found.

    Parameters
    ----------
    dseg : Volume
        Integers of structures.tsv on the whole grid of the map.
    structures : sequence of Structure
        The nuclei that were looked for.
    voxels_pv : ndarray of shape (C,)
        Sum of the probabilities of nucleus ``structures[c]`` over the voxels.
    measured : ndarray of bool, shape (X, Y, Z)
        Voxels of the map with a measurement; the others are outside, as slices that a brain mask left empty.
    seen : collection of str
        Abbreviations of the nuclei that the network labelled on its own grid; one of them without a voxel on that of
        the map was lost from one to the other.

    Returns
    -------
    Coverage
        A nucleus without a voxel is missing, except where it was seen and still fills half a voxel by its
        probabilities. Probabilities alone find nothing: a little doubt everywhere sums to many voxels.

    Notes
    -----
    Where a missing nucleus should be is read from the others: the similarity transform (least squares) from typical
    places in the MNI152 brain to the centres that were found. Outside is what falls beyond the measured voxels or
    closer than 8 mm to their edge, or where most voxels within 8 mm have no measurement.
    """
    view = _View(measured)
    boxes = ndimage.find_objects(dseg.array, max_label=max(structure.index for structure in structures))
    found = [structure for structure in structures if boxes[structure.index - 1] is not None]
    absent = [structure for structure in structures if boxes[structure.index - 1] is None]
    partly = {structure for structure, voxels in zip(structures, voxels_pv, strict=True) if voxels >= 0.5}
    lost = [structure for structure in absent if structure in partly and structure.abbreviation in seen]
    missing = [structure for structure in absent if structure not in lost]
    warnings = [
        f"{structure.abbreviation} {_explain(dseg, structure, found, view)}; its values are n/a"
        for structure in missing
    ]
    size = " x ".join(f"{edge:.3g}" for edge in dseg.voxel_size_mm)
    warnings += [
        f"{structure.abbreviation} was found, but fills no voxel of {size} mm: its label volume is 0, see volume_pv_mm3"
        for structure in lost
    ]
    warnings += [
        f"{structure.abbreviation} touches the edge of {part}; its volume may be too small"
        for structure in found
        if (part := view.touched_by(boxes[structure.index - 1]))
    ]
    warnings += _find_exchanged(dseg, {structure: boxes[structure.index - 1] for structure in found})
    return Coverage(tuple(structure.abbreviation for structure in missing), tuple(warnings))


def _find_exchanged(dseg: Volume, boxes: Mapping[Structure, tuple[slice, ...]]) -> list[str]:
    """Name nuclei whose left one lies to the right of the right one; the first axis runs to the right."""
    places = {
        structure.abbreviation: box[0].start + np.nonzero(dseg.array[box] == structure.index)[0].mean()
        for structure, box in boxes.items()
    }
    return [
        f"{left} lies to the right of {right}: left and right are exchanged; check the map's header and, for an "
        "nnU-Net folder, the axes of its training (orientation in dataset.json)"
        for left, right in ((name, f"{name[:-1]}R") for name in places if name.endswith("_L"))
        if places[left] > places.get(right, np.inf)
    ]


class _View:
    """The block of voxels that holds all measured ones."""

    def __init__(self, measured: NDArray[np.bool_]) -> None:
        self.measured = measured
        found = ndimage.find_objects(measured.astype(np.uint8))
        x, y, z = found[0] if found else (slice(0, size) for size in measured.shape)
        self.bounds = ((x.start, x.stop - 1), (y.start, y.stop - 1), (z.start, z.stop - 1))
        """First and last voxel along each axis."""

    def name_part(self, axis: int, side: int) -> str:
        """Say what ends at a face: the image itself, or the measured part of it."""
        ends_image = self.bounds[axis][side] == (0, self.measured.shape[axis] - 1)[side]
        return "the image" if ends_image else "the measured part of the image"

    def touched_by(self, box: tuple[slice, slice, slice]) -> str:
        """Say whose edge a block of voxels reaches; empty if none."""
        for axis, (piece, (first, last)) in enumerate(zip(box, self.bounds, strict=True)):
            if piece.start <= first or piece.stop > last:
                return self.name_part(axis, int(piece.start > first))
        return ""

    def shows(self, index: NDArray[np.float64], reach: NDArray[np.float64]) -> bool:
        """Tell whether half of the voxels about a place were measured."""
        low, high = np.floor(index - reach).astype(int), np.ceil(index + reach).astype(int) + 1
        x, y, z = (slice(max(start, 0), max(stop, 0)) for start, stop in zip(low, high, strict=True))
        about = self.measured[x, y, z]
        return about.size > 0 and float(about.mean()) >= 0.5


def _explain(dseg: Volume, structure: Structure, found: Sequence[Structure], view: _View) -> str:
    """Say why a nucleus is missing, with the face that it lies beyond, such as ``lowest slice at z = -20 mm``."""
    centre_mm = _expect_centre(dseg, structure, found)
    if centre_mm is None:
        return "was not found"
    sizes_mm, bounds = np.array(dseg.voxel_size_mm), np.array(view.bounds)
    index = (np.linalg.inv(dseg.affine) @ [*centre_mm, 1.0])[:3]
    beyond_mm = np.stack([bounds[:, 0] - 0.5 - index, index - bounds[:, 1] - 0.5], axis=1) * sizes_mm[:, None]
    axis, side = (int(place) for place in np.unravel_index(int(beyond_mm.argmax()), beyond_mm.shape))
    if beyond_mm[axis, side] < -_REACH_MM:
        return "was not found" if view.shows(index, _REACH_MM / sizes_mm) else "lies where the map has no measurement"
    middle = bounds.mean(axis=1)
    middle[axis] = bounds[axis, side]
    place_mm = (dseg.affine @ [*middle, 1.0])[axis]
    face = f"{_FACES[axis][side]} slice at {'xyz'[axis]} = {place_mm:.0f} mm"
    return f"lies outside {view.name_part(axis, side)} ({face})"


def _expect_centre(dseg: Volume, structure: Structure, found: Sequence[Structure]) -> NDArray[np.float64] | None:
    if len({other.nucleus for other in found}) < 3 or len({other.hemisphere for other in found}) < 2:
        return None  # a plane or a line of nuclei does not tell where the head lies
    indices = np.array([np.argwhere(dseg.array == other.index).mean(axis=0) for other in found])
    centres_mm = indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    carry = fit_similarity(np.array([other.mni_mm for other in found]), centres_mm)
    return carry(np.array(structure.mni_mm))
