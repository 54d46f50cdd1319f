"""Reconstruct a chi map from the phase and magnitude of GRE echoes, given as files or arrays, and describe how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import check_grid
from bids_dgmseg.image.masks import faces_that_cut, masked_gaussian
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.qsm.field import fit_r2star, is_evenly_spaced
from bids_dgmseg.qsm.inversion import (
    FITS_NOISE,
    PHASE_SIGNS,
    Acquisition,
    LocalSources,
    Methods,
    find_local_sources,
    padded_shape,
)
from bids_dgmseg.qsm.phase import MAX_RESIDUAL_RAD, fit_total_field
from bids_dgmseg.qsm.sign import compare_tails, correlate_with_head_field, decide_sign, describe_doubt
from bids_dgmseg.qsm.signal import read_signal
from bids_dgmseg.segmentation.localize import find_brain, find_mask_problems

_MAX_SPREAD_PPM = 0.5
"""Largest plausible difference of the 99th and the 1st percentile of a map; brains have 0.05 to 0.4 ppm."""

_RIM_MM = 5.0
"""Near the border of the mask good maps have extreme values, too, as background removal is least accurate there."""

_MAX_MISFIT, _MAX_DISAGREEMENT_RAD = 2.0, 0.05
"""Largest misfit over noise, and smooth phase that no field explains; good maps have up to 1.8 and 0.02."""

_MAX_LOCAL_SHARE, _FILTERED_MISFIT = 0.3, 1.5
"""Largest SD of the local over that of the total field: heads have 0.02 to 0.2, high-pass filtered phase 0.35 to 1.
With a smaller misfit over noise, the field may be that of a phantom without air."""

_LEAST_CONTRAST, _SHADING_MM = 0.025, 8.0
"""Of `measure_contrast`: smallest in a brain; three heads have 0.06 to 0.1, bottles 0.005. Width of the average."""

_SLAB_MM = 60.0
"""Thinner slabs lose contrast: of a real head at 43 mm a fifth in caudate and putamen, at 62 mm 7 % in the caudate."""

_LEAST_KEPT = 0.8
"""Fraction of the brain mask with values; erosion leaves more than 0.85 of whole brains."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction(LocalSources):
    """A chi map with the choices made on the way; arrays have shape (X, Y, Z)."""

    acquisition: Acquisition
    methods: Methods
    brain: NDArray[np.bool_]
    """The brain before the erosion, found in the magnitude or provided by the user."""
    magnitude: NDArray[np.float32]
    """Root of the sum of squares of the echoes."""
    total_field_ppm: NDArray[np.float32]
    """Unwrapped field of all sources; 0 outside the reliable part of the brain."""
    phase_sign: int
    """1 if phase increases with the field, -1 if it decreases."""
    phase_sign_from: str
    """What the sign was judged from, or ``stated by the user``."""
    head_correlation: float
    """Correlation of the total field, with this sign, with the field that the shape of the head induces; can be NaN."""
    tail_ratio: float
    """Distance of the positive tail of the deep brain from its median, over that of the negative tail."""
    readout_rad: float | None
    """Range of the phase of a bipolar readout that was removed; 0 if there was none, None if unknown."""
    disagreement_rad: float
    """Smooth phase of the echoes that no field explains; 0 with a single echo."""
    fringe_mm: float
    """Length of the open ends of fringe lines in a single echo, if more than noise has."""
    r2star_per_s: NDArray[np.float32] | None
    """R2* in the mask before its erosion; 0 outside. None with a single echo."""
    problems: tuple[str, ...] = ()
    """Why the map is not usable, see `find_problems`."""
    conversion: str = ""
    """How the phase in the files was converted."""
    warnings: tuple[str, ...] = ()
    """Doubts about the files."""

    @property
    def local_share(self) -> float:
        """SD of the local over that of the total field, in the mask; 0 without a field."""
        return _local_share(self, self.total_field_ppm)

    @property
    def sign_doubt(self) -> str:
        """Why the sign of the phase may be wrong; empty if it is certain."""
        return describe_doubt(self.head_correlation, self.tail_ratio, is_stated=self.methods.phase_sign != "auto")


