"""Read phase images in radians, as scanners and converters store them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, check_intact, load_image

PHASE_RANGES = (
    (-math.pi, math.pi, 1.0, 0.0),
    (0.0, 2 * math.pi, 1.0, 0.0),
    (-4096.0, 4095.0, math.pi / 4096, 0.0),
    (0.0, 4095.0, 2 * math.pi / 4096, -math.pi),
    (-3142.0, 3142.0, 1e-3, 0.0),
)
"""Lowest and highest value, scale to rad and offset in rad: radians, 12 bits with and without sign, milliradians."""

_LARGEST_SPAN_RAD = 200.0
"""Largest span of an unwrapped phase; sidecars also state rad for larger values, which are integers of a converter."""

_RANGE_TOLERANCE = 0.02
"""Fraction of a range by which values may end before it, or beyond it by rounding."""


def read_phase(path: str | Path, *, units: str = "") -> Volume:
    """Read a phase image.

    Parameters
    ----------
    path : path
        NIfTI file.
    units : str
        Unit in its sidecar. Values in rad are used as they are; otherwise the range of the values determines the scale.

    Returns
    -------
    Volume
        Phase in rad, wrapped to -π to π; NaN where a value is not finite.

    Raises
    ------
    InputError
        If the file is damaged or not a 3D image, its header is implausible, its values are constant, or their range is
        unknown.
    """
    name = Path(path).name
    volume = Volume.read(path)
    check_intact(path)
    check_header(load_image(path), name)
    finite = np.isfinite(volume.array)
    stored = np.where(finite, volume.array, 0.0)
    low, high = float(stored.min()), float(stored.max())
    if low == high:
        raise InputError(f"{name}: all values are {low:g}, expected a phase image; export it again")
    stated = units.strip().casefold() in ("rad", "rads", "radian", "radians")
    if stated and high - low <= _LARGEST_SPAN_RAD:
        scale, offset = 1.0, 0.0
    else:
        matching = [
            (scale, offset)
            for lowest, highest, scale, offset in PHASE_RANGES
            if max(abs(low - lowest), abs(high - highest)) <= _RANGE_TOLERANCE * (highest - lowest)
        ]
        if not matching:
            raise InputError(
                f"{name}: values from {low:.4g} to {high:.4g} are {'not radians and ' if stated else ''}not in a known "
                "range of phase images (±π, 0 to 2π, ±4096, 0 to 4095, ±3142); rescale to radians and set "
                '"Units" to "rad" in its sidecar'
            )
        scale, offset = matching[0]
    wrapped = np.remainder(stored * scale + offset + math.pi, 2 * math.pi) - math.pi
    return volume.with_array(np.where(finite, wrapped, np.nan).astype(np.float32))
