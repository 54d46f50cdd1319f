"""Interfaces that draw the nuclei, write the derivatives of a scan, and analyse those of many scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Directory,
    File,
    InputMultiPath,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.interfaces.step import FileInterface, StepInputSpec, check_absolute, read_dseg, read_report


class _PlotInputSpec(StepInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (LocalizeNuclei)")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid (SegmentNuclei)")
    segmentation_report = File(exists=True, mandatory=True, desc="report of SegmentNuclei")
    in_automatic = File(exists=True, desc="labels before manual edits, drawn as dashed outlines")
    in_lesion_masks = InputMultiPath(File(exists=True), desc="masks of voxels that are not measured, drawn dotted")
    title = traits.Str(usedefault=True, desc="name of the scan in the figures")
    planes = traits.List(
        traits.Enum("axial", "coronal", "sagittal"),
        ["axial", "coronal", "sagittal"],
        usedefault=True,
        desc="planes of the image that are drawn",
    )
    viewer = traits.Bool(True, usedefault=True, desc="also write an interactive viewer (HTML, 1 to 3 MB)")


class _PlotOutputSpec(TraitedSpec):
    out_figures = traits.List(File(exists=True), desc="PNG per plane, named after it, and viewer.html")


class PlotNuclei(FileInterface):
    """Draw the outlines of the nuclei on slices of the map; see `bids_dgmseg.report.mosaic.draw_mosaic`.

    Examples
    --------
    >>> step = PlotNuclei(in_chi="chi.nii", in_dseg="dseg.nii.gz", planes=["axial"])  # doctest: +SKIP
    """

    input_spec = _PlotInputSpec
    output_spec = _PlotOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Draw the figures."""
        import numpy as np

        from bids_dgmseg.image.volume import Volume
        from bids_dgmseg.measurement.map_quality import find_blobs
        from bids_dgmseg.measurement.segmented_scan import read_lesion_masks
        from bids_dgmseg.models.registry import get_model
        from bids_dgmseg.report.mosaic import draw_mosaic

        inputs, automatic = self.inputs, self.path("in_automatic")
        report = read_report(inputs.segmentation_report, "model", "labels")
        model = get_model(report["model"], report["labels"])
        chi = Volume.read(inputs.in_chi)
        dseg = read_dseg(inputs.in_dseg, model, chi)
        lesions = read_lesion_masks(self.paths("in_lesion_masks"), chi)
        blobs = find_blobs(chi, dseg, structures=model.structures, lesions=lesions)
        blob = np.any([blob.mask for blob in blobs], axis=0) if blobs else None
        marks = {"excluded": lesions, "strong sources": blob}
        figures = [
            draw_mosaic(
                chi,
                dseg,
                folder / f"{plane}.png",
                plane=plane,
                structures=model.structures,
                title=inputs.title,
                automatic=read_dseg(automatic, model, chi) if automatic else None,
                marks={name: mask for name, mask in marks.items() if mask is not None and mask.any()},
            )
            for plane in inputs.planes
        ]
        if inputs.viewer:
            from bids_dgmseg.report.scan_figures import write_viewer

            path, scan = folder / "viewer.html", inputs.title
            write_viewer(chi, dseg, path, structures=model.structures, scan=scan, model=model.name)
            figures.append(path)
        return {"out_figures": figures}


class _SaveInputSpec(StepInputSpec):
    out_dir = Directory(mandatory=True, desc="the derivative dataset, absolute")
    entities = traits.Dict(
        traits.Str, traits.Str, mandatory=True, desc="BIDS entities of the scan without suffix, such as sub: 01, ses: 1"
    )
    in_chi = File(exists=True, mandatory=True, desc="the map; it is saved if there is a reconstruction_report")
    in_location = File(exists=True, mandatory=True, desc="box and masks of head regions (LocalizeNuclei)")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the grid of the map (SegmentNuclei)")
    in_automatic = File(exists=True, desc="labels before manual edits (SegmentNuclei)")
    in_probseg = File(exists=True, mandatory=True, desc="probabilities on the same grid, one volume per nucleus")
    in_stats = File(exists=True, mandatory=True, desc="table of the measures (MeasureNuclei)")
    in_figures = InputMultiPath(File(exists=True), desc="figures named after their planes, viewer.html (PlotNuclei)")
    in_map_figures = InputMultiPath(File(exists=True), desc="figures named after further maps (MeasureNuclei)")
    in_standard = InputMultiPath(File(exists=True), desc="files in standard space (MeasureNuclei)")
    in_r2star = File(exists=True, desc="R2* in 1/s from the echoes of the map (ReconstructQSM)")
    in_fields = InputMultiPath(File(exists=True), desc="brain mask and fields of the reconstruction (ReconstructQSM)")
    in_reconstruction_figure = File(exists=True, desc="PNG of the reconstruction (ReconstructQSM)")
    reconstruction_report = File(exists=True, desc="report of ReconstructQSM, if it made the map")
    map_report = File(exists=True, mandatory=True, desc="report of LocalizeNuclei")
    segmentation_report = File(exists=True, mandatory=True, desc="report of SegmentNuclei")
    measures_report = File(exists=True, mandatory=True, desc="report of MeasureNuclei")
    provenance = traits.Dict(
        traits.Str, desc="fields of `bids_dgmseg.bids.derivatives.Provenance`: sources, settings, …; all are optional"
    )
    masks = traits.Bool(True, usedefault=True, desc="write one binary mask per nucleus and hemisphere, and per region")


class _SaveOutputSpec(TraitedSpec):
    out_files = traits.List(traits.Str, desc="files that were written; the last is the sidecar of the labels")


