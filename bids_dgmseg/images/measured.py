"""Which voxels of a map were measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ZERO_PPM = 1e-4
"""A tenth of a ppb: below any map's noise, above what 16 bits make of a zero."""


def is_measured(chi: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the voxels of a map (ppm) with a measurement: finite, and not 0 as brain masks leave the rest."""
    measured: NDArray[np.bool_] = np.abs(chi) > _ZERO_PPM  # NaN is not larger; infinity does not occur
    return measured
