"""Interface that writes the derivatives of a scan into a BIDS dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import Directory, File, InputMultiPath, TraitedSpec, isdefined, traits

from bids_dgmseg.interfaces.step import FileInterface, StepInputSpec, check_absolute, read_report


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
        traits.Str, desc="fields of `bids_dgmseg.bids.scan_results.Provenance`: sources, settings, …; all are optional"
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
        from bids_dgmseg.bids.derivatives import save_scan
        from bids_dgmseg.bids.entities import ScanName, stem_of
        from bids_dgmseg.bids.scan_results import Provenance, ScanResults

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
