"""Confidence in and placement of each nucleus, and rule-based QC ratings (green, amber or red)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage, special
from scipy.optimize import minimize_scalar

from bids_dgmseg.image.grids import Similarity, fit_similarity
from bids_dgmseg.image.masks import ROUNDING_MM
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import CONFIDENCE_COLUMNS, PLACEMENT_COLUMNS, find_regions
from bids_dgmseg.measurement.segmented_scan import FieldOfView
from bids_dgmseg.models.structures import Structure, without_parts

RIM_MM = (1.0, 3.0)
"""Distances from the nucleus between which the rim lies: beyond partial volume, before other tissue."""


def measure_confidence(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
    fov: FieldOfView,
) -> pd.DataFrame:
    r"""Compute indicators of a good or bad segmentation per nucleus.

    Arguments are those of `measure_nuclei`, and the field of view of the whole map, cropped to the block that the
    arrays cover. Returns ``abbreviation`` and the columns of `CONFIDENCE_COLUMNS`; a nucleus without voxels
    has 0 components and NaN otherwise, except that all of its probability lies outside and its expected Dice is 0.

    Notes
    -----
    With probabilities :math:`p_i`, the voxels :math:`R` of the nucleus in `dseg`, and
    :math:`H(p) = -p \log_2 p - (1 - p) \log_2 (1 - p)`:

    .. math::

       \text{mean\_entropy} = \sum_R H(p_i) / |R|, \qquad
       \text{mass\_outside} = \sum_{i \notin R} p_i \Big/ \sum_i p_i, \qquad
       \text{expected\_dice} = 2 \sum_R p_i \Big/ \Big(|R| + \sum_i p_i\Big).

    The expected Dice is the ratio of expectations for a truth that contains each voxel with its probability. Unlike
    the other two it needs no separate limit for small nuclei, which are mostly boundary.

    The entropy is that of one nucleus against everything else, so that models with several heads, whose probabilities
    do not sum to 1, are comparable. The contrast is positive if the nucleus is more paramagnetic than its surroundings,
    as iron makes it. The rim holds valid voxels of no nucleus between 1 and 3 mm from the nucleus, centre to centre.
    """
    values = np.where(fov.inside, chi, np.nan)
    steps = [int(np.ceil(RIM_MM[1] / edge)) for edge in voxel_size_mm]
    rows = []
    for structure, probability, (tight, voxels) in zip(
        structures, probseg, find_regions(dseg, structures), strict=True
    ):
        row: dict[str, Any] = {"abbreviation": structure.abbreviation, "n_components": 0}
        total, within, n_voxels = probability.sum(dtype=np.float64), 0.0, int(np.count_nonzero(voxels))
        if n_voxels:
            x, y, z = (
                slice(max(piece.start - step, 0), min(piece.stop + step, size))
                for piece, step, size in zip(tight, steps, chi.shape, strict=True)
            )
            box = x, y, z  # with a margin as wide as the rim
            region = np.isin(dseg[box], structure.labels)
            within = float(probability[box][region].sum(dtype=np.float64))
            p = np.clip(probability[box][region].astype(np.float64), 0, 1)
            row["n_components"] = ndimage.label(region, np.ones((3, 3, 3)))[1]
            row["mean_entropy_bits"] = float((special.entr(p) + special.entr(1 - p)).mean() / np.log(2))
            row["rim_contrast_ppm"] = _contrast(values[box], region, dseg[box] == 0, voxel_size_mm)
            row["edge_distance_mm"] = fov.crop(box).distance_to_edge(region)
        if total > 0:
            row["mass_outside_fraction"] = max(0.0, 1 - within / total)
            row["expected_dice"] = 2 * within / (n_voxels + total)
        rows.append(row)
    return pd.DataFrame(rows, columns=["abbreviation", *CONFIDENCE_COLUMNS]).astype({"n_components": "Int64"})


def _contrast(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    free: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> float:
    """Return the contrast with the rim; `free` are the voxels of no nucleus."""
    within, beyond = region & np.isfinite(chi), free & np.isfinite(chi)
    distance_mm = ndimage.distance_transform_edt(~region, sampling=voxel_size_mm)
    rim = (distance_mm > RIM_MM[0] + ROUNDING_MM) & (distance_mm <= RIM_MM[1] + ROUNDING_MM)
    if not within.any() or not (rim & beyond).any():
        return np.nan
    return float(np.median(chi[within]) - np.median(chi[rim & beyond]))


HEIGHTS_MM3 = {6.0: 830.0, 9.0: 300.0}
"""Height above the top of the putamen in mm → volume of the caudate above it, the largest of 34 manual labels."""

MIN_NUCLEI = 6
"""Nuclei from which the position of the head is estimated; fewer give no size of the head."""

_NUCLEI_OF_SCALE = ("DN", "IN", "RN", "SN", "STN", "CN", "PUT", "GP")
"""Nuclei that the scale along one axis is estimated from, whatever else a model labels: limits were set with them."""

_MIN_FOR_SCALE, _MIN_HEIGHT_MM = 8, 35.0
"""Nuclei, and range of their typical heights, from which the scale along one axis is estimated: without those of the
cerebellum, it varies by twice as much."""


def measure_placement(dseg: Volume, *, structures: Sequence[Structure]) -> pd.DataFrame:
    """Measure detached voxels of each nucleus, and the size and height of the caudate.

    Parameters
    ----------
    dseg : Volume
        Labels on the whole grid of the map, or on a block of it.
    structures : sequence of Structure
        The nuclei of the model.

    Returns
    -------
    DataFrame
        ``abbreviation`` and the columns of `PLACEMENT_COLUMNS`; NaN for nuclei without a voxel. ``caudate_ratio`` and
        ``caudate_height`` are those of the caudate only.

    Notes
    -----
    ``detached_volume_mm3`` is the volume outside of the largest face-connected piece. ``caudate_ratio`` is the volume
    of both caudates relative to both putamina and pallida; NaN if one of the six is missing. ``caudate_height`` is
    the volume more than 6 mm above the top of the putamen of its side relative to 830 mm³, or that more than 9 mm above
    relative to 300 mm³, whichever is larger (`HEIGHTS_MM3`): where the caudate ends, veins of the ventricle's wall look
    like it.
    """
    voxel_mm3 = float(np.prod(dseg.voxel_size_mm))
    voxels_mm = _voxels_mm(dseg, structures)
    ratio = _caudate_ratio(voxels_mm)
    rows = []
    for structure, (_, region) in zip(structures, find_regions(dseg.array, structures), strict=True):
        name = structure.abbreviation
        row: dict[str, Any] = {"abbreviation": name}
        if name in voxels_mm:
            pieces, n_pieces = ndimage.label(region)
            sizes = np.bincount(pieces.ravel(), minlength=n_pieces + 1)[1:]
            row["detached_volume_mm3"] = float(sizes.sum() - sizes.max()) * voxel_mm3
            if structure.nucleus == "CN":
                row["caudate_ratio"] = ratio
                putamen = voxels_mm.get(f"PUT_{structure.hemisphere}")
                if putamen is not None:
                    volumes = volumes_above(voxels_mm[name], putamen, voxel_mm3)
                    row["caudate_height"] = max(volumes[height] / most for height, most in HEIGHTS_MM3.items())
        rows.append(row)
    return pd.DataFrame(rows, columns=["abbreviation", *PLACEMENT_COLUMNS])


def volumes_above(caudate: NDArray[np.float64], putamen: NDArray[np.float64], voxel_mm3: float) -> dict[float, float]:
    """Return the volume in mm³ of the caudate above each of `HEIGHTS_MM3`, from positions of voxels (N, 3) in mm."""
    above_mm = caudate[:, 2] - putamen[:, 2].max()
    return {height: np.count_nonzero(above_mm > height) * voxel_mm3 for height in HEIGHTS_MM3}


def measure_head_size(dseg: Volume, *, structures: Sequence[Structure]) -> float:
    """Return the size of the head relative to MNI152, from the distances between its nuclei.

    It is the scale of the similarity transform from typical positions; NaN with fewer than six nuclei or one side only.
    """
    to_mni = _fit_to_mni(_voxels_mm(dseg, structures), structures)
    return np.nan if to_mni is None else float(np.linalg.det(to_mni.matrix) ** (-1 / 3))


def measure_slice_scale(dseg: Volume, *, structures: Sequence[Structure]) -> float:
    r"""Return how far apart the nuclei lie along the slice axis, relative to the other axes and to MNI152.

    Parameters
    ----------
    dseg : Volume
        Labels on the grid of the map; the slice axis is that of the longest edge of a voxel, of equal ones the last.
    structures : sequence of Structure
        The nuclei of the model.

    Returns
    -------
    float
        NaN with fewer than eight nuclei or of one side only, or without nuclei of both cerebellum and basal ganglia.

    Notes
    -----
    The centres of the nuclei :math:`x_n` are compressed by :math:`k` along the slice axis :math:`u`, :math:`y_n = x_n +
    (1/k - 1)\, (u \cdot x_n)\, u`; the result is the :math:`k` with which they are most similar to the typical
    positions: that with the smallest residual of the similarity transform, relative to its scale. With slices that are
    stated too thick by a factor, :math:`k` is larger by it; the tilt of the slices and the size of the head do not
    matter. Nuclei that are labelled in parts count as wholes.
    """
    structures = without_parts(structures)
    voxels_mm = _voxels_mm(dseg, structures)
    nuclei = [row for row in structures if row.abbreviation in voxels_mm and row.nucleus in _NUCLEI_OF_SCALE]
    typical = np.array([_centre_mni(nucleus) for nucleus in nuclei]).reshape(-1, 3)
    if len(nuclei) < _MIN_FOR_SCALE or len({nucleus.hemisphere for nucleus in nuclei}) != 2:
        return np.nan
    if np.ptp(typical[:, 2]) < _MIN_HEIGHT_MM:
        return np.nan
    centres = np.array([voxels_mm[nucleus.abbreviation].mean(axis=0) for nucleus in nuclei])
    axis = 2 - int(np.argmax(np.round(dseg.voxel_size_mm[::-1], 3)))
    direction = dseg.affine[:3, axis] / np.linalg.norm(dseg.affine[:3, axis])
    along = ((centres - centres.mean(axis=0)) @ direction)[:, None] * direction

    def residual(log_scale: float) -> float:
        compressed = centres + (np.exp(-log_scale) - 1) * along
        to_scan = fit_similarity(typical, compressed)
        return float(np.linalg.norm(to_scan(typical) - compressed) / np.cbrt(np.linalg.det(to_scan.matrix)))

    return float(np.exp(minimize_scalar(residual, bounds=(-1, 1), method="bounded").x))


def _fit_to_mni(voxels_mm: Mapping[str, NDArray[np.float64]], structures: Sequence[Structure]) -> Similarity | None:
    """Fit the centres of the nuclei to their typical positions; None for too few nuclei."""
    nuclei = [row for row in structures if row.abbreviation in voxels_mm and row.mni_course_mm]
    if len(nuclei) < MIN_NUCLEI or len({nucleus.hemisphere for nucleus in nuclei}) != 2:
        return None
    centres = np.array([voxels_mm[nucleus.abbreviation].mean(axis=0) for nucleus in nuclei])
    return fit_similarity(centres, np.array([_centre_mni(nucleus) for nucleus in nuclei]))


def _caudate_ratio(voxels_mm: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the number of voxels of the caudates relative to putamina and pallida."""
    six = np.array([[len(voxels_mm.get(f"{nucleus}_{side}", ())) for side in "LR"] for nucleus in ("CN", "PUT", "GP")])
    return float(six[0].sum() / six[1:].sum()) if six.all() else np.nan


def _voxels_mm(dseg: Volume, structures: Sequence[Structure]) -> dict[str, NDArray[np.float64]]:
    """Return the centres of the voxels of each nucleus that has any, in mm, by abbreviation."""
    voxels = {}
    for structure, (box, region) in zip(structures, find_regions(dseg.array, structures), strict=True):
        if region.any():
            indices = np.argwhere(region) + [part.start for part in box]
            voxels[structure.abbreviation] = indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    return voxels


def _centre_mni(structure: Structure) -> NDArray[np.float64]:
    """Return the mean of the typical course, which is closest to the centre of a long nucleus."""
    centre: NDArray[np.float64] = np.mean(structure.mni_course_mm, axis=0)
    return centre


Rating = Literal["green", "amber", "red"]

RATINGS: tuple[Rating, ...] = ("green", "amber", "red")
"""From best to worst."""


@dataclass(frozen=True)
class Rule:
    """Limits beyond which a measure is rated amber or red."""

    column: str
    side: Literal["above", "below", "away"]
    """Which values are worse; ``away`` from 0 in both directions."""
    amber: float
    red: float | None
    """None if the measure alone never shows that a result is wrong."""
    reason: str
    """Shown to the user."""
    unit: str = ""
    """Shown to the user; ``%`` for fractions."""
    nuclei: tuple[str, ...] = ()
    """Nuclei, without side, that the rule is for; empty means all."""
    not_nuclei: tuple[str, ...] = ()
    """Nuclei, without side, that the rule is not for."""

    def concerns(self, nucleus: str) -> bool:
        """Return whether the rule is for a nucleus, named without side."""
        return (not self.nuclei or nucleus in self.nuclei) and nucleus not in self.not_nuclei

    def rate(self, value: float) -> Rating:
        """Return the rating of one value; green if it is missing."""
        if math.isnan(value):
            return "green"
        size = {"above": value, "below": -value, "away": abs(value)}[self.side]
        sign = -1 if self.side == "below" else 1
        if self.red is not None and size > sign * self.red:
            return "red"
        return "amber" if size > sign * self.amber else "green"

    def explain(self, value: float) -> str:
        """Format the reason with the value and the limit that it exceeds."""
        limit = self.red if self.rate(value) == "red" and self.red is not None else self.amber
        if self.unit == "%":
            limit, value = 100 * limit, 100 * value
        shown = np.format_float_positional(value, 4, unique=False, fractional=False, trim="-")
        unit = f" {self.unit}" if self.unit else ""
        beyond = {"above": "above ", "below": "below ", "away": "beyond ±"}[self.side]
        return f"{self.reason} (" + f"{shown}{unit}, {beyond}{limit:g})".replace("-", "−")


