"""Interface that takes a map and its labels to a standard space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import BaseInterfaceInputSpec, File, TraitedSpec, isdefined, traits

from bids_dgmseg.interfaces.base import FileInterface


class _NormalizeInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (ConformChi)")
    in_dseg = File(exists=True, mandatory=True, desc="labels on its grid, indices of structures.tsv (SegmentNuclei)")
    in_probseg = File(
        exists=True, desc="probabilities on its grid or a block of it, one volume per nucleus (SegmentNuclei)"
    )
    in_regions = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="masks brain and ventricles, if there are (LocalizeNuclei)"
    )
    output_space = traits.Str(
        "MNI152NLin2009cAsym", usedefault=True, desc="standard space, and resolution in mm, such as :res-2 (default: 1)"
    )


class _NormalizeOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="map in ppm on the grid of the standard space, 0 where not measured")
    out_dseg = File(exists=True, desc="labels on the same grid; left is the patient's left")
    out_probseg = File(desc="probabilities on the same grid, if in_probseg is set")
    out_xfm = File(
        exists=True, desc="displacement field that takes images of the scan to standard space (for antsApplyTransforms)"
    )
    out_inverse_xfm = File(exists=True, desc="displacement field that takes images in standard space to the scan")
    out_files = traits.Dict(traits.Str, File(exists=True), desc="all of them, by the names of these outputs")
    report = traits.Dict(
        desc="space, resolution, limits of the Jacobian determinant, Dice of each nucleus with the standard space"
    )
    warnings = traits.List(traits.Str, desc="doubts about the alignment")


class NormalizeToMNI(FileInterface):
    """Take a map, labels and probabilities to MNI152NLin2009cAsym; see `bids_dgmseg.registration.mni`.

    Examples
    --------
    >>> NormalizeToMNI(in_chi="chi.nii", in_dseg="dseg.nii.gz").run().outputs.out_chi  # doctest: +SKIP
    """

    input_spec = _NormalizeInputSpec
    output_spec = _NormalizeOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Align the labels, then resample."""
        from bids_dgmseg.registration.mni import normalize_files

        given = self.inputs
        return normalize_files(
            Path(given.in_chi),
            Path(given.in_dseg),
            Path(given.in_probseg) if isdefined(given.in_probseg) else None,
            {name: Path(path) for name, path in given.in_regions.items()},
            output_space=given.output_space,
            folder=folder,
        )
