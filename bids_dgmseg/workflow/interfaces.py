"""The steps of one scan as Nipype interfaces: each reads files, calls one function and writes its result.

What only the steps need is imported when they run, because importing torch and matplotlib takes seconds and the process
that builds the workflows does not need them; `environment.worker_servers` loads them for the workers.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nipype import Node
from nipype.interfaces.base import BaseInterfaceInputSpec, Bunch, File, SimpleInterface, TraitedSpec, traits
from numpy.typing import NDArray

from bids_dgmseg.bids.derivatives import remove_refused, save_refused, save_scan
from bids_dgmseg.errors import InputError, raise_if_interrupted
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_tsv
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.workflow.qc_record import (
    build_qc_record,
    describe_box,
    report_input,
    report_measures,
    report_reconstruction,
)

STEPS = ("reconstruct", "prepare", "segment", "measure", "save")
"""Nodes in the order of the data; only scans with echoes have the first."""

FRACTION_SCALE = np.float32(1 / 255)
"""Probabilities are stored as integers from 0 to 255, as in probseg files."""


class StepNode(Node):
    """Node that raises the exception of its interface; Nipype raises another one, which quotes the traceback."""

    error: BaseException | None = None

    def run(self, updatehash: bool = False) -> Any:
        """Run the step, log its time, and keep the exception that it raises in `error`."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        try:
            raise_if_interrupted()
            result = super().run(updatehash=updatehash)
            took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            logging.getLogger("nipype.workflow").info("%s: %.3f s, CPU %.3f s", self.fullname, took_s, cpu_s)
            return result
        except BaseException as error:  # noqa: BLE001 - raised again below
            self.error = self.interface.error or error
            raise self.error from None


class Step(SimpleInterface, ABC):
    """Interface with one function, ``run_step(folder) -> outputs``, that remembers the exception it raised."""

    error: BaseException | None = None

    def _run_interface(self, runtime: Bunch) -> Bunch:
        try:
            self._results.update(self.run_step(Path(runtime.cwd)))
        except BaseException as error:
            self.error = error
            raise
        return runtime

    @abstractmethod
    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Do the work in an empty folder and return the outputs."""


def _object(desc: str, **metadata: Any) -> Any:
    """Trait for a Python object; not hashed, since Nipype cannot and each run has its own working directory."""
    return traits.Any(nohash=True, desc=desc, **metadata)


class _ReconstructInputSpec(BaseInterfaceInputSpec):
    job = _object("Job of a scan with echoes", mandatory=True)
    problem = traits.Str(usedefault=True, desc="why the scan cannot be processed; empty if it can")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the Fourier transforms")


class _ReconstructOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the grid of the echoes, 0 outside the brain")
    out_r2star = File(exists=True, desc="float32 R2* in 1/s on the same grid, 0 outside; not with a single echo")
    out_figure = File(exists=True, desc="PNG of magnitude, total field, local field and map")
    out_report = _object("StepReport: how the map was reconstructed")
    out_fingerprint = traits.Str(desc="hash of everything that the map depends on")


class Reconstruct(Step):
    """Reconstruct a susceptibility map from multi-echo GRE."""

    input_spec = _ReconstructInputSpec
    output_spec = _ReconstructOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Reconstruct the map, or save why it is refused."""
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T
        from bids_dgmseg.qsm.reconstruct import reconstruct_files
        from bids_dgmseg.report.reconstruction_figure import draw_reconstruction

        job, scan, mask = self.inputs.job, self.inputs.job.scan, self.inputs.job.brain_mask
        output_dir, sign = job.config.output_dir, job.config.reconstruction.phase_sign
        remove_refused(output_dir, scan, job.model)
        if self.inputs.problem:
            raise InputError(self.inputs.problem)
        limit_threads(self.inputs.n_threads)
        mark = job.hash_map()  # before the images are read: if they change meanwhile, the next run processes the scan
        b0_tesla = float(scan.sidecar["MagneticFieldStrength"])
        result = reconstruct_files(
            [echo.parts for echo in scan.echoes],
            echo_times_s=[echo.time_s for echo in scan.echoes],
            b0_tesla=b0_tesla,
            phase_units=[echo.units for echo in scan.echoes],
            mask=mask,
            phase_sign=sign,
            background=job.config.reconstruction.background,
            inversion=job.config.reconstruction.inversion,
            unwrapping=job.config.reconstruction.unwrapping,
        )
        chi = write_like(result.chi_ppm, scan.chi, folder / f"{scan.name}_Chimap.nii.gz")
        grid, figure = Volume.read(chi), folder / "reconstruction.png"
        draw_reconstruction(result, grid, figure, hz_per_ppm=GYROMAGNETIC_MHZ_PER_T * b0_tesla, title=scan.name)
        report = report_reconstruction(scan, result, grid, mask=mask, phase_sign=sign)
        if result.problems and not job.config.reconstruction.accept_implausible:
            # the other warnings are about accepting the map
            warnings = [text for text in report.warnings if not any(problem in text for problem in result.problems)]
            save_refused(output_dir, scan, job.model, figure=figure, record={**report.values, "Warnings": warnings})
            remedy = "correct the brain mask" if mask else "provide a brain mask with --brain-mask"
            raise InputError(
                f"the reconstructed map of {scan.name} is not usable: {'; '.join(result.problems)}; look at its images "
                f"in sub-{scan.participant}.html, {remedy}, or use --accept-implausible-maps"
            )
        r2star = {}
        if result.r2star_hz is not None:
            r2star["out_r2star"] = str(write_like(result.r2star_hz, scan.chi, folder / "R2starmap.nii.gz"))
        return {
            "out_chi": str(chi),
            **r2star,
            "out_figure": str(figure),
            "out_report": report,
            "out_fingerprint": mark,
        }


