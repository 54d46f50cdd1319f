"""Interface that applies manual corrections to labels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import File, TraitedSpec, traits

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.interfaces.base import FileInterface, HashedSidecarsInputSpec, find_model, read_dseg


class _CorrectInputSpec(HashedSidecarsInputSpec):
    in_dseg = File(exists=True, mandatory=True, desc="automatic labels, indices of structures.tsv")
    in_correction = File(
        exists=True, mandatory=True, desc="corrected labels on the same grid, with the label table of their name (.tsv)"
    )
    model = traits.Str("default", usedefault=True, desc="model that made the labels")
    labels = traits.List(traits.Str, desc="its nuclei; by default those of the registry")

    def sidecars(self) -> Sequence[Path]:
        """Return the label table of the correction."""
        from bids_dgmseg.bids.masks_and_maps import read_label_table

        with contextlib.suppress(InputError):  # reported by the step
            if self.in_correction and (table := read_label_table(Path(self.in_correction)).source):
                return [table]
        return []


class _CorrectOutputSpec(TraitedSpec):
    out_dseg = File(exists=True, desc="labels with the corrections on the same grid")
    edited = traits.Dict(traits.Str, traits.Float, desc="nuclei that differ, to the Dice with the automatic ones")
    report = traits.Dict(desc="file, hash and edited nuclei of the correction")
    warnings = traits.List(traits.Str, desc="nuclei that the correction removes")


class CorrectLabels(FileInterface):
    """Replace labels by those that a person has corrected; see `bids_dgmseg.measurement.corrections.apply_correction`.

    Examples
    --------
    >>> step = CorrectLabels(in_dseg="dseg.nii.gz", in_correction="corrected.nii.gz")  # doctest: +SKIP
    """

    input_spec = _CorrectInputSpec
    output_spec = _CorrectOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Apply the correction."""
        from bids_dgmseg.bids.corrections import read_correction_table
        from bids_dgmseg.image.volume import read_labels
        from bids_dgmseg.io.nifti import write_like
        from bids_dgmseg.measurement.corrections import apply_correction

        path, model = Path(self.inputs.in_correction), find_model(self.inputs.model, self.inputs.labels)
        dseg, correction = read_dseg(self.inputs.in_dseg, model), read_labels(path)
        if difference := describe_grid_mismatch(dseg, correction):
            raise InputError(
                f"{path.name}: is not on the grid of the labels that it corrects ({difference}); correct the labels of "
                "this scan without resampling them"
            )
        present = [int(number) for number in np.unique(correction.array) if number]
        numbers = read_correction_table(path, model, present)
        corrected = apply_correction(dseg.array, correction.array, numbers=numbers, structures=model.structures)
        left = set(np.unique(corrected.labels).tolist())
        removed = [one.abbreviation for one in model.structures if one.index not in left]
        removed = [name for name in removed if name in corrected.edited]
        return {
            "out_dseg": str(write_like(corrected.labels, self.inputs.in_dseg, folder / "dseg.nii.gz")),
            "edited": dict(corrected.edited),
            "report": {"file": path.name, "edited": list(corrected.edited)},
            "warnings": [f"{name} was removed by the correction" for name in removed],
        }
