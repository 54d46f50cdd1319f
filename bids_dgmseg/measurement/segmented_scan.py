"""A map with its segmentation: field of view, coverage of the nuclei, lesion masks, and the reference region."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, check_grid, describe_grid_mismatch, fit_similarity, resample
from bids_dgmseg.image.masks import ROUNDING_MM, is_valid, outside_field_of_view
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.further_maps import share_outside
from bids_dgmseg.measurement.nuclei import REFERENCED, find_regions
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import Structure, with_wholes


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
    parts_ppm: Sequence[NDArray[np.floating]] = ()
    """Paramagnetic and diamagnetic part of a reconstructed map."""
    changes_ppm: NDArray[np.floating] | None = None
    """Changes (4, X, Y, Z) of a reconstructed map, see `bids_dgmseg.measurement.nuclei.measure_uncertainty`."""
    noise_sd: Callable[[NDArray[np.bool_], float], float] | None = None
    """SD of the mean of a region due to the noise of the field, see the same."""
    edited: Mapping[str, float] | None = None
    """If the labels were edited by hand: nuclei that differ from the automatic labels → Dice with them."""

    session_volumes: Mapping[str, Mapping[str, float]] | None = None
    """If the sessions of the participant were labelled together: volumes of the nuclei in this one, see
    `bids_dgmseg.measurement.nuclei.measure_session_volumes`."""

    lesions: NDArray[np.bool_] | None = None
    """Voxels of the map that are left out of all measures."""

    proof: pd.DataFrame | None = None
    """If the scan was proved: the table of `bids_dgmseg.measurement.proof.prove`."""

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
    present = [structure for structure in structures if boxes[structure.index - 1] is not None]
    absent = [structure for structure in structures if boxes[structure.index - 1] is None]
    half_voxel = {structure for structure, voxels in zip(structures, voxels_pv, strict=True) if voxels >= 0.5}
    too_small = [structure for structure in absent if structure in half_voxel and structure.abbreviation in labelled]
    missing = [structure for structure in absent if structure not in too_small]
    box = next(iter(ndimage.find_objects(valid.astype(np.uint8))), [slice(0, size) for size in valid.shape])
    bounds = np.array([(piece.start, piece.stop - 1) for piece in box])  # first and last valid voxel along each axis
    size = " x ".join(f"{edge:.3g}" for edge in dseg.voxel_size_mm)
    # The first axis runs to the right.
    centres = {each.abbreviation: np.nonzero(dseg.array == each.index)[0].mean() for each in present}
    warnings = [
        *(
            f"{each.abbreviation} {_explain(dseg, each, present, valid, bounds)}; its values are n/a"
            for each in missing
        ),
        *(
            f"{each.abbreviation} was detected, but is too small to label at {size} mm; use volume_pv_mm3"
            for each in too_small
        ),
        *(
            f"{each.abbreviation} touches the edge of the field of view; its volume may be too small"
            for each in present
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
    dseg: Volume, structure: Structure, present: Sequence[Structure], valid: NDArray[np.bool_], bounds: NDArray[np.intp]
) -> str:
    """Explain why a nucleus is missing, with the face beyond which it lies, such as ``lowest slice at z = -20 mm``."""
    if len({other.nucleus for other in present}) < 3 or len({other.hemisphere for other in present}) < 2:
        return "was not found"  # nuclei in a plane or on a line do not determine the position of the head
    centres = np.array([np.argwhere(dseg.array == other.index).mean(axis=0) for other in present])
    centres_mm = centres @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    to_head = fit_similarity(np.array([other.mni_mm for other in present]), centres_mm)
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
        return "was not found" if covered else "is in a region without valid data"
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
        if not inside.array.any() and np.nan_to_num(mask.array).any():
            raise InputError(f"{path.name}: no voxel is above 0.5; give lesions the value 1")
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


MIN_VOXELS = 20
"""With fewer, one vessel or the noise of a few voxels would shift every nucleus."""

MIN_VOLUME_MM3 = 50.0
"""Two thirds of the smallest nucleus; at 0.5 mm, 20 voxels are less than the error of any label."""


@dataclass(frozen=True)
class Reference:
    """Susceptibility of a reference region, and how the region was obtained."""

    region: str
    """``csf``, ``whole-brain``, or a nucleus."""
    source: str
    """Description of how the region was obtained."""
    mean_ppm: float = np.nan
    """NaN if there is no value."""
    std_ppm: float = np.nan
    n_voxels: int = 0
    problem: str = ""
    """Why there is no value, as a warning without the name of the scan; empty if there is one."""

    @property
    def sem_ppm(self) -> float:
        """Standard error of the mean, with voxels counted as independent; common to all nuclei of the scan."""
        return float(self.std_ppm / np.sqrt(self.n_voxels)) if self.n_voxels else np.nan


def measure_reference(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    *,
    name: str,
    source: str,
    voxel_size_mm: tuple[float, float, float],
) -> Reference:
    """Measure the susceptibility of a reference region.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Susceptibility in ppm, NaN where not valid.
    region : ndarray of bool, shape (X, Y, Z)
        Voxels of the region, all inside the field of view.
    name : str
        Name of the region.
    source : str
        Description of how the region was obtained.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    Reference
        Mean and sample standard deviation (n - 1); NaN for fewer than 20 valid voxels or less than 50 mm³.
    """
    values = chi[region & np.isfinite(chi)].astype(np.float64)
    volume_mm3 = len(values) * float(np.prod(voxel_size_mm))
    if len(values) < MIN_VOXELS or volume_mm3 < MIN_VOLUME_MM3:
        problem = (
            f"reference {name}: {len(values)} voxels ({volume_mm3:.0f} mm3) in {source}, expected {MIN_VOXELS} and "
            f"{MIN_VOLUME_MM3:.0f} mm3 or more; its referenced values are n/a"
        )
        return Reference(name, source, n_voxels=len(values), problem=problem)
    return Reference(name, source, float(values.mean()), float(values.std(ddof=1)), len(values))


def erode_ventricles(
    ventricles: NDArray[np.bool_],
    *,
    voxel_size_mm: tuple[float, float, float],
    label_size_mm: tuple[float, float, float],
) -> NDArray[np.bool_]:
    """Erode the lateral ventricles to voxels that contain only CSF.

    Parameters
    ----------
    ventricles : ndarray of bool, shape (X, Y, Z)
        On the grid of the map, resampled from coarser labels.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel of the map in mm.
    label_size_mm : tuple of 3 float
        Edge lengths of a voxel of the original labels in mm.

    Returns
    -------
    ndarray of bool
        Voxels farther than half an edge of the original voxels from every voxel outside, centre to centre, that share
        no face with one. The boundary of coarse labels can be wrong by this distance, and beyond it lies caudate or
        white matter; voxels of the map with longer edges contain some of it wherever they touch the boundary.
    """
    eroded = np.zeros(ventricles.shape, bool)
    boxes = ndimage.find_objects(ventricles.astype(np.uint8))
    if boxes:
        padded = np.pad(ventricles[boxes[0]], 1)
        distance_mm = ndimage.distance_transform_edt(padded, sampling=voxel_size_mm)
        inner = ndimage.binary_erosion(padded) & (distance_mm > max(label_size_mm) / 2 + ROUNDING_MM)
        eroded[boxes[0]] = inner[1:-1, 1:-1, 1:-1]
    return eroded


def check_reference(reference: ReferenceRegion, model: Model) -> None:
    """Check that the options of the reference region fit each other and the model; `InputError` if not."""
    structures = with_wholes(model.structures)
    names = [*dict.fromkeys(row.nucleus for row in structures), *(row.abbreviation for row in structures)]
    if reference.region not in ("none", "whole-brain", "csf", *names):
        raise InputError(
            f"`reference` {reference.region}: unknown; choose from whole-brain, csf, {', '.join(names)} of {model.name}"
        )
    if reference.masks and reference.region != "csf":
        raise InputError(f"`reference_mask`: requires `reference` csf, not {reference.region}; add `reference` csf")
    if reference.region == "csf" and not reference.masks and "ventricles" not in model.localizer.labels:
        raise InputError(
            f"`reference` csf: {model.name} does not label the ventricles; provide masks with `reference_mask`"
        )


def find_reference(
    wanted: ReferenceRegion,
    scan: SegmentedScan,
    *,
    mask: Path | None,
    regions: Mapping[str, NDArray[np.bool_]],
    model: Model,
) -> Reference | None:
    """Measure the reference region of a scan; None if no reference was asked for.

    `mask` is the user's mask of this scan and `regions` are the masks of the head regions on the grid of the map. A
    reference without a value has a `problem`. `InputError` if a mask is not readable or on another grid.
    """
    if wanted.region == "none":
        return None
    name, size_mm = wanted.region, scan.chi.voxel_size_mm
    if wanted.masks is not None and mask is None:
        return Reference(name, "", problem=f"reference {name}: no mask for this scan; its referenced values are n/a")
    if wanted.region not in ("whole-brain", "csf"):
        indices = [
            label
            for structure in with_wholes(scan.structures)
            for label in structure.labels
            if name in (structure.nucleus, structure.abbreviation)
        ]
        region, source = np.isin(scan.dseg.array, indices), f"{name} labelled by {model.name}"
    elif mask is not None:
        values = Volume.read(mask)
        check_intact(mask)
        check_grid(mask, values, scan.chi)
        region, source = np.asarray(values.array > 0.5), f"mask {mask.name}"
    elif wanted.region == "whole-brain" and "brain" in regions:
        region, source = regions["brain"], f"brain labelled by {model.name}"
    elif wanted.region == "whole-brain":
        region, source = scan.fov.inside, "field of view of the map"
    else:
        finder, network_input = model, model.localizer.input
        if model.ventricles:
            finder = get_model(model.ventricles)
            network_input = finder.input
        label_mm = network_input.spacing_mm if network_input else (0.0, 0.0, 0.0)
        ventricles = regions["ventricles"] & (scan.dseg.array == 0)
        region = erode_ventricles(ventricles, voxel_size_mm=size_mm, label_size_mm=label_mm)
        depth_mm = max(label_mm) / 2
        at_least = ", at least by one voxel" if max(size_mm) > depth_mm + ROUNDING_MM else ""
        source = f"lateral ventricles labelled by {finder.name}, eroded by {depth_mm:g} mm{at_least}"
    return measure_reference(scan.chi.array, region & scan.fov.inside, name=name, source=source, voxel_size_mm=size_mm)


def add_referenced_columns(
    stats: pd.DataFrame, reference: Reference, *, voxel_size_mm: tuple[float, float, float]
) -> pd.DataFrame:
    r"""Add susceptibilities relative to the reference region.

    Returns a copy of the table of `measure_nuclei` and `measure_high_iron` with the columns of `REFERENCE_COLUMNS`
    appended; NaN if value or reference is missing.

    With the mean :math:`\chi_0` of the reference region: :math:`\chi - \chi_0` for means, medians and percentiles,
    :math:`m - \chi_0 v n` for the mass :math:`m = v \sum \chi` of :math:`n` valid voxels of volume :math:`v`.
    Standard deviations and standard errors of the nuclei do not change: the error of :math:`\chi_0` is common to all.
    """
    table = stats.copy()
    for column, name in REFERENCED.items():
        table[name] = table[column] - reference.mean_ppm
    valid_mm3 = table["n_valid"].astype(np.float64) * np.prod(voxel_size_mm)
    table["mass_ref_ppm_mm3"] = table["mass_ppm_mm3"] - reference.mean_ppm * valid_mm3
    return table