class _PrepareInputSpec(BaseInterfaceInputSpec):
    in_chi = File(mandatory=True, desc="susceptibility map of the dataset")
    in_reconstruction = traits.Str(usedefault=True, desc="hash of everything that a reconstructed map depends on")
    job = _object("Job", mandatory=True)
    sidecar = traits.Dict(usedefault=True, desc="its metadata")
    problem = traits.Str(usedefault=True, desc="why the scan cannot be processed; empty if it can")


class _PrepareOutputSpec(TraitedSpec):
    out_chi = File(exists=True, desc="float32 map in ppm on the input's own grid, NaN where not valid")
    out_report = _object("StepReport: units, reference and geometry")
    out_fingerprint = traits.Str(desc="hash of everything that the results depend on")


class Prepare(Step):
    """Check that an image is a susceptibility map and convert it to ppm."""

    input_spec = _PrepareInputSpec
    output_spec = _PrepareOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Convert the map."""
        from bids_dgmseg.image.units import check_chi

        if self.inputs.problem:
            raise InputError(self.inputs.problem)
        path, job = Path(self.inputs.in_chi), self.inputs.job
        mark = job.fingerprint(self.inputs.in_reconstruction)  # before the map is read, as in `Reconstruct`
        try:
            checked = check_chi(path, self.inputs.sidecar)
        except InputError as error:
            if not job.scan.from_echoes:
                raise
            reason = str(error).partition(": ")[2].partition("; ")[0]  # the user has no such map and no such sidecar
            raise InputError(
                f"the reconstructed map of {job.scan.name} is not usable: {reason}; check EchoTime, "
                f"MagneticFieldStrength and the values of {job.scan.chi.name}"
            ) from error
        out_chi = write_like(checked.chi_ppm.array, path, folder / "chi.nii")
        weights, learned = job.config.segmentation.weights, ""
        if weights:
            from bids_dgmseg.models.model_folder import describe_learned_folds  # with torch

            learned = describe_learned_folds(weights, path)
        report = report_input(path, checked, learned=learned)
        return {"out_chi": str(out_chi), "out_report": report, "out_fingerprint": mark}


class _SegmentInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid")
    model = _object("Model", mandatory=True)
    weights = traits.Str(desc="folder with other weights than the model's own")
    device = traits.Enum("auto", "cpu", "cuda", usedefault=True, desc="device of the networks")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the networks")


class _SegmentOutputSpec(TraitedSpec):
    out_dseg = File(exists=True, desc="labels on the map's own grid, indices of structures.tsv")
    out_probseg = File(exists=True, desc="probabilities on the same grid, one volume per nucleus in the model's order")
    out_regions = traits.Dict(traits.Str, File(exists=True), desc="head region to mask on the same grid")
    out_block = File(exists=True, desc="npz: the probabilities inside the box as uint8 (C, x, y, z), its bounds")
    out_box = _object("Box of the localizer")
    out_seen = traits.List(traits.Str, desc="nuclei on the network's own grid")


class Segment(Step):
    """Localize and label the nuclei."""

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Segment the map."""
        from bids_dgmseg.image.grids import Grid
        from bids_dgmseg.image.masks import is_valid
        from bids_dgmseg.measurement.field_of_view import FieldOfView
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.segmentation.regions import resample_regions
        from bids_dgmseg.segmentation.segment import segment_map

        limit_threads(self.inputs.n_threads)
        model, like, chi = self.inputs.model, self.inputs.in_chi, Volume.read(self.inputs.in_chi)
        weights = Path(self.inputs.weights) if self.inputs.weights else None
        result = segment_map(chi, model, weights=weights, device=self.inputs.device)
        block = result.block
        fractions = block.fractions()
        whole = np.zeros((*chi.shape, len(fractions)), np.uint8, order="F")  # as it is written
        whole[block.slices] = np.moveaxis(fractions, 0, -1)
        bounds = np.array([(piece.start, piece.stop) for piece in block.slices])
        np.savez(folder / "block.npz", fractions=fractions, bounds=bounds)
        regions: dict[str, NDArray[np.bool_]] = {}
        if result.location.labels is not None:
            covered = FieldOfView.of(is_valid(chi.array), voxel_size_mm=chi.voxel_size_mm).inside
            grid, names = Grid(chi.shape, chi.affine), model.localizer.labels
            regions = resample_regions(result.location.labels, grid, names=names, valid=covered)
        return {
            "out_dseg": str(write_like(result.labels, like, folder / "dseg.nii.gz")),
            "out_probseg": str(write_like(whole, like, folder / "probseg.nii.gz", scale=1 / 255)),
            "out_regions": {
                name: str(write_like(mask.astype(np.uint8), like, folder / f"{name}.nii.gz"))
                for name, mask in regions.items()
            },
            "out_block": str(folder / "block.npz"),
            "out_box": result.location.box,
            "out_seen": list(block.seen),
        }


