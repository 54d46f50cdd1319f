"""Reconstruction of one scan's chi map: read and check its echoes, reconstruct, describe the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.phase import read_phase
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact, load_image
from bids_dgmseg.qsm.reconstruct import Reconstruction, describe_steps, estimate_memory_gb, reconstruct_chi
from bids_dgmseg.workflow.qc_record import StepReport

MIN_SIGN_RATIO = 1.3
"""Ratio of the map's extremes below which the automatic phase sign is uncertain; five real maps have 1.6 to 2.1."""

_UNREADABLE_GB = 1.0


def plan_memory_gb(scan: Scan) -> float:
    """Estimate the memory of a reconstruction from the header of the first echo.

    Returns 1 GB if it cannot be read: the step itself then reports why.
    """
    try:
        image = load_image(scan.echoes[0].magnitude) if scan.echoes else None
    except InputError:
        image = None
    if image is None or len(image.shape) < 3:
        return _UNREADABLE_GB
    return estimate_memory_gb(image.shape[:3], voxel_sizes(image.affine).tolist(), n_echoes=len(scan.echoes))


def reconstruct_scan(scan: Scan, *, mask: Path | None, phase_sign: str) -> Reconstruction:
    """Read the echoes of a scan and reconstruct its chi map.

    Parameters
    ----------
    scan : Scan
        Its echoes lie on one grid.
    mask : Path or None
        The user's brain mask, on the same grid; by default it is computed from the magnitude.
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases or decreases with the field.

    Raises
    ------
    InputError
        If a file cannot be read or used, grids differ, or there is no tissue.
    """
    grid = Volume.read(scan.echoes[0].magnitude)
    phase, magnitude = (np.empty((len(scan.echoes), *grid.shape), np.float32) for _ in range(2))
    for number, echo in enumerate(scan.echoes):
        phase[number] = _on_grid(read_phase(echo.phase, units=echo.units), echo.phase, grid, scan)
        magnitude[number] = _read_magnitude(echo.magnitude, grid, scan)
    brain = None
    if mask is not None:
        brain = _on_grid(Volume.read(mask), mask, grid, scan, advice="resample the mask first") > 0
        check_intact(mask)
    x, y, z = (grid.affine[2, :3] / grid.voxel_size_mm).tolist()
    try:
        return reconstruct_chi(
            phase,
            magnitude,
            echo_times_s=[echo.time_s for echo in scan.echoes],
            b0_tesla=float(scan.sidecar["MagneticFieldStrength"]),
            voxel_size_mm=grid.voxel_size_mm,
            b0_direction=(x, y, z),
            mask=brain,
            phase_sign={"positive": 1, "negative": -1}.get(phase_sign),
        )
    except ValueError as error:
        culprit = mask or scan.echoes[0].magnitude
        raise InputError(f"{culprit.name}: {error}; give a brain mask with --brain-mask") from error


def describe_reconstruction(scan: Scan, result: Reconstruction, *, mask: Path | None, phase_sign: str) -> StepReport:
    """Return the parameters of a reconstruction, for the sidecar of the map, the QC record and the page."""
    warnings = []
    if result.phase_sign < 0 and phase_sign == "auto":
        warnings.append(
            "assumed that phase decreases with the field, because veins and iron would be negative otherwise; set "
            "--phase-sign to be certain"
        )
    if phase_sign == "auto" and result.tail_ratio < MIN_SIGN_RATIO:
        warnings.append(
            "the phase sign is uncertain, because the map's positive and negative extremes are similar; check the "
            "figures (pallidum and dentate must be bright) and set --phase-sign"
        )
    if len(scan.echoes) == 1:
        warnings.append(
            "only one echo, so the coil's phase offset is not removed; background field removal may leave some of it"
        )
    values = {
        "EchoTime": [echo.time_s for echo in scan.echoes],
        "MagneticFieldStrength": scan.sidecar["MagneticFieldStrength"],
        "BrainMask": mask.name if mask else "by magnitude",
        "PhaseSign": result.phase_sign,
        "PhaseSignFrom": "the map's extreme values" if phase_sign == "auto" else "--phase-sign",
        "ReadoutCorrection": _describe_readout(result.readout_ramp_rad),
        **describe_steps(len(scan.echoes)),
    }
    return StepReport(values, tuple(warnings))


def _describe_readout(ramp_rad: float | None) -> str:
    if ramp_rad is None:
        return "not assessed: bipolar readouts can be detected only with three or more evenly spaced echoes"
    if not ramp_rad:
        return "none needed: no phase ramp alternates between echoes"
    return f"phase ramp of {ramp_rad:.2g} rad across the brain, alternating between echoes, removed"


def _read_magnitude(path: Path, grid: Volume, scan: Scan) -> NDArray[np.float32]:
    magnitude = np.nan_to_num(_on_grid(Volume.read(path), path, grid, scan), nan=0.0, posinf=0.0, neginf=0.0)
    check_intact(path)
    if magnitude.min() < 0 or magnitude.max() == magnitude.min():
        raise InputError(
            f"{path.name}: values from {magnitude.min():.4g} to {magnitude.max():.4g}, expected a magnitude image "
            "(non-negative and not constant); export it again"
        )
    return np.asarray(magnitude, np.float32)


def _on_grid(
    volume: Volume, path: Path, grid: Volume, scan: Scan, *, advice: str = "export both from the same scan"
) -> NDArray[Any]:
    """Return the array of a volume that lies on the grid of the first echo."""
    if difference := describe_grid_mismatch(grid, volume):
        first = scan.echoes[0].magnitude.name
        raise InputError(f"{path.name}: does not lie on the grid of {first} ({difference}); {advice}")
    return volume.array