def reconstruct_files(
    echoes: Sequence[Mapping[str, Path]],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    phase_units: Sequence[str] = (),
    mask: Path | None = None,
    methods: Methods = Methods(),  # noqa: B008 (frozen)
) -> Reconstruction:
    """Read the echoes of a scan, all on one grid, and reconstruct its chi map.

    Parameters
    ----------
    echoes : sequence of E mapping
        NIfTI files of each echo by part, see `bids_dgmseg.qsm.signal.read_signal`.
    echo_times_s : sequence of E float
        Echo times in s, in ascending order.
    b0_tesla : float
        Field strength in T.
    phase_units : sequence of E str
        ``Units`` of the phase files; by default the values determine the scale.
    mask : path, optional
        Brain mask, voxels above 0.5; by default the brain is found in the magnitude.
    methods : Methods

    Returns
    -------
    Reconstruction
        Arrays in RAS+ axes on the grid of the first echo.

    Raises
    ------
    InputError
        If a file cannot be read or used, the grids differ, or no tissue is left inside the mask.
    """
    signal = read_signal(echoes, units=phase_units)
    grid, brain = signal.grid, None
    if mask is not None:
        volume = Volume.read(mask)
        check_grid(mask, volume, grid, other=signal.name)
        check_intact(mask)
        brain = volume.array > 0.5
    acquisition = Acquisition(echo_times_s, b0_tesla, grid.voxel_size_mm, signal.b0_direction)
    try:
        result = reconstruct_chi(signal.phase, signal.magnitude, acquisition, mask=brain, methods=methods)
    except ValueError as error:
        where = mask.name if mask else signal.name
        raise InputError(f"{where}: {error}; provide a brain mask that fits the brain") from error
    return replace(result, conversion=signal.conversion, warnings=signal.warnings)


def reconstruct_chi(
    phase: NDArray[np.float32],
    magnitude: NDArray[np.float32],
    acquisition: Acquisition,
    *,
    mask: NDArray[np.bool_] | None = None,
    methods: Methods = Methods(),  # noqa: B008 (frozen)
) -> Reconstruction:
    """Reconstruct a chi map: unwrapping, field fit, background field removal, dipole inversion.

    Parameters
    ----------
    phase : ndarray of shape (E, X, Y, Z)
        Wrapped phase in rad; voxels with a non-finite value are excluded.
    magnitude : ndarray of shape (E, X, Y, Z)
        Signal in any unit.
    acquisition : Acquisition
    mask : ndarray of bool, shape (X, Y, Z), optional
        Brain; by default `find_brain` of the combined magnitude.
    methods : Methods

    Raises
    ------
    ValueError
        If no brain is found, or no voxel of the mask is far enough from its border.

    See Also
    --------
    fit_total_field, project_onto_dipoles, invert : The steps, with references.
    """
    times_s, size_mm = acquisition.echo_times_s, acquisition.voxel_size_mm
    finite = np.isfinite(phase).all(axis=0)
    phases = torch.from_numpy(np.where(finite, phase, np.float32(0)))
    signal = torch.from_numpy(
        np.where(np.isfinite(magnitude), magnitude, np.float32(0))
    )  # the head, also without phase
    is_found = mask is None
    combined = signal.square().sum(dim=0).sqrt().numpy()
    if mask is None:
        mask = find_brain(combined, voxel_size_mm=size_mm)
        if not mask.any():
            raise ValueError("no brain found in the magnitude")
    brain = torch.from_numpy(mask & finite)
    r2star = None
    if len(times_s) > 1:
        r2star = torch.zeros(mask.shape)
        r2star[brain] = fit_r2star(signal[:, brain], echo_times_s=times_s)
    total = fit_total_field(
        phases, signal, brain, combined, echo_times_s=times_s, b0_tesla=acquisition.b0_tesla, voxel_size_mm=size_mm
    )
    first = phases[0].clone()
    del phases  # the inversion needs the memory
    correlation = correlate_with_head_field(
        total.field_ppm, total.reliable, combined, voxel_size_mm=size_mm, b0_direction=acquisition.b0_direction
    )
    source = find_local_sources(total, first, signal, combined, acquisition=acquisition, methods=methods)
    depth_mm = ndimage.distance_transform_edt(source.mask, sampling=size_mm)
    ratio = compare_tails(source.chi_ppm, depth_mm, voxel_size_mm=size_mm)
    stated = PHASE_SIGNS[methods.phase_sign]
    sign, sign_from = (stated, "stated by the user") if stated else decide_sign(correlation, ratio)
    signed = {"chi_ppm": sign * source.chi_ppm, "local_field_ppm": sign * source.local_field_ppm}
    return Reconstruction(
        **{**vars(source), **signed},
        acquisition=acquisition,
        methods=methods,
        brain=mask,
        magnitude=combined,
        total_field_ppm=sign * np.where(total.reliable, total.field_ppm, np.float32(0)),
        phase_sign=sign,
        phase_sign_from=sign_from,
        head_correlation=sign * correlation,
        tail_ratio=ratio if sign > 0 else 1 / ratio,
        readout_rad=total.readout_rad,
        disagreement_rad=total.disagreement_rad,
        fringe_mm=total.fringe_mm,
        r2star_per_s=None if r2star is None else r2star.numpy(),
        problems=(
            *(_find_found_mask_problems(mask, combined, size_mm) if is_found else ()),
            *find_problems(
                source.chi_ppm, depth_mm, local_share=_local_share(source, total.field_ppm), misfit=source.misfit
            ),
        ),
    )


def _find_found_mask_problems(
    mask: NDArray[np.bool_], magnitude: NDArray[np.float32], size_mm: Sequence[float]
) -> list[str]:
    """Return the reasons why a mask that was found is not that of a brain."""
    problems = list(find_mask_problems(mask, magnitude, voxel_size_mm=size_mm))
    contrast = measure_contrast(magnitude, mask, voxel_size_mm=size_mm)
    if not problems and contrast < _LEAST_CONTRAST:
        problems.append(
            f"its magnitude is uniform (contrast {contrast:.1%}, expected 6 to 10 % in a brain): a bottle? If not, "
            "provide a brain mask"
        )
    return problems


def measure_contrast(
    magnitude: NDArray[np.float32], mask: NDArray[np.bool_], *, voxel_size_mm: Sequence[float]
) -> float:
    """Measure the contrast of the tissues in a mask: SD of the relative signal without coil shading and noise.

    The signal is divided by its average over 8 mm; more than 5 mm inside the mask, the root of the mean product of
    neighbours is free of noise.
    """
    sums, share = masked_gaussian(magnitude, mask, [_SHADING_MM / step for step in voxel_size_mm])
    relative = np.where(mask, magnitude * share / np.maximum(sums, np.finfo(np.float32).tiny) - 1, 0)
    deep = ndimage.distance_transform_edt(mask, sampling=voxel_size_mm) > _RIM_MM
    relative, products = np.where(deep, relative, np.nan), []
    for axis in range(3):
        values = np.moveaxis(relative, axis, 0)
        products.append((values[1:] * values[:-1]).ravel())
    mean = np.nanmean(np.concatenate(products)) if deep.any() else math.inf  # too small to tell
    return math.sqrt(max(float(mean), 0.0))


def _local_share(source: LocalSources, total_ppm: NDArray[np.float32]) -> float:
    local, whole = (float(field[source.mask].std()) for field in (source.local_field_ppm, total_ppm))
    return local / whole if whole else 0.0


def find_problems(
    chi_ppm: NDArray[np.float32], depth_mm: NDArray[np.float64], *, local_share: float, misfit: float
) -> Iterator[str]:
    """Yield the reasons why the susceptibilities in a mask are implausible.

    `depth_mm` (X, Y, Z) is the distance from the outside of the mask, 0 there. The outer 5 mm of the mask do not count;
    of a thinner one, the outer half. `local_share` is the part of the field that is of the sources in the brain,
    `misfit` what the map leaves of it, over its noise.
    """
    low, high = np.percentile(chi_ppm[depth_mm > min(_RIM_MM, depth_mm.max() / 2)], (1, 99))
    if not high - low <= _MAX_SPREAD_PPM:
        yield (
            f"its values have a spread of {high - low:.2g} ppm (streaks?), expected 0.05 to 0.4 ppm in a brain, at "
            f"most {_MAX_SPREAD_PPM:g} ppm"
        )
    if local_share > _MAX_LOCAL_SHARE and misfit > _FILTERED_MISFIT:
        yield (
            f"the phase lacks the background field ({local_share:.0%} of the field is from the "
            f"brain, expected at most {_MAX_LOCAL_SHARE:.0%}): it was filtered, as for SWI; export the unfiltered phase"
        )


