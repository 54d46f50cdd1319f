"""One rating a nucleus and a scan, by rules that are data."""

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
    """When a measure turns a rating to amber or red."""

    column: str
    side: Literal["above", "below", "away"]
    """Which values are worse; ``away`` from 0 in both directions."""
    amber: float
    """Values beyond it are amber."""
    red: float | None
    """Values beyond it are red; None where the measure alone never tells that a result is wrong."""
    words: str
    """What the user reads."""
    unit: str
    """What the user reads; ``%`` where the measure is a share of 1."""
    why: str
    """Where the limits come from."""

    def rate(self, value: float) -> Rating:
        """Give the rating of one value; a missing value is green, for it tells nothing."""
        if math.isnan(value):
            return "green"
        size = {"above": value, "below": -value, "away": abs(value)}[self.side]
        amber, red = (limit if limit is None or self.side != "below" else -limit for limit in (self.amber, self.red))
        if red is not None and size > red:
            return "red"
        return "amber" if amber is not None and size > amber else "green"

    def explain(self, value: float) -> str:
        """Say in words what is wrong, with the value and the limit that it passed."""
        limit = self.red if self.rate(value) == "red" and self.red is not None else self.amber
        if self.unit == "%":
            limit, value = 100 * limit, 100 * value
        unit = f" {self.unit}" if self.unit else ""
        where = {"above": "above ", "below": "below ", "away": "beyond ±"}[self.side]
        said = f"{_round_away_from(limit, value)}{unit}, {where}{limit:g}".replace("-", "−")
        return f"{self.words} ({said})"


def _round_away_from(limit: float, value: float) -> str:
    """Round to three digits, or as many as it takes to tell the value from a limit of either sign."""
    rounded = (f"{value:.{digits}g}" for digits in range(3, 18))
    return next(text for text in rounded if abs(float(text)) != abs(limit) or abs(value) == abs(limit))


NUCLEUS_RULES: tuple[Rule, ...] = (
    Rule("n_components", "below", 1, 1, "not found", "parts", "a nucleus has at least one part"),
    Rule(
        "n_voxels",
        "below",
        1,
        None,
        "found, but fills no voxel",
        "voxels",
        "its weighted volume stands; never red, since voxels are larger than it and nothing went wrong",
    ),
    Rule(
        "n_components",
        "above",
        2,
        4,
        "in many parts",
        "parts",
        "nuclei are whole; the interposed nucleus has two parts a side",
    ),
    Rule(
        "expected_dice",
        "below",
        0.65,
        0.4,
        "the model is not certain of its outline",
        "expected Dice",
        "in benchmarks/flags.py a twentieth of dgm16's nuclei of a Dice of 0.7 and more lie below 0.65, and seven "
        "in ten of the others; below 0.4 hardly any, and half",
    ),
    Rule(
        "rim_contrast_ppm",
        "below",
        0.01,
        -0.02,
        "hardly brighter than its surroundings",
        "ppm",
        "all eight nuclei hold more iron than what is around them; below 0 by more than noise, it is another place",
    ),
    Rule(
        "rim_contrast_ppm",
        "above",
        0.35,
        1.0,
        "much brighter than its surroundings",
        "ppm",
        "adults' nuclei reach about 0.2 ppm, iron overload more; 1 ppm is a wrong unit or blood",
    ),
    Rule(
        "boundary_gradient_ppm_per_mm",
        "below",
        0.0,
        None,
        "darker inside its outline than outside",
        "ppm/mm",
        "an outline on the wrong place crosses no edge; noise alone can do it to a small nucleus",
    ),
    Rule(
        "edge_distance_mm",
        "below",
        2.0,
        0.5,
        "close to the end of what was measured",
        "mm",
        "maps are wrong for some mm at the edge of their mask; at 0 the nucleus may be cut",
    ),
    Rule(
        "volume_z",
        "away",
        6.0,
        None,
        "its volume is unusual",
        "SD",
        "protocols differ by more than 2 SD, one in ten right nuclei of benchmarks/flags.py by 4; never red, since a "
        "disease may well change a volume",
    ),
    Rule(
        "mean_ppm_z",
        "away",
        4.0,
        12.0,
        "its susceptibility is unusual",
        "SD",
        "references and diseases shift means by some SD; 12 SD, about 0.4 ppm, is not brain tissue",
    ),
    Rule(
        "volume_asymmetry",
        "away",
        0.5,
        1.0,
        "its volume differs between the sides",
        "",
        "0.5 is two thirds larger than the other side, 1 three times as large",
    ),
    Rule(
        "mean_ppm_asymmetry",
        "away",
        0.67,
        1.2,
        "its susceptibility differs between the sides",
        "",
        "0.67 is twice the other side, 1.2 four times; a disease of one side may well do the first",
    ),
)
"""Rules for one nucleus; columns of the regions, the quality measures, `norms` and `asymmetry`."""

