"""The steps as Nipype interfaces: read, call one function, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import BaseInterfaceInputSpec, Bunch, File, SimpleInterface, TraitedSpec, traits

from bids_dgmseg.bids.derivatives import save_scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.measurement.field_of_view import FieldOfView, check_coverage
from bids_dgmseg.measurement.scan import SegmentedScan, measure_scan
from bids_dgmseg.models.weights import limit_threads
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.report.slices import PLANES
from bids_dgmseg.report.viewer import write_viewer
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.predict import predict
from bids_dgmseg.workflow import files
from bids_dgmseg.workflow.reference import take_reference


class _CheckInputSpec(BaseInterfaceInputSpec):
    in_chi = File(mandatory=True, desc="susceptibility map as it lies in the dataset")
    sidecar = traits.Dict(usedefault=True, desc="its metadata")
    problem = traits.Str(usedefault=True, desc="why its metadata cannot be read; empty if they can")


class _CheckOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the input's own grid, NaN where not measured")
    out_report = File(exists=True, desc="JSON: units, reference, geometry, warnings")


class Check(SimpleInterface):
    """Refuse what is no susceptibility map, and bring the others to ppm."""

    input_spec = _CheckInputSpec
    output_spec = _CheckOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        path, cwd = Path(self.inputs.in_chi), Path(runtime.cwd)
        if self.inputs.problem:
            raise InputError(self.inputs.problem)
        checked = check_chi(path, self.inputs.sidecar)
        out_chi = write_like(checked.chi_ppm.array, path, cwd / "chi.nii")
        self._results["out_chi"] = str(out_chi)
        self._results["out_report"] = str(files.write_json(files.describe_input(path, checked), cwd / "report.json"))
        return runtime


class _NetworkInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not measured")
    # Not hashed: Nipype cannot, and every run has a working directory of its own.
    model = traits.Any(mandatory=True, nohash=True, desc="the registry's entry")
    weights = traits.Str(desc="folder that takes the place of the model's own weights")
    device = traits.Enum("auto", "cpu", "cuda", usedefault=True, desc="where the networks run")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the networks")


class _LocalizeOutputSpec(TraitedSpec):
    out_box = File(exists=True, desc="JSON: opposite corners of the nuclei's box in mm, RAS+")
    out_regions = traits.Dict(traits.Str, File(exists=True), desc="region of the head to mask on the map's own grid")


class Localize(SimpleInterface):
    """Find the box that holds the nuclei."""

    input_spec = _NetworkInputSpec
    output_spec = _LocalizeOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        limit_threads(self.inputs.n_threads)
        chi = _read_finite(self.inputs.in_chi)
        found, cwd = localize(chi, self.inputs.model, **_where(self.inputs)), Path(runtime.cwd)
        self._results["out_box"] = str(files.write_json(files.describe_box(found.box), cwd / "box.json"))
        self._results["out_regions"] = files.write_regions(
            found.labels, self.inputs.in_chi, chi, names=self.inputs.model.localizer.labels, folder=cwd
        )
        return runtime


class _SegmentInputSpec(_NetworkInputSpec):
    in_box = File(exists=True, mandatory=True, desc="JSON: opposite corners of the nuclei's box in mm")


class _SegmentOutputSpec(TraitedSpec):
    out_dseg = File(exists=True, desc="labels on the map's own grid, numbered as in structures.tsv")
    out_probseg = File(exists=True, desc="fractions on the same grid, one volume a nucleus in the model's order")
    out_block = File(exists=True, desc="JSON: bounds of the part that was segmented, nuclei seen in it")


class Segment(SimpleInterface):
    """Label the nuclei inside the box."""

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        limit_threads(self.inputs.n_threads)
        model, in_chi, cwd = self.inputs.model, self.inputs.in_chi, Path(runtime.cwd)
        chi = _read_finite(in_chi)
        block = predict(chi, files.read_box(self.inputs.in_box), model, **_where(self.inputs))
        dseg = label_grid(block, model, chi.shape)
        self._results["out_dseg"] = str(write_like(dseg, in_chi, cwd / "dseg.nii.gz"))
        fractions = files.to_fractions(block.probabilities[1:], block.slices, chi.shape)
        self._results["out_probseg"] = str(write_like(fractions, in_chi, cwd / "probseg.nii.gz", scale=1 / 255))
        self._results["out_block"] = str(files.write_json(files.describe_block(block), cwd / "block.json"))
        return runtime


class _MeasureInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not measured")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid")
    in_probseg = File(exists=True, mandatory=True, desc="fractions on the same grid, one volume a nucleus")
    in_block = File(exists=True, mandatory=True, desc="JSON: bounds of the part that was segmented, nuclei seen in it")
    in_box = File(exists=True, mandatory=True, desc="JSON: the nuclei's box in mm")
    in_regions = traits.Dict(traits.Str, File(exists=True), usedefault=True, desc="region of the head to mask")
    in_check = File(exists=True, mandatory=True, desc="JSON: what was found out about the map")
    model = traits.Any(mandatory=True, nohash=True, desc="the registry's entry")
    reference = traits.Any(mandatory=True, nohash=True, desc="the region that susceptibilities are referred to")


class _MeasureOutputSpec(TraitedSpec):
    out_stats = File(exists=True, desc="tab-separated table, one row a nucleus")
    out_report = File(exists=True, desc="JSON: rating, quality of the map, reference, warnings about nuclei")


class Measure(SimpleInterface):
    """Measure the nuclei of one scan, and how far map and segmentation can be trusted."""

    input_spec = _MeasureInputSpec
    output_spec = _MeasureOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        model, cwd = self.inputs.model, Path(runtime.cwd)
        chi, dseg = Volume.read(self.inputs.in_chi), Volume.read(self.inputs.in_dseg, np.uint8)
        (block, seen), measured = files.read_block(self.inputs.in_block), is_valid(chi.array)
        probseg = files.read_fractions(self.inputs.in_probseg, block)
        fov = FieldOfView.of(measured, voxel_size_mm=chi.voxel_size_mm)
        scan = SegmentedScan(chi, dseg, probseg, block, model.structures, fov)
        voxels_pv = probseg.sum(axis=(1, 2, 3), dtype=np.float64)
        gaps = check_coverage(dseg, structures=model.structures, voxels_pv=voxels_pv, valid=measured, labelled=seen)
        reference = take_reference(self.inputs.reference, scan, regions=self.inputs.in_regions, model=model)
        found = measure_scan(
            scan,
            box=files.read_box(self.inputs.in_box),
            missing=gaps.missing,
            reference=reference,
            map_reference=files.read_json(self.inputs.in_check)["reference"],
        )
        found.stats.to_csv(cwd / "stats.tsv", sep="\t", index=False, na_rep="n/a")
        self._results["out_stats"] = str(cwd / "stats.tsv")
        report = files.describe_findings(found, reference, gaps.warnings)
        self._results["out_report"] = str(files.write_json(report, cwd / "report.json"))
        return runtime


class _FiguresInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not measured")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid")
    model = traits.Any(mandatory=True, nohash=True, desc="the registry's entry")
    title = traits.Str(usedefault=True, desc="the scan's name")
    viewer = traits.Bool(True, usedefault=True, desc="whether to write the interactive viewer")


class _FiguresOutputSpec(TraitedSpec):
    out_figures = traits.Dict(traits.Str, File(exists=True), desc="plane to PNG, viewer to HTML")


class Figures(SimpleInterface):
    """Draw the map with the nuclei's outlines in three planes, and write the interactive viewer."""

    input_spec = _FiguresInputSpec
    output_spec = _FiguresOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        chi, dseg = Volume.read(self.inputs.in_chi), Volume.read(self.inputs.in_dseg, np.uint8)
        self._results["out_figures"] = {
            plane: str(
                draw_mosaic(
                    chi,
                    dseg,
                    Path(runtime.cwd) / f"{plane}.png",
                    plane=plane,
                    structures=self.inputs.model.structures,
                    title=self.inputs.title,
                )
            )
            for plane in PLANES
        }
        if self.inputs.viewer:
            self._results["out_figures"]["viewer"] = str(
                write_viewer(
                    chi,
                    dseg,
                    Path(runtime.cwd) / "viewer.html",
                    structures=self.inputs.model.structures,
                    scan=self.inputs.title,
                    model=self.inputs.model.name,
                )
            )
        return runtime


