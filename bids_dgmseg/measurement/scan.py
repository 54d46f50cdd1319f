"""All measures of one scan: its nuclei, relative to a reference region, the quality of its map, and the QC ratings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.measurement.blobs import Blob, find_blobs, measure_blobs
from bids_dgmseg.measurement.columns import EXCLUSION_COLUMNS, SESSION_COLUMNS, STATS_COLUMNS
from bids_dgmseg.measurement.exclusion import measure_exclusion
from bids_dgmseg.measurement.field_of_view import Coverage, FieldOfView, check_coverage
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
from bids_dgmseg.measurement.placement import measure_head_size, measure_placement, measure_slice_scale
from bids_dgmseg.measurement.rating import (
    RATINGS,
    Rating,
    measure_confidence,
    missing_fraction,
    rate_nuclei,
    rate_scan,
    summarize_nuclei,
)
from bids_dgmseg.measurement.reference_region import Reference, add_referenced_columns
from bids_dgmseg.measurement.segmented_scan import SegmentedScan
from bids_dgmseg.measurement.volume_change import add_session_columns, join_session_columns
from bids_dgmseg.models.structures import Structure, join_parts, whole_of, wholes_of

NAMED_FRACTION = 0.01
"""Nuclei that lack this fraction of their voxels are named in a warning; also the limit of an amber rating."""

_NUCLEUS = ["index", "abbreviation"]

_SIZES = ["n_voxels", "volume_mm3", "volume_pv_mm3"]

_COMPARED_SIZES = ["volume_asymmetry", "volume_pv_asymmetry", "volume_z"]
"""Comparisons of volumes, which have no meaning for the rest of a nucleus."""


_KNOWN_OF_MISSING = {
    *_NUCLEUS,
    *EXCLUSION_COLUMNS,
    "name",
    "hemisphere",
    "edited",
    "automatic_dice",
    "rating",
    "reasons",
}
"""Columns that a missing nucleus has, too."""


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
    brain_ml: float | None = None,
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
    brain_ml : float, optional
        Volume of the brain that the localizer labelled.
    failed_checks : int, optional
        Number of the plausibility checks that the map fails, if it was reconstructed here.
    bilateral : bool
        Add a bilateral row (left and right combined) per nucleus; rating, quality and warnings of the scan do not
        change.

    Returns
    -------
    ScanMeasures
        Missing nuclei have NaN in every measure and a red rating. Nuclei that are labelled in parts follow with the
        measures of the whole.
    """
    found = _measure_labels(scan, reference=reference, map_reference=map_reference, bilateral=bilateral, lacking={})
    quality = _measure_quality(scan, found, box=box, brain_ml=brain_ml, failed_checks=failed_checks)
    rating, reasons = rate_scan(quality)
    stats = found.finished
    if wholes := wholes_of(scan.structures):
        joined = _measure_labels(
            join_scan(scan),
            reference=reference,
            map_reference=map_reference,
            bilateral=bilateral,
            lacking=_find_partial(scan, found.coverage),
        )
        names = {name for one in wholes for name in (one.abbreviation, one.nucleus)}
        rows = joined.finished[joined.finished["abbreviation"].isin(names)].astype({"index": "Int64"})
        rows["index"] = pd.NA
        stats = pd.concat([stats.astype({"index": "Int64"}), rows], ignore_index=True)
    return ScanMeasures(
        stats[[name for name in STATS_COLUMNS if name in stats]],
        quality,
        rating,
        reasons,
        tuple(_warn(found, rating, failed_checks)),
    )


def _find_partial(scan: SegmentedScan, coverage: Coverage) -> dict[str, str]:
    """Return the nuclei of which a part is missing, with the reason for their rating."""
    lacking = {}
    for whole in wholes_of(scan.structures):
        parts = {one.abbreviation for one in scan.structures if whole_of(one) == whole}
        missing = sorted(parts & {*coverage.missing})
        if missing and len(missing) < len(parts):
            lacking[whole.abbreviation] = f"{' and '.join(missing)} not found, so that these are values of the rest"
    return lacking


