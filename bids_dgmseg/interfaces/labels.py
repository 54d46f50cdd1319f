"""Interfaces that label a chi map: localization of the nuclei, segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import nibabel as nib
import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    File,
    InputMultiPath,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_dgmseg.config import Device
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, block_affine, covering_block
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces.base import FileInterface, HashedSidecarsInputSpec, path_or_none
from bids_dgmseg.io.files import sidecar_path
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.engine import choose_labels
from bids_dgmseg.segmentation.records import Location, SharedSpace

PROBABILITY_STEP = 1 / 255
"""Probabilities are stored as integers from 0 to 255 with this ``scl_slope``."""


class _NetworkInputSpec(BaseInterfaceInputSpec):
    model = traits.Str("default", usedefault=True, desc="one of `bids_dgmseg.list_models`")
    weights = Directory(exists=True, desc="folder with other weights than the model's own")
    label_map = File(exists=True, desc="table that maps the labels of an nnU-Net folder to nuclei")
    device = traits.Enum(*get_args(Device), usedefault=True, desc="device of the networks")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the networks")


class _ModelInputSpec(_NetworkInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (ConformChi)")


class _ModelInterface(FileInterface):
    """Interface that runs the networks of a model."""

    def _choose_model(self, *, ensemble: bool = False) -> tuple[Model, list[str]]:
        """Return the model with the nuclei of its weights, and warnings."""
        weights, label_map = path_or_none(self.inputs.weights), path_or_none(self.inputs.label_map)
        return choose_labels(get_model(self.inputs.model), weights, label_map, ensemble=ensemble)


class _LocalizeInputSpec(_ModelInputSpec):
    find_midplane = traits.Bool(
        False, usedefault=True, desc="find the plane between the hemispheres also if the model does not need it"
    )
    find_ventricles = traits.Bool(
        False, usedefault=True, desc="find the lateral ventricles, for which another network may have to be run"
    )


class _LocalizeOutputSpec(TraitedSpec):
    out_box = traits.Dict(
        desc="box with the nuclei: low and high corner in mm (RAS+); rotation_deg, rotated_size if tilted"
    )
    out_regions = traits.Dict(
        traits.Str,
        File(exists=True),
        desc="brain, cerebellum, ventricles (with find_ventricles): mask on the grid of in_chi, if the model has it",
    )
    out_head_labels = File(exists=True, desc="head regions on the grid of the localizer; not for all models")
    midplane = traits.Dict(desc="plane between the hemispheres: unit normal towards the right (RAS+), offset_mm")


class LocalizeNuclei(_ModelInterface):
    """Find the box with the nuclei and the regions of the head; see `bids_dgmseg.segmentation.segment.localize`.

    Examples
    --------
    >>> LocalizeNuclei(in_chi="chi.nii", model="dgm16").run().outputs.out_box  # doctest: +SKIP
    {'low': [-47.5, -73.0, -60.0], 'high': [47.5, 47.0, 45.0]}
    """

    input_spec = _LocalizeInputSpec
    output_spec = _LocalizeOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Localize the nuclei."""
        from bids_dgmseg.image.masks import is_valid
        from bids_dgmseg.measurement.field_of_view import FieldOfView
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.segmentation.regions import REGIONS, resample_regions
        from bids_dgmseg.segmentation.segment import find_ventricles, localize

        limit_threads(self.inputs.n_threads)
        model, _ = self._choose_model()
        path, chi = self.inputs.in_chi, Volume.read(self.inputs.in_chi)
        location = localize(
            chi,
            model,
            weights=path_or_none(self.inputs.weights),
            device=self.inputs.device,
            midplane=self.inputs.find_midplane,
        )
        outputs: dict[str, Any] = {"out_box": location.box.to_dict(), "out_regions": {}}
        if location.labels is not None:
            covered = FieldOfView.of(is_valid(chi.array), voxel_size_mm=chi.voxel_size_mm).inside
            grid, names = Grid(chi.shape, chi.affine), model.localizer.labels
            wanted = [name for name in REGIONS if not (name == "ventricles" and model.ventricles)]
            regions = resample_regions(location.labels, grid, names=names, valid=covered, regions=wanted)
            if model.ventricles and self.inputs.find_ventricles:
                found = find_ventricles(chi, location.box, model, device=self.inputs.device)
                regions["ventricles"] = found & covered
            outputs["out_regions"] = {
                name: str(write_like(mask.astype(np.uint8), path, folder / f"{name}.nii.gz"))
                for name, mask in regions.items()
            }
            coarse = nib.Nifti1Image(location.labels.array.astype(np.uint8), location.labels.affine)
            coarse.to_filename(folder / "head_labels.nii.gz")
            outputs["out_head_labels"] = str(folder / "head_labels.nii.gz")
        if location.plane is not None:
            outputs["midplane"] = _midplane_to_dict(location.plane)
        return outputs


