"""Interface that reconstructs a chi map from gradient echoes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from nipype.interfaces.base import File, InputMultiPath, TraitedSpec, isdefined, traits

from bids_dgmseg.bids.entities import join_entities, split_entities, stem_of
from bids_dgmseg.config import PhaseSign
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.step import FileInterface, StepInputSpec, write_report
from bids_dgmseg.io.nifti import write_like

_STEP_PPM = 1e-5
"""Precision of the changes that are stored."""


class ImplausibleMapError(InputError):
    """A reconstructed map that fails the plausibility checks, with what shows why."""

    def __init__(
        self, problems: Sequence[str], *, report: Mapping[str, Any], warnings: Sequence[str], figure: Path
    ) -> None:
        super().__init__(
            f"the reconstructed map is not usable: {'; '.join(problems)}; look at {figure}, correct the brain mask "
            "(`in_mask`), or set `accept_implausible`"
        )
        self.problems, self.report, self.warnings, self.figure = tuple(problems), dict(report), list(warnings), figure

    def __reduce__(self) -> Any:
        """Travel between processes with all attributes."""
        return partial(type(self), report=self.report, warnings=self.warnings, figure=self.figure), (self.problems,)


class _ReconstructInputSpec(StepInputSpec):
    in_phase = InputMultiPath(
        File(exists=True),
        mandatory=True,
        desc="wrapped phase, one 3D image per echo, in rad or in the scanner's integers",
    )
    in_magnitude = InputMultiPath(
        File(exists=True), desc="magnitude, one image per echo; needed if in_phase is a phase"
    )
    parts = traits.List(
        traits.Str,
        ["phase", "mag"],
        usedefault=True,
        desc="what in_phase and in_magnitude contain: phase and mag, real and imag, or only complex",
    )
    echo_times_s = traits.List(traits.Float, mandatory=True, desc="echo times in s, ascending")
    field_strength_t = traits.Float(mandatory=True, desc="field strength in T")
    phase_units = traits.List(traits.Str, desc="unit of each phase image (rad, arbitrary); by default from the values")
    acquisition_type = traits.Str(desc="MRAcquisitionType in the sidecar of the echoes, 2D or 3D")
    in_mask = File(exists=True, desc="brain mask on the grid of the echoes; by default found in the magnitude")
    phase_sign = traits.Enum(
        *get_args(PhaseSign), usedefault=True, desc="whether phase increases (positive) or decreases with the field"
    )
    regularization = traits.Range(
        low=0.0, exclude_low=True, desc="weight of the inversion; by default from the noise of the field"
    )
    erosion_mm = traits.Range(
        low=0.0, desc="depth below the border of the brain from which the map has values; by default one voxel"
    )
    save_fields = traits.Bool(False, usedefault=True, desc="also return the brain mask, the total and the local field")
    accept_implausible = traits.Bool(False, usedefault=True, desc="return maps that fail the plausibility checks")
    title = traits.Str(usedefault=True, desc="title of the figure")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the Fourier transforms")


class _ReconstructOutputSpec(TraitedSpec):
    out_chi = File(
        exists=True, desc="float32 map in ppm on the grid of the first echo, mean 0 over the brain, 0 outside"
    )
    out_r2star = File(exists=True, desc="float32 R2* in 1/s on the same grid, 0 outside; not with a single echo")
    out_changes = File(
        exists=True, desc="changes of the map in ppm with other choices, four volumes, for MeasureNuclei; as out_r2star"
    )
    out_figure = File(exists=True, desc="PNG of magnitude, total field, local field and map")
    out_fields = traits.List(
        File(exists=True),
        desc="paramagnetic and diamagnetic .nii.gz, parts of the map in ppm, not with a single echo; with save_fields "
        "brain, total and local .nii.gz, the fields in Hz",
    )
    out_report = File(
        exists=True,
        desc="reconstruction (as in the sidecar of the map), n_failed_checks (of plausibility), warnings (JSON)",
    )


class ReconstructQSM(FileInterface):
    """Reconstruct a chi map from gradient echoes; see `bids_dgmseg.qsm.reconstruct.reconstruct_files`.

    Raises `ImplausibleMapError`, with the figure and the report, if the map fails the plausibility checks.

    Examples
    --------
    >>> step = ReconstructQSM(in_phase=["phase_1.nii", "phase_2.nii"])  # doctest: +SKIP
    """

    input_spec = _ReconstructInputSpec
    output_spec = _ReconstructOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Reconstruct the map."""
        import numpy as np

        from bids_dgmseg.image.units import check_acquisition
        from bids_dgmseg.image.volume import Volume
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, separate_sources
        from bids_dgmseg.qsm.inversion import Methods
        from bids_dgmseg.qsm.reconstruct import describe_reconstruction, list_warnings, reconstruct_files
        from bids_dgmseg.report.scan_figures import draw_reconstruction

        inputs, echoes = self.inputs, self._list_echoes()
        limit_threads(inputs.n_threads)
        try:
            check_acquisition(inputs.echo_times_s, inputs.field_strength_t)
            methods = Methods(
                phase_sign=inputs.phase_sign,
                regularization=inputs.regularization if isdefined(inputs.regularization) else None,
                erosion_mm=inputs.erosion_mm if isdefined(inputs.erosion_mm) else None,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        mask = self.path("in_mask")
        result = reconstruct_files(
            echoes,
            echo_times_s=inputs.echo_times_s,
            b0_tesla=inputs.field_strength_t,
            phase_units=inputs.phase_units if isdefined(inputs.phase_units) else (),
            mask=mask,
            methods=methods,
        )
        first = next(iter(echoes[0].values()))
        chi = write_like(result.chi_ppm, first, folder / _name_map(first))
        grid, figure = Volume.read(chi), folder / "reconstruction.png"
        hz_per_ppm = GYROMAGNETIC_MHZ_PER_T * inputs.field_strength_t
        draw_reconstruction(result, grid, figure, hz_per_ppm=hz_per_ppm, title=inputs.title)
        report = describe_reconstruction(result, grid, mask=mask)
        warnings = list_warnings(result)
        if inputs.acquisition_type == "2D":
            warnings.append(f"{first.name}: 2D acquisition; phase can jump between slices, 3D is recommended for QSM")
        if result.problems and not inputs.accept_implausible:
            raise ImplausibleMapError(result.problems, report=report, warnings=warnings, figure=figure)
        accepted = [f"the map is implausible: {problem}; kept (`accept_implausible`)" for problem in result.problems]
        images, changes = {}, None
        if (r2star := result.r2star_per_s) is not None and result.changes_ppm is not None:
            parts = separate_sources(result.chi_ppm, r2star * result.mask, b0_tesla=inputs.field_strength_t)
            images = dict(zip(("r2star", "paramagnetic", "diamagnetic"), (r2star, *parts), strict=True))
            stored = np.rint(np.moveaxis(result.changes_ppm, 0, -1) / _STEP_PPM).clip(-32767, 32767).astype(np.int16)
            changes = write_like(stored, first, folder / "changes.nii.gz", scale=_STEP_PPM)
        if inputs.save_fields:
            images |= {
                "brain": result.brain.astype(np.uint8),
                "total": hz_per_ppm * result.total_field_ppm,
                "local": hz_per_ppm * result.local_field_ppm,
            }
        files = {name: write_like(image, first, folder / f"{name}.nii.gz") for name, image in images.items()}
        return {
            "out_chi": chi,
            "out_r2star": files.pop("r2star", None),
            "out_changes": changes,
            "out_figure": figure,
            "out_fields": list(files.values()),
            "out_report": write_report(
                folder, reconstruction=report, n_failed_checks=len(result.problems), warnings=[*accepted, *warnings]
            ),
        }

    def _list_echoes(self) -> list[dict[str, Path]]:
        """Return the files of each echo by part."""
        inputs = self.inputs
        if set(inputs.parts) not in ({"phase", "mag"}, {"real", "imag"}, {"complex"}):
            raise InputError(f"`parts`: {', '.join(inputs.parts)}; pass phase and mag, real and imag, or complex")
        images = [inputs.in_phase, *([inputs.in_magnitude] if inputs.in_magnitude else [])]
        numbers = {len(files) for files in images} | {len(inputs.echo_times_s)}
        if len(numbers) > 1 or len(images) != len(inputs.parts):
            counts = " and ".join(str(len(files)) for files in images)
            raise InputError(
                f"`in_phase` and `in_magnitude`: {counts} images for {len(inputs.echo_times_s)} echo times and parts "
                f"{', '.join(inputs.parts)}; pass one image per part and echo"
            )
        return [dict(zip(inputs.parts, map(Path, files), strict=True)) for files in zip(*images, strict=True)]


def _name_map(echo: Path) -> str:
    """Return the name of a map in messages, as in the output; that of a first echo without entities is kept.

    >>> _name_map(Path("sub-01_acq-x_echo-1_part-phase_MEGRE.nii.gz")), _name_map(Path("phase_1.nii"))
    ('sub-01_acq-x_Chimap.nii.gz', 'phase_1_Chimap.nii.gz')
    """
    entities = {key: label for key, label in split_entities(stem_of(echo)).items() if key not in ("echo", "part")}
    return f"{join_entities(entities) or stem_of(echo)}_Chimap.nii.gz"
