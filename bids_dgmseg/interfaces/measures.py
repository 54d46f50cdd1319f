"""Interfaces that measure and draw labelled nuclei."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import BaseInterfaceInputSpec, File, TraitedSpec, isdefined, traits
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, block_affine, box_of_mask, check_grid
from bids_dgmseg.image.volume import Volume, read_block
from bids_dgmseg.interfaces.base import FileInterface, find_model, path_or_none, read_dseg
from bids_dgmseg.models.registry import Model


class _LabelledInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid, indices of structures.tsv")
    model = traits.Str("default", usedefault=True, desc="model that made the labels")
    labels = traits.List(
        traits.Str, desc="its nuclei, in the order of the probabilities; by default those of the registry"
    )


class _LabelledInterface(FileInterface):
    """Interface for a map with labels."""

    def _read(self) -> tuple[Volume, Volume, Model]:
        """Return the map, the labels on its grid, and the model."""
        model = find_model(self.inputs.model, self.inputs.labels)
        chi, dseg = Volume.read(self.inputs.in_chi), read_dseg(self.inputs.in_dseg, model)
        check_grid(self.inputs.in_dseg, dseg, chi, what="labels")
        return chi, dseg, model

    def _read_on_grid(self, path: str, chi: Volume, dtype: DTypeLike = np.float32) -> Volume:
        image = Volume.read(path, dtype)
        check_grid(path, image, chi)
        return image


class _MeasureInputSpec(_LabelledInputSpec):
    in_probseg = File(
        exists=True,
        mandatory=True,
        desc="probabilities on the same grid, or in a block of it (SegmentNuclei.out_probseg_box)",
    )
    in_box = traits.Dict(desc="box of LocalizeNuclei; by default that of the probabilities")
    in_regions = traits.Dict(traits.Str, File(exists=True), desc="masks of head regions (LocalizeNuclei.out_regions)")
    in_r2star = File(exists=True, desc="R2* in 1/s on the same grid")
    detected = traits.List(traits.Str, desc="nuclei that the network found; by default those with a voxel")
    edited = traits.Dict(
        traits.Str, traits.Float, desc="nuclei that were corrected manually, to the Dice with the automatic labels"
    )
    in_space = traits.Dict(desc="one of out_spaces of AlignSessions: adds the changes of volume between the sessions")
    map_reference = traits.Str(
        "not stated", usedefault=True, desc="region whose susceptibility is 0 in the map (ConformChi.reference)"
    )
    reference = traits.Enum(
        "none",
        "whole-brain",
        "csf",
        "structure",
        usedefault=True,
        desc="region whose mean is subtracted in further columns",
    )
    reference_structure = traits.Str(desc="nucleus for the reference structure, such as CN or CN_L")
    reference_mask = File(exists=True, desc="mask for the reference csf; by default the ventricles in in_regions")
    needs_reference_mask = traits.Bool(
        False, usedefault=True, desc="whether the reference is n/a without reference_mask"
    )
    n_failed_checks = traits.Int(desc="number of plausibility checks that a reconstructed map failed")
    in_exclude = traits.List(
        File(exists=True),
        usedefault=True,
        desc="masks of voxels that are left out of all measures, in the space of the map",
    )
    bilateral = traits.Bool(False, usedefault=True, desc="add a row per nucleus with left and right combined")


class _MeasureOutputSpec(TraitedSpec):
    out_stats = File(exists=True, desc="tab-separated table, one row per nucleus; columns in mm3, ppm and 1/s")
    rating = traits.Enum("green", "amber", "red", desc="rating of the scan")
    report = traits.Dict(desc="rating with reasons, quality of the map, reference region")
    warnings = traits.List(traits.Str, desc="nuclei that are missing, cut or exchanged, missing voxels")


class MeasureNuclei(_LabelledInterface):
    """Measure and rate the nuclei of a map; see `bids_dgmseg.measurement.scan.measure_scan`.

    Examples
    --------
    >>> step = MeasureNuclei(in_chi="chi.nii", in_dseg="dseg.nii.gz", in_probseg="probseg.nii.gz")  # doctest: +SKIP
    """

    input_spec = _MeasureInputSpec
    output_spec = _MeasureOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Measure the nuclei."""
        from bids_dgmseg.io.files import write_tsv
        from bids_dgmseg.measurement.exclusion import read_exclusion
        from bids_dgmseg.measurement.reference_region import check_reference, find_reference
        from bids_dgmseg.measurement.scan import describe_measures, measure_scan
        from bids_dgmseg.measurement.segmented_scan import SegmentedScan

        given = self.inputs
        if given.in_space and "volumes" not in given.in_space:
            raise InputError("`in_space`: has no volumes; pass one of `out_spaces` of AlignSessions")
        chi, dseg, model = self._read()
        probabilities, block = _enclose_labels(*read_block(Path(given.in_probseg), chi), dseg)
        if len(probabilities) != len(model.structures):
            raise InputError(
                f"{Path(given.in_probseg).name}: has {len(probabilities)} volumes, {model.name} has "
                f"{len(model.structures)} nuclei; pass their names as `labels`"
            )
        exclude = read_exclusion([Path(path) for path in given.in_exclude], chi)
        r2star = self._read_on_grid(given.in_r2star, chi).array if given.in_r2star else None
        present = set(np.unique(dseg.array).tolist())
        detected = [one.abbreviation for one in model.structures if one.index in present]
        scan = SegmentedScan(
            chi=chi,
            dseg=dseg,
            probseg=probabilities,
            block=block,
            structures=model.structures,
            labelled=given.detected if isdefined(given.detected) else detected,
            r2star_hz=r2star,
            edited=given.edited if isdefined(given.edited) else None,
            session_volumes=given.in_space.get("volumes") if given.in_space else None,
            exclude=exclude,
        )
        is_usable = np.ones(chi.shape, bool) if exclude is None else ~exclude
        usable = chi.with_array(np.where(is_usable, chi.array, np.float32(np.nan)))
        mask = path_or_none(given.reference_mask)
        wanted = ReferenceRegion(
            kind=given.reference,
            structure=given.reference_structure or None,
            masks=mask or (Path("masks") if given.needs_reference_mask else None),
        )
        check_reference(wanted, model)
        regions = given.in_regions or {}
        if wanted.kind == "csf" and not wanted.masks and "ventricles" not in regions:
            raise InputError(
                "`reference` csf: no ventricles in `in_regions`; set `find_ventricles` of LocalizeNuclei, or "
                "`reference_mask`"
            )
        reference = find_reference(wanted, replace(scan, chi=usable), mask=mask, regions=regions, model=model)
        brain = regions.get("brain")
        measures = measure_scan(
            scan,
            box=Box.from_dict(given.in_box) if given.in_box else _box_of(chi, block),
            reference=reference,
            map_reference=given.map_reference,
            brain_ml=chi.volume_ml(self._read_on_grid(brain, chi, np.uint8).array) if brain else None,
            failed_checks=given.n_failed_checks if isdefined(given.n_failed_checks) else None,
            bilateral=given.bilateral,
        )
        write_tsv(measures.stats, folder / "stats.tsv")
        problem = [reference.problem] if reference and reference.problem else []
        return {
            "out_stats": str(folder / "stats.tsv"),
            "rating": measures.rating,
            "report": {**describe_measures(measures, reference), **self._describe_exclusion(chi, exclude)},
            "warnings": [*measures.warnings, *problem],
        }

    def _describe_exclusion(self, chi: Volume, exclude: NDArray[np.bool_] | None) -> dict[str, Any]:
        """Return the masks of excluded voxels, for the QC record."""
        if exclude is None:
            return {}
        names = [Path(path).name for path in self.inputs.in_exclude]
        volume_mm3 = float(np.count_nonzero(exclude) * np.prod(chi.voxel_size_mm))
        return {"excluded": {"files": names, "volume_mm3": round(volume_mm3, 3)}}