class _SaveInputSpec(BaseInterfaceInputSpec):
    in_dseg = File(exists=True, mandatory=True, desc="labels")
    in_probseg = File(exists=True, mandatory=True, desc="fractions")
    in_stats = File(exists=True, mandatory=True, desc="table of the measures")
    in_box = File(exists=True, mandatory=True, desc="JSON: the nuclei's box in mm")
    in_check = File(exists=True, mandatory=True, desc="JSON: what was found out about the map")
    in_regions = traits.Dict(traits.Str, File(exists=True), usedefault=True, desc="region of the head to mask")
    in_found = File(exists=True, mandatory=True, desc="JSON: rating, quality of the map, reference, warnings")
    in_figures = traits.Dict(traits.Str, File(exists=True), mandatory=True, desc="plane to PNG, viewer to HTML")
    in_chi = File(exists=True, desc="map that was reconstructed here")
    in_reconstruction = File(exists=True, desc="JSON: how it came about")
    scan = traits.Any(mandatory=True, nohash=True, desc="whose derivatives these are")
    model = traits.Any(mandatory=True, nohash=True, desc="the registry's entry")
    config = traits.Any(mandatory=True, nohash=True, desc="configuration of the run")
    fingerprint = traits.Str(mandatory=True, desc="what the results depend on")
    reconstruction = traits.Str(usedefault=True, desc="what a map that was reconstructed here depends on")


