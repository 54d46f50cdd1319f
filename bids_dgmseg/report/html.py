"""The base of all pages: formatted values, templates, embedded plots, atomic writing."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from bids_dgmseg import __version__
from bids_dgmseg.io.files import MISSING, write_bytes
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS, describe_sampled
from bids_dgmseg.models.structures import color_of

_LONGEST_SLUG = 100
"""Characters; names of files have 255 bytes, with suffixes and the marks of temporary files."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Quantity(NamedTuple):
    """A measure that pages plot and compare."""

    name: str
    unit: str
    digits: int
    factor: float = 1.0
    """From the unit of the files to `unit`."""

    @property
    def label(self) -> str:
        """Return name and unit, as on an axis."""
        return f"{self.name} ({self.unit})"


QUANTITIES = {"volume_mm3": Quantity("volume", "mm³", 1), "mean_ppm": Quantity("mean susceptibility", "ppm", 4)}
"""By their columns in stats.tsv."""


def quantity(measure: str) -> Quantity:
    """Return how a measure is shown, such as the mean of a further map; susceptibilities are in ppb.

    >>> quantity("R2starmap_mean_per_s").label, quantity("mean_ppm_harmonized").label
    ('R2starmap mean (1/s)', 'mean susceptibility, harmonized over sites (ppb)')
    """
    base = measure.removesuffix("_harmonized")
    if base != measure:
        shown = quantity(base)
        return shown._replace(name=f"{shown.name}, harmonized over sites")
    about = STATS_COLUMNS.get(measure) or describe_sampled(measure) or {}
    unit = about.get("Units", "").replace("^3", "³")
    ending = "_" + unit.replace("1/", "per_").replace("/", "_per_")
    other = Quantity(measure.removesuffix(ending).replace("_", " "), unit or "no unit", 4)
    shown = QUANTITIES.get(measure, other)
    return shown._replace(unit="ppb", digits=1, factor=1000.0) if shown.unit == "ppm" else shown


def format_number(value: Any, digits: int = 3) -> str:
    """Format a number, or the text of one, with fixed decimals; anything else is ``n/a``.

    >>> format_number(-0.01249), format_number("640.04", 1), format_number("-0.0001"), format_number(None)
    ('−0.012', '640.0', '0.000', 'n/a')
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return MISSING
    if not math.isfinite(number):
        return MISSING
    rounded = f"{number:.{digits}f}"
    if float(rounded) == 0:
        rounded = rounded.removeprefix("-")
    return rounded.replace("-", "−")


def format_significant(value: float) -> str:
    """Format three significant digits, or all digits before the point up to 100,000.

    >>> [format_significant(value) for value in (1234.5, -0.012345, -12050130, 0.0000002)]
    ['1234', '−0.0123', '−1.21 × 10⁷', '2 × 10⁻⁷']
    """
    if not math.isfinite(value):
        return MISSING
    text = f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}"
    mantissa, _, exponent = text.partition("e")
    power = f" × 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if exponent else ""
    return mantissa.replace("-", "−") + power


def format_p(value: Any) -> str:
    """Format a p value.

    >>> format_p(0.00002), format_p(0.0412)
    ('< 0.001', '0.041')
    """
    if isinstance(value, int | float) and value < 0.001:
        return "< 0.001"
    return format_number(value)


def format_value(value: Any, unit: str = "") -> str:
    """Format a value of a JSON file.

    >>> format_value([0.9375, 0.9375, 3.0]), format_value(1432.1, "ml"), format_value(None, "ppm")
    ('0.938, 0.938, 3', '1432 ml', 'n/a')
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = format_significant(value)
    elif isinstance(value, Mapping):
        text = "; ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(format_value(item) for item in value) or "none"
    else:
        text = str(value)
    return f"{text} {unit}" if unit and text != MISSING else text


def format_size(values: Sequence[float] | None) -> str:
    """Format edge lengths.

    >>> format_size([1, 1, 3])
    '1 × 1 × 3 mm'
    """
    return f"{' × '.join(format_value(float(value)) for value in values)} mm" if values else MISSING


@cache
def _environment() -> Environment:
    """Jinja environment of all templates; text is escaped, unknown names are errors."""
    environment = Environment(
        loader=PackageLoader("bids_dgmseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, p=format_p, value=format_value)
    environment.globals.update(version=__version__, color_of=color_of)
    return environment


def render(template: str, **context: Any) -> bytes:
    """Render a template as UTF-8; characters of undecodable paths become question marks."""
    return _environment().get_template(template).render(**context).encode(errors="replace")


def write_page(template: str, out: Path, **context: Any) -> Path:
    """Render a template and write the page atomically."""
    return write_bytes(render(template, **context), out)


SCREEN_DPI = 140
"""Pixels per inch of a figure on a page."""


class PlotFile(NamedTuple):
    """A plot beside a page: link from the page, data URL for pages that hold their plots, size on it in pixels."""

    href: str
    data: str
    width: int
    height: int


def save_plot(
    png: bytes, page_dir: Path, name: str, *, folder: str = "figures", dpi: float = SCREEN_DPI, pdf: bytes = b""
) -> PlotFile:
    """Write ``FOLDER/NAME.png``, and the PDF if there is one, below the folder of a page."""
    href = f"{folder}/{name}.png"
    write_bytes(png, page_dir / href)
    data = "data:image/png;base64," + base64.b64encode(png).decode()
    if pdf:
        write_bytes(pdf, page_dir / f"{folder}/{name}.pdf")
    width, height = (round(size * SCREEN_DPI / dpi) for size in Image.open(io.BytesIO(png)).size)
    return PlotFile(href, data, width, height)


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts names by their text and by the numbers in it.

    >>> sorted(["Site 10", "Site 9", "2", "10"], key=natural_key)
    ['2', '10', 'Site 9', 'Site 10']
    """
    parts = re.findall(r"\d+|\D+", name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def slug(text: str) -> str:
    """Replace the characters that identifiers and file names should not have, and shorten long text.

    Eight digits of a checksum keep different texts apart that would become equal.

    >>> slug("mean ppm/site A"), slug("größe"), slug("..")
    ('mean-ppm-site-A', 'gr-e-d353a267', '5ec1f7e7')
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
    if plain and plain == re.sub("[ +/]", "-", text) and len(plain) <= _LONGEST_SLUG:
        return plain
    return f"{plain[:_LONGEST_SLUG]}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}".lstrip("-")


def scan_anchor(scan: str, model: str) -> str:
    """Return the identifier of a scan's section on the page of its participant."""
    return slug(f"{scan}_{model}")