def estimate_memory_gb(shape: Sequence[int], voxel_size_mm: Sequence[float], *, n_echoes: int) -> float:
    """Estimate the peak memory of `reconstruct_chi`, its arguments included, for echoes of a shape (X, Y, Z).

    Five arrays of all echoes, 85 bytes per voxel of the padded grid of the inversion, and the imported libraries; at
    least 160 bytes per voxel of that grid, when the echoes are no longer needed; with several echoes 32 bytes per voxel
    for the changes of the map. `benchmarks/reconstruction.py --memory` compares the estimate with measurements.
    """
    padded = math.prod(padded_shape(shape, voxel_size_mm))
    with_echoes = 4 * 5 * n_echoes * math.prod(shape) + 85 * padded
    changes = 32 * math.prod(shape) if n_echoes > 1 else 0
    return (900e6 + max(with_echoes, 160 * padded) + changes) / 1e9


def describe_reconstruction(result: Reconstruction, grid: Volume, *, mask: Path | None = None) -> dict[str, Any]:
    """Return the parameters and numbers of a reconstruction, as in the sidecar of the map.

    `grid` is an image on the grid of the map, `mask` the user's brain mask. Keys are in CamelCase, for JSON.
    """
    readout = "none needed: no phase alternates between echoes"
    if result.readout_rad is None:
        readout = "not assessed: bipolar readouts can be detected only with three or more evenly spaced echoes"
    elif result.readout_rad:
        readout = f"smooth phase of {result.readout_rad:.2g} rad that alternates between echoes, removed"
    return {
        "EchoTime": list(result.acquisition.echo_times_s),
        "MagneticFieldStrength": round(result.acquisition.b0_tesla, 4),
        "PhaseConversion": result.conversion,
        "BrainMask": mask.name if mask else "network brain-mask",
        "PhaseSign": result.phase_sign,
        "PhaseSignFrom": result.phase_sign_from,
        "HeadFieldCorrelation": None if math.isnan(result.head_correlation) else round(result.head_correlation, 3),
        "ExtremesRatio": round(result.tail_ratio, 3),
        "ReadoutCorrection": readout,
        **describe_steps(result),
        **_measure_steps(result, grid),
        **({"Problems": list(result.problems)} if result.problems else {}),
    }


def describe_steps(result: Reconstruction) -> dict[str, str]:
    """Describe the steps of a reconstruction, for the sidecar of the map."""
    times_s, erosion_mm = result.acquisition.echo_times_s, result.methods.erosion_mm
    eroded = "one voxel" if erosion_mm is None else f"at least {erosion_mm:g} mm"
    steps = {
        "Unwrapping": "spatial, between the most coherent neighbours first; coil phase offset not removed",
        "FieldFit": "phase divided by echo time",
        "BackgroundFieldRemoval": "projection onto dipole fields (PDF), 80 iterations at half and 10 at full "
        f"resolution; three times, without the field of the map of the time before; mask eroded by {eroded}",
        "DipoleInversion": "two-level total variation with edges of the magnitude and of the map (STAR-like), misfit "
        "weighted by its local size",
    }
    if result.fringe_mm:
        steps["Unwrapping"] = "Laplacian, as fringe lines are open; coil phase offset not removed"
    if len(times_s) > 1:
        steps["Unwrapping"] = (
            "spatial, between the most coherent neighbours first, for the phase difference of the first two echoes, "
            "temporal for all; smooth coil phase offset removed"
        )
        limit = f"voxels with a residual above {MAX_RESIDUAL_RAD:g} rad excluded"
        steps["FieldFit"] = f"weighted least squares; {limit}"
        steps["R2starFit"] = "ARLO" if is_evenly_spaced(times_s) else "weighted log-linear fit"
    return steps


