"""How the pages' templates are read."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined


def open_templates(**filters: Callable[..., object]) -> Environment:
    """Open the templates of all pages: text is escaped, an unknown name is an error; `filters` are known by name."""
    environment = Environment(
        loader=PackageLoader("bids_dgmseg.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment
