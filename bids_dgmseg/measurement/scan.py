"""All measures of one scan: the table of its nuclei, the quality of its map, and the QC ratings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.measurement.confidence import measure_confidence
from bids_dgmseg.measurement.field_of_view import FieldOfView, check_coverage
from bids_dgmseg.measurement.map_quality import box_margin, measure_map_quality
from bids_dgmseg.measurement.norms import compare_with_norms, parse_reference_region
from bids_dgmseg.measurement.nuclei import measure_asymmetry, measure_high_iron, measure_nuclei
from bids_dgmseg.measurement.rating import Rating, rate_nuclei, rate_scan
from bids_dgmseg.measurement.reference import Reference, add_referenced_columns
from bids_dgmseg.models.structures import Structure

_NUCLEUS = ["index", "abbreviation"]


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

    @cached_property
    def fov(self) -> FieldOfView:
        """Field of view of the map."""
        return FieldOfView.of(is_valid(self.chi.array), voxel_size_mm=self.chi.voxel_size_mm)


@dataclass(frozen=True)
class ScanMeasures:
    """Measures of one scan."""

    stats: pd.DataFrame
    """One row per nucleus, columns of `STATS_COLUMNS` in their order."""
    quality: Mapping[str, float]
    """Measures of the map as a whole."""
    rating: Rating
    reasons: tuple[str, ...]
    """Why the rating of the scan is not green, worst first."""
    warnings: tuple[str, ...]
    """Nuclei that are missing or may be cut, without the name of the scan."""


def measure_scan(
    scan: SegmentedScan, *, box: Box, reference: Reference | None = None, map_reference: str = "not stated"
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

    Returns
    -------
    ScanMeasures
        Missing nuclei have NaN in every measure and a red rating.
    """
    chi, dseg = scan.chi.array[scan.block], scan.dseg.array[scan.block]
    size_mm, structures = scan.chi.voxel_size_mm, scan.structures
    coverage = check_coverage(
        scan.dseg,
        structures=structures,
        voxels_pv=scan.probseg.sum(axis=(1, 2, 3), dtype=np.float64),
        valid=is_valid(scan.chi.array),
        labelled=scan.labelled,
    )
    missing = coverage.missing
    stats = measure_nuclei(chi, dseg, scan.probseg, structures=structures, voxel_size_mm=size_mm, missing=missing)
    stats = stats.merge(measure_high_iron(chi, dseg, structures=structures, voxel_size_mm=size_mm), on=_NUCLEUS)
    confidence = measure_confidence(
        chi, dseg, scan.probseg, structures=structures, voxel_size_mm=size_mm, fov=scan.fov.crop(scan.block)
    )
    stats = stats.merge(confidence, on=_NUCLEUS)
    nuclei = stats.assign(nucleus=[structure.nucleus for structure in structures])
    stats = nuclei.merge(measure_asymmetry(stats), on="nucleus").drop(columns="nucleus")
    if reference is not None:
        stats = add_referenced_columns(stats, reference, voxel_size_mm=size_mm)
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
        "red_nuclei_fraction": float((stats["rating"] == "red").mean()),
    }
    rating, reasons = rate_scan(quality, stats["rating"].tolist())
    kept = {*_NUCLEUS, "name", "hemisphere", "rating", "reasons"}
    stats.loc[stats["abbreviation"].isin(list(missing)), [column for column in stats if column not in kept]] = np.nan
    columns = [column for column in STATS_COLUMNS if column in stats]
    return ScanMeasures(stats[columns], quality, rating, reasons, coverage.warnings)