def join_scan(scan: SegmentedScan) -> SegmentedScan:
    """Return the scan with whole nuclei instead of their parts."""
    structures = tuple(dict.fromkeys(whole_of(one) for one in scan.structures))
    probseg = np.zeros((len(structures), *scan.probseg.shape[1:]), np.float32)
    for part, probability in zip(scan.structures, scan.probseg, strict=True):
        probseg[structures.index(whole_of(part))] += probability
    labelled = {whole_of(one).abbreviation for one in scan.structures if one.abbreviation in scan.labelled}
    edited = scan.edited
    if edited is not None:  # a whole differs as much as the part that differs most
        edited = {
            whole.abbreviation: min(edited[one.abbreviation] for one in parts)
            for whole in structures
            if (parts := [one for one in scan.structures if whole_of(one) == whole and one.abbreviation in edited])
        }
    return replace(
        scan,
        dseg=scan.dseg.with_array(join_parts(scan.dseg.array)),
        probseg=probseg.clip(max=1),
        structures=structures,
        labelled=labelled,
        edited=edited,
    )


@dataclass(frozen=True)
class _LabelMeasures:
    """Measures of the structures of a scan."""

    stats: pd.DataFrame
    """One row per structure, rated; those that are missing have values that mean nothing."""
    finished: pd.DataFrame
    """With bilateral rows, if asked for, and without values of what is missing."""
    coverage: Coverage
    blobs: Sequence[Blob]


def _measure_labels(
    scan: SegmentedScan,
    *,
    reference: Reference | None,
    map_reference: str,
    bilateral: bool,
    lacking: Mapping[str, str],
) -> _LabelMeasures:
    """Measure and rate the structures of a scan; see `measure_scan`. Those of `lacking` are red, with a reason."""
    inside = scan.fov.inside[scan.block]
    chi = np.where(inside, scan.chi.array[scan.block], np.float32(np.nan))  # nnU-Net also labels voxels outside
    dseg, probseg, structures = scan.dseg.array[scan.block], scan.probseg, scan.structures
    exclude = None if scan.exclude is None else scan.exclude[scan.block]
    blobs = find_blobs(scan.chi, scan.dseg, structures=structures, exclude=scan.exclude)
    if scan.edited:  # the probabilities of the network are those of other outlines
        probseg = probseg.copy()
        probseg[[structure.abbreviation in scan.edited for structure in structures]] = np.nan
    coverage = check_coverage(
        scan.dseg,
        structures=structures,
        voxels_pv=probseg.sum(axis=(1, 2, 3), dtype=np.float64),
        valid=is_valid(scan.chi.array),
        labelled=scan.labelled,
    )
    measure = partial(
        _measure_structures,
        chi,
        r2star_hz=None if scan.r2star_hz is None else scan.r2star_hz[scan.block],
        reference=reference,
        fov=scan.fov.crop(scan.block),
        voxel_size_mm=scan.chi.voxel_size_mm,
        exclude=exclude,
    )
    stats = measure(dseg, probseg, structures=structures, missing=coverage.missing)
    stats = stats.merge(measure_placement(scan.dseg, structures=structures), on=_NUCLEUS)
    stats = stats.merge(measure_blobs(blobs, structures=structures), on=_NUCLEUS)
    stats, wholly_excluded = _add_exclusion(stats, exclude, dseg, structures)
    nuclei = stats.assign(nucleus=[structure.nucleus for structure in structures])
    stats = nuclei.merge(measure_asymmetry(stats), on="nucleus").drop(columns="nucleus")
    if reference is not None and reference.region == "csf":
        norms = compare_with_norms(stats.assign(mean_ppm=stats["mean_ref_ppm"]), reference="csf")
    else:
        norms = compare_with_norms(stats, reference=parse_reference_region(map_reference))
    stats = _without_partial_sizes(stats.merge(norms, on=_NUCLEUS))
    if scan.edited is not None:
        stats = stats.merge(_describe_edits(scan.edited, structures), on=_NUCLEUS)
    stats = add_session_columns(stats, scan.session_volumes)
    stats = stats.merge(rate_nuclei(stats).replace({"reasons": {"": np.nan}}), on=_NUCLEUS)
    stats = _rate_rests(stats, lacking)
    finished, missing = stats.copy(), {*coverage.missing, *wholly_excluded}
    if bilateral:
        finished = insert_bilateral(stats, _measure_bilateral(scan, dseg, probseg, stats, measure))
        missing |= {name.partition("_")[0] for name in missing}
    measured = [column for column in finished if column not in _KNOWN_OF_MISSING]
    finished.loc[finished["abbreviation"].isin(missing), measured] = np.nan
    return _LabelMeasures(stats, finished, coverage, blobs)


