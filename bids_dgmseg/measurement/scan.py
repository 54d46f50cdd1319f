"""All measures of one scan: its nuclei, relative to a reference region, the quality of its map, and the QC ratings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Box
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import REFERENCED, STATS_COLUMNS
from bids_dgmseg.measurement.field_of_view import FieldOfView, check_coverage
from bids_dgmseg.measurement.map_quality import box_margin, measure_map_quality
from bids_dgmseg.measurement.nuclei import (
    compare_with_norms,
    insert_bilateral,
    join_labels,
    measure_asymmetry,
    measure_high_iron,
    measure_nuclei,
    measure_r2star,
    parse_reference_region,
)
from bids_dgmseg.measurement.rating import (
    RATINGS,
    Rating,
    measure_confidence,
    missing_fraction,
    rate_nuclei,
    rate_scan,
    summarize_nuclei,
)
from bids_dgmseg.models.structures import Structure

MIN_VOXELS = 20
"""With fewer, one vessel or the noise of a few voxels would shift every nucleus."""

MIN_VOLUME_MM3 = 50.0
"""Two thirds of the smallest nucleus; at 0.5 mm, 20 voxels are less than the error of any label."""

NAMED_FRACTION = 0.01
"""Nuclei that lack this fraction of their voxels are named in a warning; also the limit of an amber rating."""

_ROUNDING_MM = 1e-6
"""Rounding error of affines in float32."""

_NUCLEUS = ["index", "abbreviation"]


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
        inner = ndimage.binary_erosion(padded) & (distance_mm > max(label_size_mm) / 2 + _ROUNDING_MM)
        eroded[boxes[0]] = inner[1:-1, 1:-1, 1:-1]
    return eroded


def describe_erosion(*, voxel_size_mm: tuple[float, float, float], label_size_mm: tuple[float, float, float]) -> str:
    """Describe the depth of `erode_ventricles`.

    >>> describe_erosion(voxel_size_mm=(1.0, 1.0, 2.0), label_size_mm=(3.0, 3.0, 3.0))
    'eroded by 1.5 mm, at least by one voxel'
    """
    depth_mm = max(label_size_mm) / 2
    at_least = ", at least by one voxel" if max(voxel_size_mm) > depth_mm + _ROUNDING_MM else ""
    return f"eroded by {depth_mm:g} mm{at_least}"


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


@dataclass(frozen=True)
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
    r2star_hz: NDArray[np.floating] | None = None
    """R2* in 1/s on the same grid, if it was measured."""

    @cached_property
    def fov(self) -> FieldOfView:
        """Field of view of the map."""
        return FieldOfView.of(is_valid(self.chi.array), voxel_size_mm=self.chi.voxel_size_mm)


@dataclass(frozen=True)
class ScanMeasures:
    """Measures of one scan."""

    stats: pd.DataFrame
    """One row per nucleus (and, if asked for, per pair of sides), columns of `STATS_COLUMNS` in their order."""
    quality: Mapping[str, float]
    """Measures of the map as a whole."""
    rating: Rating
    reasons: tuple[str, ...]
    """Why the rating of the scan is not green, worst first."""
    warnings: tuple[str, ...]
    """Nuclei that are missing, may be cut or lie on the other side, without the name of the scan."""


def measure_scan(
    scan: SegmentedScan,
    *,
    box: Box,
    reference: Reference | None = None,
    map_reference: str = "not stated",
    failed_checks: int | None = None,
    bilateral: bool = False,
) -> ScanMeasures:
    """Measure and rate the nuclei and the map of one scan.

    Parameters
    ----------
    scan : SegmentedScan
        Map and segmentation.
    box : Box
        Box that the localizer found.
    reference : Reference, optional
        Reference region of this run; without it the table has no referenced columns.
    map_reference : str
        Region whose susceptibility is 0 in the map, as stated in its sidecar.
    failed_checks : int, optional
        Number of the plausibility checks that the map fails, if it was reconstructed here.
    bilateral : bool
        Also measure both sides of each nucleus together; rating, quality and warnings of the scan do not change.

    Returns
    -------
    ScanMeasures
        Missing nuclei have NaN in every measure and a red rating.
    """
    inside = scan.fov.inside[scan.block]
    chi = np.where(inside, scan.chi.array[scan.block], np.float32(np.nan))  # nnU-Net also labels voxels outside
    dseg = scan.dseg.array[scan.block]
    size_mm, structures = scan.chi.voxel_size_mm, scan.structures
    coverage = check_coverage(
        scan.dseg,
        structures=structures,
        voxels_pv=scan.probseg.sum(axis=(1, 2, 3), dtype=np.float64),
        valid=is_valid(scan.chi.array),
        labelled=scan.labelled,
    )
    missing = coverage.missing
    r2star_hz = None if scan.r2star_hz is None else scan.r2star_hz[scan.block]
    measure = partial(
        _measure_structures,
        chi,
        r2star_hz=r2star_hz,
        reference=reference,
        fov=scan.fov.crop(scan.block),
        voxel_size_mm=size_mm,
    )
    stats = measure(dseg, scan.probseg, structures=structures, missing=missing)
    nuclei = stats.assign(nucleus=[structure.nucleus for structure in structures])
    stats = nuclei.merge(measure_asymmetry(stats), on="nucleus").drop(columns="nucleus")
    if reference is not None and reference.region == "csf":
        norms = compare_with_norms(stats.assign(mean_ppm=stats["mean_ref_ppm"]), reference="csf")
    else:
        norms = compare_with_norms(stats, reference=parse_reference_region(map_reference))
    stats = stats.merge(norms, on=_NUCLEUS)
    stats = stats.merge(rate_nuclei(stats).replace({"reasons": {"": np.nan}}), on=_NUCLEUS)
    # The main field is along z of the world, even if the slices are oblique.
    x, y, z = (scan.chi.affine[2, :3] / size_mm).tolist()
    quality = {
        **measure_map_quality(scan.chi.array, inside=scan.fov.inside, voxel_size_mm=size_mm, b0_direction=(x, y, z)),
        "box_margin_mm": box_margin(scan.dseg, box),
        **summarize_nuclei(stats),
        **({} if failed_checks is None else {"failed_checks": failed_checks}),
    }
    rating, reasons = rate_scan(quality)
    red = {*stats.loc[stats["rating"] == "red", "abbreviation"], *(stats["abbreviation"] if rating == "red" else ())}
    causes = {name: "the rating is red" for name in red}
    if failed_checks:
        causes = dict.fromkeys(stats["abbreviation"], "the reconstruction of the map failed its checks")
    warnings = [*coverage.warnings, *(_describe_exchange(*pair, causes) for pair in coverage.exchanged)]
    fractions = missing_fraction(stats).set_axis(stats["abbreviation"])
    if named := [f"{name} {fraction:.0%}" for name, fraction in fractions.items() if fraction >= NAMED_FRACTION]:
        shown = ", ".join(named)
        warnings.append(f"voxels without data (NaN or 0) in {shown}; they are excluded from the means, check the map")
    if bilateral:
        stats = insert_bilateral(stats, _measure_bilateral(scan, dseg, stats, measure))
        missing = (*missing, *(name.partition("_")[0] for name in missing))
    kept = {*_NUCLEUS, "name", "hemisphere", "rating", "reasons"}
    stats.loc[stats["abbreviation"].isin(list(missing)), [column for column in stats if column not in kept]] = np.nan
    columns = [column for column in STATS_COLUMNS if column in stats]
    return ScanMeasures(stats[columns], quality, rating, reasons, tuple(warnings))


def _measure_structures(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    *,
    structures: Sequence[Structure],
    r2star_hz: NDArray[np.floating] | None,
    reference: Reference | None,
    fov: FieldOfView,
    voxel_size_mm: tuple[float, float, float],
    missing: Collection[str] = (),
) -> pd.DataFrame:
    """Return the measures of each structure that depend on no other structure."""
    what: dict[str, Any] = {"structures": structures, "voxel_size_mm": voxel_size_mm}
    stats = measure_nuclei(chi, dseg, probseg, missing=missing, **what)
    stats = stats.merge(measure_high_iron(chi, dseg, **what), on=_NUCLEUS)
    if r2star_hz is not None:
        stats = stats.merge(measure_r2star(r2star_hz, chi, dseg, structures=structures), on=_NUCLEUS)
    stats = stats.merge(measure_confidence(chi, dseg, probseg, fov=fov, **what), on=_NUCLEUS)
    return stats if reference is None else add_referenced_columns(stats, reference, voxel_size_mm=voxel_size_mm)


def _measure_bilateral(
    scan: SegmentedScan,
    dseg: NDArray[np.integer],
    sides: pd.DataFrame,
    measure: Callable[..., pd.DataFrame],
) -> pd.DataFrame:
    """Measure both sides of each nucleus together; the rating is the worse of those in the table of the `sides`.

    There is no asymmetry and no z-score, because norms are those of one side.
    """
    joined, nuclei = join_labels(dseg, scan.structures)
    of_nucleus = np.array([one.nucleus for one in scan.structures])
    sums = [scan.probseg[of_nucleus == nucleus.abbreviation].sum(axis=0) for nucleus in nuclei]
    probseg = np.minimum(np.array(sums, np.float32).reshape(len(nuclei), *dseg.shape), 1)
    ratings, reasons = [], []
    for nucleus in nuclei:
        own = sides[of_nucleus == nucleus.abbreviation]
        ratings.append(max(own["rating"], key=RATINGS.index))
        known = own.dropna(subset=["reasons"])
        why = zip(known["abbreviation"], known["reasons"], strict=True)
        reasons.append("; ".join(f"{name}: {reason}" for name, reason in why))
    rows = measure(joined, probseg, structures=nuclei)
    return rows.assign(rating=ratings, reasons=reasons).replace({"reasons": {"": np.nan}})


def _describe_exchange(left: str, right: str, causes: Mapping[str, str]) -> str:
    """Blame the header only for plausible nuclei in a plausible map: in noise they lie anywhere.

    `causes` are other reasons by nucleus.
    """
    cause = causes.get(left) or causes.get(right)
    if not cause:
        return (
            f"{left} lies to the right of {right}: left and right are exchanged; check the map's header and, for an "
            "nnU-Net folder, the axes of its training (orientation in dataset.json)"
        )
    return f"{left} lies to the right of {right}, and {cause}: the segmentation is unreliable; check the map"
