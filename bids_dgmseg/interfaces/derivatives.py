"""Interface that writes the derivatives of a scan into a BIDS dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import BaseInterfaceInputSpec, Directory, File, TraitedSpec, traits

from bids_dgmseg.bids.derivatives import save_scan
from bids_dgmseg.bids.entities import ScanName
from bids_dgmseg.bids.output_dataset import start_dataset
from bids_dgmseg.bids.qc_record import build_qc_record
from bids_dgmseg.bids.sample_figures import sample_figure
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box
from bids_dgmseg.interfaces.base import FileInterface, check_absolute, find_model, path_or_none
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.io.nifti import load_image


class _SaveInputSpec(BaseInterfaceInputSpec):
    out_dir = Directory(mandatory=True, desc="the derivative dataset, absolute")
    entities = traits.Dict(
        traits.Str, traits.Str, mandatory=True, desc="BIDS entities of the scan without suffix, such as sub: 01, ses: 1"
    )
    model = traits.Str("default", usedefault=True, desc="model that made the labels")
    labels = traits.List(
        traits.Str, desc="its nuclei, in the order of the probabilities; by default those of the registry"
    )
    in_dseg = File(exists=True, mandatory=True, desc="labels on the grid of the scan (SegmentNuclei)")
    in_probseg = File(exists=True, mandatory=True, desc="probabilities on the same grid, one volume per nucleus")
    in_stats = File(exists=True, mandatory=True, desc="table of the measures (MeasureNuclei)")
    in_box = traits.Dict(mandatory=True, desc="box of the nuclei (LocalizeNuclei)")
    in_regions = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="masks of head regions (LocalizeNuclei)"
    )
    in_figures = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="plane to PNG, viewer to HTML (PlotNuclei)"
    )
    in_map_figures = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="name of each further map to PNG (SampleMaps)"
    )
    in_automatic = File(exists=True, desc="automatic labels, if those in in_dseg were corrected (CorrectLabels)")
    correction_report = traits.Dict(usedefault=True, desc="report of CorrectLabels")
    correction_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of CorrectLabels")
    in_chi = File(exists=True, desc="map, if it was reconstructed from echoes (ReconstructQSM)")
    in_r2star = File(exists=True, desc="R2* in 1/s from the same echoes")
    in_reconstruction_figure = File(exists=True, desc="PNG of the reconstruction")
    in_fields = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="brain mask and fields of the reconstruction"
    )
    reconstruction_report = traits.Dict(usedefault=True, desc="report of ReconstructQSM")
    reconstruction_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of ReconstructQSM")
    input_report = traits.Dict(usedefault=True, desc="report of ConformChi")
    input_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of ConformChi")
    segmentation_report = traits.Dict(usedefault=True, desc="report of SegmentNuclei")
    segmentation_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of SegmentNuclei")
    measures_report = traits.Dict(usedefault=True, desc="report of MeasureNuclei")
    measures_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of MeasureNuclei")
    sampling_report = traits.Dict(usedefault=True, desc="report of SampleMaps")
    sampling_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of SampleMaps")
    in_standard = traits.Dict(
        traits.Str, File(exists=True), usedefault=True, desc="out_chi, out_dseg, … of NormalizeToMNI, if it ran"
    )
    normalization_report = traits.Dict(usedefault=True, desc="report of NormalizeToMNI")
    normalization_warnings = traits.List(traits.Str, usedefault=True, desc="warnings of NormalizeToMNI")
    output_space = traits.Str(usedefault=True, desc="output_space of NormalizeToMNI")
    sources = traits.List(traits.Str, usedefault=True, desc="BIDS URIs of the images that the results depend on")
    source_file = File(desc="map or first echo, which is never overwritten")
    scanner = traits.Dict(usedefault=True, desc="metadata that identify the scanner")
    settings = traits.Dict(usedefault=True, desc="options, for the QC record")
    masks = traits.Bool(True, usedefault=True, desc="write one binary mask per nucleus and hemisphere, and per region")
    made_from = traits.Dict(usedefault=True, desc="what the results depend on (bids_dgmseg.bids.current.MadeFrom)")


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
        given, name = self.inputs, ScanName.of(self.inputs.entities)
        check_absolute(given.out_dir)
        Box.from_dict(given.in_box)  # an error, before anything is written
        dseg, probseg = load_image(given.in_dseg), load_image(given.in_probseg)
        if dseg.shape != probseg.shape[:3] or not np.allclose(dseg.affine, probseg.affine, atol=1e-3):
            file = Path(given.in_probseg).name
            raise InputError(f"{file}: is not on the grid of the labels; pass `out_probseg` of SegmentNuclei")
        if "abbreviation" not in read_tsv(Path(given.in_stats), nrows=0):
            raise InputError(f"{Path(given.in_stats).name}: no column abbreviation; pass `out_stats` of MeasureNuclei")
        start_dataset(Path(given.out_dir))
        model = find_model(given.model, given.labels)
        record = build_qc_record(
            name,
            model,
            given_map=given.input_report,
            reconstruction=given.reconstruction_report or None,
            scanner=given.scanner,
            box_mm=given.in_box,
            correction=given.correction_report or None,
            measures=given.measures_report,
            warnings=[
                *given.reconstruction_warnings,
                *given.input_warnings,
                *given.segmentation_warnings,
                *given.correction_warnings,
                *given.measures_warnings,
                *given.sampling_warnings,
                *given.normalization_warnings,
            ],
            settings={**given.settings, **given.segmentation_report},
        )
        if given.sampling_report:
            record["maps"] = {name: dict(about) for name, about in given.sampling_report.items()}
        if given.normalization_report:
            record["normalization"] = dict(given.normalization_report)
        figures = {plane: Path(path) for plane, path in given.in_figures.items()}
        figures |= {sample_figure(name): Path(path) for name, path in given.in_map_figures.items()}
        if given.in_reconstruction_figure:
            figures["reconstruction"] = Path(given.in_reconstruction_figure)
        written = save_scan(
            Path(given.out_dir),
            name,
            model,
            out_dseg=Path(given.in_dseg),
            out_probseg=Path(given.in_probseg),
            stats=Path(given.in_stats),
            record=record,
            masks=given.masks,
            made_from=given.made_from,
            figures=figures,
            regions={region: Path(path) for region, path in given.in_regions.items()},
            sources=given.sources,
            source_file=path_or_none(given.source_file),
            chi=path_or_none(given.in_chi),
            r2star=path_or_none(given.in_r2star),
            fields={name: Path(path) for name, path in given.in_fields.items()},
            automatic=path_or_none(given.in_automatic),
            correction=given.correction_report or None,
            standard={name: Path(path) for name, path in given.in_standard.items()},
            output_space=given.output_space,
        )
        return {"out_files": [str(path) for path in written]}