def _enclose_labels(
    probabilities: NDArray[np.float32], block: tuple[slice, slice, slice], dseg: Volume
) -> tuple[NDArray[np.float32], tuple[slice, slice, slice]]:
    """Extend probabilities (C, x, y, z) by 0 to a block that contains all labels, as corrected ones may lie outside."""
    boxes = [box for box in ndimage.find_objects((dseg.array > 0).astype(np.uint8)) if box]
    low = [min(piece.start, *(box[axis].start for box in boxes)) for axis, piece in enumerate(block)] if boxes else []
    high = [max(piece.stop, *(box[axis].stop for box in boxes)) for axis, piece in enumerate(block)] if boxes else []
    if not boxes or (low, high) == ([piece.start for piece in block], [piece.stop for piece in block]):
        return probabilities, block
    margins = [(piece.start - first, last - piece.stop) for piece, first, last in zip(block, low, high, strict=True)]
    x, y, z = (slice(first, last) for first, last in zip(low, high, strict=True))
    return np.pad(probabilities, [(0, 0), *margins]), (x, y, z)


def _box_of(chi: Volume, block: tuple[slice, slice, slice]) -> Box:
    """Return the box that encloses a block of voxels."""
    return box_of_mask(Volume(np.ones_like(chi.array[block], bool), block_affine(chi.affine, block)))


