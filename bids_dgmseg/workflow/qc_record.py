"""The QC record of a scan (``_qc.json``): the reports of its steps, the options and the versions."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes

import bids_dgmseg
from bids_dgmseg.bids.derivatives import SCANNER_FIELDS
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import SHIPPED_WEIGHTS, ReconstructionOptions, RunConfig
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import Model

if TYPE_CHECKING:
    from bids_dgmseg.image.grids import Box
    from bids_dgmseg.image.units import ChiMap
    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.measurement.reference_region import Reference
    from bids_dgmseg.measurement.scan import ScanMeasures
    from bids_dgmseg.qsm.reconstruct import Reconstruction

_LIBRARIES = ("nibabel", "nipype", "numpy", "scipy", "torch")


@dataclass(frozen=True)
class StepReport:
    """Part of the QC record that comes from one step, and its warnings (without the scan's name)."""

    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def report_reconstruction(
    scan: Scan, result: Reconstruction, grid: Volume, *, mask: Path | None, phase_sign: str
) -> StepReport:
    """Return the parameters and numbers of a reconstruction, also part of the sidecar of the map.

    `grid` is an image on its grid, `mask` the brain mask of the user.
    """
    from bids_dgmseg.qsm.phase_sign import describe_doubt  # with torch
    from bids_dgmseg.qsm.reconstruct import describe_steps

    warnings = list(result.warnings)
    warnings += [f"the reconstructed map is implausible: {problem}; accepted as asked" for problem in result.problems]
    if doubt := describe_doubt(
        result.head_correlation, result.tail_ratio, sign=result.phase_sign, given=phase_sign != "auto"
    ):
        warnings.append(f"{doubt}; check the figures (pallidum and dentate must be bright) and set --phase-sign")
    if len(scan.echoes) == 1:
        warnings.append(
            "only one echo, so the coil's phase offset is not removed; background field removal may leave some of it"
        )
    readout = "none needed: no phase ramp alternates between echoes"
    if result.readout_ramp_rad is None:
        readout = "not assessed: bipolar readouts can be detected only with three or more evenly spaced echoes"
    elif result.readout_ramp_rad:
        ramp_rad = f"{result.readout_ramp_rad:.2g} rad"
        readout = f"phase ramp of {ramp_rad} across the brain, alternating between echoes, removed"
    values = {
        "EchoTime": [echo.time_s for echo in scan.echoes],
        "MagneticFieldStrength": scan.sidecar["MagneticFieldStrength"],
        "PhaseConversion": result.conversion,
        "BrainMask": mask.name if mask else "network brain-mask",
        "PhaseSign": result.phase_sign,
        "PhaseSignFrom": result.phase_sign_from if phase_sign == "auto" else "--phase-sign",
        "HeadFieldCorrelation": None if math.isnan(result.head_correlation) else round(result.head_correlation, 3),
        "ExtremesRatio": round(result.tail_ratio, 3),
        "ReadoutCorrection": readout,
        **describe_steps(
            [echo.time_s for echo in scan.echoes],
            background=result.background,
            inversion=result.inversion,
            unwrapping=result.unwrapping,
        ),
        **_measure_steps(result, grid),
        **({"Problems": list(result.problems)} if result.problems else {}),
    }
    return StepReport(values, tuple(warnings))


def _measure_steps(result: Reconstruction, grid: Volume) -> dict[str, Any]:
    from bids_dgmseg.qsm.inversion import regularization_weight  # with torch

    size_mm, mask = grid.voxel_size_mm, result.mask
    weight = regularization_weight(result.inversion, noise_ppm=result.noise_ppm, voxel_size_mm=size_mm)
    brain_ml, map_ml = (round(float(region.sum() * np.prod(size_mm)) / 1000, 1) for region in (result.brain, mask))
    total, local = (float(field[mask].std()) for field in (result.total_field_ppm, result.local_field_ppm))
    r2star = {} if result.r2star_hz is None else {"R2starMedian": round(float(np.median(result.r2star_hz[mask])), 2)}
    return {
        # B0 is z of the world, here along the axes of the image, which point to the right, anterior and superior
        "B0Direction": [round(float(part), 4) for part in grid.affine[2, :3] / size_mm],
        "BrainVolume": brain_ml,
        "MapVolume": map_ml,
        "FieldNoise": round(result.noise_ppm, 6),
        "LocalFieldFraction": round(local / total, 4) if total else None,
        **({"RegularizationWeight": float(f"{weight:.3g}")} if weight else {}),
        "FieldMisfit": round(result.misfit_ppm, 6),
        **r2star,
    }


def report_input(path: Path, checked: ChiMap, *, learned: str = "") -> StepReport:
    """Return how a map was read: its units, reference and grid; `learned` warns of weights trained on it."""
    image = load_image(path)
    values = {
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
    return StepReport(values, (*checked.warnings, *([learned] if learned else [])))


def report_measures(found: ScanMeasures, reference: Reference | None) -> StepReport:
    """Return the rating of a scan, the quality of its map and the reference region."""
    values: dict[str, Any] = {"rating": found.rating, "reasons": list(found.reasons), **found.quality}
    if reference is None:
        return StepReport(values, found.warnings)
    region = asdict(reference) | {"sem_ppm": reference.sem_ppm}
    keys = ("region", "source", "mean_ppm", "std_ppm", "sem_ppm", "n_voxels")
    values["reference"] = {key: region[key] for key in keys}
    problem = (reference.problem,) if reference.problem else ()
    return StepReport(values, (*found.warnings, *problem))


def describe_box(box: Box) -> dict[str, Any]:
    """Return the localizer's box as it is written to sidecars; mm, RAS+."""
    corners = {"low": list(box.low_mm), "high": list(box.high_mm)}
    if box.oriented is None:
        return corners
    return corners | {"rotation_deg": list(box.oriented.rotation_deg), "rotated_size": list(box.oriented.size_mm)}


def build_qc_record(
    scan: Scan,
    model: Model,
    config: RunConfig,
    *,
    prepared: StepReport,
    box: Box,
    measured: StepReport,
    reconstructed: StepReport | None = None,
) -> dict[str, Any]:
    """Combine the reports of the steps to the content of ``_qc.json``, see docs/outputs.md.

    The record depends only on the scan, the options and the versions. `box` is the result of the localizer.
    """
    from bids_dgmseg.models.model_folder import read_model_folder  # with torch

    warnings = [*(reconstructed.warnings if reconstructed else ()), *prepared.warnings, *measured.warnings]
    given, reference, weights = dict(prepared.values), config.reference, config.segmentation.weights
    if reconstructed:
        given["reconstructed_from"] = f"{len(reconstructed.values['EchoTime'])} echoes"
    return {
        "scan": scan.name,
        "model": model.name,
        "input": given,
        **({"reconstruction": dict(reconstructed.values)} if reconstructed else {}),
        "scanner": {name: scan.sidecar[name] for name in SCANNER_FIELDS if name in scan.sidecar},
        "box_mm": describe_box(box),
        **measured.values,
        "warnings": [with_scan(scan.name, warning) for warning in warnings],
        "settings": {
            "model": model.name,
            "weights": weights.name if weights else SHIPPED_WEIGHTS,
            "device": config.resources.device,
            "threads": config.resources.omp_nthreads,
            "mirrored": read_model_folder(model, weights).uses_mirroring,
            "ensemble": model.ensemble,
            "masks": config.segmentation.masks,
            "bilateral": config.segmentation.bilateral,
            "reference": reference.kind,
            **({"reference_structure": reference.structure} if reference.structure else {}),
            **({"reference_mask": reference.masks.name} if reference.masks else {}),
            **(_describe_options(config.reconstruction) if reconstructed else {}),
        },
        "versions": {
            "bids_dgmseg": bids_dgmseg.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
    }


def _describe_options(options: ReconstructionOptions) -> dict[str, str]:
    return {name: getattr(options, name) for name in ("phase_sign", "unwrapping", "background", "inversion")}


def with_scan(name: str, message: str) -> str:
    """Prefix a message with the name of the scan, unless what precedes its first colon contains it.

    >>> with_scan("sub-01", "DN_L was not found")
    'sub-01: DN_L was not found'
    >>> with_scan("sub-01", "sub-01_Chimap.nii.gz: all voxels are 0")
    'sub-01_Chimap.nii.gz: all voxels are 0'
    """
    return message if name in message.partition(":")[0] else f"{name}: {message}"