class _SaveOutputSpec(TraitedSpec):
    out_files = traits.List(traits.Str, desc="the derivatives that were written")


class Save(SimpleInterface):
    """Name the results and place them in the output directory."""

    input_spec = _SaveInputSpec
    output_spec = _SaveOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        scan, model, config = self.inputs.scan, self.inputs.model, self.inputs.config
        box_mm = files.read_json(self.inputs.in_box)
        made = files.read_json(self.inputs.in_reconstruction) if self.inputs.in_reconstruction else {}
        quality = files.describe_quality(
            scan,
            model,
            config,
            check=files.read_json(self.inputs.in_check),
            box_mm=box_mm,
            found=files.read_json(self.inputs.in_found),
            made=made,
        )
        written = save_scan(
            config.output_dir,
            scan,
            model,
            out_dseg=Path(self.inputs.in_dseg),
            out_probseg=Path(self.inputs.in_probseg),
            stats=Path(self.inputs.in_stats),
            quality=quality,
            box_mm=box_mm,
            masks=config.segmentation.masks,
            fingerprint=self.inputs.fingerprint,
            figures={plane: Path(path) for plane, path in self.inputs.in_figures.items()},
            regions={region: Path(path) for region, path in self.inputs.in_regions.items()},
            chi=Path(self.inputs.in_chi) if self.inputs.in_chi else None,
            reconstruction=self.inputs.reconstruction,
        )
        self._results["out_files"] = [str(path) for path in written]
        return runtime


def _read_finite(path: str) -> Volume:
    """Read the map as networks want it: 0 where it was not measured."""
    chi = Volume.read(path)
    return chi.with_array(np.nan_to_num(chi.array, copy=False, nan=0.0))


def _where(inputs: Any) -> dict[str, Any]:
    return {"weights": Path(inputs.weights) if inputs.weights else None, "device": inputs.device}
