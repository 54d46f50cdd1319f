"""Measures of nuclei: volume and its change, susceptibility, asymmetry, z-scores; the columns of ``_stats.tsv``."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.masks import ROUNDING_MM, share_covered
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import DataDictionary, read_data_dictionaries
from bids_dgmseg.models.structures import Structure, with_wholes

_DICTIONARIES = read_data_dictionaries("stats")

STATS_COLUMNS: DataDictionary = {name: entry for table in _DICTIONARIES.values() for name, entry in table.items()}
"""All columns of ``_stats.tsv``, in order."""

NUCLEUS_COLUMNS = _DICTIONARIES["nucleus"]
"""Columns of `measure_nuclei`, in order."""

HIGH_IRON_COLUMNS = _DICTIONARIES["high_iron"]
"""Columns of `measure_high_iron`."""

R2STAR_COLUMNS = _DICTIONARIES["r2star"]
"""Columns of `measure_r2star`; present if the map is made of several echoes."""

UNCERTAINTY_COLUMNS = _DICTIONARIES["uncertainty"]
"""Columns of `measure_uncertainty`; present if the map is made of several echoes."""

REFERENCE_COLUMNS = _DICTIONARIES["reference"]
"""Columns of `bids_dgmseg.measurement.segmented_scan`; present if a reference region was requested."""

CONFIDENCE_COLUMNS = _DICTIONARIES["confidence"]
"""Columns of `bids_dgmseg.measurement.rating`."""

PLACEMENT_COLUMNS = _DICTIONARIES["placement"]
"""Columns of `bids_dgmseg.measurement.rating.measure_placement`."""

SESSION_COLUMNS = _DICTIONARIES["sessions"]
"""Columns of `bids_dgmseg.measurement.nuclei`, of scans that were labelled together with other sessions."""

PROOF_COLUMNS = _DICTIONARIES["proof"]
"""Columns of `bids_dgmseg.measurement.proof`; present if the scan was proved."""

EXCLUSION_COLUMNS = _DICTIONARIES["excluded"]
"""Columns of scans of which voxels were excluded by a mask."""

BLOB_COLUMNS = _DICTIONARIES["blobs"]
"""Columns of `bids_dgmseg.measurement.map_quality.measure_blobs`."""

SAMPLED_MEASURES: Mapping[str, str] = {"mean": "Mean", "median": "Median", "std": "Standard deviation (n - 1)"}
"""Measures of further maps in the nuclei."""

_SAMPLED = re.compile(rf"(.+)_(n_valid|{'|'.join(SAMPLED_MEASURES)})(?:_([a-z0-9_]+))?")


def describe_sampled(column: str) -> Mapping[str, str] | None:
    """Return the data dictionary entry of a measure of a further map; None if the column is none.

    >>> describe_sampled("R2starmap_mean_per_s")
    {'Description': 'Mean of R2starmap over the valid voxels of the nucleus', 'Units': '1/s'}
    """
    match = _SAMPLED.fullmatch(column)
    if column in STATS_COLUMNS or not match:
        return None
    name, measure, unit = match.groups()
    if measure == "n_valid":
        return {"Description": f"Voxels of the nucleus with a value of {name}"}
    shown = f"{name} (|chi-|, positive)" if name.startswith("diamagnetic_") else name
    units = {"Units": spell_unit(unit)} if unit else {}
    return {"Description": f"{SAMPLED_MEASURES[measure]} of {shown} over the valid voxels of the nucleus", **units}


def spell_unit(unit: str) -> str:
    """Return a unit at the end of a column's name as it is read.

    >>> spell_unit("per_s"), spell_unit("ml_per_100g_per_min"), spell_unit("ppm")
    ('1/s', 'ml/100g/min', 'ppm')
    """
    return unit.replace("_per_", "/").replace("per_", "1/")


ASYMMETRY_OF: Mapping[str, str] = {
    "volume_mm3": "volume_asymmetry",
    "volume_pv_mm3": "volume_pv_asymmetry",
    "mean_ppm": "mean_ppm_asymmetry",
    "mean_pv_ppm": "mean_pv_ppm_asymmetry",
}
"""Measure → column of its asymmetry index."""

REFERENCED: Mapping[str, str] = {
    name.replace("_ref_ppm", "_ppm"): name for name in REFERENCE_COLUMNS if name.endswith("_ref_ppm")
}
"""Susceptibility → the same relative to the reference region."""

Z_SCORE_OF: Mapping[str, str] = {"volume_mm3": "volume_z", "mean_ppm": "mean_ppm_z"}
"""Measure → column of its z-score."""

CORE_DEPTH_MM = 1.0
"""Approximate depth to which partial volume and blurring reach."""

CORE_DEPTH_EDGES = 1.2
"""Erodes at least one layer along the short edges of a voxel, and none along edges that are 1.2 times longer."""

_LARGEST_COMPACT = 100_000

_OF_PROBABILITIES = {"mean_probability", "volume_pv_mm3", "mean_pv_ppm"}

HIGH_IRON_SDS = 1.0
"""The high-iron region lies this many standard deviations above the mean of the nucleus."""


def measure_nuclei(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating] | None = None,
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
    missing: Collection[str] = (),
) -> pd.DataFrame:
    r"""Measure volume and susceptibility of each nucleus on the grid of the map.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Susceptibility in ppm, NaN where not valid; 0 is a valid value.
    dseg : ndarray of int, shape (X, Y, Z)
        Integers of ``structures.tsv``; 0 is background.
    probseg : ndarray of shape (C, X, Y, Z), optional
        Probability of nucleus ``structures[c]``, from 0 to 1.
    structures : sequence of C Structure
        In the order of the channels and of the rows.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    missing : collection of str
        Abbreviations of nuclei that were not found; all their measures are missing.

    Returns
    -------
    DataFrame
        One row per nucleus, the columns of `NUCLEUS_COLUMNS`; without `probseg` those of probabilities are left out. A
        nucleus without voxels has volume 0 and NaN for its
        susceptibilities; a single voxel has no ``std_ppm``. ``n_voxels`` and ``n_valid`` are ``Int64``, so that they
        can be missing.

    Notes
    -----
    With voxel volume :math:`v`, susceptibility :math:`\chi_i`, probabilities :math:`p_{ci}`, the voxels
    :math:`R_c` of the nucleus in `dseg`, and the valid voxels :math:`M`:

    .. math::

       \text{volume} &= v\,|R_c| & \text{volume\_pv} &= v \sum_i p_{ci} \\
       \text{mean} &= \sum_{R_c \cap M} \chi_i / |R_c \cap M| &
       \text{mean\_pv} &= \sum_M p_{ci}\chi_i / \sum_M p_{ci} \\
       \text{mass} &= v \sum_{R_c \cap M} \chi_i & \text{mean\_probability} &= \sum_{R_c} p_{ci} / |R_c|

    ``std`` is the sample standard deviation (:math:`n - 1`), percentiles interpolate linearly between order
    statistics, and ``core_mean`` is the mean over `core_mask`. Volumes include voxels that are not valid.
    """
    rows = []
    for channel, (structure, (box, region)) in enumerate(zip(structures, find_regions(dseg, structures), strict=True)):
        row: dict[str, object] = {
            "index": structure.index,
            "name": structure.name,
            "abbreviation": structure.abbreviation,
            "hemisphere": structure.hemisphere or np.nan,
        }
        if structure.abbreviation not in missing:
            row |= _label_measures(chi[box], region, voxel_size_mm)
            if probseg is not None:
                row |= _probability_measures(chi, probseg[channel], box, region, voxel_size_mm)
        rows.append(row)
    columns = [name for name in NUCLEUS_COLUMNS if probseg is not None or name not in _OF_PROBABILITIES]
    return pd.DataFrame(rows, columns=columns).astype({"n_voxels": "Int64", "n_valid": "Int64"})


def find_regions(
    dseg: NDArray[np.integer], structures: Sequence[Structure]
) -> list[tuple[tuple[slice, ...], NDArray[np.bool_]]]:
    """Find the bounding box of each structure, empty if it does not occur, and its voxels inside the box."""
    numbers = np.unique([number for structure in structures for number in structure.labels]).astype(np.int64)
    compact, values = dseg, numbers
    if numbers.size and (numbers[0] < 1 or numbers[-1] > _LARGEST_COMPACT):  # scipy has one box up to the largest
        positions = np.searchsorted(numbers, dseg).clip(max=len(numbers) - 1)
        compact, values = np.where(numbers[positions] == dseg, positions + 1, 0), np.arange(1, len(numbers) + 1)
    boxes = ndimage.find_objects(compact, max_label=int(values.max(initial=0))) if numbers.size else []
    box_of = {int(number): boxes[value - 1] for number, value in zip(numbers, values, strict=True)}
    regions = []
    for structure in structures:
        pieces = [box_of[number] for number in structure.labels if box_of[number]] or [(slice(0, 0),) * 3]
        axes = zip(*pieces, strict=True)
        box = tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in axes)
        regions.append((box, np.isin(dseg[box], structure.labels)))
    return regions


def unindex_joined(stats: pd.DataFrame, structures: Sequence[Structure]) -> pd.DataFrame:
    """Remove the index of structures of several labels; tables without any are not changed."""
    is_joined = np.array([bool(structure.members) for structure in structures])
    return stats.assign(index=stats["index"].astype("Int64").mask(is_joined)) if is_joined.any() else stats


def core_mask(region: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Erode a nucleus to its core, free of partial volume.

    A voxel remains if every voxel outside the region (and outside the array) is farther from it, centre to centre, than
    1 mm and than 1.2 times the shortest edge. On isotropic voxels of 0.85 mm and more this is an erosion by one layer
    of face neighbours; thick slices are eroded in-plane only.
    """
    if not region.any():
        return region.copy()
    depth_mm = max(CORE_DEPTH_MM, CORE_DEPTH_EDGES * min(voxel_size_mm)) + ROUNDING_MM
    distance_mm = ndimage.distance_transform_edt(np.pad(region, 1), sampling=voxel_size_mm)
    return np.asarray(distance_mm[1:-1, 1:-1, 1:-1] > depth_mm)


