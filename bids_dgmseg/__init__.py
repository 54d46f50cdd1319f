"""Segment the deep nuclei of the brain on quantitative susceptibility maps, and measure them."""

from __future__ import annotations

__version__ = "0.1.0"
