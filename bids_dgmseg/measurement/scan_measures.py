"""All measures of one scan: its nuclei, relative to a reference region, the quality of its map, and the QC ratings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.image.masks import ROUNDING_MM, is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.map_quality import Blob, find_blobs, measure_blobs, measure_map_quality
from bids_dgmseg.measurement.nuclei import (
    BLOB_COLUMNS,
    EXCLUSION_COLUMNS,
    PLACEMENT_COLUMNS,
    STATS_COLUMNS,
    add_session_columns,
    compare_with_norms,
    measure_asymmetry,
    measure_high_iron,
    measure_nuclei,
    measure_r2star,
    measure_uncertainty,
    parse_reference_region,
    unindex_joined,
)
from bids_dgmseg.measurement.rating import (
    RATINGS,
    Rating,
    measure_confidence,
    measure_head_size,
    measure_placement,
    measure_slice_scale,
    missing_fraction,
    rate_nuclei,
    rate_scan,
    summarize_nuclei,
)
from bids_dgmseg.measurement.segmented_scan import (
    Coverage,
    Reference,
    SegmentedScan,
    add_referenced_columns,
    check_coverage,
    measure_lesions,
)
from bids_dgmseg.models.structures import Structure, with_wholes

NAMED_FRACTION = 0.01
"""Nuclei that lack this fraction of their voxels are named in a warning; also the limit of an amber rating."""

LARGE_EDGE_MM = 2.5
"""Voxels with a longer edge, or thicker slices, are named in a warning."""

_SIZES = ["n_voxels", "volume_mm3", "volume_pv_mm3"]

_COMPARED_SIZES = ["volume_asymmetry", "volume_pv_asymmetry", "volume_z"]
"""Comparisons of volumes, which have no meaning for the rest of a nucleus."""

_OF_ONE_SIDE = {*PLACEMENT_COLUMNS, *BLOB_COLUMNS, "automatic_dice"}
"""Columns that both sides of a nucleus together do not have."""

_KNOWN_OF_MISSING = {
    *("index", "name", "abbreviation", "hemisphere", "edited", "automatic_dice", "rating", "reasons"),
    *EXCLUSION_COLUMNS,
}
"""Columns that a missing nucleus has, too."""


@dataclass(frozen=True)
class ScanMeasures:
    """Measures of one scan."""

    stats: pd.DataFrame
    """One row per structure, columns of `STATS_COLUMNS` in their order."""
    quality: Mapping[str, float]
    """Measures of the map as a whole."""
    rating: Rating
    reasons: tuple[str, ...]
    """Why the rating of the scan is not green, worst first."""
    warnings: tuple[str, ...]
    """Nuclei that are missing, may be cut or lie on the other side, without the name of the scan."""


def measure_scan(
    scan: SegmentedScan,
    structures: Sequence[Structure],
    *,
    reference: Reference | None = None,
    map_reference: str = "not stated",
    facts: Mapping[str, float] | None = None,
) -> ScanMeasures:
    """Measure and rate the nuclei and the map of one scan.

    Parameters
    ----------
    scan : SegmentedScan
        Map and segmentation.
    structures : sequence of Structure
        Rows of the table: the structures of the scan and, as sets of their labels, nuclei that are labelled in parts
        (`bids_dgmseg.models.structures.with_wholes`) or both sides together (`with_pairs`). Rating, quality and
        warnings of the scan do not depend on the latter.
    reference : Reference, optional
        Reference region of this run; without it the table has no referenced columns.
    map_reference : str
        Region whose susceptibility is 0 in the map, as stated in its sidecar.
    facts : mapping of str to float, optional
        Other measures that are rated: ``brain_volume_ml`` (as the localizer labelled it), ``failed_checks`` (number of
        plausibility checks that a map reconstructed here fails), ``years_beyond_training`` (distance of the age from
        those that the model was made for).

    Returns
    -------
    ScanMeasures
        Missing nuclei have NaN in every measure and a red rating; so do both sides together if one is missing.
    """
    probseg = _join_probabilities(scan, structures)
    sums = probseg.sum(axis=(1, 2, 3), dtype=np.float64)
    voxels_pv = {structure.abbreviation: voxels for structure, voxels in zip(structures, sums, strict=True)}
    coverage = check_coverage(
        scan.dseg,
        structures=scan.structures,
        voxels_pv=np.array([voxels_pv[structure.abbreviation] for structure in scan.structures]),
        valid=is_valid(scan.chi.array),
        labelled=scan.labelled,
    )
    missing = _find_missing(structures, coverage.missing)
    blobs = find_blobs(scan.chi, scan.dseg, structures=scan.structures, lesions=scan.lesions)
    stats = _measure_structures(scan, structures, probseg, reference=reference, missing=missing)
    for table in (_measure_places(scan.dseg, structures), measure_blobs(blobs, structures=structures)):
        stats = stats.merge(table, on="abbreviation")
    if scan.lesions is not None:
        dseg = scan.dseg.array[scan.block]
        stats = stats.merge(measure_lesions(scan.lesions[scan.block], dseg, structures=structures), on="abbreviation")
        covered = stats["excluded_fraction"] == 1  # else they would be rated as nuclei that fill no voxel
        stats[_SIZES] = stats[_SIZES].mask(covered)
        missing |= _find_missing(structures, stats.loc[covered, "abbreviation"])
    stats = stats.merge(measure_asymmetry(stats), on="abbreviation")
    is_csf = reference is not None and reference.region == "csf"
    compared = stats.assign(mean_ppm=stats["mean_ref_ppm"]) if is_csf else stats
    region = "csf" if is_csf else parse_reference_region(map_reference)
    stats = _without_partial_sizes(stats.merge(compare_with_norms(compared, reference=region), on="abbreviation"))
    if scan.proof is not None:
        stats = stats.join(scan.proof, on="abbreviation")
    if scan.edited is not None:
        stats = stats.join(_describe_edits(scan.edited, structures))
    stats = _rate_structures(add_session_columns(stats, scan.session_volumes, structures), structures, coverage.missing)
    is_single = stats["abbreviation"].isin([structure.abbreviation for structure in scan.structures])
    singles = stats[is_single]
    quality = {**_measure_quality(scan, singles), "n_blobs": len(blobs), **(facts or {})}
    rating, reasons = rate_scan(quality)
    warnings = tuple(_warn(singles, coverage, blobs, rating, quality))
    measured = [column for column in stats if column not in _KNOWN_OF_MISSING]
    stats.loc[stats["abbreviation"].isin(missing), measured] = np.nan
    stats.loc[stats["hemisphere"].isna(), [column for column in stats if column in _OF_ONE_SIDE]] = np.nan
    stats = unindex_joined(stats, structures)
    return ScanMeasures(stats[[name for name in STATS_COLUMNS if name in stats]], quality, rating, reasons, warnings)


def _join_probabilities(scan: SegmentedScan, structures: Sequence[Structure]) -> NDArray[np.float32]:
    """Return the probability (C, x, y, z) of each structure, summed over its labels; NaN if one was edited."""
    channels = {}
    for structure, probability in zip(scan.structures, scan.probseg, strict=True):
        is_edited = scan.edited and structure.abbreviation in scan.edited  # the network's are of another outline
        channels[structure.index] = np.full_like(probability, np.nan) if is_edited else probability
    joined = [
        np.minimum(sum(channels[label] for label in structure.labels), 1)
        if structure.members
        else channels[structure.index]
        for structure in structures
    ]
    return np.array(joined, np.float32).reshape(len(structures), *scan.probseg.shape[1:])


def _find_missing(structures: Sequence[Structure], names: Collection[str]) -> set[str]:
    """Find the structures without a value: both sides together if one is missing, whole nuclei if all parts are."""
    missing = {*names}
    for structure in structures:
        is_missing = [member.abbreviation in missing for member in structure.members]
        if is_missing and (all(is_missing) if structure.hemisphere else any(is_missing)):
            missing.add(structure.abbreviation)
    return missing


def _measure_structures(
    scan: SegmentedScan,
    structures: Sequence[Structure],
    probseg: NDArray[np.float32],
    *,
    reference: Reference | None,
    missing: Collection[str],
) -> pd.DataFrame:
    """Return the measures of each structure that depend on no other structure.

    Lesions are left out, except from what describes the outlines.
    """
    inside, dseg = scan.fov.inside[scan.block], scan.dseg.array[scan.block]
    chi = np.where(inside, scan.chi.array[scan.block], np.float32(np.nan))  # nnU-Net also labels voxels outside
    what: dict[str, Any] = {"structures": structures, "voxel_size_mm": scan.chi.voxel_size_mm}
    measured, weights = dseg, probseg
    if scan.lesions is not None:
        lesions = scan.lesions[scan.block]
        chi = np.where(lesions, np.float32(np.nan), chi)
        measured, weights = np.where(lesions, 0, dseg), np.where(lesions, np.float32(0), probseg)
    tables = [measure_high_iron(chi, measured, **what)]
    if scan.r2star_per_s is not None:
        r2star = scan.r2star_per_s[scan.block]
        parts = [part[scan.block] for part in scan.parts_ppm]
        tables.append(measure_r2star(r2star, chi, measured, structures=structures, parts_ppm=parts))
        if scan.changes_ppm is not None and scan.noise_sd:
            changes = scan.changes_ppm[(slice(None), *scan.block)]
            tables.append(measure_uncertainty(changes, scan.noise_sd, r2star, chi, measured, structures=structures))
    tables.append(measure_confidence(chi, dseg, probseg, fov=scan.fov.crop(scan.block), **what))
    stats = measure_nuclei(chi, measured, weights, missing=missing, **what)
    for table in tables:
        stats = stats.merge(table, on="abbreviation")
    if reference is None:
        return stats
    return add_referenced_columns(stats, reference, voxel_size_mm=scan.chi.voxel_size_mm)


def _measure_places(dseg: Volume, structures: Sequence[Structure]) -> pd.DataFrame:
    """Measure the placement of the structures of one side."""
    single = with_wholes([structure for structure in structures if not structure.members])
    places = measure_placement(dseg, structures=single).set_index("abbreviation")
    return places.reindex([structure.abbreviation for structure in structures]).reset_index()


def _rate_structures(stats: pd.DataFrame, structures: Sequence[Structure], missing: Collection[str]) -> pd.DataFrame:
    """Rate all structures; both sides of a nucleus together as the worse of them, a rest of parts red."""
    rated = rate_nuclei(stats).set_index("abbreviation")
    for structure in structures:
        name, parts = structure.abbreviation, [member.abbreviation for member in structure.members]
        if parts and not structure.hemisphere:
            sides = rated.loc[parts]
            reasons = [f"{side}: {reason}" for side, reason in sides["reasons"].items() if reason]
            rated.loc[name] = [max(sides["rating"], key=RATINGS.index), "; ".join(reasons)]
        elif 0 < len(lost := sorted({*parts} & {*missing})) < len(parts):
            reason = f"{' and '.join(lost)} not found, so that these are values of the rest"
            rated.loc[name] = ["red", "; ".join(filter(None, (reason, str(rated.at[name, "reasons"]))))]
    return stats.join(rated.replace({"reasons": {"": np.nan}}), on="abbreviation")


def _measure_quality(scan: SegmentedScan, stats: pd.DataFrame) -> dict[str, float]:
    """Measure the map as a whole."""
    # The main field is along z of the world, even if the slices are oblique.
    size_mm, structures = scan.chi.voxel_size_mm, scan.structures
    x, y, z = (scan.chi.affine[2, :3] / size_mm).tolist()
    return {
        **measure_map_quality(scan.chi.array, inside=scan.fov.inside, voxel_size_mm=size_mm, b0_direction=(x, y, z)),
        "head_size": measure_head_size(scan.dseg, structures=structures),
        "slice_scale": measure_slice_scale(scan.dseg, structures=structures),
        "longest_edge_mm": max(size_mm),
        "shortest_edge_mm": min(size_mm),
        **summarize_nuclei(stats),
    }


def _warn(
    stats: pd.DataFrame, coverage: Coverage, blobs: Sequence[Blob], rating: Rating, quality: Mapping[str, float]
) -> Iterator[str]:
    """Describe nuclei that are missing, may be cut or lie on the other side, blobs, missing data and large voxels."""
    names = stats["abbreviation"]
    doubtful = {*names[(stats["rating"] == "red") | (rating == "red") | bool(quality.get("failed_checks"))]}
    yield from coverage.warnings
    for left, right in coverage.exchanged:  # in noise, or in an implausible map, nuclei lie anywhere
        cause = (
            ", and the rating is red or the map failed its checks: the segmentation is unreliable; check the map"
            if doubtful & {left, right}
            else ": left and right are exchanged; check the map's header and, for an nnU-Net folder, the axes of its "
            "training (orientation in dataset.json)"
        )
        yield f"{left} lies to the right of {right}{cause}"
    yield from (blob.describe() for blob in blobs)
    fractions = missing_fraction(stats).set_axis(names)
    if named := [f"{name} {fraction:.0%}" for name, fraction in fractions.items() if fraction >= NAMED_FRACTION]:
        shown = ", ".join(named)
        yield f"missing data (NaN or 0) in {shown}; excluded from the means, check the map"
    if (edge_mm := quality["longest_edge_mm"]) > LARGE_EDGE_MM + ROUNDING_MM:
        yield f"voxels or slices of {edge_mm:.3g} mm: partial volume changes means and volumes of small nuclei"
    if quality.get("years_beyond_training"):
        yield "the age in participants.tsv is outside the model's training range; check the labels"


def _without_partial_sizes(stats: pd.DataFrame) -> pd.DataFrame:
    """Remove comparisons of the volumes of nuclei of which, or of whose other side, voxels were excluded."""
    if "excluded_fraction" not in stats:
        return stats
    partial_size = stats["excluded_fraction"] > 0
    nuclei = stats["abbreviation"].str.partition("_")[0]
    partial_pair = partial_size.groupby(nuclei).transform("any")
    changed = {name: stats[name].mask(partial_size if name == "volume_z" else partial_pair) for name in _COMPARED_SIZES}
    return stats.assign(**changed)


def describe_measures(measures: ScanMeasures, reference: Reference | None = None) -> dict[str, Any]:
    """Return the rating of a scan, the quality of its map and the reference region, as in the QC record."""
    values: dict[str, Any] = {"rating": measures.rating, "reasons": list(measures.reasons), **measures.quality}
    if reference is not None:
        region = asdict(reference) | {"sem_ppm": reference.sem_ppm}
        keys = ("region", "source", "mean_ppm", "std_ppm", "sem_ppm", "n_voxels")
        values["reference"] = {key: region[key] for key in keys}
    return values


def _describe_edits(edited: Mapping[str, float], structures: Sequence[Structure]) -> pd.DataFrame:
    """Return which structures were edited by hand, and how much the part that differs most does."""
    names = {structure.index: structure.abbreviation for structure in structures if not structure.members}
    dice = [[edited[names[label]] for label in row.labels if names[label] in edited] for row in structures]
    rows = [(int(bool(values)), min(values, default=1.0)) for values in dice]
    return pd.DataFrame(rows, columns=["edited", "automatic_dice"])