def _rate_rests(stats: pd.DataFrame, lacking: Mapping[str, str]) -> pd.DataFrame:
    """Rate nuclei without one of their parts red, with the reason as the first."""
    reasons = [
        "; ".join(filter(None, (lacking.get(name, ""), "" if pd.isna(own) else str(own)))) or np.nan
        for name, own in zip(stats["abbreviation"], stats["reasons"], strict=True)
    ]
    return stats.assign(rating=stats["rating"].mask(stats["abbreviation"].isin([*lacking]), "red"), reasons=reasons)


def _measure_quality(
    scan: SegmentedScan, found: _LabelMeasures, *, box: Box, brain_ml: float | None, failed_checks: int | None
) -> dict[str, float]:
    """Measure the map as a whole."""
    # The main field is along z of the world, even if the slices are oblique.
    size_mm, structures = scan.chi.voxel_size_mm, scan.structures
    x, y, z = (scan.chi.affine[2, :3] / size_mm).tolist()
    return {
        **measure_map_quality(scan.chi.array, inside=scan.fov.inside, voxel_size_mm=size_mm, b0_direction=(x, y, z)),
        "box_margin_mm": box_margin(scan.dseg, box),
        "head_size": measure_head_size(scan.dseg, structures=structures),
        "slice_scale": measure_slice_scale(scan.dseg, structures=structures),
        **({} if brain_ml is None else {"brain_volume_ml": brain_ml}),
        **summarize_nuclei(found.stats),
        "n_blobs": len(found.blobs),
        **({} if failed_checks is None else {"failed_checks": failed_checks}),
    }


def _warn(found: _LabelMeasures, rating: Rating, failed_checks: int | None) -> Iterator[str]:
    """Describe nuclei that are missing, may be cut or lie on the other side, blobs and missing data."""
    names = found.stats["abbreviation"]
    red = names[(found.stats["rating"] == "red") | (rating == "red")]
    causes = dict.fromkeys(red, "the rating is red")
    if failed_checks:
        causes = dict.fromkeys(names, "the reconstruction of the map failed its checks")
    yield from found.coverage.warnings
    yield from (_describe_exchange(*pair, causes) for pair in found.coverage.exchanged)
    yield from (blob.describe() for blob in found.blobs)
    fractions = missing_fraction(found.stats).set_axis(names)
    if named := [f"{name} {fraction:.0%}" for name, fraction in fractions.items() if fraction >= NAMED_FRACTION]:
        shown = ", ".join(named)
        yield f"voxels without data (NaN or 0) in {shown}; they are excluded from the means, check the map"


