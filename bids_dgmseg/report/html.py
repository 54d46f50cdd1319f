"""The base of all pages: templates, embedded plots, atomic writing."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from bids_dgmseg import __version__
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.report.format import format_count, format_number, format_p, format_value
from bids_dgmseg.report.style import colour_of


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
    environment.filters.update(number=format_number, p=format_p, value=format_value, count=format_count)
    environment.globals.update(version=__version__, colour_of=colour_of)
    return environment


def render(template: str, **context: Any) -> bytes:
    """Render a template as UTF-8; characters of undecodable paths become question marks."""
    return _environment().get_template(template).render(**context).encode(errors="replace")


def write_page(template: str, out: Path, **context: Any) -> Path:
    """Render a template and write the page atomically."""
    return write_bytes(render(template, **context), out)


@dataclass(frozen=True)
class PlotFile:
    """A plot in ``figures/`` beside a page."""

    href: str
    """Link from the page."""
    data: str
    """Data URL, for pages that hold their plots."""
    width: int
    height: int


def save_plot(png: bytes, folder: Path, name: str) -> PlotFile:
    """Write ``figures/NAME.png`` below the folder of a page."""
    href = f"figures/{name}.png"
    write_bytes(png, folder / href)
    return PlotFile(href, "data:image/png;base64," + base64.b64encode(png).decode(), *Image.open(io.BytesIO(png)).size)


def slug(text: str) -> str:
    """Replace the characters that identifiers and file names should not have.

    >>> slug("mean ppm/site A")
    'mean-ppm-site-A'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "unnamed"


def scan_anchor(scan: str, model: str) -> str:
    """Return the identifier of a scan's section on the page of its participant."""
    return slug(f"{scan}_{model}")
