"""All that is measured of one scan: the table of its nuclei, the quality of its map, and the ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.asymmetry import measure_asymmetry
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.measurement.confidence import measure_quality
from bids_dgmseg.measurement.field_of_view import View
from bids_dgmseg.measurement.map_quality import measure_box_margin, measure_scan
from bids_dgmseg.measurement.norms import compare_with_norms, name_region
from bids_dgmseg.measurement.nuclei import measure_high_iron, measure_regions
from bids_dgmseg.measurement.rating import Rating, rate_nuclei, rate_scan
from bids_dgmseg.measurement.reference import Reference, refer
from bids_dgmseg.models.structures import Structure

_NUCLEUS = ["index", "abbreviation"]

_KEPT = (*_NUCLEUS, "name", "hemisphere", "rating", "reasons")


@dataclass(frozen=True)
class Segmented:
    """A map and its segmentation."""

    chi: Volume
    """In ppm, NaN where not measured."""
    dseg: Volume
    """Numbers of structures.tsv, on the same grid."""
    probseg: NDArray[np.float32]
    """Probabilities (C, x, y, z) in `block`, in the order of `structures`."""
    block: tuple[slice, slice, slice]
    """Where in the map; all else is background."""
    structures: Sequence[Structure]
    view: View
    """What the map shows."""


@dataclass(frozen=True)
class Findings:
    """What was measured of a scan."""

    stats: pd.DataFrame
    """One row a nucleus, columns of `STATS_COLUMNS` in their order."""
    quality: Mapping[str, float]
    """Measures of the map as a whole."""
    rating: Rating
    reasons: tuple[str, ...]
    """Why the scan's rating is not green, the worst first."""


def measure_segmentation(
    scan: Segmented, *, box: Box, missing: Sequence[str], reference: Reference | None, map_reference: str
) -> Findings:
    """Measure nuclei and map, and give each its rating.

    Parameters
    ----------
    scan : Segmented
        Map and segmentation.
    box : Box
        What the localizer found.
    missing : sequence of str
        Abbreviations of nuclei that have no value.
    reference : Reference, optional
        What referenced values are relative to; without it the table has none.
    map_reference : str
        Region whose susceptibility is 0 in the map, as its sidecar states it.

    Returns
    -------
    Findings
        Missing nuclei have NaN in every measure and a red rating.
    """
    stats = _measure_nuclei(scan, missing)
    if reference is not None:
        stats = refer(stats, reference, voxel_size_mm=scan.chi.voxel_size_mm)
    stats = stats.merge(_compare_with_norms(stats, reference, map_reference), on=_NUCLEUS)
    stats = stats.merge(rate_nuclei(stats).replace({"reasons": {"": np.nan}}), on=_NUCLEUS)
    quality = {
        **measure_scan(
            scan.chi.array, view=scan.view, voxel_size_mm=scan.chi.voxel_size_mm, b0_direction=_b0_direction(scan.chi)
        ),
        "box_margin_mm": measure_box_margin(scan.dseg, box),
        "red_nuclei_fraction": float((stats["rating"] == "red").mean()),
    }
    rating, reasons = rate_scan(quality, stats["rating"].tolist())
    absent = stats["abbreviation"].isin(list(missing))
    stats.loc[absent, [column for column in stats if column not in _KEPT]] = np.nan
    return Findings(stats[[column for column in STATS_COLUMNS if column in stats]], quality, rating, reasons)


def _measure_nuclei(scan: Segmented, missing: Sequence[str]) -> pd.DataFrame:
    """Measure regions, high-iron parts, signs of a bad segmentation and the difference of the sides."""
    chi, dseg = scan.chi.array[scan.block], scan.dseg.array[scan.block]
    size_mm, structures = scan.chi.voxel_size_mm, scan.structures
    stats = measure_regions(chi, dseg, scan.probseg, structures=structures, voxel_size_mm=size_mm, missing=missing)
    stats = stats.merge(measure_high_iron(chi, dseg, structures=structures, voxel_size_mm=size_mm), on=_NUCLEUS)
    view = scan.view.cut(scan.block)
    stats = stats.merge(
        measure_quality(chi, dseg, scan.probseg, structures=structures, voxel_size_mm=size_mm, view=view), on=_NUCLEUS
    )
    nucleus = [structure.nucleus for structure in structures]
    return stats.assign(nucleus=nucleus).merge(measure_asymmetry(stats), on="nucleus").drop(columns="nucleus")


def _compare_with_norms(stats: pd.DataFrame, reference: Reference | None, map_reference: str) -> pd.DataFrame:
    """Compare CSF-referenced means where there are any, else those of the map with its own reference."""
    if reference is not None and reference.region == "csf":
        return compare_with_norms(stats.assign(mean_ppm=stats["mean_ref_ppm"]), reference="csf")
    return compare_with_norms(stats, reference=name_region(map_reference))


def _b0_direction(chi: Volume) -> tuple[float, float, float]:
    """Give the main field's direction along the grid's axes: it is z of the world, however slices are tilted."""
    x, y, z = (chi.affine[2, :3] / chi.voxel_size_mm).tolist()
    return x, y, z
