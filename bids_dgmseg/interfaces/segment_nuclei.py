"""Interface that labels the nuclei of a chi map and applies a manual correction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import File, TraitedSpec

from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.step import NetworkInputSpec, NetworkInterface, write_report

PROBABILITY_STEP = 1 / 255
"""Probabilities are stored as integers from 0 to 255 with this ``scl_slope``."""


class _SegmentInputSpec(NetworkInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (LocalizeNuclei)")
    in_location = File(exists=True, mandatory=True, desc="box, midplane and mid-space (LocalizeNuclei)")
    in_source = File(desc="the map before its conversion, to tell whether the weights were trained on it")
    in_correction = File(
        exists=True, desc="labels drawn by a person on the same grid, with the label table of their name (.tsv)"
    )


class _SegmentOutputSpec(TraitedSpec):
    out_dseg = File(
        exists=True, desc="labels on the grid of in_chi, indices of structures.tsv; left is the patient's left"
    )
    out_automatic = File(exists=True, desc="the labels before in_correction, if that is set")
    out_probseg = File(exists=True, desc="probabilities from 0 to 1 on the same grid, one volume per nucleus")
    out_probseg_box = File(exists=True, desc="the same inside the box of the nuclei only; elsewhere they are 0")
    out_report = File(
        exists=True,
        desc="model, labels (in the order of the probabilities), detected, settings, edits, warnings (JSON)",
    )


class SegmentNuclei(NetworkInterface):
    """Label the nuclei of a chi map; see `bids_dgmseg.segmentation.segment.segment_map`.

    Examples
    --------
    >>> step = SegmentNuclei(in_chi="chi.nii", in_location="location.nii.gz", model="dgm16")  # doctest: +SKIP
    """

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Segment the map."""
        import nibabel as nib
        import numpy as np

        from bids_dgmseg.bids.corrections import apply_correction
        from bids_dgmseg.image.grids import Grid, block_affine, covering_block
        from bids_dgmseg.image.volume import Volume
        from bids_dgmseg.io.nifti import write_like
        from bids_dgmseg.models.model_folder import (
            TRAINED_ON_MAP,
            TRAINING_MAPS,
            describe_learned_folds,
            list_folder_maps,
        )
        from bids_dgmseg.segmentation.records import Localization
        from bids_dgmseg.segmentation.segment import segment_map

        inputs, weights, source = self.inputs, self.path("weights"), self.path("in_source")
        model, warnings = self.choose_model()
        chi = Volume.read(inputs.in_chi)
        record = Localization.read(Path(inputs.in_location), chi)
        block = covering_block(Grid(chi.shape, chi.affine), record.location.box)
        if any(along.start == along.stop for along in block):
            raise InputError(f"`in_location`: lies outside of {Path(inputs.in_chi).name}; pass that of this map")
        result = segment_map(
            chi,
            model,
            weights=weights,
            device=inputs.device,
            location=record.location,
            shared=record.space,
        )
        slices, fractions = result.block.slices, np.moveaxis(result.block.fractions(), 0, -1)
        whole = np.zeros((*chi.shape, len(model.labels)), np.uint8, order="F")  # as it is written
        whole[slices] = fractions
        box = nib.Nifti1Image(fractions, block_affine(chi.affine, slices))
        box.header.set_slope_inter(PROBABILITY_STEP, 0)
        box.to_filename(folder / "probseg_box.nii")
        dseg = automatic = write_like(result.labels, inputs.in_chi, folder / "dseg.nii.gz")
        edits: dict[str, Any] = {}
        if correction := self.path("in_correction"):
            edited = apply_correction(Volume(result.labels, chi.affine), correction, model)
            dseg = write_like(edited.labels, inputs.in_chi, folder / "edited_dseg.nii.gz")
            edits = {"file": correction.name, "edited": edited.dice}
            warnings = [*warnings, *(f"{name} was removed by the correction" for name in edited.removed)]
        learned = describe_learned_folds(weights, source) if weights and source else ""
        training_maps = list_folder_maps(weights) if weights else []
        space = record.space
        return {
            "out_dseg": dseg,
            "out_automatic": automatic if correction else None,
            "out_probseg": write_like(whole, inputs.in_chi, folder / "probseg.nii.gz", scale=PROBABILITY_STEP),
            "out_probseg_box": folder / "probseg_box.nii",
            "out_report": write_report(
                folder,
                model=model.name,
                labels=list(model.labels),
                detected=list(result.block.seen),
                settings={
                    "mirrored": result.model.mirrored,
                    **({TRAINED_ON_MAP: True} if learned else {}),
                    **({TRAINING_MAPS: training_maps} if training_maps else {}),
                    **({"longitudinal": dict(space.correlations)} if space else {}),
                },
                edits=edits,
                warnings=[
                    *warnings,
                    *([learned] if learned else []),
                    *(space.warnings if space else []),
                ],
            ),
        }
