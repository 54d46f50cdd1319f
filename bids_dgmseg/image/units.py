"""Read susceptibility maps: find their unit, and reject images of other kinds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.masks import find_missing
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, check_intact, load_image

PPM_PER_UNIT = {"ppm": 1.0, "ppb": 1e-3}

ECHO_TIME_LIMITS_S = 1e-4, 0.5
"""Echo times beyond these are in other units."""

FIELD_LIMITS_T = 0.01, 20.0

PHASE_RANGES = (
    (-math.pi, math.pi, 1.0, 0.0),
    (0.0, 2 * math.pi, 1.0, 0.0),
    (-4096.0, 4095.0, math.pi / 4096, 0.0),
    (-2048.0, 2047.0, math.pi / 2048, 0.0),
    (0.0, 4095.0, 2 * math.pi / 4096, -math.pi),
    (-3142.0, 3142.0, 1e-3, 0.0),
)
"""Lowest and highest value, scale to rad and offset in rad: radians, 12 bits with and without sign, milliradians."""

# The spread is the difference between the 99th and the 1st percentile of the voxels that are not 0.
LARGEST_SPREAD_PPM = 3.0
"""Brains have a spread of 0.05 to 0.4 ppm; streaks and noise around a head without a brain mask reach ±1 ppm."""

SMALLEST_SPREAD_PPM = 1e-3
"""Masks, constants and maps in other units (tesla, fractions of one) are below."""

SMALLEST_SPREAD_PPB = 30.0
"""Below the 0.05 ppm of a brain, with a margin; above local fields at 3 T, whose spread is 5 to 25 Hz."""

PHASE_HINT_SPREAD = 1.0
"""Only above this spread does an ImageType of phase count: tools copy it to chi maps, which stay below."""

PHASE_EDGE, PHASE_EDGE_SHARE = 0.1, 0.005
"""Wrapped phase fills each outer tenth of its range with a tenth of the voxels; chi maps leave them nearly empty."""

NEGATIVE_SHARE = 1e-3
"""Half of a chi map is below its reference; fewer negative voxels than this may come from interpolation."""

LARGEST_POSITIVE_PPM = 0.2
"""The 90th percentile is about 0.05 ppm in maps of paramagnetic sources, and 0.5 in magnitude images scaled to 1."""

HOLES_SHARE = 0.01
"""A larger fraction of voxels that are not finite is the background of the map, a smaller one consists of holes."""

HOLES_RIM_SHARE = 1 / 6
"""Smallest fraction of non-zero voxels around a hole in the brain; empty corners of an image have hardly any."""

LARGEST_PPM = 10.0
"""No tissue has a value beyond this of either sign: a single one is an error of a reconstruction, and missing."""

EMPTY_SHARE = 1e-3
"""Missing zeros are reported from this fraction of the brain: a tenth of a slice. Those in nuclei always are."""

CLIPPED_SHARE = 2e-4
"""In real maps one voxel has the highest value, and one the lowest; of maps clipped at ±0.1 ppm, 0.3 and 0.05 %. At
±0.2 ppm, shares above this go with means of nuclei that are up to 5 % too small, lower ones with 0.2 %."""

PILE_RATIO, PILE_REACH = 5, 10
"""A clipped value has so many times the voxels of each of so many values beside it: 8 to 60 in real maps clipped at
±0.1 ppm and rounded to ppb, 0.05 to 1.6 at the ends of a phantom without noise."""

PHANTOM_PILES = 2
"""A phantom without noise has such values between its ends, too: one per tissue. A map can have one, its background."""

LARGEST_CLIP_PPM = 0.3
"""Nuclei reach about 0.2 ppm, so that a limit beyond this changes none."""

PICTURE_LEVELS = (16, 256)
"""Numbers of values of a picture; fewer are those of a numerical phantom, and maps of 16 bits have thousands."""

SMALLEST_STEP_PPM = 1.5e-3
"""Between the values of a picture; integers in ppb have a step of 1e-3 ppm."""

FEWEST_VOXELS = 10_000
"""Smaller images have too few values to judge them."""

_SAMPLE = 1_000_000

_UNITS = {
    "ppm": ("ppm", "parts per million", "part per million", "1e-6", "10^-6"),
    "ppb": ("ppb", "parts per billion", "part per billion", "1e-9", "10^-9"),
    "Hz": ("hz", "hertz", "rad/s", "rads/s", "radians/s"),
    "rad": ("rad", "rads", "radian", "radians"),
    "1/s": ("1/s", "s^-1", "s-1"),
    "": ("", "n/a", "arbitrary", "arbitrary units", "a.u.", "au", "unknown"),
}

_REFERENCE_KEYS = (
    "referenceregion susceptibilityreferenceregion susceptibilityreference qsmreferenceregion"
    " qsmreference referencetissue reference"
).split()


CHI = "chi"
"""Contrast of susceptibility maps."""


@dataclass(frozen=True)
class ChiMap:
    """A usable susceptibility map."""

    chi_ppm: Volume
    """In ppm; NaN where a voxel is not finite or beyond ±10 ppm."""
    units: str
    """Unit in the file: ``ppm`` or ``ppb``."""
    units_from: str
    """``sidecar`` or ``magnitude of the values``."""
    reference: str
    """Reference region in the sidecar, or ``not stated``."""
    n_replaced: int
    """Voxels inside the brain that were NaN, infinite or beyond ±10 ppm."""
    n_empty: int
    """Voxels inside the brain that were 0 in empty slices or connected groups: missing data, NaN in `chi_ppm`."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Summary:
    """Robust summary of an image's values."""

    low: float
    p90: float
    high: float
    negative_share: float
    is_phase: bool

    spread: float
    """99th minus 1st percentile."""
    reach: str
    """1st or 99th percentile, whichever is larger in size."""