class _PlotInputSpec(_LabelledInputSpec):
    title = traits.Str(usedefault=True, desc="name of the scan in the figures")
    planes = traits.List(
        traits.Enum("axial", "coronal", "sagittal"),
        ["axial", "coronal", "sagittal"],
        usedefault=True,
        desc="planes of the image that are drawn",
    )
    in_automatic = File(exists=True, desc="labels before a manual correction, drawn as dashed outlines")
    in_exclude = traits.List(File(exists=True), usedefault=True, desc="masks of excluded voxels, drawn dotted")
    viewer = traits.Bool(True, usedefault=True, desc="also write an interactive viewer (HTML, 1 to 3 MB)")


class _PlotOutputSpec(TraitedSpec):
    out_figures = traits.Dict(traits.Str, File(exists=True), desc="plane to PNG, viewer to HTML")


class PlotNuclei(_LabelledInterface):
    """Draw the outlines of the nuclei on slices of the map; see `bids_dgmseg.report.mosaic.draw_mosaic`.

    Examples
    --------
    >>> PlotNuclei(in_chi="chi.nii", in_dseg="dseg.nii.gz", planes=["axial"]).run()  # doctest: +SKIP
    """

    input_spec = _PlotInputSpec
    output_spec = _PlotOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Draw the figures."""
        from bids_dgmseg.measurement.blobs import find_blobs
        from bids_dgmseg.measurement.exclusion import read_exclusion
        from bids_dgmseg.report.mosaic import draw_mosaic

        chi, dseg, model = self._read()
        title, structures = self.inputs.title, model.structures
        before = self._read_on_grid(self.inputs.in_automatic, chi, np.uint8) if self.inputs.in_automatic else None
        exclude = read_exclusion([Path(path) for path in self.inputs.in_exclude], chi)
        blobs = find_blobs(chi, dseg, structures=structures, exclude=exclude)
        blob = np.any([one.mask for one in blobs], axis=0) if blobs else None
        marks = {"excluded": exclude, "strong sources": blob}
        figures: dict[str, Path] = {
            plane: draw_mosaic(
                chi,
                dseg,
                folder / f"{plane}.png",
                plane=plane,
                structures=structures,
                title=title,
                automatic=before,
                marks={name: mask for name, mask in marks.items() if mask is not None and mask.any()},
            )
            for plane in self.inputs.planes
        }
        if self.inputs.viewer:
            from bids_dgmseg.report.scan_figures import write_viewer

            path = folder / "viewer.html"
            figures["viewer"] = write_viewer(chi, dseg, path, structures=structures, scan=title, model=model.name)
        return {"out_figures": {name: str(path) for name, path in figures.items()}}
