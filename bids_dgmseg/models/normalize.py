"""From ppm to what a network was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def in_ppm(chi: FloatArray) -> FloatArray:
    """Keep the physical scale: tenths of a ppm, clipped at ±0.5 ppm, where only veins and streaks lie beyond."""
    return np.clip(chi, -0.5, 0.5) * np.float32(10)


def zscore(chi: FloatArray) -> FloatArray:
    """Mean 0, SD 1 over the whole patch; a constant patch becomes 0."""
    spread = chi.std()
    return (chi - chi.mean()) / spread if spread > 0 else np.zeros_like(chi)


def minmax(chi: FloatArray) -> FloatArray:
    """Scale the patch to 0 … 1; a constant patch becomes 0."""
    low, high = chi.min(), chi.max()
    return (chi - low) / (high - low) if high > low else np.zeros_like(chi)


NORMALIZATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {"ppm": in_ppm, "zscore": zscore, "minmax": minmax}
