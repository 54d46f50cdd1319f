"""Segment the deep gray nuclei of the brain on quantitative susceptibility maps, and measure them.

>>> from bids_dgmseg import segment, measure, reconstruct, list_models
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bids_dgmseg.api import SegmentationResult, list_models, measure, reconstruct, segment

__version__ = "0.1.0"

__all__ = ["SegmentationResult", "__version__", "list_models", "measure", "reconstruct", "segment"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first used, so that ``bids_dgmseg --help`` stays fast (PEP 562)."""
    if name in __all__:
        return getattr(importlib.import_module("bids_dgmseg.api"), name)
    raise AttributeError(f"module 'bids_dgmseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
