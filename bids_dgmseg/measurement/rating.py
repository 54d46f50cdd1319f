"""Rule-based QC rating (green, amber or red) per nucleus and per scan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

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

    def rate(self, value: float) -> Rating:
        """Return the rating of one value; green if it is missing."""
        if math.isnan(value):
            return "green"
        size = {"above": value, "below": -value, "away": abs(value)}[self.side]
        amber, red = (limit if limit is None or self.side != "below" else -limit for limit in (self.amber, self.red))
        if red is not None and size > red:
            return "red"
        return "amber" if amber is not None and size > amber else "green"

    def explain(self, value: float) -> str:
        """Format the reason with the value and the limit that it exceeds."""
        limit = self.red if self.rate(value) == "red" and self.red is not None else self.amber
        if self.unit == "%":
            limit, value = 100 * limit, 100 * value
        # Three digits, or as many as distinguish the value from the limit.
        rounded = (f"{value:.{digits}g}" for digits in range(3, 18))
        shown = next(text for text in rounded if abs(float(text)) != abs(limit) or abs(value) == abs(limit))
        unit = f" {self.unit}" if self.unit else ""
        beyond = {"above": "above ", "below": "below ", "away": "beyond ±"}[self.side]
        return f"{self.reason} (" + f"{shown}{unit}, {beyond}{limit:g})".replace("-", "−")


NUCLEUS_RULES: tuple[Rule, ...] = (
    Rule("n_components", "below", 1, 1, "not found", "components"),
    # Never red: the nucleus is smaller than the voxels, and its probability-weighted volume is valid.
    Rule("n_voxels", "below", 1, None, "found, but fills no voxel", "voxels"),
    # Nuclei are connected; the interposed nucleus has two components per side.
    Rule("n_components", "above", 2, 4, "many components", "components"),
    # In benchmarks/ratings.py a twentieth of dgm16's nuclei with a Dice of 0.7 and more lie below 0.65, and seven in
    # ten of the others; below 0.4 hardly any, and half.
    Rule("expected_dice", "below", 0.65, 0.4, "uncertain outline", "expected Dice"),
    # All eight nuclei contain more iron than their surroundings; below 0 by more than noise, the label is misplaced.
    Rule("rim_contrast_ppm", "below", 0.01, -0.02, "hardly brighter than its surroundings", "ppm"),
    # Nuclei of adults reach about 0.2 ppm, more with iron overload; 1 ppm indicates a wrong unit or blood.
    Rule("rim_contrast_ppm", "above", 0.35, 1.0, "much brighter than its surroundings", "ppm"),
    # A misplaced outline follows no edge; never red, since noise alone can do this to a small nucleus.
    Rule("boundary_gradient_ppm_per_mm", "below", 0.0, None, "darker inside its outline than outside", "ppm/mm"),
    # Maps are unreliable within some mm of the edge of their mask; at 0 the nucleus may be cut.
    Rule("edge_distance_mm", "below", 2.0, 0.5, "close to the edge of the field of view", "mm"),
    # Protocols differ by more than 2 SD, one in ten correct nuclei of benchmarks/ratings.py by 4; never red, since a
    # disease may well change a volume.
    Rule("volume_z", "away", 6.0, None, "unusual volume", "SD"),
    # References and diseases shift means by some SD; 12 SD, about 0.4 ppm, is not brain tissue.
    Rule("mean_ppm_z", "away", 4.0, 12.0, "unusual susceptibility", "SD"),
    # 0.5: two thirds larger than the other side; 1: three times as large.
    Rule("volume_asymmetry", "away", 0.5, 1.0, "volume differs between left and right"),
    # 0.67: twice the other side, as a unilateral disease may cause; 1.2: four times.
    Rule("mean_ppm_asymmetry", "away", 0.67, 1.2, "susceptibility differs between left and right"),
)
"""Rules for one nucleus; columns of ``_stats.tsv``."""

SCAN_RULES: tuple[Rule, ...] = (
    # 0.03 ppm is the contrast of the putamen, 0.08 ppm that of the red nucleus.
    Rule("noise_sd_ppm", "above", 0.03, 0.08, "noisy map", "ppm"),
    # On the phantom, division truncated at 0.2 yields 1, at 0.1 about 3, at 0.05 ten. Never red: in
    # benchmarks/ratings.py most outlines and means withstood streaks of ten and more.
    Rule("streaking_index", "above", 6.0, None, "streaks"),
    # Cortex and CSF over white matter alone cause 0.05 ppm in the phantom, less in a folded brain.
    Rule("rim_residual_ppm", "above", 0.08, 0.15, "residual background field at the edge of the mask", "ppm"),
    # Within a voxel of the edge a nucleus may be cut; never red, since in benchmarks/ratings.py most were not.
    Rule("box_margin_mm", "below", 1.0, None, "nuclei close to the edge of the segmented box", "mm"),
    # Red nuclei must show in the rating of the scan; with more than a quarter of them the scan is not usable.
    Rule("red_nuclei_fraction", "above", 0.0, 0.25, "nuclei with a red rating", "%"),
)
"""Rules for a scan; names of `MAP_QUALITY`, ``box_margin_mm`` and ``red_nuclei_fraction``."""


def rate(values: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Rating, tuple[str, ...]]:
    """Apply rules to measures.

    Parameters
    ----------
    values : mapping
        Measure → value; rules of absent or missing measures do not apply.
    rules : sequence of Rule
        Rules to apply.

    Returns
    -------
    rating : {"green", "amber", "red"}
        The worst of all rules.
    reasons : tuple of str
        One per rule that is not green, worst first.
    """
    found = []
    for rule in rules:
        raw = values.get(rule.column)
        value = math.nan if raw is None or pd.isna(raw) else float(raw)
        if (rating := rule.rate(value)) != "green":
            found.append((RATINGS.index(rating), rule.explain(value)))
    found.sort(key=lambda pair: -pair[0])
    worst = max((level for level, _ in found), default=0)
    return RATINGS[worst], tuple(reason for _, reason in found)


def rate_nuclei(table: pd.DataFrame) -> pd.DataFrame:
    """Rate every nucleus of a scan.

    Parameters
    ----------
    table : DataFrame
        One row per nucleus and hemisphere, with ``index``, ``abbreviation`` and any of the columns of `NUCLEUS_RULES`.

    Returns
    -------
    DataFrame
        ``index``, ``abbreviation``, ``rating`` and ``reasons`` (separated by semicolons, empty if green). A nucleus
        without voxels is rated only by whether it was found at all.
    """
    ratings = []
    for _, row in table.iterrows():
        values = {str(key): value for key, value in row.items()}
        if values.get("n_components") == 0:
            weighted_mm3 = values.get("volume_pv_mm3")
            is_found = weighted_mm3 is not None and not pd.isna(weighted_mm3) and weighted_mm3 > 0
            values = {"n_voxels": 0} if is_found else {"n_components": 0}
        ratings.append(rate(values, NUCLEUS_RULES))
    result = table[["index", "abbreviation"]].reset_index(drop=True)
    result["rating"] = [rating for rating, _ in ratings]
    result["reasons"] = ["; ".join(reasons) for _, reasons in ratings]
    return result


def rate_scan(values: Mapping[str, Any], ratings: Sequence[Rating]) -> tuple[Rating, tuple[str, ...]]:
    """Rate a scan by its map and the ratings of its nuclei; returns as `rate`.

    Parameters
    ----------
    values : mapping
        Measures of the map, and ``box_margin_mm``.
    ratings : sequence of str
        Ratings of its nuclei.
    """
    fraction = ratings.count("red") / len(ratings) if ratings else math.nan
    return rate({**values, "red_nuclei_fraction": fraction}, SCAN_RULES)