def _read_rules(scope: str) -> tuple[Rule, ...]:
    text = files("bids_dgmseg").joinpath("data", "rating_rules.tsv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(text.splitlines(), delimiter="\t") if row.pop("scope") == scope]
    return tuple(
        Rule(
            row["column"],
            row["side"],  # type: ignore[arg-type]  # a test reads all
            amber=float(row["amber"]),
            red=None if row["red"] == "n/a" else float(row["red"]),
            reason=row["reason"],
            unit=row["unit"],
            nuclei=tuple(row["nuclei"].split()),
            not_nuclei=tuple(row["not_nuclei"].split()),
        )
        for row in rows
    )


NUCLEUS_RULES = _read_rules("nucleus")
"""Rules for one nucleus; columns of ``_stats.tsv``. Limits and their reasons are in ``data/rating_rules.tsv``."""

SCAN_RULES = _read_rules("scan")
"""Rules for a scan; measures of `bids_dgmseg.measurement.scan_measures.ScanMeasures.quality`."""

_TYPICAL = ("mean_ppm_z", "rim_contrast_ppm")
"""Measures that depend on the scale and the zero of the map."""


def rate(values: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Rating, tuple[str, ...]]:
    """Apply rules to measures (name → value): the worst rating, and a reason per rule that is not green, worst first.

    Rules of absent or missing measures do not apply, nor do those for other nuclei than that of ``abbreviation``.
    """
    flags = []
    nucleus = str(values.get("abbreviation", "")).partition("_")[0]
    for rule in rules:
        if not rule.concerns(nucleus):
            continue
        raw = values.get(rule.column)
        value = math.nan if raw is None or pd.isna(raw) else float(raw)
        if (rating := rule.rate(value)) != "green":
            flags.append((RATINGS.index(rating), rule.explain(value)))
    flags.sort(key=lambda pair: -pair[0])
    worst = max((level for level, _ in flags), default=0)
    return RATINGS[worst], tuple(reason for _, reason in flags)


def rate_nuclei(table: pd.DataFrame) -> pd.DataFrame:
    """Rate every nucleus of a scan.

    Parameters
    ----------
    table : DataFrame
        One row per nucleus and hemisphere, with ``abbreviation``, any of the columns of `NUCLEUS_RULES`, and
        ``n_voxels`` and ``n_valid`` for the fraction of missing voxels.

    Returns
    -------
    DataFrame
        ``abbreviation``, ``rating`` and ``reasons`` (separated by semicolons, empty if green). A nucleus
        without voxels is rated only by whether it was found at all.
    """
    ratings = []
    for _, row in table.assign(missing_fraction=missing_fraction(table)).iterrows():
        values = {str(key): value for key, value in row.items()}
        if values.get("n_components") == 0:
            weighted_mm3 = values.get("volume_pv_mm3")
            is_found = weighted_mm3 is not None and not pd.isna(weighted_mm3) and weighted_mm3 > 0
            values = {"n_voxels": 0} if is_found else {"n_components": 0}
        ratings.append(rate(values, NUCLEUS_RULES))
    result = table[["abbreviation"]].reset_index(drop=True)
    result["rating"] = [rating for rating, _ in ratings]
    result["reasons"] = ["; ".join(reasons) for _, reasons in ratings]
    return result


def missing_fraction(table: pd.DataFrame) -> pd.Series:
    """Return the fraction of each nucleus without data; NaN without voxels or counts."""
    counts = table.reindex(columns=["n_voxels", "n_valid"]).astype(float)
    return (counts["n_voxels"] - counts["n_valid"]) / counts["n_voxels"].where(counts["n_voxels"] > 0)


def summarize_nuclei(table: pd.DataFrame) -> dict[str, float]:
    """Compute the measures of a scan that follow from its nuclei.

    Parameters
    ----------
    table : DataFrame
        One row per nucleus with ``rating``, and any columns of the table that `rate_nuclei` rated.

    Returns
    -------
    dict
        ``atypical_nuclei_fraction`` (z-score of the mean or contrast beyond an amber limit, among nuclei with one of
        them), ``flagged_nuclei_fraction`` (not green) and ``red_nuclei_fraction``; NaN without nuclei.
    """
    values = table[table.reindex(columns=list(_TYPICAL)).notna().any(axis=1)]
    rules = [rule for rule in NUCLEUS_RULES if rule.column in _TYPICAL]
    rows = ({str(key): value for key, value in row.items()} for _, row in values.iterrows())
    atypical = [rate(row, rules)[0] != "green" for row in rows]
    return {
        "atypical_nuclei_fraction": float(np.mean(atypical)) if atypical else math.nan,
        "flagged_nuclei_fraction": float((table["rating"] != "green").mean()),
        "red_nuclei_fraction": float((table["rating"] == "red").mean()),
    }


def rate_scan(values: Mapping[str, Any]) -> tuple[Rating, tuple[str, ...]]:
    """Rate a scan by the measures of its map and `summarize_nuclei`; returns as `rate`."""
    return rate(values, SCAN_RULES)
