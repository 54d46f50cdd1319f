"""Interfaces that check a chi map and find the nuclei, alone or with the participant's other sessions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import File, InputMultiPath, TraitedSpec, isdefined, traits

from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.step import NetworkInputSpec, NetworkInterface, write_report
from bids_dgmseg.io.files import read_sidecar


class _LocalizeInputSpec(NetworkInputSpec):
    in_chi = File(mandatory=True, desc="susceptibility map in ppm or ppb, in any orientation and with any voxel size")
    metadata = traits.Dict(desc="its metadata, such as Units; by default those of the JSON file next to it")
    units = traits.Enum("ppm", "ppb", desc="unit of the map, if the metadata do not state it")
    find_ventricles = traits.Bool(
        False, usedefault=True, desc="find the lateral ventricles, for which another network may have to be run"
    )
    in_session = File(exists=True, desc="one of out_sessions of AlignSessions, if sessions are labelled together")


class _LocalizeOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the grid of in_chi, NaN where not valid")
    out_location = File(
        exists=True,
        desc="box of the nuclei, midplane, masks of brain, cerebellum and ventricles, as far as the model has them; "
        "read by `bids_dgmseg.segmentation.records.Localization`",
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
        from bids_dgmseg.segmentation.records import Localization, SharedSpace
        from bids_dgmseg.segmentation.regions import REGIONS, resample_regions
        from bids_dgmseg.segmentation.segment import find_ventricles, localize

        path, inputs, session = Path(self.inputs.in_chi), self.inputs, self.path("in_session")
        space = SharedSpace.read(session) if session else None
        metadata = inputs.metadata if isdefined(inputs.metadata) else read_sidecar(path)
        checked = check_chi(path, {**metadata, "Units": inputs.units} if inputs.units else metadata)
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
        from bids_dgmseg.measurement.volume_change import measure_session_volumes
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