def _label_measures(
    chi: NDArray[np.floating], region: NDArray[np.bool_], voxel_size_mm: tuple[float, float, float]
) -> Mapping[str, float]:
    """Measures over the voxels of one label; both arrays are cropped to its bounding box."""
    voxel_mm3 = float(np.prod(voxel_size_mm))
    n_voxels = int(np.count_nonzero(region))
    valid = np.isfinite(chi)
    values = chi[region & valid].astype(np.float64)
    row = {"n_voxels": n_voxels, "n_valid": len(values), "volume_mm3": n_voxels * voxel_mm3}
    if not len(values):
        return row
    p05, p25, median, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95))
    core = chi[core_mask(region, voxel_size_mm=voxel_size_mm) & valid].astype(np.float64)
    return row | {
        "mean_ppm": values.mean(),
        "median_ppm": median,
        "p05_ppm": p05,
        "p25_ppm": p25,
        "p75_ppm": p75,
        "p95_ppm": p95,
        "std_ppm": values.std(ddof=1) if len(values) > 1 else np.nan,
        "core_mean_ppm": core.mean() if len(core) else np.nan,
        "mass_ppm_mm3": values.sum() * voxel_mm3,
    }


def _probability_measures(
    chi: NDArray[np.floating],
    probability: NDArray[np.floating],
    box: tuple[slice, ...],
    region: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> Mapping[str, float]:
    """Measures of one nucleus by its probabilities (X, Y, Z); `region` are the voxels of its label inside `box`."""
    inside = ~(probability <= 0)  # NaN, if the probabilities are unknown, makes all three NaN
    weights, values = probability[inside].astype(np.float64), chi[inside].astype(np.float64)
    valid = np.isfinite(values)
    total = weights[valid].sum()
    return {
        "mean_probability": float(probability[box][region].mean(dtype=np.float64)) if region.any() else np.nan,
        "volume_pv_mm3": float(weights.sum() * np.prod(voxel_size_mm)),
        "mean_pv_ppm": float(weights[valid] @ values[valid] / total) if total > 0 else np.nan,
    }


def measure_high_iron(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:
    r"""Measure the high-iron region of each nucleus and the standard errors of the means.

    Arguments are those of `measure_nuclei`. Returns ``abbreviation`` and the columns of `HIGH_IRON_COLUMNS`.
    Standard error and threshold need two voxels; if no voxel exceeds the threshold (all are equal), the region has
    volume 0 and no mean.

    Notes
    -----
    Two-region analyses [1]_ divide a nucleus into a region of low (RI) and one of high iron content (RII) by a
    threshold that depends on age and is estimated from healthy controls. A single scan has no controls, so the
    threshold here is that of the nucleus itself: with mean :math:`m` and standard deviation :math:`s`
    (:math:`n - 1`) of its valid voxels, the region is :math:`\{i : \chi_i > m + s\}`. It describes the upper end of
    the distribution inside the nucleus, not whether the nucleus contains more iron than others of its age: adding a
    constant to the map shifts threshold and mean alike, and the volume of the region says nothing about iron. In pure
    Gaussian noise :math:`\bar\chi_\text{high} = m + 1.525 s`; only what exceeds this is a separate region.

    Standard errors are :math:`s / \sqrt{n}`, with voxels counted as independent. Neighbouring voxels of a map are not,
    so the true errors are larger; that of the high-iron region takes its voxels as given.

    References
    ----------
    .. [1] Li Y, Sethi SK, et al. Iron content in deep gray matter as a function of age using quantitative
       susceptibility mapping: a multicenter study. Front Neurosci 14 (2021) 607705. doi:10.3389/fnins.2020.607705
    """
    voxel_mm3 = float(np.prod(voxel_size_mm))
    rows = []
    for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True):
        row: dict[str, object] = {"abbreviation": structure.abbreviation}
        values = chi[box][region & np.isfinite(chi[box])].astype(np.float64)
        if len(values) > 1:
            sd = float(values.std(ddof=1))
            threshold = float(values.mean()) + HIGH_IRON_SDS * sd
            high = values[values > threshold] if sd > 1e-12 else values[:0]  # equal values differ by rounding alone
            row |= {
                "sem_ppm": _standard_error(values),
                "high_iron_threshold_ppm": threshold,
                "high_iron_mean_ppm": float(high.mean()) if len(high) else np.nan,
                "high_iron_sem_ppm": _standard_error(high),
                "high_iron_volume_mm3": len(high) * voxel_mm3,
                "high_iron_fraction": len(high) / len(values),
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=["abbreviation", *HIGH_IRON_COLUMNS])


def measure_r2star(
    r2star_per_s: NDArray[np.floating],
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    parts_ppm: Sequence[NDArray[np.floating]] = (),
) -> pd.DataFrame:
    """Measure R2* of each nucleus, in the voxels whose susceptibility and R2* are measured.

    `parts_ppm` are the paramagnetic and the diamagnetic part of the susceptibility, if their means are wanted.

    Arrays have one shape (X, Y, Z): R2* in 1/s, susceptibility (both NaN where not valid) and labels. Returns
    ``abbreviation`` and the columns of `R2STAR_COLUMNS`, NaN for a nucleus without valid voxels.
    """
    rows, valid = [], np.isfinite(chi) & np.isfinite(r2star_per_s)
    for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True):
        values, *parts = (image[box][region & valid[box]].astype(np.float64) for image in (r2star_per_s, *parts_ppm))
        measures = [values.mean(), np.median(values), *(part.mean() for part in parts)] if len(values) else []
        rows.append(dict(zip(R2STAR_COLUMNS, measures, strict=False)) | {"abbreviation": structure.abbreviation})
    return pd.DataFrame(
        rows, columns=["abbreviation", *list(R2STAR_COLUMNS)[: 2 + len(parts_ppm)]], dtype=object
    ).infer_objects()


