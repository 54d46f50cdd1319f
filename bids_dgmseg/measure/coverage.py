"""Which nuclei a scan could not show: outside the image, cut by its edge, or not found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.images.volume import Volume
from bids_dgmseg.structures import Structure

_TYPICAL_MM = {
    "DN": (15.0, -58.0, -35.0), "IN": (7.0, -55.0, -31.0), "RN": (5.3, -19.5, -9.5), "SN": (10.0, -17.0, -13.8),
    "STN": (10.3, -11.5, -7.5), "CN": (14.3, 9.5, 10.0), "PUT": (26.5, 2.0, 1.0), "GP": (18.5, -3.0, -1.0),
}  # fmt: skip
_REACH_MM = 8.0  # a nucleus's radius and what heads differ by
_FACES = (("leftmost", "rightmost"), ("hindmost", "foremost"), ("lowest", "highest"))


@dataclass(frozen=True)
class Coverage:
    """What is said about nuclei that could not be measured in full."""

    missing: tuple[str, ...]
    """Abbreviations of nuclei without any value."""
    warnings: tuple[str, ...]
    """One sentence a nucleus, without the scan's name."""


def find_gaps(dseg: Volume, *, structures: Sequence[Structure], voxels_pv: NDArray[np.float64]) -> Coverage:
    """Tell which nuclei are outside the image, cut by its edge, lost between voxels, or not found.

    Parameters
    ----------
    dseg : Volume
        Integers of structures.tsv on the whole grid of the map.
    structures : sequence of Structure
        The nuclei that were looked for.
    voxels_pv : ndarray of shape (C,)
        Sum of the probabilities of nucleus ``structures[c]`` over the voxels.

    Returns
    -------
    Coverage
        A nucleus without a voxel is missing, except where it still fills half a voxel by its probabilities.

    Notes
    -----
    Where a missing nucleus should be is read from the others: the similarity transform (least squares) from typical
    places in the MNI152 brain to the centres that were found. Outside is what falls beyond the image or closer than
    8 mm to its edge.
    """
    boxes = ndimage.find_objects(dseg.array, max_label=max(structure.index for structure in structures))
    found = [structure for structure in structures if boxes[structure.index - 1] is not None]
    absent = [structure for structure in structures if boxes[structure.index - 1] is None]
    partly = {structure for structure, voxels in zip(structures, voxels_pv, strict=True) if voxels >= 0.5}
    lost = [structure for structure in absent if structure in partly]
    missing = [structure for structure in absent if structure not in lost]
    warnings = [_describe_missing(structure, _find_face(dseg, structure, found)) for structure in missing]
    size = " x ".join(f"{edge:.3g}" for edge in dseg.voxel_size_mm)
    warnings += [
        f"{structure.abbreviation} has no voxel at {size} mm; its label volume is 0, see volume_pv_mm3"
        for structure in lost
    ]
    warnings += [
        f"{structure.abbreviation} touches the edge of the image; its volume may be too small"
        for structure in found
        if _touches(boxes[structure.index - 1], dseg.shape)
    ]
    return Coverage(tuple(structure.abbreviation for structure in missing), tuple(warnings))


def _describe_missing(structure: Structure, face: str | None) -> str:
    if face is None:
        return f"{structure.abbreviation} was not found; its values are n/a"
    return f"{structure.abbreviation} lies outside the image ({face}); its values are n/a"


def _touches(box: tuple[slice, slice, slice], shape: tuple[int, int, int]) -> bool:
    return any(piece.start == 0 or piece.stop == size for piece, size in zip(box, shape, strict=True))


def _find_face(dseg: Volume, structure: Structure, found: Sequence[Structure]) -> str | None:
    """Name the side of the image that a missing nucleus lies beyond, such as ``lowest slice at z = -20 mm``."""
    centre_mm = _expect_centre(dseg, structure, found)
    if centre_mm is None:
        return None
    index = (np.linalg.inv(dseg.affine) @ [*centre_mm, 1.0])[:3]
    ends = np.array([(-0.5, size - 0.5) for size in dseg.shape])
    beyond_mm = np.stack([ends[:, 0] - index, index - ends[:, 1]], axis=1) * np.array(dseg.voxel_size_mm)[:, None]
    axis, side = np.unravel_index(int(beyond_mm.argmax()), beyond_mm.shape)
    if beyond_mm[axis, side] < -_REACH_MM:
        return None
    middle = (np.asarray(dseg.shape) - 1) / 2
    middle[axis] = (0, dseg.shape[axis] - 1)[side]
    place_mm = (dseg.affine @ [*middle, 1.0])[axis]
    return f"{_FACES[axis][side]} slice at {'xyz'[axis]} = {place_mm:.0f} mm"


def _expect_centre(
    dseg: Volume, structure: Structure, found: Sequence[Structure]
) -> NDArray[np.float64] | None:
    if len({other.nucleus for other in found}) < 3 or len({other.hemisphere for other in found}) < 2:
        return None  # a plane or a line of nuclei does not tell where the head lies
    indices = np.array([np.argwhere(dseg.array == other.index).mean(axis=0) for other in found])
    centres_mm = indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    typical_mm = np.array([_typical_mm(other) for other in found])
    return _carry(typical_mm, centres_mm, _typical_mm(structure))


def _typical_mm(structure: Structure) -> NDArray[np.float64]:
    x, y, z = _TYPICAL_MM[structure.nucleus]
    return np.array([-x if structure.hemisphere == "L" else x, y, z])


def _carry(
    source: NDArray[np.float64], target: NDArray[np.float64], point: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Move a point by the least-squares similarity transform that takes `source` to `target` (Umeyama 1991)."""
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    u, strengths, vt = np.linalg.svd((target - target_mean).T @ (source - source_mean))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    scale = (strengths * signs).sum() / ((source - source_mean) ** 2).sum()
    moved: NDArray[np.float64] = target_mean + scale * (u * signs) @ vt @ (point - source_mean)
    return moved