class SaveDerivatives(FileInterface):
    """Write the derivatives of a scan; see `bids_dgmseg.bids.derivatives.save_scan`.

    Also writes ``dataset_description.json``, the label table, ``.bidsignore`` and README, if the dataset has none.

    Examples
    --------
    >>> step = SaveDerivatives(out_dir="/study/derivatives/dgmseg", entities={"sub": "01"})  # doctest: +SKIP
    """

    input_spec = _SaveInputSpec
    output_spec = _SaveOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Write the derivatives."""
        from bids_dgmseg.bids.derivatives import Provenance, ScanResults, save_scan
        from bids_dgmseg.bids.entities import ScanName, stem_of

        inputs, out_dir, scan = self.inputs, Path(self.inputs.out_dir), ScanName.of(self.inputs.entities)
        check_absolute(out_dir)
        figure = self.path("in_reconstruction_figure")
        results = ScanResults(
            chi=Path(inputs.in_chi),
            location=Path(inputs.in_location),
            dseg=Path(inputs.in_dseg),
            automatic=self.path("in_automatic"),
            probseg=Path(inputs.in_probseg),
            stats=Path(inputs.in_stats),
            figures={stem_of(path): path for path in [*self.paths("in_figures"), *([figure] if figure else [])]},
            map_figures={stem_of(path): path for path in self.paths("in_map_figures")},
            standard={stem_of(path): path for path in self.paths("in_standard")},
            r2star=self.path("in_r2star"),
            fields={stem_of(path): path for path in self.paths("in_fields")},
            map_report=read_report(inputs.map_report, "input"),
            segmentation_report=read_report(inputs.segmentation_report, "model", "labels", "settings"),
            measures_report=read_report(inputs.measures_report, "measures"),
            reconstruction_report=read_report(self.path("reconstruction_report"), "reconstruction"),
            provenance=Provenance(**inputs.provenance if isdefined(inputs.provenance) else {}),
        )
        return {"out_files": save_scan(out_dir, scan, results, masks=inputs.masks)}


class _AnalyseGroupInputSpec(BaseInterfaceInputSpec):
    results = traits.List(Directory, mandatory=True, minlen=1, desc="output folders of the participant level")
    datasets = traits.List(
        Directory,
        desc="dataset with participants.tsv and sessions.tsv of each folder of results (default: the folder itself, "
        "otherwise its DatasetLinks, otherwise the dataset around derivatives/)",
    )
    out_dir = traits.Str(desc="folder for tables and page, absolute, created if needed (default: the working folder)")
    participant_label = traits.List(traits.Str, desc="participants to use, without sub- (default: all)")
    session_label = traits.List(traits.Str, desc="sessions to use, without ses- (default: all)")
    model = traits.List(traits.Str, desc="models to use (default: all)")
    options = traits.Dict(
        traits.Str,
        traits.Any,
        desc="fields of bids_dgmseg.config.GroupOptions, such as {'group_column': 'diagnosis'}",
    )
    warnings = traits.List(traits.Str, desc="further warnings, to be shown on the page")
    n_missing = traits.Range(low=0, value=0, usedefault=True, desc="scans of the study without results")


class _AnalyseGroupOutputSpec(TraitedSpec):
    out_tables = traits.List(
        File(exists=True),
        desc="group_*.tsv: measures of all scans and results; each has a data dictionary (.json)",
    )
    out_page = File(exists=True, desc="group.html; not set if it could not be written, see out_warnings")
    out_reference_group = traits.Str(desc="group that the others are compared with, and why; empty without groups")
    out_warnings = traits.List(traits.Str, desc="all warnings, in one line each")
    out_notes = traits.List(traits.Str, desc="why tables are not written")
    out_n_unusable = traits.Int(desc="damaged tables and scans whose results are out of date")


class AnalyseGroup(FileInterface):
    """Analyse the ``_stats.tsv`` and ``_qc.json`` of many scans: sides, outliers, sites, ages, groups and changes.

    Tables and a page are written to ``out_dir``. Always runs, since Nipype does not look into folders for changes.

    Examples
    --------
    >>> AnalyseGroup(results=["out"], options={"group_column": "diagnosis"}).run().outputs.out_page  # doctest: +SKIP
    """

    input_spec = _AnalyseGroupInputSpec
    output_spec = _AnalyseGroupOutputSpec
    _always_run = True

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Analyse the results and write tables and page."""
        from bids_dgmseg.report.group_page import analyse_group
        from bids_dgmseg.study.results import ResultsSelection, find_results_folders

        def value(name: str, default: Any) -> Any:
            trait = getattr(self.inputs, name)
            return trait if isdefined(trait) else default

        out_dir = Path(value("out_dir", folder))
        check_absolute(out_dir)
        report = analyse_group(
            find_results_folders(
                [Path(path) for path in self.inputs.results],
                datasets=[Path(path) for path in value("datasets", ())],
                tables_dir=out_dir,
            ),
            out_dir,
            options=read_options(value("options", {})),
            selection=ResultsSelection(
                *(tuple(value(name, ())) for name in ("participant_label", "session_label", "model"))
            ),
            warnings=value("warnings", ()),
            n_missing=self.inputs.n_missing,
        )
        return {
            "out_tables": list(map(str, report.tables)),
            **({"out_page": str(report.page)} if report.page else {}),
            "out_reference_group": report.reference_group,
            "out_warnings": list(report.warnings),
            "out_notes": list(report.notes),
            "out_n_unusable": report.n_unusable,
        }


def read_options(values: Mapping[str, Any]) -> GroupOptions:
    """Convert plain values to options; ValueError for unknown names and values of another type."""
    if unknown := {*values} - {field.name for field in fields(GroupOptions)}:
        raise ValueError(f"`options`: unknown {', '.join(sorted(unknown))}")
    return msgspec.convert(dict(values), GroupOptions, dec_hook=lambda _, value: Path(value))