SCAN_RULES: tuple[Rule, ...] = (
    Rule(
        "noise_sd_ppm",
        "above",
        0.03,
        0.08,
        "noisy map",
        "ppm",
        "0.03 ppm is the contrast of the putamen, 0.08 that of the red nucleus",
    ),
    Rule(
        "streaking_index",
        "above",
        6.0,
        None,
        "streaks",
        "",
        "1 has none; on the phantom, division truncated at 0.2 leaves 1, at 0.1 about 3, at 0.05 ten; never red: in "
        "benchmarks/flags.py most outlines and means stood streaks of ten and more",
    ),
    Rule(
        "rim_residual_ppm",
        "above",
        0.08,
        0.15,
        "residual background field at the brain's rim",
        "ppm",
        "cortex and fluid over white matter alone make 0.05 ppm in the phantom, less in a folded brain",
    ),
    Rule(
        "box_margin_mm",
        "below",
        1.0,
        None,
        "nuclei close to the edge of the box that was segmented",
        "mm",
        "within a voxel of the edge a nucleus may be cut; in benchmarks/flags.py most were not, so never red",
    ),
    Rule(
        "red_nuclei_fraction",
        "above",
        0.0,
        0.25,
        "nuclei with a red rating",
        "%",
        "whoever sees the scan's rating alone must hear of them; a quarter means that the scan is not usable",
    ),
)
"""Rules for a scan; names of `scan_quality`, ``box_margin_mm`` and ``red_nuclei_fraction``."""


def rate(values: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Rating, tuple[str, ...]]:
    """Apply rules to measures.

    Parameters
    ----------
    values : mapping
        Measure → value; what is absent or missing is not judged.
    rules : sequence of Rule
        Rules to apply.

    Returns
    -------
    rating : {"green", "amber", "red"}
        The worst of all rules.
    reasons : tuple of str
        One for each rule that is not green, the worst first.
    """
    found = []
    for rule in rules:
        raw = values.get(rule.column)
        value = math.nan if raw is None or pd.isna(raw) else float(raw)
        if (rating := rule.rate(value)) != "green":
            found.append((RATINGS.index(rating), rule.explain(value)))
    found.sort(key=lambda pair: -pair[0])
    worst = max((level for level, _ in found), default=0)
    return RATINGS[worst], tuple(words for _, words in found)


def rate_nuclei(table: pd.DataFrame) -> pd.DataFrame:
    """Give every nucleus of a scan its rating.

    Parameters
    ----------
    table : DataFrame
        One row a nucleus and side, with ``index``, ``abbreviation`` and any of the columns of `NUCLEUS_RULES`.

    Returns
    -------
    DataFrame
        ``index``, ``abbreviation``, ``rating`` and ``reasons`` (separated by semicolons, empty where green).
    """
    verdicts = [rate(_judged(row), NUCLEUS_RULES) for _, row in table.iterrows()]
    result = table[["index", "abbreviation"]].reset_index(drop=True)
    result["rating"] = [rating for rating, _ in verdicts]
    result["reasons"] = ["; ".join(reasons) for _, reasons in verdicts]
    return result


def _judged(row: pd.Series) -> dict[str, Any]:
    """Take the measures of a nucleus; of one without a voxel nothing but whether it was found all the same."""
    values = {str(key): value for key, value in row.items()}
    if values.get("n_components") != 0:
        return values
    weighted_mm3 = values.get("volume_pv_mm3")
    is_found = weighted_mm3 is not None and not pd.isna(weighted_mm3) and weighted_mm3 > 0
    return {"n_voxels": 0} if is_found else {"n_components": 0}


def rate_scan(values: Mapping[str, Any], ratings: Sequence[Rating]) -> tuple[Rating, tuple[str, ...]]:
    """Give a scan its rating.

    Parameters
    ----------
    values : mapping
        Measures of the map, and ``box_margin_mm``.
    ratings : sequence of str
        Of its nuclei.

    Returns
    -------
    rating : {"green", "amber", "red"}
        The worst of all rules.
    reasons : tuple of str
        One for each rule that is not green, the worst first.
    """
    share = ratings.count("red") / len(ratings) if ratings else math.nan
    return rate({**values, "red_nuclei_fraction": share}, SCAN_RULES)