class _MeasureInputSpec(BaseInterfaceInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid")
    in_report = _object("StepReport of the map", mandatory=True)
    in_r2star = File(exists=True, desc="R2* in 1/s on the same grid")
    in_reconstructed = _object("StepReport of its reconstruction")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid")
    in_block = File(exists=True, mandatory=True, desc="npz: probabilities inside the box")
    in_box = _object("Box of the localizer", mandatory=True)
    in_seen = traits.List(traits.Str, usedefault=True, desc="nuclei on the network's own grid")
    in_regions = traits.Dict(traits.Str, File(exists=True), usedefault=True, desc="head region to mask")
    model = _object("Model", mandatory=True)
    reference = _object("ReferenceRegion", mandatory=True)
    reference_mask = File(exists=True, desc="the user's mask of the reference region")
    title = traits.Str(usedefault=True, desc="name of the scan in the figures")
    viewer = traits.Bool(True, usedefault=True, desc="whether to write the interactive viewer")
    bilateral = traits.Bool(False, usedefault=True, desc="whether to also measure both sides of each nucleus together")


class _MeasureOutputSpec(TraitedSpec):
    out_stats = File(exists=True, desc="tab-separated table, one row per nucleus and, with bilateral, per pair")
    out_figures = traits.Dict(traits.Str, File(exists=True), desc="plane to PNG, viewer to HTML")
    out_report = _object("StepReport: rating, quality of the map, reference region")


class Measure(Step):
    """Measure and rate the nuclei and the map, and draw them."""

    input_spec = _MeasureInputSpec
    output_spec = _MeasureOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Measure the nuclei."""
        from bids_dgmseg.measurement.reference_region import find_reference
        from bids_dgmseg.measurement.scan import SegmentedScan, measure_scan
        from bids_dgmseg.report.mosaic import draw_mosaic
        from bids_dgmseg.report.slices import PLANES
        from bids_dgmseg.report.viewer import write_viewer

        chi, dseg = Volume.read(self.inputs.in_chi), Volume.read(self.inputs.in_dseg, np.uint8)
        model, structures = self.inputs.model, self.inputs.model.structures
        with np.load(self.inputs.in_block) as stored:
            x, y, z = (slice(int(start), int(stop)) for start, stop in stored["bounds"])
            probabilities = stored["fractions"].astype(np.float32) * FRACTION_SCALE
        r2star = Volume.read(self.inputs.in_r2star).array if self.inputs.in_r2star else None
        seen = self.inputs.in_seen
        scan = SegmentedScan(chi, dseg, probabilities, (x, y, z), structures, labelled=seen, r2star_hz=r2star)
        mask = Path(self.inputs.reference_mask) if self.inputs.reference_mask else None
        reference = find_reference(self.inputs.reference, scan, mask=mask, regions=self.inputs.in_regions, model=model)
        found = measure_scan(
            scan,
            box=self.inputs.in_box,
            reference=reference,
            map_reference=self.inputs.in_report.values["reference"],
            failed_checks=len(made.values.get("Problems", ())) if (made := self.inputs.in_reconstructed) else None,
            bilateral=self.inputs.bilateral,
        )
        write_tsv(found.stats, folder / "stats.tsv")
        title = self.inputs.title
        figures: dict[str, Path] = {
            plane: draw_mosaic(chi, dseg, folder / f"{plane}.png", plane=plane, structures=structures, title=title)
            for plane in PLANES
        }
        if self.inputs.viewer:
            path = folder / "viewer.html"
            figures["viewer"] = write_viewer(chi, dseg, path, structures=structures, scan=title, model=model.name)
        return {
            "out_stats": str(folder / "stats.tsv"),
            "out_figures": {name: str(path) for name, path in figures.items()},
            "out_report": report_measures(found, reference),
        }


class _SaveInputSpec(BaseInterfaceInputSpec):
    in_dseg = File(exists=True, mandatory=True, desc="labels")
    in_probseg = File(exists=True, mandatory=True, desc="probabilities")
    in_regions = traits.Dict(traits.Str, File(exists=True), usedefault=True, desc="head region to mask")
    in_box = _object("Box of the localizer", mandatory=True)
    in_stats = File(exists=True, mandatory=True, desc="table of the measures")
    in_figures = traits.Dict(traits.Str, File(exists=True), mandatory=True, desc="plane to PNG, viewer to HTML")
    in_prepared = _object("StepReport of the map", mandatory=True)
    in_measured = _object("StepReport of the measures", mandatory=True)
    in_chi = File(exists=True, desc="map that was reconstructed here")
    in_r2star = File(exists=True, desc="R2* in 1/s from the same echoes")
    in_reconstruction_figure = File(exists=True, desc="PNG of its reconstruction")
    in_reconstructed = _object("StepReport of its reconstruction")
    job = _object("Job", mandatory=True)
    in_fingerprint = traits.Str(mandatory=True, desc="hash of everything that the results depend on")
    in_reconstruction = traits.Str(usedefault=True, desc="hash of everything that a reconstructed map depends on")


class _SaveOutputSpec(TraitedSpec):
    out_files = traits.List(traits.Str, desc="the derivatives that were written")


class Save(Step):
    """Write the derivatives into the output directory."""

    input_spec = _SaveInputSpec
    output_spec = _SaveOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Write the derivatives."""
        given, job = self.inputs, self.inputs.job
        scan, model, config = job.scan, job.model, job.config
        quality = build_qc_record(
            scan,
            model,
            config,
            prepared=given.in_prepared,
            box=given.in_box,
            measured=given.in_measured,
            reconstructed=given.in_reconstructed or None,
        )
        figures = dict(given.in_figures)
        if given.in_reconstruction_figure:
            figures["reconstruction"] = given.in_reconstruction_figure
        written = save_scan(
            config.output_dir,
            scan,
            model,
            out_dseg=Path(given.in_dseg),
            out_probseg=Path(given.in_probseg),
            stats=Path(given.in_stats),
            quality=quality,
            box_mm=describe_box(given.in_box),
            masks=config.segmentation.masks,
            fingerprint=given.in_fingerprint,
            figures={name: Path(path) for name, path in figures.items()},
            regions={region: Path(path) for region, path in given.in_regions.items()},
            chi=Path(given.in_chi) if given.in_chi else None,
            r2star=Path(given.in_r2star) if given.in_r2star else None,
            reconstruction=given.in_reconstruction,
        )
        return {"out_files": [str(path) for path in written]}
