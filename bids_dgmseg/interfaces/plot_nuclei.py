"""Interface that draws labelled nuclei."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import File, InputMultiPath, TraitedSpec, traits

from bids_dgmseg.interfaces.step import FileInterface, StepInputSpec, read_dseg, read_report


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
