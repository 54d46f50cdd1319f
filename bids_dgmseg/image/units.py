"""Is this file a susceptibility map, and in which unit? Judged from its sidecar and its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, check_intact, load_image

PPM_PER_UNIT = {"ppm": 1.0, "ppb": 1e-3}

# The spread is the distance from the 1st to the 99th percentile of the voxels that are not 0.
LARGEST_SPREAD_PPM = 3.0
"""Brains spread over 0.05 to 0.4 ppm; streaks and noise around a head that was not stripped reach ±1 ppm."""

SMALLEST_SPREAD_PPM = 1e-3
"""Below it lie masks, constants and maps in other units (tesla, fractions of one)."""

SMALLEST_SPREAD_PPB = 30.0
"""A brain's 0.05 ppm, with some room; local fields at 3 T spread over 5 to 25 Hz, below it."""

PHASE_HINT_SPREAD = 1.0
"""A sidecar that calls the image a phase is believed above it; chi maps inherit phase sidecars, but stay below."""

PHASE_RANGES = ((-math.pi, math.pi), (0.0, 2 * math.pi), (-4096.0, 4095.0), (0.0, 4095.0), (-3142.0, 3142.0))
"""What scanners and converters store: radians, 12 bits with and without sign, thousandths of radians."""

PHASE_EDGE, PHASE_EDGE_SHARE = 0.1, 0.005
"""Wrapped phase fills both outer tenths of its range with a tenth of the voxels each; maps leave them nearly empty."""

NEGATIVE_SHARE = 1e-3
"""Half of a chi map is below its reference; fewer than this is none (interpolation makes a few)."""

LARGEST_POSITIVE_PPM = 0.2
"""The 90th percentile of a map of paramagnetic sources alone is near 0.05 ppm, of a magnitude scaled to 1 near 0.5."""

HOLES_SHARE = 0.01
"""A background of NaN takes most of an image; fewer voxels that are not finite are holes in a map."""

HOLES_RIM_SHARE = 1 / 6
"""A voxel of the brain has at least one of its six neighbours in it; empty corners of an image have hardly any."""

_UNITS = {
    "ppm": ("ppm", "parts per million", "part per million", "1e-6", "10^-6"),
    "ppb": ("ppb", "parts per billion", "part per billion", "1e-9", "10^-9"),
    "Hz": ("hz", "hertz", "rad/s", "rads/s", "radians/s"),
    "rad": ("rad", "rads", "radian", "radians"),
    "": ("", "n/a", "arbitrary", "arbitrary units", "a.u.", "au", "unknown"),
}

_REFERENCE_KEYS = (
    "referenceregion",
    "susceptibilityreferenceregion",
    "susceptibilityreference",
    "qsmreferenceregion",
    "qsmreference",
    "referencetissue",
    "reference",
)