def _add_exclusion(
    stats: pd.DataFrame, exclude: NDArray[np.bool_] | None, dseg: NDArray[np.integer], structures: Sequence[Structure]
) -> tuple[pd.DataFrame, list[str]]:
    """Add the excluded fractions, and return the nuclei without any other voxel, which have no measure."""
    if exclude is None:
        return stats, []
    stats = stats.merge(measure_exclusion(exclude, dseg, structures=structures), on=_NUCLEUS)
    whole = stats["excluded_fraction"] == 1  # else they would be rated as nuclei that fill no voxel
    stats[_SIZES] = stats[_SIZES].mask(whole)
    return stats, list(stats.loc[whole, "abbreviation"])


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
    exclude: NDArray[np.bool_] | None,
    missing: Collection[str] = (),
) -> pd.DataFrame:
    """Return the measures of each structure that depend on no other structure.

    Excluded voxels are left out, except from what describes the outlines.
    """
    what: dict[str, Any] = {"structures": structures, "voxel_size_mm": voxel_size_mm}
    measured, weights = dseg, probseg
    if exclude is not None:
        chi = np.where(exclude, np.float32(np.nan), chi)
        measured, weights = np.where(exclude, 0, dseg), np.where(exclude, np.float32(0), probseg)
    stats = measure_nuclei(chi, measured, weights, missing=missing, **what)
    stats = stats.merge(measure_high_iron(chi, measured, **what), on=_NUCLEUS)
    if r2star_hz is not None:
        stats = stats.merge(measure_r2star(r2star_hz, chi, measured, structures=structures), on=_NUCLEUS)
    stats = stats.merge(measure_confidence(chi, dseg, probseg, fov=fov, **what), on=_NUCLEUS)
    return stats if reference is None else add_referenced_columns(stats, reference, voxel_size_mm=voxel_size_mm)


def _measure_bilateral(
    scan: SegmentedScan,
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    sides: pd.DataFrame,
    measure: Callable[..., pd.DataFrame],
) -> pd.DataFrame:
    """Measure each nucleus bilaterally; the rating is the worse of those in the table of the `sides`.

    There is no asymmetry and no z-score, because norms are those of one side.
    """
    joined, nuclei = join_labels(dseg, scan.structures)
    of_nucleus = np.array([one.nucleus for one in scan.structures])
    sums = [probseg[of_nucleus == nucleus.abbreviation].sum(axis=0) for nucleus in nuclei]
    joint = np.minimum(np.array(sums, np.float32).reshape(len(nuclei), *dseg.shape), 1)
    ratings, reasons = [], []
    for nucleus in nuclei:
        own = sides[of_nucleus == nucleus.abbreviation]
        ratings.append(max(own["rating"], key=RATINGS.index))
        known = own.dropna(subset=["reasons"])
        why = zip(known["abbreviation"], known["reasons"], strict=True)
        reasons.append("; ".join(f"{name}: {reason}" for name, reason in why))
    rows = measure(joined, joint, structures=nuclei)
    if scan.session_volumes is not None:
        joint_volumes = [join_session_columns(sides[of_nucleus == nucleus.abbreviation]) for nucleus in nuclei]
        rows[list(SESSION_COLUMNS)] = np.array(joint_volumes).reshape(-1, len(SESSION_COLUMNS))
    if scan.exclude is not None:
        excluded = measure_exclusion(scan.exclude[scan.block], joined, structures=nuclei)
        rows["excluded_fraction"] = excluded["excluded_fraction"]
    if "edited" in sides:
        rows["edited"] = [sides.loc[of_nucleus == nucleus.abbreviation, "edited"].max() for nucleus in nuclei]
    return rows.assign(rating=ratings, reasons=reasons).replace({"reasons": {"": np.nan}})


def _describe_edits(edited: Mapping[str, float], structures: Sequence[Structure]) -> pd.DataFrame:
    """Return which nuclei were edited by hand, and how much they differ from the automatic labels."""
    return pd.DataFrame(
        {
            "index": [one.index for one in structures],
            "abbreviation": [one.abbreviation for one in structures],
            "edited": [int(one.abbreviation in edited) for one in structures],
            "automatic_dice": [edited.get(one.abbreviation, 1.0) for one in structures],
        }
    )


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
