"""How numbers and settings are written for reading."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bids_dgmseg.measurement.columns import STATS_COLUMNS

NO_VALUE = "n/a"

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """A column of the table of a scan."""

    key: str
    """In ``_stats.tsv``."""
    title: str
    group: str
    """What the columns beside it share, with the unit."""
    digits: int
    """Decimals shown; the full value stays in the cell's title."""

    @property
    def meaning(self) -> str:
        """From the data dictionary of the table."""
        return str(STATS_COLUMNS.get(self.key, {}).get("Description", self.title))


COLUMNS = (
    Column("n_voxels", "count", "Voxels", 0),
    Column("volume_mm3", "label", "Volume (mm³)", 1),
    Column("volume_pv_mm3", "weighted", "Volume (mm³)", 1),
    Column("mean_ppm", "mean", "Susceptibility (ppm)", 3),
    Column("median_ppm", "median", "Susceptibility (ppm)", 3),
    Column("std_ppm", "SD", "Susceptibility (ppm)", 3),
    Column("p05_ppm", "5th %", "Susceptibility (ppm)", 3),
    Column("p95_ppm", "95th %", "Susceptibility (ppm)", 3),
    Column("mean_pv_ppm", "weighted", "Susceptibility (ppm)", 3),
    Column("core_mean_ppm", "core", "Susceptibility (ppm)", 3),
    Column("mean_ref_ppm", "mean", "Relative to the reference (ppm)", 3),
    Column("core_mean_ref_ppm", "core", "Relative to the reference (ppm)", 3),
    Column("mean_probability", "mean", "Probability", 2),
)
"""Of the table of measurements."""

CHECKS = (
    Column("n_components", "parts", "Segmentation", 0),
    Column("mean_entropy_bits", "entropy (bit)", "Segmentation", 2),
    Column("mass_outside_fraction", "outside", "Segmentation", 2),
    Column("expected_dice", "expected Dice", "Segmentation", 2),
    Column("rim_contrast_ppm", "contrast (ppm)", "Map around it", 3),
    Column("boundary_gradient_ppm_per_mm", "gradient (ppm/mm)", "Map around it", 3),
    Column("edge_distance_mm", "to the edge (mm)", "Map around it", 1),
    Column("volume_z", "volume", "Against the literature (SD)", 1),
    Column("mean_ppm_z", "susceptibility", "Against the literature (SD)", 1),
    Column("volume_asymmetry", "volume", "Left − right, of the mean", 2),
    Column("mean_ppm_asymmetry", "susceptibility", "Left − right, of the mean", 2),
)
"""Of the table of what the ratings are given by."""


def round_text(text: str | None, *, digits: int) -> str:
    """Round a number of a table for reading; what is not a finite number is ``n/a``.

    >>> round_text("-0.01249", digits=3)
    '−0.012'
    >>> round_text("n/a", digits=3)
    'n/a'
    """
    try:
        value = float(text or "nan")
    except ValueError:
        return NO_VALUE
    if not math.isfinite(value):
        return NO_VALUE
    rounded = f"{value:.{digits}f}"
    if float(rounded) == 0:
        rounded = rounded.removeprefix("-")
    return rounded.replace("-", "−")


def say(value: Any) -> str:
    """Write a value of a JSON file for reading.

    >>> say([0.9375, 0.9375, 3.0])
    '0.938, 0.938, 3'
    >>> say(None)
    'n/a'
    """
    if value is None:
        return NO_VALUE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else NO_VALUE
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {say(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(say(item) for item in value) or "none"
    return str(value)


def say_size(values: Sequence[float] | None, *, unit: str = "mm") -> str:
    """Write edge lengths.

    >>> say_size([1, 1, 3])
    '1 × 1 × 3 mm'
    """
    return f"{' × '.join(say(float(value)) for value in values)} {unit}".strip() if values else NO_VALUE


def say_box(box: Mapping[str, Any] | None) -> str:
    """Write a box in mm.

    >>> say_box({"low": [-50, -80.4, -60], "high": [50, 40, 50]})
    'x −50 to 50, y −80 to 40, z −60 to 50 mm'
    >>> say_box({"low": [0, 0, 0], "high": [1, 2, 3], "rotation_deg": [-17.6, 0, 5]})
    'x 0 to 1, y 0 to 2, z 0 to 3 mm, turned by 18° as head or slices are'
    """
    if not box or not box.get("low") or not box.get("high"):
        return NO_VALUE
    sides = zip("xyz", box["low"], box["high"], strict=True)
    text = ", ".join(f"{axis} {low:.0f} to {high:.0f}" for axis, low, high in sides) + " mm"
    turned = (
        f", turned by {math.hypot(*box['rotation_deg']):.0f}° as head or slices are" if box.get("rotation_deg") else ""
    )
    return (text + turned).replace("-", "−")


def say_number(value: Any, digits: int = 3) -> str:
    """Write a number with a true minus; what is none is ``n/a``.

    >>> say_number(-0.01249)
    '−0.012'
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NO_VALUE
    return round_text(str(value), digits=digits)


def say_p(value: Any) -> str:
    """Write a p value.

    >>> say_p(0.00002), say_p(0.0412)
    ('< 0.001', '0.041')
    """
    if isinstance(value, int | float) and value < 0.001:
        return "< 0.001"
    return say_number(value)


def say_short(value: float) -> str:
    """Write three digits of a number, and all before its point up to a hundred thousand.

    >>> say_short(1234.5), say_short(-0.012345), say_short(-12050130), say_short(0.0000002)
    ('1234', '−0.0123', '−1.21 × 10⁷', '2 × 10⁻⁷')
    """
    if not math.isfinite(value):
        return NO_VALUE
    text = f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}"
    mantissa, _, exponent = text.partition("e")
    power = f" × 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if exponent else ""
    return mantissa.replace("-", "−") + power


def anchor_of(scan: str, model: str) -> str:
    """Return the identifier of a scan's section on the page of its participant.

    >>> anchor_of("sub-a+b_ses-1", "dgm16")
    'sub-a-b_ses-1_dgm16'
    """
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"{scan}_{model}")


def open_templates(**filters: Callable[..., object]) -> Environment:
    """Open the templates of all pages: text is escaped, an unknown name is an error; `filters` are known by name."""
    environment = Environment(
        loader=PackageLoader("bids_dgmseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment
