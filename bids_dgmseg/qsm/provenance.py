"""How a map was reconstructed: the parameters and numbers in its sidecar, and warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.qsm.local_sources import FITS_NOISE
from bids_dgmseg.qsm.phase_sign import describe_doubt
from bids_dgmseg.qsm.reconstruct import Reconstruction, describe_steps

_LEAST_KEPT = 0.8
"""Fraction of the brain mask with values; erosion leaves more than 0.85 of whole brains."""


def describe_reconstruction(
    result: Reconstruction,
    grid: Volume,
    *,
    echo_times_s: Sequence[float],
    field_strength_t: float,
    mask: Path | None = None,
    sign_is_given: bool = False,
) -> dict[str, Any]:
    """Return the parameters and numbers of a reconstruction, as in the sidecar of the map.

    Parameters
    ----------
    result : Reconstruction
    grid : Volume
        An image on its grid.
    echo_times_s : sequence of float
    field_strength_t : float
    mask : path, optional
        The user's brain mask.
    sign_is_given : bool
        Whether the user stated the sign of the phase.

    Returns
    -------
    dict
        Values for JSON, keys in CamelCase.
    """
    readout = "none needed: no phase ramp alternates between echoes"
    if result.readout_ramp_rad is None:
        readout = "not assessed: bipolar readouts can be detected only with three or more evenly spaced echoes"
    elif result.readout_ramp_rad:
        ramp_rad = f"{result.readout_ramp_rad:.2g} rad"
        readout = f"phase ramp of {ramp_rad} across the brain, alternating between echoes, removed"
    return {
        "EchoTime": list(echo_times_s),
        "MagneticFieldStrength": field_strength_t,
        "PhaseConversion": result.conversion,
        "BrainMask": mask.name if mask else "network brain-mask",
        "PhaseSign": result.phase_sign,
        "PhaseSignFrom": "stated by the user" if sign_is_given else result.phase_sign_from,
        "HeadFieldCorrelation": None if math.isnan(result.head_correlation) else round(result.head_correlation, 3),
        "ExtremesRatio": round(result.tail_ratio, 3),
        "ReadoutCorrection": readout,
        **describe_steps(
            echo_times_s,
            background=result.background,
            inversion=result.inversion,
            unwrapping=result.unwrapping,
            erosion_mm=result.erosion_mm,
        ),
        **_measure_steps(result, grid),
        **({"Problems": list(result.problems)} if result.problems else {}),
    }


def list_warnings(result: Reconstruction, *, n_echoes: int, sign_is_given: bool) -> list[str]:
    """Return doubts about the files, the sign of the phase, the brain that is left, and the coil's phase offset."""
    warnings = list(result.warnings)
    if doubt := describe_doubt(result.head_correlation, result.tail_ratio, sign=result.phase_sign, given=sign_is_given):
        warnings.append(f"{doubt}; check the figures (pallidum and dentate must be bright) and set `phase_sign`")
    kept = float(result.mask.sum() / result.brain.sum())
    if kept < _LEAST_KEPT:
        warnings.append(
            f"the map has values in only {100 * kept:.0f} % of the brain mask: elsewhere the phase is unreliable or "
            "too close to the border of the mask"
        )
    if result.regularization and result.misfit_ppm < FITS_NOISE * result.noise_ppm:
        warnings.append(
            f"the map explains the field to {result.misfit_ppm / result.noise_ppm:.2f} of its noise, so it contains "
            "noise; increase `regularization`"
        )
    if n_echoes == 1:
        warnings.append(
            "only one echo, so the coil's phase offset is not removed; background field removal may leave some of it"
        )
    return warnings


def _measure_steps(result: Reconstruction, grid: Volume) -> dict[str, Any]:
    size_mm, mask = grid.voxel_size_mm, result.mask
    weight, factors = result.regularization, result.interpolation
    brain_ml, map_ml = (round(float(region.sum() * np.prod(size_mm)) / 1000, 1) for region in (result.brain, mask))
    total, local = (float(field[mask].std()) for field in (result.total_field_ppm, result.local_field_ppm))
    r2star = {} if result.r2star_hz is None else {"R2starMedian": round(float(np.median(result.r2star_hz[mask])), 2)}
    return {
        # the axes of the image point to the right, anterior and superior
        "B0Direction": [round(float(part), 4) for part in result.b0_direction],
        "BrainVolume": brain_ml,
        "MapVolume": map_ml,
        "MapBrainFraction": round(float(mask.sum() / result.brain.sum()), 4),
        **({"Interpolation": [round(factor, 2) for factor in factors]} if max(factors) > 1 else {}),
        "FieldNoise": round(result.noise_ppm, 6),
        **({} if result.thermal_noise_ppm is None else {"ThermalFieldNoise": round(result.thermal_noise_ppm, 6)}),
        "LocalFieldFraction": round(local / total, 4) if total else None,
        **({"RegularizationWeight": float(f"{weight:.3g}")} if weight else {}),
        **({"RegularizationCorrections": result.n_corrections} if weight else {}),
        "FieldMisfit": round(result.misfit_ppm, 6),
        "MisfitOverNoise": round(result.misfit_ppm / result.noise_ppm, 3) if result.noise_ppm else None,
        **r2star,
    }