def _measure_steps(result: Reconstruction, grid: Volume) -> dict[str, Any]:
    size_mm, mask = grid.voxel_size_mm, result.mask
    weight, factors = result.regularization, result.interpolation
    brain_ml, map_ml = (round(float(region.sum() * np.prod(size_mm)) / 1000, 1) for region in (result.brain, mask))
    r2star = (
        {} if result.r2star_per_s is None else {"R2starMedian": round(float(np.median(result.r2star_per_s[mask])), 2)}
    )
    return {
        # the axes of the image point to the right, anterior and superior
        "B0Direction": [round(float(part), 4) for part in result.acquisition.b0_direction],
        "BrainVolume": brain_ml,
        "MapVolume": map_ml,
        "MapBrainFraction": round(float(mask.sum() / result.brain.sum()), 4),
        **({"Interpolation": [round(factor, 2) for factor in factors]} if max(factors) > 1 else {}),
        "FieldNoise": round(result.noise_ppm, 6),
        **({} if result.thermal_noise_ppm is None else {"ThermalFieldNoise": round(result.thermal_noise_ppm, 6)}),
        "EchoDisagreement": round(result.disagreement_rad, 4),
        "LocalFieldFraction": round(result.local_share, 4),
        "RegularizationWeight": float(f"{weight:.3g}"),
        "RegularizationCorrections": result.n_adjustments,
        "FieldMisfit": round(result.misfit_ppm, 6),
        "MisfitOverNoise": round(result.misfit, 3),
        **r2star,
    }


def list_warnings(result: Reconstruction) -> list[str]:
    """Return doubts about the files, the sign of the phase, the brain that is left, the fit and the phase."""
    warnings = list(result.warnings)
    if result.sign_doubt:
        advice = "check the figures (pallidum and dentate must be bright) and set `phase_sign`"
        warnings.append(f"{result.sign_doubt}; {advice}")
    kept = float(result.mask.sum() / result.brain.sum())
    if kept < _LEAST_KEPT:
        warnings.append(
            f"the map covers only {100 * kept:.0f} % of the brain mask; elsewhere the phase is unreliable or too close "
            "to the border of the mask"
        )
    extent_mm = np.multiply(result.brain.shape, result.acquisition.voxel_size_mm)
    if extent_mm[faces_that_cut(result.brain).all(axis=1)].min(initial=_SLAB_MM) < _SLAB_MM:
        warnings.append(
            f"the images cover less than {_SLAB_MM:g} mm of the brain: the susceptibility of large nuclei is too low; "
            "compare scans of the same coverage only"
        )
    if (misfit := result.misfit) < FITS_NOISE:
        warnings.append(f"residual is {misfit:.2f} × the noise of the field: the map fits noise")
    if misfit > _MAX_MISFIT:
        warnings.append(
            f"residual is {misfit:.1f} × the noise of the field: the brain mask is too large, or background field "
            "remains; check the mask and the figures"
        )
    if result.disagreement_rad > _MAX_DISAGREEMENT_RAD:
        warnings.append(
            f"the phase of the echoes disagrees by {result.disagreement_rad:.2f} rad: wrong order or sign of an echo, "
            "filtered phase, a failed coil combination or an uneven bipolar readout; do not use the map before the "
            "phase is exported or combined again"
        )
    if result.local_share > _MAX_LOCAL_SHARE:
        warnings.append(
            "the phase contains little background field; if the scanner filtered it (as for SWI), "
            "the map is wrong: export the unfiltered phase"
        )
    if result.fringe_mm:
        warnings.append(
            f"the phase has open-ended fringe lines of {result.fringe_mm:.0f} mm, as after a failed coil combination; "
            "combine the coils again"
        )
    if len(result.acquisition.echo_times_s) == 1:
        warnings.append(
            "only one echo, so the coil's phase offset is not removed; background field removal may leave some of it"
        )
    return warnings