def measure_uncertainty(
    changes_ppm: NDArray[np.floating],
    noise_sd: Callable[[NDArray[np.bool_], float], float],
    r2star_per_s: NDArray[np.floating],
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
) -> pd.DataFrame:
    r"""Measure the SDs of the mean susceptibility of each nucleus: from noise, and from choices of the reconstruction.

    Parameters
    ----------
    changes_ppm : ndarray of shape (4, X, Y, Z)
        How the map changes with half and with twice the weight of the regularization, and with a brain mask smaller and
        larger by one voxel.
    noise_sd : callable
        Valid voxels of a nucleus, and their median R2* in 1/s → SD of their mean in ppm.
    r2star_per_s, chi, dseg, structures
        As for `measure_r2star`.

    Returns
    -------
    DataFrame
        ``abbreviation`` and the columns of `UNCERTAINTY_COLUMNS`, NaN for a nucleus without valid voxels.

    Notes
    -----
    The second is the root of the sum of two squares: the ranges of the means with the three weights, and with the three
    masks.
    """
    rows = []
    for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True):
        valid, sds = region & np.isfinite(chi[box]), (np.nan, np.nan)
        if valid.any():
            weight, mask = changes_ppm[(slice(None), *box)][:, valid].mean(axis=1, dtype=np.float64).reshape(2, -1)
            noise = noise_sd(valid, float(np.median(r2star_per_s[box][valid])))
            sds = noise, float(np.hypot(np.ptp([0, *weight]), np.ptp([0, *mask])))
        rows.append((structure.abbreviation, *sds))
    return pd.DataFrame(rows, columns=["abbreviation", *UNCERTAINTY_COLUMNS])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def asymmetry_index(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    r"""Compute the asymmetry index of a measure.

    Parameters
    ----------
    left, right : array_like
        The same measure on both sides, in the same unit; left is the patient's left.

    Returns
    -------
    ndarray
        From -2 (0 on the left) over 0 (equal) to 2 (0 on the right). NaN if a value is missing or below 0, or both are
        0, since the mean of the sides is then no scale for their difference.

    Notes
    -----
    :math:`A = (L - R) / ((L + R) / 2)`. The index of a susceptibility depends on the reference of the map, which is
    a constant added to both sides.

    Examples
    --------
    >>> asymmetry_index([110.0], [90.0])
    array([0.2])
    """
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    mean = (first + second) / 2
    defined = (first >= 0) & (second >= 0) & (mean > 0)
    index: NDArray[np.float64] = np.divide(first - second, mean, out=np.full(mean.shape, np.nan), where=defined)
    return index


def measure_asymmetry(stats: pd.DataFrame) -> pd.DataFrame:
    """Compute the asymmetry of each nucleus from the table of `measure_nuclei`; measures that it lacks are omitted.

    Returns ``abbreviation`` and the columns of `ASYMMETRY_OF`; NaN for rows without a hemisphere.
    """
    nuclei = stats["abbreviation"].str.removesuffix("_L").str.removesuffix("_R")
    sides = {side: stats[stats["hemisphere"] == side].set_index(nuclei[stats["hemisphere"] == side]) for side in "LR"}
    table = stats[["abbreviation"]].reset_index(drop=True)
    for measure, name in ASYMMETRY_OF.items():
        if measure in stats:
            left, right = (sides[side][measure].reindex(nuclei).to_numpy(np.float64, na_value=np.nan) for side in "LR")
            table[name] = np.where(stats["hemisphere"].isin(["L", "R"]), asymmetry_index(left, right), np.nan)
    return table


@dataclass(frozen=True)
class PublishedNorm:
    """Mean and standard deviation of a measure of one nucleus and hemisphere in adults."""

    mean: float
    sd: float
    reference: str | None
    """Region whose susceptibility is 0; None for volumes and if it is not known."""


_NORMS_TSV = files("bids_dgmseg").joinpath("data", "norms.tsv").read_text(encoding="utf-8")

NORMS = {
    (row["nucleus"], row["measure"]): PublishedNorm(
        mean=float(row["mean"]), sd=float(row["sd"]), reference=None if row["reference"] == "n/a" else row["reference"]
    )
    for row in csv.DictReader(_NORMS_TSV.splitlines(), delimiter="\t")
    if row["mean"] != "n/a"
}
"""(nucleus, measure) → norm of ``norms.tsv``, without those for which no published value was found."""

_EXCLUDED = re.compile(
    r"\b(without|excluding|excludes|except|minus|outside|no)\b.*"
    r"|\bnon\W?csf\b"
    r"|\b(csf|cerebrospinal fluid|ventric\w*)\W+((is|was|are|were)\s+)?(excluded|removed|masked out)\b"
)
"""What the description of a region excludes."""


def parse_reference_region(description: str) -> str | None:
    """Parse the reference region that a sidecar describes into the terms of ``norms.tsv``; None if it states none.

    >>> [parse_reference_region(text) for text in ("CSF (lateral ventricles)", "whole brain without CSF", "not stated")]
    ['csf', 'whole-brain', None]
    """
    text = description.casefold()
    included = _EXCLUDED.sub(" ", text).strip(" ,;()")
    if any(word in included for word in ("csf", "cerebrospinal", "ventric")):
        return "csf"
    if "whole" in included or included in ("brain", "brain mask"):
        return "whole-brain"
    return None if text in ("", "n/a", "none", "unknown", "not stated") else text


def compare_with_norms(
    stats: pd.DataFrame, *, reference: str | None = None, norms: Mapping[tuple[str, str], PublishedNorm] = NORMS
) -> pd.DataFrame:
    r"""Compute z-scores of the table of `measure_nuclei` relative to the norms.

    `reference` is the region whose susceptibility is 0 in the map, such as ``csf`` or ``whole-brain``, None if it is
    not known. Returns ``abbreviation`` and the columns of `Z_SCORE_OF`: NaN if the measure is missing, there is no
    norm, norm and map are known to have different references, or the row has no hemisphere, as norms are of one side.

    :math:`z = (x - \mu) / \sigma`. Segmentation protocols, field strengths, reconstructions and ages differ more
    between studies than subjects do within one: a z-score of 3 is not a finding, one of 30 means a wrong unit.
    """
    nuclei = stats["abbreviation"].str.split("_").str[0].where(stats["hemisphere"].isin(["L", "R"]))
    table = stats[["abbreviation"]].reset_index(drop=True)
    for measure, name in Z_SCORE_OF.items():
        values = stats[measure].to_numpy(np.float64, na_value=np.nan)
        scores = np.full(len(values), np.nan)
        for row, nucleus in enumerate(nuclei):
            norm = norms.get((nucleus, measure))
            if norm is None or not norm.sd > 0 or (norm.reference and reference and norm.reference != reference):
                continue
            scores[row] = (values[row] - norm.mean) / norm.sd
        table[name] = scores
    return table


SMOOTHING_MM = 0.7
"""Standard deviation of the Gaussian that smooths the maps: noise of their gradients would weaken a change."""

REACH_MM = 2.3
"""Voxels outside of a nucleus are compared if their centre is this close to that of a voxel inside."""

_EDGE_MM = 2.5
"""Half of the width of blurred edges: voxels that are closer to the surface move with it."""

MIN_VOLUME_MM3 = 20.0
"""Smallest nucleus whose change is measured: there are 14 unknowns."""

MIN_COVERED = 0.8
"""Fraction of the compared voxels that must have a value in all sessions."""

_MARGIN_MM = REACH_MM + 5 * SMOOTHING_MM

_INSIDE = 0.9
"""Fraction of a voxel that must be covered by a map."""


def measure_volume_change(
    maps: Sequence[NDArray[np.floating]],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:
    r"""Measure how the volume of each nucleus differs between sessions.

    The change is found from the maps by registration, not as the difference of two segmentations, which comes out too
    small, as a network has learned how large nuclei are.

    Parameters
    ----------
    maps : sequence of K ndarray of shape (X, Y, Z)
        Susceptibility in ppm of two or more sessions, aligned rigidly on one grid; NaN where there is no value.
    dseg : ndarray of int, shape (X, Y, Z)
        Labels of the nuclei on the same grid, indices of ``structures.tsv``, best of the mean of the maps.
    structures : sequence of Structure
    voxel_size_mm : tuple of 3 float

    Returns
    -------
    DataFrame
        One row per structure, indexed by abbreviation, and one column per map (0 to K - 1): the volume relative to the
        mean of all sessions in percent, so that each row sums to 0. NaN for a nucleus below 20 mm³, or if more than 20
        % of the voxels that are compared lack a value.

    Notes
    -----
    Let :math:`I_k` be the maps, smoothed by a Gaussian of 0.7 mm, and :math:`\bar I` their mean. If the nucleus of
    session k differs from the mean by a small affine displacement :math:`u_k(x) = A_k (x - c) + t_k`, then

    .. math:: I_k(x) - \bar I(x) = -\nabla \bar I(x) \cdot u_k(x) + a_k + b_k M(x) + \text{noise}

    to second order, because the gradient is that of the mean [1]_. For x within 2.5 mm of the surface of the nucleus,
    :math:`u_k` is that of the nearest point of the surface: the edge keeps its width. The 14 unknowns per session are
    found by least squares over the nucleus and all voxels up to 2.3 mm from it. :math:`a_k` is a shift of the zero of
    the map, and :math:`b_k` (with the equally smoothed mask M) a change of the susceptibility of the nucleus, neither
    of which is a change of volume. Residual motion is :math:`t_k` and the antisymmetric part of :math:`A_k`. The
    relative change of volume is the divergence of the displacement, :math:`\operatorname{tr} A_k`. As all sessions
    have the same equations, their changes sum to 0 and none is favoured.

    The boundary shift integral [2]_ integrates the differences themselves; in susceptibility maps, whose contrast
    differs around a nucleus and whose zero fluctuates, it was less accurate (docs/how-to/longitudinal.md).

    References
    ----------
    .. [1] Reuter M, Rosas HD, Fischl B. Highly accurate inverse consistent registration: a robust approach. NeuroImage
       53 (2010) 1181-1196. doi:10.1016/j.neuroimage.2010.07.020
    .. [2] Freeborough PA, Fox NC. The boundary shift integral: an accurate and robust measure of cerebral volume
       changes from registered repeat MRI. IEEE Trans Med Imaging 16 (1997) 623-629. doi:10.1109/42.640753
    """
    images = np.stack(maps).astype(np.float64)
    valid = np.isfinite(images.sum(axis=0))
    margin = np.ceil(_MARGIN_MM / np.array(voxel_size_mm)).astype(int)
    changes = {}
    for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True):
        change = np.full(len(images), np.nan)
        if np.count_nonzero(region) * np.prod(voxel_size_mm) >= MIN_VOLUME_MM3:
            x, y, z = (
                slice(max(part.start - more, 0), part.stop + more) for part, more in zip(box, margin, strict=True)
            )
            mask = np.isin(dseg[x, y, z], structure.labels)
            change = 100 * _divergence(images[:, x, y, z], mask, valid[x, y, z], voxel_size_mm)
        changes[structure.abbreviation] = change
    return pd.DataFrame.from_dict(changes, orient="index", columns=range(len(images)), dtype=np.float64)


def _divergence(
    images: NDArray[np.float64],
    mask: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """Return the divergence of the displacement of each image (K, x, y, z) from their mean."""
    compared = ndimage.distance_transform_edt(~mask, sampling=voxel_size_mm) <= REACH_MM
    sigma = SMOOTHING_MM / np.array(voxel_size_mm)
    if not valid.all():
        images = np.where(valid, images, images[:, valid].mean() if valid.any() else 0)
        near = np.pad(valid, 1, mode="edge")  # the images go on
        to_invalid_mm = np.asarray(ndimage.distance_transform_edt(near, sampling=voxel_size_mm))
        usable = to_invalid_mm[1:-1, 1:-1, 1:-1] > 2 * SMOOTHING_MM
        if np.count_nonzero(compared & usable) < MIN_COVERED * np.count_nonzero(compared):
            return np.full(len(images), np.nan)
        compared &= usable
    smooth = np.stack([ndimage.gaussian_filter(image, sigma) for image in images])
    mean = smooth.mean(axis=0)
    gradient = np.stack([part[compared] for part in _slopes(mean, voxel_size_mm)], axis=1)
    # the edge of the nucleus in the maps is that of the mask, blurred by voxels and by the smoothing
    edge = ndimage.gaussian_filter(mask.astype(np.float64), np.sqrt(2) * sigma)[compared]
    x = _to_surface(mask, voxel_size_mm)[compared] - np.argwhere(mask).mean(axis=0) * voxel_size_mm
    affine = -(gradient[:, :, None] * x[:, None, :]).reshape(len(x), 9)
    design = np.column_stack([affine, -gradient, np.ones(len(x)), edge])
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1
    unknowns = np.linalg.lstsq(design / scale, (smooth - mean)[:, compared].T)[0] / scale[:, None]
    divergence: NDArray[np.float64] = unknowns[[0, 4, 8]].sum(axis=0)
    return divergence


def _slopes(image: NDArray[np.float64], voxel_size_mm: tuple[float, float, float]) -> Iterator[NDArray[np.float64]]:
    """Yield the slope along each axis, per mm: that of the cubic spline, as differences of neighbours blunt edges."""
    coefficients = ndimage.spline_filter(image, order=3, output=np.float64, mode="mirror")
    for axis, size_mm in enumerate(voxel_size_mm):
        slope = ndimage.correlate1d(coefficients, [-0.5 / size_mm, 0, 0.5 / size_mm], axis=axis, mode="mirror")
        for other in {0, 1, 2} - {axis}:
            slope = ndimage.correlate1d(slope, [1 / 6, 4 / 6, 1 / 6], axis=other, mode="mirror")
        yield slope


def _to_surface(mask: NDArray[np.bool_], voxel_size_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return the positions (x, y, z, 3) of voxels in mm; those near the surface of a mask are moved to it.

    The blurred edge of a nucleus keeps its width when the nucleus shrinks: it moves as its surface does.
    """
    size_mm = np.array(voxel_size_mm)
    position: NDArray[np.float64] = np.moveaxis(np.indices(mask.shape), 0, -1) * size_mm
    across = np.empty_like(position)
    for side in (mask, ~mask):
        nearest = ndimage.distance_transform_edt(
            side, sampling=voxel_size_mm, return_distances=False, return_indices=True
        )
        across[side] = np.moveaxis(nearest, 0, -1)[side] * size_mm
    step = across - position
    length = np.linalg.norm(step, axis=-1, keepdims=True)
    position += np.where(length <= _EDGE_MM, step * (1 - size_mm.min() / 2 / length), 0)
    return position


def measure_session_volumes(
    maps: Sequence[Volume], dseg: Volume, probseg: NDArray[np.floating], structures: Sequence[Structure]
) -> list[dict[str, dict[str, float]]]:
    """Measure the volume of each nucleus in each session, as the mean volume and the change from it.

    Parameters
    ----------
    maps : sequence of Volume
        Maps in ppm with their affines in the space of `dseg`, on any grids; 0 where there is no value.
    dseg : Volume
        Labels of the mean of the maps.
    probseg : ndarray of shape (C, X, Y, Z)
        Probabilities of the mean of the maps on the grid of `dseg`, in the order of `structures`.
    structures : sequence of C Structure

    Returns
    -------
    list of dict
        Per map, abbreviation of each nucleus whose change can be measured → ``mean_mm3``, the summed probability of the
        mean of the maps, and ``change_percent``, see `measure_volume_change`. Nuclei that are labelled in parts follow.
    """
    grid = Grid(dseg.shape, dseg.affine)
    images = []
    for chi in maps:
        is_covered = share_covered(chi, grid) > _INSIDE
        images.append(np.where(is_covered, resample(chi, grid, antialias=True).array, np.float32(np.nan)))
    size_mm, nuclei = dseg.voxel_size_mm, with_wholes(structures)
    changes = measure_volume_change(images, dseg.array, structures=nuclei, voxel_size_mm=size_mm).dropna()
    sums = probseg.sum(axis=(1, 2, 3), dtype=np.float64) * np.prod(size_mm)
    volume_of = {structure.index: float(volume) for structure, volume in zip(structures, sums, strict=True)}
    means = {nucleus.abbreviation: sum(volume_of[label] for label in nucleus.labels) for nucleus in nuclei}
    return [
        {
            str(name): {"mean_mm3": means[str(name)], "change_percent": float(change)}
            for name, change in changes[number].items()
        }
        for number in range(len(maps))
    ]


def add_session_columns(
    stats: pd.DataFrame, volumes: Mapping[str, Mapping[str, float]] | None, structures: Sequence[Structure]
) -> pd.DataFrame:
    """Add the columns of `SESSION_COLUMNS` to a table of `measure_nuclei`, if the volumes in the session are known.

    They are NaN for nuclei that were edited by hand or of which voxels are lesions (``edited``,
    ``excluded_fraction``), because the volumes are those of other outlines. Structures that have no volumes of their
    own, such as both sides of a nucleus, have the sum of those that they join, NaN if one is unknown.
    """
    if volumes is None:
        return stats
    rows = []
    for structure in structures:
        name = structure.abbreviation
        members = [name] if name in volumes else [member.abbreviation for member in structure.members]
        entries = [volumes.get(member, {"mean_mm3": np.nan, "change_percent": np.nan}) for member in members]
        mean = sum(entry["mean_mm3"] for entry in entries)
        volume = sum(entry["mean_mm3"] * (1 + entry["change_percent"] / 100) for entry in entries)
        change = entries[0]["change_percent"] if len(entries) == 1 else 100 * (volume / mean - 1) if entries else np.nan
        rows.append((change, volume if entries else np.nan))
    changed = (stats.reindex(columns=["edited", "excluded_fraction"]) > 0).any(axis=1)
    columns = pd.DataFrame(rows, stats.index, list(SESSION_COLUMNS), dtype=np.float64)
    return stats.join(columns.mask(changed))
