"""Interfaces that align sessions, localize the nuclei of a chi map, and label them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from nipype.interfaces.base import File, InputMultiPath, TraitedSpec, isdefined, traits

from bids_dgmseg.config import Prove
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.step import NetworkInputSpec, NetworkInterface, write_report
from bids_dgmseg.io.files import read_sidecar

PROBABILITY_STEP = 1 / 255
"""Probabilities are stored as integers from 0 to 255 with this ``scl_slope``."""


class _LocalizeInputSpec(NetworkInputSpec):
    in_chi = File(mandatory=True, desc="susceptibility map in ppm or ppb, in any orientation and with any voxel size")
    metadata = traits.Dict(desc="its metadata, such as Units; by default those of the JSON file next to it")
    find_ventricles = traits.Bool(
        False, usedefault=True, desc="find the lateral ventricles, for which another network may have to be run"
    )
    in_session = File(exists=True, desc="one of out_sessions of AlignSessions, if sessions are labelled together")


class _LocalizeOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the grid of in_chi, NaN where not valid")
    out_location = File(
        exists=True,
        desc="box of the nuclei, midplane, masks of brain, cerebellum and ventricles, as far as the model has them; "
        "read by `bids_dgmseg.segmentation.localize.Localization`",
    )
    out_report = File(exists=True, desc="input (how the map was read), warnings (JSON)")


class LocalizeNuclei(NetworkInterface):
    """Check that an image is a susceptibility map, convert it to ppm, and find the box with the nuclei.

    See `bids_dgmseg.image.units.check_chi` and `bids_dgmseg.segmentation.segment.localize`.

    Examples
    --------
    >>> LocalizeNuclei(in_chi="sub-01_Chimap.nii.gz", model="dgm16").run().outputs.out_location  # doctest: +SKIP
    """

    input_spec = _LocalizeInputSpec
    output_spec = _LocalizeOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Check the map and localize the nuclei."""
        from bids_dgmseg.image.grids import Grid
        from bids_dgmseg.image.masks import is_valid
        from bids_dgmseg.image.units import check_chi, describe_chi
        from bids_dgmseg.io.nifti import write_like
        from bids_dgmseg.measurement.segmented_scan import FieldOfView
        from bids_dgmseg.segmentation.localize import REGIONS, Localization, SharedSpace, resample_regions
        from bids_dgmseg.segmentation.segment import find_ventricles, localize

        path, inputs, session = Path(self.inputs.in_chi), self.inputs, self.path("in_session")
        space = SharedSpace.read(session) if session else None
        metadata = inputs.metadata if isdefined(inputs.metadata) else read_sidecar(path)
        checked = check_chi(path, metadata)
        chi, (model, _) = checked.chi_ppm, self.choose_model()
        out_chi = write_like(chi.array, path, folder / "chi.nii")
        location = localize(chi, model, weights=self.path("weights"), device=inputs.device)
        regions = {}
        if location.labels is not None:
            covered = FieldOfView.of(is_valid(chi.array), voxel_size_mm=chi.voxel_size_mm).inside
            names, grid = model.localizer.labels, Grid(chi.shape, chi.affine)
            wanted = [name for name in REGIONS if not (name == "ventricles" and model.ventricles)]
            regions = resample_regions(location.labels, grid, names=names, valid=covered, regions=wanted)
            if model.ventricles and inputs.find_ventricles:
                regions["ventricles"] = covered & find_ventricles(chi, location.box, model, device=inputs.device)
        record = Localization(location=location, regions=regions, space=space)
        return {
            "out_chi": out_chi,
            "out_location": record.write(folder / "location.nii.gz", chi, like=path),
            "out_report": write_report(folder, input=describe_chi(path, checked), warnings=[*checked.warnings]),
        }


class _AlignInputSpec(NetworkInputSpec):
    in_sessions = InputMultiPath(
        File(exists=True), mandatory=True, desc="maps of all sessions of the participant, in ppm or ppb"
    )
    metadata = traits.List(traits.Dict, desc="metadata of each map; by default those of the JSON files next to them")
    names = traits.List(traits.Str, desc="name of each map in messages and records; by default that of the file")


class _AlignOutputSpec(TraitedSpec):
    out_sessions = traits.List(
        File(exists=True), desc="per map, the mid-space and the volumes of the nuclei (JSON), for LocalizeNuclei"
    )
    out_mean = File(exists=True, desc="mean of the maps in ppm, in the mid-space at 1 mm")


