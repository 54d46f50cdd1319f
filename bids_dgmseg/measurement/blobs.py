"""Strongly paramagnetic and diamagnetic regions in or beside nuclei: haemorrhages, large veins, calcifications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.masks import ROUNDING_MM
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import BLOB_COLUMNS
from bids_dgmseg.models.structures import Structure

PARAMAGNETIC_PPM, DIAMAGNETIC_PPM = 0.3, -0.15
"""In five real maps, at most 20 mm³ of a nucleus are above, and 5 mm³ within 5 mm of one below."""

SMALLEST_MM3 = 50.0

THICKNESS_MM = 2.0
"""Some voxel is this far from the surface; those of veins near the nuclei are not."""

BESIDE_MM = 8.0


@dataclass(frozen=True)
class Blob:
    """A region."""

    mask: NDArray[np.bool_]
    """On the grid of the map."""
    nuclei: tuple[str, ...]
    """Abbreviations of the nuclei that it overlaps or, if there is none, of the closest one."""
    inside: bool
    """Whether it overlaps them."""
    volume_mm3: float
    peak_ppm: float
    """Highest value, or lowest if it is diamagnetic."""
    centre_mm: tuple[float, float, float]

    def describe(self) -> str:
        """Describe it in one line."""
        kind, cause = ("paramagnetic", "haemorrhage, vein") if self.peak_ppm > 0 else ("diamagnetic", "calcification")
        x, y, z = (round(value) for value in self.centre_mm)
        return (
            f"strongly {kind} region of {self.volume_mm3:.0f} mm3 (to {self.peak_ppm:.2f} ppm) "
            f"{'in' if self.inside else 'beside'} {', '.join(self.nuclei)} at x, y, z = {x}, {y}, {z} mm ({cause} or "
            "artefact); check it, and leave it out with `lesion_masks`"
        )


def find_blobs(
    chi: Volume, dseg: Volume, *, structures: Sequence[Structure], exclude: NDArray[np.bool_] | None = None
) -> list[Blob]:
    """Find strongly paramagnetic and diamagnetic regions in or beside nuclei.

    Regions are 26-connected voxels above 0.3 ppm or below -0.15 ppm, of 50 mm³ or more, with a voxel whose centre is
    2 mm or more from those outside, within 8 mm of a nucleus.

    Parameters
    ----------
    chi : Volume
        Map in ppm.
    dseg : Volume
        Labels on the same grid.
    structures : sequence of Structure
    exclude : ndarray of bool, optional
        Voxels that are not measured anyway.
    """
    labelled = np.isin(dseg.array, [one.index for one in structures])
    boxes = ndimage.find_objects(labelled.astype(np.uint8))
    if not boxes:
        return []
    size_mm = chi.voxel_size_mm
    margins = [int(np.ceil(4 * BESIDE_MM / edge)) for edge in size_mm]  # so that the size of most is known
    pieces = zip(boxes[0], margins, chi.shape, strict=True)
    block = tuple(slice(max(piece.start - margin, 0), min(piece.stop + margin, n)) for piece, margin, n in pieces)
    values, labels = chi.array[block], dseg.array[block]
    usable = np.isfinite(values) if exclude is None else np.isfinite(values) & ~exclude[block]
    distance_mm, nearest = ndimage.distance_transform_edt(~labelled[block], sampling=size_mm, return_indices=True)
    names = {one.index: one.abbreviation for one in structures}
    voxel_mm3 = float(np.prod(size_mm))
    start = [piece.start for piece in block]
    found = []
    for strong in (usable & (values > PARAMAGNETIC_PPM), usable & (values < DIAMAGNETIC_PPM)):
        groups, n_groups = ndimage.label(strong, np.ones((3, 3, 3)))
        sizes = np.bincount(groups.ravel(), minlength=n_groups + 1)
        for number in np.flatnonzero(sizes * voxel_mm3 >= SMALLEST_MM3):
            region = groups == number
            if number == 0 or distance_mm[region].min() > BESIDE_MM + ROUNDING_MM:
                continue
            if _thickness_mm(region, size_mm) < THICKNESS_MM - ROUNDING_MM:
                continue
            own = np.unique(labels[region & labelled[block]])
            closest = np.argwhere(region)[distance_mm[region].argmin()]
            place = tuple(axis[tuple(closest)] for axis in nearest)
            centre = (np.argwhere(region).mean(axis=0) + start) @ chi.affine[:3, :3].T + chi.affine[:3, 3]
            mask = np.zeros(chi.shape, bool)
            mask[block] = region
            peak = values[region].max() if values[region].min() > 0 else values[region].min()
            x, y, z = centre.tolist()
            nuclei = [names[int(index)] for index in own] or [names[int(labels[place])]]
            found.append(
                Blob(mask, tuple(nuclei), bool(len(own)), float(sizes[number] * voxel_mm3), float(peak), (x, y, z))
            )
    return sorted(found, key=lambda blob: -blob.volume_mm3)


def _thickness_mm(region: NDArray[np.bool_], size_mm: tuple[float, float, float]) -> float:
    box = ndimage.find_objects(region.astype(np.uint8))[0]
    return float(ndimage.distance_transform_edt(np.pad(region[box], 1), sampling=size_mm).max())


def measure_blobs(blobs: Sequence[Blob], *, structures: Sequence[Structure]) -> pd.DataFrame:
    """Return ``index``, ``abbreviation`` and the columns of `BLOB_COLUMNS` per nucleus, 0 if it has no such region."""
    rows = []
    for one in structures:
        own = [blob for blob in blobs if one.abbreviation in blob.nuclei]
        volumes = (sum(blob.volume_mm3 for blob in own if (blob.peak_ppm > 0) == sign) for sign in (True, False))
        rows.append((one.index, one.abbreviation, *map(float, volumes)))
    return pd.DataFrame(rows, columns=["index", "abbreviation", *BLOB_COLUMNS])