@dataclass(frozen=True)
class Checked:
    """A susceptibility map that was found usable."""

    chi_ppm: Volume
    """In ppm; NaN where nothing was measured."""
    units: str
    """Unit in the file: ``ppm`` or ``ppb``."""
    units_from: str
    """``sidecar`` or ``magnitude of the values``."""
    reference: str
    """Region whose susceptibility is 0, as the sidecar has it, or ``not stated``."""
    n_replaced: int
    """Voxels inside the brain that were NaN or infinite."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    """The values of an image in a few robust numbers."""

    low: float
    p01: float
    p90: float
    p99: float
    high: float
    negative_share: float
    is_phase: bool

    @property
    def spread(self) -> float:
        return self.p99 - self.p01

    @property
    def reach(self) -> str:
        """The value of largest size, leaving out the extreme hundredths."""
        return f"{max(self.p01, self.p99, key=abs):.3g}"


def check_chi(path: str | Path, sidecar: Mapping[str, Any]) -> Checked:
    """Read a susceptibility map, find its unit and refuse what is none.

    Parameters
    ----------
    path : path
        NIfTI file.
    sidecar : mapping
        Its metadata; ``Units`` and the reference region are used where they are given. An ``ImageType`` of phase
        counts only where the values support it, since tools copy it from the phase to the map.

    Returns
    -------
    Checked
        The map in ppm, NaN at every voxel that was not finite. 0 stays 0.

    Raises
    ------
    InputError
        If the file is damaged, is no 3D image of real numbers, has voxels of no usual size, has no finite or no
        non-zero voxel, is a field map, a phase or a magnitude, or its values contradict the unit in its sidecar.
    """
    name = Path(path).name
    volume = Volume.read(path)
    check_intact(path)
    doubts = check_header(load_image(path), name)
    array = volume.array
    finite = np.isfinite(array)
    if not finite.any():
        raise InputError(f"{name}: no voxel is finite; reconstruct the map again")
    measured = finite & (array != 0)
    if not measured.any():
        raise InputError(f"{name}: all voxels are 0; reconstruct the map again")
    look = _look(array[measured])
    stated = _stated_units(name, sidecar)
    _refuse_other_images(name, look, stated, sidecar)
    units = _units(name, look, stated)
    n_replaced = count_holes(finite, measured)
    chi = np.where(finite, array * np.float32(PPM_PER_UNIT[units]), np.float32(np.nan))
    return Checked(
        chi_ppm=volume.with_array(chi),
        units=units,
        units_from="sidecar" if stated else "magnitude of the values",
        reference=_reference(sidecar),
        n_replaced=n_replaced,
        warnings=(*doubts, *_warnings(name, look, stated, units, n_replaced)),
    )


def count_holes(finite: NDArray[np.bool_], measured: NDArray[np.bool_]) -> int:
    """Count the voxels inside the brain that are not finite.

    Where NaN is also the background, those count that finite voxels enclose. Else a group of them counts if enough of
    the voxels around it were measured, so that one on the border of the brain or of the image counts too.

    Parameters
    ----------
    finite : ndarray of bool, shape (X, Y, Z)
        Voxels with a finite value.
    measured : ndarray of bool, shape (X, Y, Z)
        Voxels with a finite value other than 0.
    """
    if finite.all():
        return 0
    if np.mean(~finite) > HOLES_SHARE:
        return int(np.count_nonzero(ndimage.binary_fill_holes(finite) & ~finite))
    groups, n_groups = ndimage.label(~finite)
    around = np.where(finite, ndimage.grey_dilation(groups, footprint=ndimage.generate_binary_structure(3, 1)), 0)
    numbers = np.arange(1, n_groups + 1)
    n_around, n_measured = (ndimage.sum_labels(mask, around, numbers) for mask in (finite, measured))
    sizes = np.bincount(groups.ravel())[1:]
    return int(sizes[n_measured >= HOLES_RIM_SHARE * n_around].sum())


def _look(values: NDArray[np.float32]) -> _Look:
    p01, p90, p99 = (float(value) for value in np.percentile(values, (1, 90, 99)))
    low, high = float(values.min()), float(values.max())
    negative_share = float(np.mean(values < 0))
    is_phase = any(_fills(values, low, high, *bounds) for bounds in PHASE_RANGES)
    return _Look(low, p01, p90, p99, high, negative_share, is_phase)


def _fills(values: NDArray[np.float32], low: float, high: float, range_low: float, range_high: float) -> bool:
    """Whether values end where a range ends and crowd at both ends."""
    width = range_high - range_low
    if max(abs(low - range_low), abs(high - range_high)) > 0.01 * width:
        return False
    edge = PHASE_EDGE * width
    shares = np.mean(values < range_low + edge), np.mean(values > range_high - edge)
    return bool(min(shares) > PHASE_EDGE_SHARE)


def _stated_units(name: str, sidecar: Mapping[str, Any]) -> str:
    """Read the unit that the sidecar names: ppm, ppb, Hz or rad; empty where it is silent."""
    known = {key.casefold(): value for key, value in sidecar.items()}
    text = known.get("units", known.get("unit"))
    if text is None:
        return ""
    spelled = " ".join(str(text).casefold().replace("_", " ").split())
    for units, spellings in _UNITS.items():
        if spelled in spellings:
            return units
    raise InputError(f'{name}: "Units" in its sidecar is {text!r}, expected "ppm" or "ppb"; correct the sidecar')


def _refuse_other_images(name: str, look: _Look, stated: str, sidecar: Mapping[str, Any]) -> None:
    if stated == "Hz":
        raise InputError(
            f"{name}: its sidecar says Hz, so it is a field map, expected susceptibility in ppm or ppb; "
            'reconstruct the susceptibility map, or correct "Units"'
        )
    hinted = not stated and _is_phase_type(sidecar) and look.spread >= PHASE_HINT_SPREAD
    if stated == "rad" or look.is_phase or hinted:
        raise InputError(
            f"{name}: looks like a phase image (values from {look.low:.4g} to {look.high:.4g}), expected susceptibility"
            " in ppm or ppb; reconstruct the susceptibility map and give that"
        )
    positive_ppm = look.p90 * PPM_PER_UNIT.get(stated, 1.0)
    if look.negative_share < NEGATIVE_SHARE and positive_ppm > LARGEST_POSITIVE_PPM:
        raise InputError(
            f"{name}: looks like a magnitude image or labels (values from {look.low:.4g} to {look.high:.4g}, none "
            "negative), expected susceptibility in ppm or ppb, which has both signs; give the susceptibility map"
        )


def _units(name: str, look: _Look, stated: str) -> str:
    """Settle the unit, from the sidecar if it speaks and the values agree, else from the spread."""
    if look.spread < SMALLEST_SPREAD_PPM:
        raise InputError(
            f"{name}: values spread over {look.spread:.2g} only, expected ppm (0.05 to 0.4 in a brain) or ppb; "
            "check that it is a susceptibility map and rescale it"
        )
    largest_ppb = LARGEST_SPREAD_PPM / PPM_PER_UNIT["ppb"]
    if look.spread > largest_ppb:
        raise InputError(
            f"{name}: values reach {look.reach}, too large for ppm and for ppb; check that it is a susceptibility map"
        )
    like_ppm = look.spread < LARGEST_SPREAD_PPM
    if stated == "ppb" and like_ppm:
        raise InputError(
            f"{name}: values reach {look.reach}, expected ppb (about -1000 to 1000); "
            'set "Units" in its sidecar to "ppm" or rescale'
        )
    if stated == "ppb" or (stated == "ppm" and like_ppm):
        return stated
    if stated == "ppm" and look.spread >= SMALLEST_SPREAD_PPB:
        raise InputError(
            f"{name}: values reach {look.reach}, expected ppm (about -1 to 1); "
            'set "Units" in its sidecar to "ppb" or rescale'
        )
    if not like_ppm and look.spread < SMALLEST_SPREAD_PPB:
        raise InputError(
            f"{name}: values reach {look.reach}, too large for ppm and too small for ppb, as a field map in Hz or an "
            'unwrapped phase; give the susceptibility map (for a map in ppb set "Units" in its sidecar)'
        )
    return "ppm" if like_ppm else "ppb"


def _is_phase_type(sidecar: Mapping[str, Any]) -> bool:
    parts = sidecar.get("ImageType", ())
    if isinstance(parts, str):
        parts = parts.replace("/", "\\").split("\\")
    if not isinstance(parts, Sequence):  # null, or a number
        return False
    return any(str(part).strip().casefold() in ("p", "phase", "phase map") for part in parts)


def _reference(sidecar: Mapping[str, Any]) -> str:
    known = {key.casefold().replace("_", "").replace(" ", ""): value for key, value in sidecar.items()}
    for key in _REFERENCE_KEYS:
        if isinstance(value := known.get(key), str) and value.strip():
            return value.strip()
    return "not stated"


def _warnings(name: str, look: _Look, stated: str, units: str, n_replaced: int) -> tuple[str, ...]:
    warnings = []
    if n_replaced:
        warnings.append(
            f"{name}: {n_replaced} voxels inside the brain are NaN or infinite; "
            "they are filled for the network and missing in the measures"
        )
    if not stated and units == "ppb":
        warnings.append(f'{name}: no "Units" in its sidecar; read as ppb, since its values reach {look.reach}')
    if look.negative_share < NEGATIVE_SHARE:
        warnings.append(
            f"{name}: no value is negative, as in a map of paramagnetic sources alone; "
            "the networks were trained on total susceptibility, so check the masks"
        )
    return tuple(warnings)