class AlignSessions(NetworkInterface):
    """Align the sessions of a participant, once for all; see `bids_dgmseg.segmentation.sessions.align_sessions`.

    Examples
    --------
    >>> step = AlignSessions(in_sessions=["ses-1_Chimap.nii", "ses-2_Chimap.nii"])  # doctest: +SKIP
    >>> first, second = step.run().outputs.out_sessions  # doctest: +SKIP
    """

    input_spec = _AlignInputSpec
    output_spec = _AlignOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Align the maps, localize the nuclei on their mean, and measure how they change."""
        from dataclasses import replace

        import nibabel as nib

        from bids_dgmseg.image.grids import block_affine
        from bids_dgmseg.image.units import check_chi
        from bids_dgmseg.image.volume import Volume
        from bids_dgmseg.measurement.nuclei import measure_session_volumes
        from bids_dgmseg.segmentation.sessions import align_sessions, find_shared_spaces, segment_mean, warn_of_voxels

        inputs, paths = self.inputs, self.paths("in_sessions")
        metadata = inputs.metadata if isdefined(inputs.metadata) else [read_sidecar(path) for path in paths]
        names = inputs.names if isdefined(inputs.names) else [path.name for path in paths]
        for field, values in (("metadata", metadata), ("names", names)):
            if len(values) != len(paths):
                raise InputError(f"`{field}`: {len(values)} for {len(paths)} maps; pass one per map")
        if len(paths) < 2:
            raise InputError("`in_sessions`: one map; pass those of two or more sessions")
        model, _ = self.choose_model()
        maps = [check_chi(path, about).chi_ppm for path, about in zip(paths, metadata, strict=True)]
        aligned = align_sessions(maps, names=names)
        network: dict[str, Any] = {"weights": self.path("weights"), "device": inputs.device}
        spaces = find_shared_spaces(aligned, model, **network)
        mean = segment_mean(aligned, model, spaces[0].location, **network)
        labels = Volume(mean.labels[mean.block.slices], block_affine(aligned.mean.affine, mean.block.slices))
        volumes = measure_session_volumes(aligned.maps, labels, mean.block.probabilities[1:], mean.model.structures)
        nib.Nifti1Image(aligned.mean.array, aligned.mean.affine).to_filename(folder / "mean_chi.nii")
        correlations = {name: round(r, 3) for name, r in zip(names, aligned.correlations, strict=True)}
        warnings = [warning] if (warning := warn_of_voxels(maps)) else []
        files = [
            replace(space, correlations=correlations, volumes=session_volumes, warnings=warnings).write(
                folder / f"session_{number}.json"
            )
            for number, (space, session_volumes) in enumerate(zip(spaces, volumes, strict=True), 1)
        ]
        return {"out_sessions": files, "out_mean": folder / "mean_chi.nii"}


class _SegmentInputSpec(NetworkInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (LocalizeNuclei)")
    in_location = File(exists=True, mandatory=True, desc="box, midplane and mid-space (LocalizeNuclei)")
    in_source = File(desc="the map before its conversion, on which weights may be trained and corrections drawn")
    in_correction = File(
        exists=True, desc="labels drawn by a person on the same grid, with label table and sidecar (.tsv, .json)"
    )
    prove = traits.Enum(*get_args(Prove), usedefault=True, desc="extent of the proof on the map; empty: none")


class _SegmentOutputSpec(TraitedSpec):
    out_dseg = File(
        exists=True, desc="labels on the grid of in_chi, indices of structures.tsv; left is the patient's left"
    )
    out_automatic = File(exists=True, desc="the labels before in_correction, if that is set")
    out_probseg = File(exists=True, desc="probabilities from 0 to 1 on the same grid, one volume per nucleus")
    out_probseg_box = File(exists=True, desc="the same inside the box of the nuclei only; elsewhere they are 0")
    out_report = File(
        exists=True,
        desc="model, labels (in the order of the probabilities), detected, settings, edits, proof, warnings (JSON)",
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
        from bids_dgmseg.measurement.proof import prove
        from bids_dgmseg.models.model_folder import (
            TRAINED_ON_MAP,
            TRAINING_MAPS,
            describe_folds_trained_on,
            list_folder_maps,
        )
        from bids_dgmseg.segmentation.localize import Localization
        from bids_dgmseg.segmentation.segment import segment_map

        inputs, weights, source = self.inputs, self.path("weights"), self.path("in_source")
        model, warnings = self.choose_model()
        chi = Volume.read(inputs.in_chi)
        record = Localization.read(Path(inputs.in_location), chi)
        block = covering_block(Grid(chi.shape, chi.affine), record.location.box)
        if any(along.start == along.stop for along in block):
            raise InputError(f"`in_location`: is outside {Path(inputs.in_chi).name}; pass the location of this map")
        network: dict[str, Any] = {"weights": weights, "device": inputs.device, "shared": record.space}
        result = segment_map(chi, model, location=record.location, **network)
        labels, used, location = chi.with_array(result.labels), result.model, result.location
        slices, seen = result.block.slices, result.block.seen
        fractions = np.moveaxis(result.block.fractions(), 0, -1)
        del result  # its float32 probabilities, before planted maps are segmented
        dseg = automatic = write_like(labels.array, inputs.in_chi, folder / "dseg.nii.gz")
        edits: dict[str, Any] = {}
        if correction := self.path("in_correction"):
            edited = apply_correction(labels, correction, model, source=source)
            dseg = write_like(edited.labels, inputs.in_chi, folder / "edited_dseg.nii.gz")
            edits = {"file": correction.name, "edited": edited.dice}
            warnings = [*warnings, *edited.warnings]
        proof: dict[Any, Any] = {}
        if inputs.prove:
            proved = prove(
                chi,
                labels,
                used.structures,
                lambda planted: segment_map(planted.chi, model, location=location, **network).labels,
                full=inputs.prove == "full",
                edited=edits.get("edited", ()),
            )
            proof, warnings = proved.table.to_dict("index"), [*warnings, *proved.warnings]
        whole = np.zeros((*chi.shape, len(model.labels)), np.uint8, order="F")  # as it is written
        whole[slices] = fractions
        box = nib.Nifti1Image(fractions, block_affine(chi.affine, slices))
        box.header.set_slope_inter(PROBABILITY_STEP, 0)
        box.to_filename(folder / "probseg_box.nii")
        trained_on_it = describe_folds_trained_on(weights, source) if weights and source else ""
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
                detected=list(seen),
                settings={
                    "mirrored": used.mirrored,
                    **({TRAINED_ON_MAP: True} if trained_on_it else {}),
                    **({TRAINING_MAPS: training_maps} if training_maps else {}),
                    **({"longitudinal": dict(space.correlations)} if space else {}),
                },
                edits=edits,
                proof=proof,
                warnings=[
                    *warnings,
                    *([trained_on_it] if trained_on_it else []),
                    *(space.warnings if space else []),
                ],
            ),
        }