def check_chi(path: str | Path, sidecar: Mapping[str, Any], *, contrast: str = CHI) -> ChiMap:
    """Read a susceptibility map, find its unit, and reject images that are not susceptibility maps.

    Parameters
    ----------
    path : path
        NIfTI file.
    sidecar : mapping
        Its metadata: ``Units``, the reference region, and ``ImageType``, which must agree with the values to count.
        ``Contrast`` names an image that is no susceptibility map, such as b0.
    contrast : str
        What a model was trained on. Images of others than `CHI` are divided by ten times the 99th percentile.

    Returns
    -------
    ChiMap
        In ppm, NaN at every voxel that is not finite, beyond ±10 ppm, or missing inside the head (see
        `bids_dgmseg.image.masks.find_missing`); other zeros stay 0. In maps of one sign only empty slices are
        missing, since the value of connected voxels without a source is 0.

    Raises
    ------
    InputError
        If the file is damaged, not a 3D image of real numbers, has an implausible voxel size or no finite or non-zero
        voxel, is a field map, phase or magnitude image, or its values contradict the unit in its sidecar.
    """
    name, volume, warnings = _read_intact(path)
    array = volume.array
    if (stated := str(sidecar.get("Contrast", CHI))) != contrast:
        raise InputError(
            f'{name}: its contrast is {stated} ("Contrast" in its sidecar), expected {contrast}; train on it with '
            '"contrast" in a recipe, and segment it by workflows/papers'
        )
    finite = np.isfinite(array)
    if not finite.any():
        raise InputError(f"{name}: no voxel is finite; reconstruct the map again")
    nonzero = finite & (array != 0)
    if not nonzero.any():
        raise InputError(f"{name}: all voxels are 0; reconstruct the map again")
    if contrast != CHI:
        scaled = array / np.float32(10 * np.percentile(np.abs(array[nonzero]), 99))
        n_replaced = int(np.count_nonzero(~finite))
        return ChiMap(volume.with_array(scaled), "arbitrary", contrast, "not stated", n_replaced, 0, tuple(warnings))
    summary = _summarize(array[nonzero])
    stated = _stated_units(name, sidecar)
    _reject_other_images(name, summary, stated, sidecar)
    units = _units(name, summary, stated)
    chi = array * np.float32(PPM_PER_UNIT[units])
    finite = np.abs(chi) <= LARGEST_PPM  # false for NaN
    nonzero &= finite
    chi[~finite] = np.nan
    missing = find_missing(chi, zeros=has_both_signs(chi))
    chi[missing] = np.nan
    n_empty = int(np.count_nonzero(missing & finite))
    if n_empty > EMPTY_SHARE * np.count_nonzero(nonzero):
        warnings.append(
            f"{name}: {n_empty} voxels inside the brain are 0 in whole slices or connected groups (missing data); "
            "excluded from the measures; small holes are filled in for the network"
        )
    n_replaced = int(np.count_nonzero((missing & ~finite) | find_holes(finite, nonzero)))
    if n_replaced:
        warnings.append(
            f"{name}: {n_replaced} voxels inside the brain are NaN, infinite or beyond ±{LARGEST_PPM:g} ppm; "
            "excluded from the measures; small holes are filled in for the network"
        )
    if not stated and units == "ppb":
        warnings.append(f'{name}: no "Units" in its sidecar; assuming ppb because values reach {summary.reach}')
    warnings += [f"{name}: {line}" for line in _describe_export(array[nonzero] * np.float32(PPM_PER_UNIT[units]))]
    if summary.negative_share < NEGATIVE_SHARE:
        warnings.append(
            f"{name}: no negative values, as in maps of paramagnetic sources only; "
            "the networks were trained on total susceptibility, so check the segmentation"
        )
    keys = {key.casefold().replace("_", "").replace(" ", ""): value for key, value in sidecar.items()}
    references = (keys.get(key) for key in _REFERENCE_KEYS)
    return ChiMap(
        chi_ppm=volume.with_array(chi),
        units=units,
        units_from="sidecar" if stated else "magnitude of the values",
        reference=next((ref.strip() for ref in references if isinstance(ref, str) and ref.strip()), "not stated"),
        n_replaced=n_replaced,
        n_empty=n_empty,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Export:
    """Signs that a map was exported as a picture."""

    clipped: Mapping[float, float]
    """Limits in ppm to which values were clipped, as to a display window → fraction of the voxels."""
    n_levels: int
    """Number of different values, if they are those of an 8-bit image; else 0."""


def find_export(values_ppm: NDArray[np.floating]) -> Export:
    """Find signs of clipping and of 8 bits in the values of a map inside the brain, in ppm and not 0."""
    sample = values_ppm[:: max(1, values_ppm.size // _SAMPLE)]
    (levels, counts), (fewest, most) = np.unique(sample, return_counts=True), PICTURE_LEVELS
    if values_ppm.size < FEWEST_VOXELS or levels.size < fewest:
        return Export({}, 0)
    beside = np.ones(2 * PILE_REACH + 1, bool)
    beside[PILE_REACH] = False
    piles = counts > PILE_RATIO * ndimage.maximum_filter(counts, footprint=beside, mode="constant")
    piles &= counts > CLIPPED_SHARE * sample.size
    ends = [
        levels[end]
        for end in (0, -1)
        if piles[end] and abs(levels[end]) < LARGEST_CLIP_PPM and piles[1:-1].sum() < PHANTOM_PILES
    ]
    is_picture = levels.size <= most and np.median(np.diff(levels)) > SMALLEST_STEP_PPM
    shares = {float(end): float(np.mean(values_ppm == end)) for end in ends}
    return Export(shares, int(levels.size) if is_picture else 0)


def _describe_export(values_ppm: NDArray[np.float32]) -> list[str]:
    """Describe signs that a map was exported as a picture."""
    export, lines = find_export(values_ppm), []
    if export.clipped:
        shown = ", ".join(f"{100 * share:.2g} % at {end:.3g} ppm" for end, share in export.clipped.items())
        lines.append(
            f"many voxels have the same extreme value ({shown}), probably clipped to a display window, which lowers "
            "the means of nuclei; use the map as it was reconstructed"
        )
    if export.n_levels:
        lines.append(
            f"only {export.n_levels} different values, as in an 8-bit image, so that the scale may be lost; use the "
            "map as it was reconstructed"
        )
    return lines


def describe_chi(path: Path, checked: ChiMap) -> dict[str, Any]:
    """Return how a map was read, as the QC record shows it: unit, reference region and grid."""
    image = load_image(path)
    return {
        "file": path.name,
        "units": checked.units,
        "units_from": checked.units_from,
        "reference": checked.reference,
        "n_replaced": checked.n_replaced,
        "n_empty": checked.n_empty,
        "shape": [int(size) for size in image.shape[:3]],
        "voxel_size_mm": [round(float(edge), 4) for edge in voxel_sizes(image.affine)],
        "orientation": "".join(orientations.aff2axcodes(image.affine)),
    }


def has_both_signs(chi: NDArray[np.floating]) -> bool:
    """Return whether a map has values of both signs, as total susceptibility does; NaN and 0 do not count.

    In maps of one sign, of paramagnetic or diamagnetic sources only, 0 means that there is no source.
    """
    values = chi[np.isfinite(chi) & (chi != 0)]
    return bool(values.size and NEGATIVE_SHARE <= np.mean(values < 0) <= 1 - NEGATIVE_SHARE)


def find_holes(finite: NDArray[np.bool_], nonzero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the voxels inside the brain that are not finite; `nonzero` are the finite voxels other than 0.

    If the background is NaN, too, holes are the voxels enclosed by finite ones. Otherwise a group of voxels is a hole
    if enough of the voxels around it are not 0, so that holes at the border of the brain or of the image are found.
    """
    if finite.all():
        return ~finite
    if np.mean(~finite) > HOLES_SHARE:
        return np.asarray(ndimage.binary_fill_holes(finite) & ~finite)
    groups, n_groups = ndimage.label(~finite)
    around = np.where(finite, ndimage.grey_dilation(groups, footprint=ndimage.generate_binary_structure(3, 1)), 0)
    numbers = np.arange(1, n_groups + 1)
    n_around, n_nonzero = (ndimage.sum_labels(mask, around, numbers) for mask in (finite, nonzero))
    return np.append(False, n_nonzero >= HOLES_RIM_SHARE * n_around)[groups]


def _read_intact(path: str | Path) -> tuple[str, Volume, list[str]]:
    """Read an image and check its data and header: its file name, the image, and warnings."""
    name, volume = Path(path).name, Volume.read(path)
    check_intact(path)
    return name, volume, list(check_header(load_image(path), name))


def _summarize(values: NDArray[np.float32]) -> _Summary:
    p01, p90, p99 = (float(value) for value in np.percentile(values, (1, 90, 99)))
    low, high = float(values.min()), float(values.max())
    is_phase = False
    for range_low, range_high, _, _ in PHASE_RANGES:  # phase ends where a range ends, and fills both ends
        width, edge = range_high - range_low, PHASE_EDGE * (range_high - range_low)
        if max(abs(low - range_low), abs(high - range_high)) <= 0.01 * width:
            shares = np.mean(values < range_low + edge), np.mean(values > range_high - edge)
            is_phase |= bool(min(shares) > PHASE_EDGE_SHARE)
    negative_share, reach = float(np.mean(values < 0)), f"{max(p01, p99, key=abs):.3g}"
    return _Summary(low, p90, high, negative_share, is_phase, p99 - p01, reach)


def standard_units(text: str) -> str | None:
    """Return ppm, ppb, Hz, rad or 1/s for one of their spellings, empty if it states no unit, None if it is another.

    >>> standard_units("Parts per billion"), standard_units("s^-1"), standard_units("T")
    ('ppb', '1/s', None)
    """
    spelled = " ".join(text.casefold().replace("_", " ").split())
    return next((units for units, spellings in _UNITS.items() if spelled in spellings), None)


def column_unit(text: str) -> str:
    """Return a unit as names of columns end with it; empty if the text states none.

    >>> column_unit("s-1"), column_unit("Hz"), column_unit("mm^2/s"), column_unit("arbitrary")
    ('per_s', 'hz', 'mm_2_per_s', '')
    """
    units = standard_units(text)
    spelled = (text if units is None else units).lower().replace("1/", "per ").replace("/", " per ")
    return re.sub(r"\W+", "_", spelled).strip("_")


def to_seconds(text: str) -> tuple[str, float]:
    """Return the unit in seconds and the factor to it if a unit has milliseconds, else the unit and 1.

    >>> to_seconds("ms"), to_seconds("ms-1"), to_seconds("1/sec"), to_seconds("Seconds"), to_seconds("mm")
    (('s', 0.001), ('1/s', 1000.0), ('1/s', 1.0), ('s', 1.0), ('mm', 1.0))
    """
    spelled = re.sub(r"(m|milli)?sec(ond)?s?", lambda match: "ms" if match[1] else "s", text.casefold().strip())
    if spelled == "ms":
        return "s", 1e-3
    return ("1/s", 1e3) if spelled in ("1/ms", "ms^-1", "ms-1") else (spelled, 1.0)


def _stated_units(name: str, sidecar: Mapping[str, Any]) -> str:
    """Read the unit in the sidecar: ppm, ppb, Hz or rad; empty if not stated."""
    values = {key.casefold(): value for key, value in sidecar.items()}
    text = values.get("units", values.get("unit"))
    if text is None:
        return ""
    units = standard_units(str(text))
    if units in (*PPM_PER_UNIT, "Hz", "rad", ""):
        return str(units)
    raise InputError(f'{name}: "Units" in its sidecar is {text!r}, expected "ppm" or "ppb"; correct it')


def _reject_other_images(name: str, summary: _Summary, stated: str, sidecar: Mapping[str, Any]) -> None:
    if stated == "Hz":
        raise InputError(
            f'{name}: "Units" in its sidecar is Hz (a field map), expected susceptibility in ppm or ppb; '
            "reconstruct the susceptibility map, or correct the unit"
        )
    image_type = sidecar.get("ImageType", ())
    if isinstance(image_type, str):
        image_type = image_type.replace("/", "\\").split("\\")
    parts = image_type if isinstance(image_type, Sequence) else ()  # it may be null or a number
    is_phase_type = any(str(part).strip().casefold() in ("p", "phase", "phase map") for part in parts)
    hinted = not stated and is_phase_type and summary.spread >= PHASE_HINT_SPREAD
    if stated == "rad" or summary.is_phase or hinted:
        raise InputError(
            f"{name}: looks like a phase image (values from {summary.low:.4g} to {summary.high:.4g}), expected "
            "susceptibility in ppm or ppb; provide the reconstructed susceptibility map"
        )
    positive_ppm = summary.p90 * PPM_PER_UNIT.get(stated, 1.0)
    if summary.negative_share < NEGATIVE_SHARE and positive_ppm > LARGEST_POSITIVE_PPM:
        raise InputError(
            f"{name}: looks like a magnitude image or labels (values from {summary.low:.4g} to {summary.high:.4g}, "
            "none negative), expected susceptibility in ppm or ppb, which has both signs; provide the susceptibility "
            "map"
        )


def _units(name: str, summary: _Summary, stated: str) -> str:
    """Find the unit: from the sidecar, if the values agree, else from their spread."""
    if summary.spread < SMALLEST_SPREAD_PPM:
        raise InputError(
            f"{name}: value range is only {summary.spread:.2g}, expected ppm (0.05 to 0.4 in a brain) or ppb; "
            "check that it is a susceptibility map and rescale it"
        )
    largest_ppb = LARGEST_SPREAD_PPM / PPM_PER_UNIT["ppb"]
    if summary.spread > largest_ppb:
        raise InputError(
            f"{name}: values reach {summary.reach}, too large for both ppm and ppb; check that it is a susceptibility "
            "map"
        )
    like_ppm = summary.spread < LARGEST_SPREAD_PPM
    if stated == "ppb" and like_ppm:
        raise InputError(
            f"{name}: values reach {summary.reach}, expected ppb (about -1000 to 1000); "
            'set "Units" in its sidecar to "ppm" or rescale the map'
        )
    if stated == "ppb" or (stated == "ppm" and like_ppm):
        return stated
    if stated == "ppm" and summary.spread >= SMALLEST_SPREAD_PPB:
        raise InputError(
            f"{name}: values reach {summary.reach}, expected ppm (about -1 to 1); "
            'set "Units" in its sidecar to "ppb" or rescale the map'
        )
    if not like_ppm and summary.spread < SMALLEST_SPREAD_PPB:
        raise InputError(
            f"{name}: values reach {summary.reach}, too large for ppm and too small for ppb, like a field map in Hz or "
            'an unwrapped phase; provide the susceptibility map (if it is in ppb, set "Units" in its sidecar)'
        )
    return "ppm" if like_ppm else "ppb"


def check_acquisition(echo_times_s: Sequence[float], field_strength_t: float) -> None:
    """Check that echo times are in s and ascending, and that the field strength is in T.

    Raises
    ------
    ValueError
        With one line that names the parameter and its value.
    """
    times, (shortest, longest) = list(echo_times_s), ECHO_TIME_LIMITS_S
    if not times or min(times) < shortest or max(times) > longest or sorted(set(times)) != times:
        raise ValueError(f"echo_times_s: {times}, expected ascending times in seconds, such as [0.005, 0.010]")
    if not FIELD_LIMITS_T[0] <= field_strength_t <= FIELD_LIMITS_T[1]:
        raise ValueError(f"field_strength_t: {field_strength_t}, expected the field strength in T, such as 3")
