"""The step before the others where a scan has echoes in the place of a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nipype.interfaces.base import BaseInterfaceInputSpec, Bunch, File, SimpleInterface, TraitedSpec, traits
from numpy.typing import NDArray

from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.phase import read_phase
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact, load_image, write_like
from bids_dgmseg.models.weights import limit_threads
from bids_dgmseg.qsm.reconstruct import Reconstruction, describe_steps, estimate_memory_gb, reconstruct_chi
from bids_dgmseg.workflow import files

_CERTAIN = 1.3
"""Ratio of the map's extremes below which the sign of the phase is a guess; five real maps have 1.6 to 2.1."""

_UNKNOWN_GB = 1.0
"""Of a scan whose echoes cannot be read: the step ends with a line about them."""


class _ReconstructInputSpec(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True, nohash=True, desc="whose echoes these are")
    mask = File(exists=True, desc="the user's mask of the brain")
    phase_sign = traits.Enum("auto", "positive", "negative", usedefault=True, desc="how phase follows the field")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the Fourier transforms")


class _ReconstructOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the grid of the echoes, 0 outside the brain")
    out_report = File(exists=True, desc="JSON: how the map came about, warnings")


class Reconstruct(SimpleInterface):
    """Make a susceptibility map of phase and magnitude."""

    input_spec = _ReconstructInputSpec
    output_spec = _ReconstructOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        limit_threads(self.inputs.n_threads)
        scan, cwd = self.inputs.scan, Path(runtime.cwd)
        if scan.problem:
            raise InputError(scan.problem)
        mask = Path(self.inputs.mask) if self.inputs.mask else None
        done = reconstruct_scan(scan, mask=mask, phase_sign=self.inputs.phase_sign)
        out_chi = write_like(done.chi_ppm, scan.chi, cwd / f"{scan.name}_Chimap.nii.gz")
        report = describe_reconstruction(scan, done, mask=mask, phase_sign=self.inputs.phase_sign)
        self._results["out_chi"] = str(out_chi)
        self._results["out_report"] = str(files.write_json(report, cwd / "report.json"))
        return runtime


def plan_memory_gb(scan: Scan) -> float:
    """Read from the header of the first echo how much memory the map's reconstruction needs."""
    if not scan.echoes:
        return _UNKNOWN_GB
    try:
        image = load_image(scan.echoes[0].magnitude)
    except InputError:
        return _UNKNOWN_GB
    edges_mm = voxel_sizes(image.affine).tolist()
    if len(image.shape) < 3:
        return _UNKNOWN_GB
    return estimate_memory_gb(image.shape[:3], edges_mm, n_echoes=len(scan.echoes))


def reconstruct_scan(scan: Scan, *, mask: Path | None, phase_sign: str) -> Reconstruction:
    """Read the echoes of a scan, all on one grid, and reconstruct its map.

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
    brain = None if mask is None else _read_mask(mask, grid, scan)
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
        raise InputError(f"{culprit.name}: {error}; give a mask of the brain with --brain-mask") from error


def describe_reconstruction(scan: Scan, done: Reconstruction, *, mask: Path | None, phase_sign: str) -> dict[str, Any]:
    """Say how a map came about: for its sidecar, the quality record and the pages."""
    warnings = []
    if done.phase_sign < 0 and phase_sign == "auto":
        warnings.append(
            "phase was taken to fall with the field, since else veins and iron would be negative; "
            "--phase-sign says it for certain"
        )
    if phase_sign == "auto" and done.tail_ratio < _CERTAIN:
        warnings.append(
            "which way phase follows the field is a guess, since the map's extremes on either side are alike: look at "
            "the pictures (pallidum and dentate must be bright) and say it with --phase-sign"
        )
    if len(scan.echoes) == 1:
        warnings.append("one echo alone keeps the coil's phase, of which background removal may leave some")
    return {
        "EchoTime": [echo.time_s for echo in scan.echoes],
        "MagneticFieldStrength": scan.sidecar["MagneticFieldStrength"],
        "BrainMask": mask.name if mask else "by magnitude",
        "PhaseSign": done.phase_sign,
        "PhaseSignFrom": "the map's extreme values" if phase_sign == "auto" else "--phase-sign",
        "ReadoutCorrection": _say_alternation(done.readout_ramp_rad),
        **describe_steps(len(scan.echoes)),
        "warnings": warnings,
    }


def _say_alternation(ramp_rad: float | None) -> str:
    if ramp_rad is None:
        return "none: with fewer than three echoes, or uneven times, bipolar readouts cannot be told"
    if not ramp_rad:
        return "none needed: no ramp alternates from echo to echo"
    return f"a ramp of {ramp_rad:.2g} rad over the brain, alternating from echo to echo, removed"


def _read_magnitude(path: Path, grid: Volume, scan: Scan) -> NDArray[np.float32]:
    found = np.nan_to_num(_on_grid(Volume.read(path), path, grid, scan), nan=0.0, posinf=0.0, neginf=0.0)
    check_intact(path)
    if found.min() < 0 or found.max() == found.min():
        raise InputError(
            f"{path.name}: values from {found.min():.4g} to {found.max():.4g}, expected a magnitude, "
            "which is nowhere negative and not the same everywhere; export it again"
        )
    return np.asarray(found, np.float32)


def _read_mask(path: Path, grid: Volume, scan: Scan) -> NDArray[np.bool_]:
    mask = Volume.read(path)
    check_intact(path)
    if apart := describe_grid_mismatch(grid, mask):
        first = scan.echoes[0].magnitude.name
        raise InputError(f"{path.name}: does not lie on the grid of {first} ({apart}); resample the mask first")
    return np.asarray(mask.array > 0)


def _on_grid(volume: Volume, path: Path, grid: Volume, scan: Scan) -> NDArray[Any]:
    if apart := describe_grid_mismatch(grid, volume):
        first = scan.echoes[0].magnitude.name
        raise InputError(f"{path.name}: does not lie on the grid of {first} ({apart}); export both from one scan")
    return volume.array