class _AlignInputSpec(_NetworkInputSpec, HashedSidecarsInputSpec):
    in_sessions = InputMultiPath(
        File(exists=True), mandatory=True, desc="maps of all sessions of the participant, in ppm or ppb"
    )
    metadata = traits.List(traits.Dict, desc="of each map; by default the JSON files next to them")
    names = traits.List(traits.Str, desc="of each map, for messages and the record; by default the file names")

    def sidecars(self) -> Sequence[Path]:
        """Return the JSON files next to the maps."""
        paths = [] if isdefined(self.metadata) else self.in_sessions or []
        return [sidecar_path(Path(path)) for path in paths]


class _AlignOutputSpec(TraitedSpec):
    out_spaces = traits.List(
        traits.Dict,
        desc="per map, the mid-space for SegmentNuclei and MeasureNuclei: to_map (4×4, RAS+ mm), box, midplane, "
        "sessions, volumes of the nuclei (mean_mm3, change_percent), warnings",
    )
    out_mean = File(exists=True, desc="mean of the maps in ppm, in the mid-space at 1 mm")


class AlignSessions(_ModelInterface):
    """Align the sessions of a participant, once for all; see `bids_dgmseg.segmentation.sessions.align_sessions`.

    Examples
    --------
    >>> step = AlignSessions(in_sessions=["ses-1_Chimap.nii", "ses-2_Chimap.nii"])  # doctest: +SKIP
    >>> first, second = step.run().outputs.out_spaces  # doctest: +SKIP
    """

    input_spec = _AlignInputSpec
    output_spec = _AlignOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Align the maps, localize the nuclei on their mean, and measure how they change."""
        from bids_dgmseg.image.units import check_chi
        from bids_dgmseg.io.files import read_sidecar
        from bids_dgmseg.measurement.volume_change import measure_session_volumes
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.segmentation.sessions import (
            align_sessions,
            find_shared_spaces,
            segment_mean,
            warn_of_voxels,
        )

        given = self.inputs
        limit_threads(given.n_threads)
        model, _ = self._choose_model()
        paths = [Path(path) for path in given.in_sessions]
        metadata = given.metadata if isdefined(given.metadata) else [read_sidecar(path) for path in paths]
        names = given.names if isdefined(given.names) else [path.name for path in paths]
        for field, values in (("metadata", metadata), ("names", names)):
            if len(values) != len(paths):
                raise InputError(f"`{field}`: {len(values)} for {len(paths)} maps; pass one per map")
        if len(paths) < 2:
            raise InputError("`in_sessions`: one map; pass those of two or more sessions")
        maps = [check_chi(path, about).chi_ppm for path, about in zip(paths, metadata, strict=True)]
        aligned = align_sessions(maps, names=names)
        network: dict[str, Any] = {"weights": path_or_none(given.weights), "device": given.device}
        spaces = find_shared_spaces(aligned, model, **network)
        mean = segment_mean(aligned, model, spaces[0].location, **network)
        inside = mean.block.slices
        labels = Volume(mean.labels[inside], block_affine(aligned.mean.affine, inside))
        volumes = measure_session_volumes(aligned.maps, labels, mean.block.probabilities[1:], mean.model.structures)
        nib.Nifti1Image(aligned.mean.array, aligned.mean.affine).to_filename(folder / "mean_chi.nii")
        sessions = {name: round(r, 3) for name, r in zip(names, aligned.correlations, strict=True)}
        warning = warn_of_voxels(maps)
        return {
            "out_spaces": [
                {
                    "to_map": space.to_map.tolist(),
                    "box": space.location.box.to_dict(),
                    "midplane": _midplane_to_dict(space.location.plane),
                    "sessions": sessions,
                    "volumes": session_volumes,
                    "warnings": [warning] if warning else [],
                }
                for space, session_volumes in zip(spaces, volumes, strict=True)
            ],
            "out_mean": str(folder / "mean_chi.nii"),
        }


class _SegmentInputSpec(_ModelInputSpec):
    in_box = traits.Dict(desc="box of LocalizeNuclei; by default the nuclei are localized here")
    in_midplane = traits.Dict(desc="midplane of LocalizeNuclei; found here if the model needs it")
    in_space = traits.Dict(
        desc="one of out_spaces of AlignSessions: the network sees the map on the grid of all sessions; replaces in_box"
    )
    needs_space = traits.Bool(False, usedefault=True, desc="whether in_space must be set")
    in_source = File(desc="the map before its conversion, to tell whether the weights were trained on it")
    ensemble = traits.Bool(False, usedefault=True, desc="average over the map and its mirror image")


class _SegmentOutputSpec(TraitedSpec):
    out_dseg = File(
        exists=True, desc="labels on the grid of in_chi, indices of structures.tsv; left is the patient's left"
    )
    out_probseg = File(exists=True, desc="probabilities from 0 to 1 on the same grid, one volume per entry of labels")
    out_probseg_box = File(exists=True, desc="the same inside the box of the nuclei only; elsewhere they are 0")
    labels = traits.List(traits.Str, desc="nuclei of the model in the order of the probabilities, such as DN_L")
    detected = traits.List(traits.Str, desc="nuclei with at least one voxel on the grid of the network")
    report = traits.Dict(desc="settings of the segmentation: mirrored, ensemble, trained_on_map, …")
    warnings = traits.List(traits.Str, desc="doubts about weights and labels")


class SegmentNuclei(_ModelInterface):
    """Label the nuclei of a chi map; see `bids_dgmseg.segmentation.segment.segment_map`.

    Examples
    --------
    >>> SegmentNuclei(in_chi="chi.nii", model="dgm16").run().outputs.out_dseg  # doctest: +SKIP
    """

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Segment the map."""
        from bids_dgmseg.models.model_folder import (
            TRAINED_ON_MAP,
            TRAINING_MAPS,
            describe_learned_folds,
            limit_threads,
            list_folder_maps,
        )
        from bids_dgmseg.segmentation.segment import segment_map

        given = self.inputs
        limit_threads(given.n_threads)
        model, warnings = self._choose_model(ensemble=given.ensemble)
        like, chi, weights = given.in_chi, Volume.read(given.in_chi), path_or_none(given.weights)
        location = self._read_location()
        block = covering_block(Grid(chi.shape, chi.affine), location.box) if location else ()
        if any(along.start == along.stop for along in block):
            raise InputError(f"`in_box`: lies outside of {Path(like).name}; pass the box of this map")
        result = segment_map(
            chi,
            model,
            weights=weights,
            device=given.device,
            ensemble=given.ensemble,
            location=location,
            shared=self._read_space(),
        )
        fractions = np.moveaxis(result.block.fractions(), 0, -1)
        whole = np.zeros((*chi.shape, len(model.labels)), np.uint8, order="F")  # as it is written
        whole[result.block.slices] = fractions
        box = nib.Nifti1Image(fractions, block_affine(chi.affine, result.block.slices))
        box.header.set_slope_inter(PROBABILITY_STEP, 0)
        box.to_filename(folder / "probseg_box.nii")
        learned = describe_learned_folds(weights, Path(given.in_source)) if weights and given.in_source else ""
        training_maps = list_folder_maps(weights) if weights else []
        of_sessions = given.in_space["warnings"] if given.in_space else []
        return {
            "out_dseg": str(write_like(result.labels, like, folder / "dseg.nii.gz")),
            "out_probseg": str(write_like(whole, like, folder / "probseg.nii.gz", scale=PROBABILITY_STEP)),
            "out_probseg_box": str(folder / "probseg_box.nii"),
            "labels": list(model.labels),
            "detected": list(result.block.seen),
            "report": {
                "mirrored": given.ensemble or result.model.mirrored,
                "ensemble": given.ensemble,
                **({TRAINED_ON_MAP: True} if learned else {}),
                **({TRAINING_MAPS: training_maps} if training_maps else {}),
                **({"longitudinal": dict(given.in_space["sessions"])} if given.in_space else {}),
            },
            "warnings": [*warnings, *([learned] if learned else []), *of_sessions],
        }

    def _read_location(self) -> Location | None:
        """Return the result of LocalizeNuclei, if it is set."""
        return _location(self.inputs.in_box, self.inputs.in_midplane) if self.inputs.in_box else None

    def _read_space(self) -> SharedSpace | None:
        """Return the result of AlignSessions, if it is set."""
        space = self.inputs.in_space
        if not space:
            if self.inputs.needs_space:
                raise InputError("`in_space`: is not set; pass one of `out_spaces` of AlignSessions")
            return None
        if missing := {"to_map", "box", "midplane", "sessions", "volumes", "warnings"} - space.keys():
            raise InputError(
                f"`in_space`: has no {', '.join(sorted(missing))}; pass one of `out_spaces` of AlignSessions"
            )
        return SharedSpace(np.array(space["to_map"]), _location(space["box"], space["midplane"]))


def _midplane_to_dict(plane: Midplane | None) -> dict[str, Any]:
    return {"normal": plane.normal.tolist(), "offset_mm": plane.offset_mm} if plane else {}


def _location(box: Mapping[str, Any], plane: Mapping[str, Any] | None) -> Location:
    return Location(
        Box.from_dict(box), plane=Midplane(np.array(plane["normal"]), plane["offset_mm"]) if plane else None
    )
