"""Read the complex signal of the echoes in the conventions of scanners and converters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import check_grid
from bids_dgmseg.image.units import PHASE_RANGES, standard_units
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, check_intact, find_main_field, load_image
from bids_dgmseg.qsm.phase import wrap

_LARGEST_SPAN_RAD = 200.0
"""Largest span of an unwrapped phase; sidecars also state rad for larger values, which are integers of a converter."""

_RANGE_TOLERANCE = 0.02
"""Fraction of a range by which values may end before it, or beyond it by rounding."""

_RADIAN_TOLERANCE = 0.1
"""Wrapped values that are stated to be radians may have a range that differs from a turn by this fraction."""

_OUTLIER_PERCENT = 0.01
"""Percentage of the voxels at either end of the values that may be outliers: fewer than have any phase in a head."""

_FILL_SHARE = 0.05
"""If more voxels than this fraction share the lowest or the highest value, it marks the background."""

_JUMP, _JUMP_SHARE = 0.75, 1e-3
"""Neighbours differ by more than this fraction of the range where phase wraps: in 6 % of the pairs in noise, and of the
order of 1 % in a brain, but not in a field map or in unwrapped phase."""

_SAMPLE_SIZE = 4_000_000
"""Number of voxels from which the range of the values is found."""

_ALTERNATION = -0.3
"""Coherence of neighbouring slices below which their phase alternates; it is 0.9 in a head, and -0.9 if it does."""

_BRIGHT, _MISSING_SHARE = 0.2, 0.05
"""Magnitude of voxels with signal over its 99th percentile, and the fraction of them whose phase may be 0 by chance."""


@dataclass(frozen=True)
class ComplexSignal:
    """Phase and magnitude of the echoes of a scan."""

    grid: Volume
    """Magnitude, real part or complex values of the first echo."""
    name: str
    """Name of its file."""
    phase: NDArray[np.float32]
    """Shape (E, X, Y, Z): rad, wrapped to [-pi, pi); NaN where it was not finite or outside the range of phase."""
    magnitude: NDArray[np.float32]
    """Shape (E, X, Y, Z): in the unit of the files; 0 where it was not finite."""
    b0_direction: tuple[float, float, float]
    """Direction of the main field along the axes of the grid."""
    conversion: str
    """How the stored values were converted."""
    warnings: tuple[str, ...]


def read_signal(echoes: Sequence[Mapping[str, Path]], *, units: Sequence[str] = ()) -> ComplexSignal:
    r"""Read the echoes of a scan, all on one grid.

    Parameters
    ----------
    echoes : sequence of E mapping
        NIfTI files by part: ``mag`` and ``phase``, ``real`` and ``imag``, or ``complex``; the same parts in all echoes.
    units : sequence of E str
        ``Units`` of the phase files. Values in rad are used as they are; others are scaled by `convert_phase`.

    Raises
    ------
    InputError
        If a file cannot be read or is another kind of part, the grids differ, or the scale of the phase is unknown.

    Notes
    -----
    Voxels whose stored phase is 0 in all of several echoes become NaN if they have no signal, or are more than 5 % of
    those with signal.

    Scanners of GE leave the half turn per slice of a Fourier transform in the phase, depending on the sequence. It is
    removed along each axis along which the signal of the first echo alternates:

    .. math:: \mathrm{Re} \sum_k S_{k+1} \bar S_k < -0.3 \sum_k |S_{k+1} S_k|.
    """
    anchor = next(part for part in ("mag", "real", "complex") if part in echoes[0])
    first = echoes[0][anchor]
    grid = Volume.read(first, np.complex64 if anchor == "complex" else np.float32)
    check_header(load_image(first), first.name)
    b0_direction, doubts = find_main_field(load_image(first), first.name)
    phase, magnitude = (np.empty((len(echoes), *grid.shape), np.float32) for _ in range(2))
    for number, parts in enumerate(echoes):
        images = {part: _read_part(part, path, grid, first) for part, path in parts.items()}
        if anchor == "mag":
            phase[number], magnitude[number] = images["phase"], images["mag"]
            continue
        signal = images["complex"] if anchor == "complex" else images["real"] + np.complex64(1j) * images["imag"]
        finite = np.isfinite(signal)
        phase[number], magnitude[number] = (
            np.where(finite, np.angle(signal), np.nan),
            np.where(finite, np.abs(signal), 0),
        )
        if not magnitude[number].any():
            raise InputError(f"{parts[anchor].name}: image is empty (all zeros); export it again")
    conversion, warnings = {"real": "real and imaginary parts", "complex": "complex values"}.get(anchor, ""), []
    if anchor == "mag":
        for text, parts in zip(units, echoes, strict=False):
            if standard_units(text) not in ("rad", "", None):
                raise InputError(
                    f'{parts["phase"].name}: "Units" is {text}, expected a wrapped phase in rad or in the integers of '
                    'the scanner ("arbitrary"); pass the phase, or correct "Units"'
                )
        is_rad = bool(units) and all(standard_units(text) == "rad" for text in units)
        missing = np.asarray(~phase.any(axis=0) & (len(phase) > 1))
        conversion, warning = convert_phase(phase, is_rad=is_rad, name=echoes[0]["phase"].name)
        warnings = [warning] if warning else []
        bright = magnitude[0] > _BRIGHT * np.percentile(magnitude[0], 99)
        share = float(missing[bright].mean())
        phase[:, missing if share > _MISSING_SHARE else missing & ~bright] = np.nan
        if share > _MISSING_SHARE:
            warnings.append(
                f"{echoes[0]['phase'].name}: phase is exactly 0 in all echoes in {100 * share:.0f} % of the voxels "
                "with signal, which therefore have no value; unless the phase was masked, export it again"
            )
    for axis in range(3):
        if _coherence(phase[0], magnitude[0], axis) < _ALTERNATION:
            odd = (slice(None),) * (axis + 1) + (slice(1, None, 2),)
            phase[odd] = wrap(torch.from_numpy(phase[odd] + np.float32(math.pi))).numpy()
            conversion += "; sign that alternates between slices removed"
            warnings.append(
                f"{first.name}: the sign of the signal alternates between slices, as on GE scanners; a shift of π was "
                "removed from the phase of every other slice"
            )
    return ComplexSignal(grid, first.name, phase, magnitude, b0_direction, conversion, (*doubts, *warnings))


def _read_part(part: str, path: Path, grid: Volume, first: Path) -> NDArray[Any]:
    """Read one image of an echo and check its grid and that it is the part that its name states."""
    if part == "complex" and load_image(path).get_data_dtype().kind != "c":
        raise InputError(f"{path.name}: has real values, expected a complex image; export it again")
    volume = Volume.read(path, np.complex64 if part == "complex" else np.float32)
    check_grid(path, volume, grid, other=first.name, advice="export both from the same scan")
    check_intact(path)
    array = volume.array
    if part == "complex":
        return array
    values = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    expected = {"phase": "a phase image", "mag": "a magnitude image (not negative, not constant)"}
    is_valid = {"phase": low < high, "mag": 0 <= low < high}.get(part, low < 0 < high)
    if not is_valid:
        what = expected.get(part, "a real or imaginary part with both signs")
        raise InputError(f"{path.name}: values from {low:.4g} to {high:.4g}, expected {what}; export it again")
    return values if part == "mag" else array


def convert_phase(phase: NDArray[np.float32], *, is_rad: bool, name: str) -> tuple[str, str]:
    """Convert the stored phase of a scan to rad, in place, wrapped to [-pi, pi).

    The range of the values of all echoes together determines the scale, since the phase of one echo need not fill it.
    A range in `PHASE_RANGES` has a known scale. If it is none, ends that less than 0.01 % of the voxels reach and
    values that mark the background are left out of it, and such voxels become NaN. If it is none then either, it is
    mapped to a turn, as ROMEO, SEPIA and QSMxT do, provided that the phase wraps: neighbours differ by about the range.

    Parameters
    ----------
    phase : ndarray of shape (E, X, Y, Z)
        Stored values; modified.
    is_rad : bool
        Whether the sidecars state rad. Then values are used as they are, wrapped or not, unless they contradict it.
    name : str
        Name of the first file.

    Returns
    -------
    conversion, warning : str
        How values were converted, and a warning if the scale is a guess or contradicts the sidecar, else empty.

    Raises
    ------
    InputError
        If the scale is unknown.
    """
    low, high = _value_range(phase)
    span, values = high - low, f"values from {low:.4g} to {high:.4g}"
    like_rad = span <= _LARGEST_SPAN_RAD and (
        abs(span / (2 * math.pi) - 1) <= _RADIAN_TOLERANCE or not _is_wrapped(phase, low, high)
    )
    contradiction = f'"Units" in its sidecar is rad, but {values} are not radians' if is_rad else ""
    unknown, warning = f"{values} are not in a known range of phase images", ""
    if is_rad and like_rad:
        scale, offset, conversion = 1.0, 0.0, "radians"
    elif limits := _known_range(low, high):
        lowest, highest, scale, offset = limits
        conversion = "radians" if scale == 1 else f"values from {lowest:g} to {highest:g}, mapped to a turn"
        if contradiction and scale != 1:
            warning = f'{name}: {contradiction}; their range was mapped to a turn, set it to "arbitrary"'
    elif _is_wrapped(phase, low, high):
        scale, conversion = 2 * math.pi / span, f"{values}, mapped to a turn"
        offset = -math.pi - low * scale
        warning = (
            f"{name}: {contradiction or unknown}; the phase wraps there, so this range of all echoes was mapped to a "
            'turn; if that is wrong, convert to radians and set "Units" in its sidecar to "rad"'
        )
    else:
        raise InputError(
            f"{name}: {contradiction or unknown} (±π, 0 to 2π, ±4096, 0 to 4095, ±2048, ±3142) and do not wrap in any "
            'echo, so that their scale is unknown; convert to radians and set "Units" in its sidecar to "rad"'
        )
    for echo in phase:
        if conversion != "radians":
            echo[(echo < low - _RANGE_TOLERANCE * span) | (echo > high + _RANGE_TOLERANCE * span)] = np.nan
        echo[~np.isfinite(echo)] = np.nan
        echo[:] = wrap(torch.from_numpy(echo * scale + offset)).numpy()
    return conversion, warning


def _known_range(low: float, high: float) -> tuple[float, float, float, float] | None:
    """Return the entry of `PHASE_RANGES` for a range of values."""
    for limits in PHASE_RANGES:
        if max(abs(low - limits[0]), abs(high - limits[1])) <= _RANGE_TOLERANCE * (limits[1] - limits[0]):
            return limits
    return None


def _value_range(phase: NDArray[np.float32]) -> tuple[float, float]:
    """Return the range of the finite values, unless it is known, without outliers and what marks the background."""
    finite = np.isfinite(phase)
    ends = float(np.min(phase, where=finite, initial=np.inf)), float(np.max(phase, where=finite, initial=-np.inf))
    if _known_range(*ends):
        return ends
    values = phase.ravel()[:: phase.size // _SAMPLE_SIZE | 1]
    values = values[np.isfinite(values) & (values != 0)]
    for end in ends:
        at_end = values == end
        if _FILL_SHARE * values.size < np.count_nonzero(at_end) < values.size:
            values = values[~at_end]
    low, high = map(float, np.percentile(values if values.size else ends, (_OUTLIER_PERCENT, 100 - _OUTLIER_PERCENT)))
    tolerance = _RANGE_TOLERANCE * (high - low)
    return (ends[0] if low - ends[0] <= tolerance else low), (ends[1] if ends[1] - high <= tolerance else high)


def _is_wrapped(phase: NDArray[np.float32], low: float, high: float) -> bool:
    """Return whether neighbours in any echo differ by about a range; 0 and its ends may mark the background."""
    for echo in phase[::-1]:  # the last echo wraps most
        inside = np.where((echo > low) & (echo < high) & (echo != 0), echo, np.nan)
        steps = [np.abs(np.diff(inside, axis=axis)) for axis in range(3)]
        pairs, jumps = (
            sum(int(np.count_nonzero(step >= least)) for step in steps) for least in (0, _JUMP * (high - low))
        )
        if jumps > _JUMP_SHARE * pairs:
            return True
    return False


def _coherence(phase: NDArray[np.float32], magnitude: NDArray[np.float32], axis: int) -> float:
    """Return the mean cosine of the phase difference between neighbours along an axis, weighted by their signal."""
    lower, upper = ((slice(None),) * axis + (part,) for part in (slice(-1), slice(1, None)))
    power = magnitude[lower] * magnitude[upper]
    total = float(power.sum())
    return float(np.nansum(power * np.cos(phase[upper] - phase[lower]))) / total if total else 0.0
