"""Phase images as scanners and converters store them, in rad."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, check_intact, load_image

_TURN = 2 * math.pi

_STORED = (
    (-math.pi, math.pi, 1.0, 0.0),
    (0.0, _TURN, 1.0, 0.0),
    (-4096.0, 4095.0, math.pi / 4096, 0.0),
    (0.0, 4095.0, _TURN / 4096, -math.pi),
    (-3142.0, 3142.0, 1e-3, 0.0),
)
"""Lowest and highest value, rad a step and at 0: radians, 12 bits with and without sign, thousandths of radians."""

_LARGEST_RAD = 200.0
"""What an unwrapped phase spans at most; sidecars call larger numbers rad too, which are steps of a converter."""

_NEAR = 0.02
"""Part of a range by which values may end before it, or beyond it by rounding."""


def read_phase(path: str | Path, *, units: str = "") -> Volume:
    """Read a phase image.

    Parameters
    ----------
    path : path
        NIfTI file.
    units : str
        What its sidecar says of them: rad are taken as they are, other values for the range that they fill.

    Returns
    -------
    Volume
        Phase in rad, from -π to π; NaN where a value is not finite.

    Raises
    ------
    InputError
        If the file is damaged or no 3D image, its header cannot be right, all its values are the same, or they fill no
        known range.
    """
    name = Path(path).name
    volume = Volume.read(path)
    check_intact(path)
    check_header(load_image(path), name)
    finite = np.isfinite(volume.array)
    stored = np.where(finite, volume.array, 0.0)
    low, high = float(stored.min()), float(stored.max())
    if low == high:
        raise InputError(f"{name}: all values are {low:g}, expected a phase; export it again")
    step, start = _scale(name, low, high, units)
    wrapped = np.remainder(stored * step + start + math.pi, _TURN) - math.pi
    return volume.with_array(np.where(finite, wrapped, np.nan).astype(np.float32))


def _scale(name: str, low: float, high: float, units: str) -> tuple[float, float]:
    """Find the rad a step, and those of a stored 0."""
    stated = units.strip().casefold() in ("rad", "rads", "radian", "radians")
    if stated and high - low <= _LARGEST_RAD:
        return 1.0, 0.0
    for lowest, highest, step, start in _STORED:
        near = _NEAR * (highest - lowest)
        if abs(low - lowest) <= near and abs(high - highest) <= near:
            return step, start
    fill = "are no radians and fill" if stated else "fill"
    raise InputError(
        f"{name}: values from {low:.4g} to {high:.4g} {fill} no known range of a phase "
        '(±π, 0 to 2π, ±4096, 0 to 4095, ±3142); rescale it to radians and set "Units" in its sidecar to "rad"'
    )
