"""Reconstruction of one scan's chi map: read and check its echoes, reconstruct, describe the result."""

from __future__ import annotations

from pathlib import Path

from nibabel.affines import voxel_sizes

from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.qsm.multi_echo import reconstruct_files
from bids_dgmseg.qsm.reconstruct import Reconstruction, describe_steps, estimate_memory_gb
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
    return reconstruct_files(
        [echo.magnitude for echo in scan.echoes],
        [echo.phase for echo in scan.echoes],
        echo_times_s=[echo.time_s for echo in scan.echoes],
        b0_tesla=float(scan.sidecar["MagneticFieldStrength"]),
        phase_units=[echo.units for echo in scan.echoes],
        mask=mask,
        phase_sign=phase_sign,
    )


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
