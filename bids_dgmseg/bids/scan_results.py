"""Results of the steps of a scan, what they are made from, and the quality record (``_qc.json``)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.current import MadeFrom
from bids_dgmseg.bids.entities import ScanName
from bids_dgmseg.errors import as_options
from bids_dgmseg.models.registry import Model, get_model

_LIBRARIES = ("nibabel", "nipype", "numpy", "scipy", "torch")
"""Libraries whose versions the quality record states."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the results of a scan are made from."""

    sources: Sequence[str] = ()
    """BIDS URIs of the map, or of the echoes that it was reconstructed from; the first defines the grid."""
    scanner: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that identify the scanner."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run, for the quality record."""
    made_from: Mapping[str, Any] = field(default_factory=lambda: MadeFrom().describe())
    """What the results depend on (`bids_dgmseg.bids.current.MadeFrom`)."""


@dataclass(frozen=True, kw_only=True)
class ScanResults:
    """Files and reports of the steps of a scan, and what they are made from."""

    chi: Path
    """The map that was segmented; it is saved if it was reconstructed."""
    dseg: Path
    """Labels of structures.tsv on the grid of the map."""
    probseg: Path
    """Probabilities on the same grid, one volume per nucleus of the model."""
    stats: Path
    """Table of the measures."""
    location: Path
    """Box and regions of the head (`bids_dgmseg.segmentation.localize.Localization`)."""
    map_report: Mapping[str, Any]
    """Reports of the interfaces LocalizeNuclei, SegmentNuclei, MeasureNuclei and, if it ran, ReconstructQSM."""
    segmentation_report: Mapping[str, Any]
    measures_report: Mapping[str, Any]
    reconstruction_report: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    figures: Mapping[str, Path] = field(default_factory=dict)
    """Plane → PNG, ``viewer`` → HTML, ``reconstruction`` → PNG."""
    map_figures: Mapping[str, Path] = field(default_factory=dict)
    """Name of each further map → PNG."""
    automatic: Path | None = None
    """Labels before manual edits; None without."""
    r2star: Path | None = None
    """R2* of the echoes that the map was reconstructed from."""
    fields: Mapping[str, Path] = field(default_factory=dict)
    """Steps of the reconstruction to write: ``brain``, ``total``, ``local``."""
    standard: Mapping[str, Path] = field(default_factory=dict)
    """Files in standard space (`bids_dgmseg.registration.mni.normalize_files`) by their names."""

    @property
    def model(self) -> Model:
        """The model that made the labels, with its nuclei."""
        return get_model(self.segmentation_report["model"], self.segmentation_report["labels"])

    @property
    def edits(self) -> dict[str, Any]:
        """File with the labels that a person has edited, and the nuclei that differ; empty without."""
        report = self.segmentation_report["edits"]
        return {**report, "edited": [*report["edited"]]} if report else {}

    @property
    def maps(self) -> dict[str, Path | None]:
        """Reconstructed maps by suffix."""
        made = bool(self.reconstruction_report)
        return {"Chimap": self.chi if made else None, "R2starmap": self.r2star if made else None}


def build_quality_record(scan: ScanName, results: ScanResults, box_mm: Mapping[str, Any]) -> dict[str, Any]:
    """Combine the reports of the steps to the content of ``_qc.json``, see docs/outputs.md.

    The record depends only on the scan, the options and the versions.
    """
    steps, measures, provenance = results.reconstruction_report, results.measures_report, results.provenance
    reconstruction = steps["reconstruction"] if steps else {}
    from_echoes = {"reconstructed_from": f"{len(reconstruction['EchoTime'])} echoes"} if reconstruction else {}
    reports = (steps, results.map_report, results.segmentation_report, measures)
    return {
        "scan": scan.name,
        "model": results.model.name,
        "input": {**results.map_report["input"], **from_echoes},
        **({"reconstruction": reconstruction} if reconstruction else {}),
        **({"correction": results.edits} if results.edits else {}),
        "scanner": dict(provenance.scanner),
        "box_mm": dict(box_mm),
        **measures["measures"],
        "warnings": [with_scan(scan.name, text) for report in reports for text in report.get("warnings", ())],
        "settings": {**provenance.settings, **results.segmentation_report["settings"]},
        "versions": {
            "bids_dgmseg": bids_dgmseg.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        **{part: measures[part] for part in ("maps", "normalization") if part in measures},
    }


def with_scan(name: str, message: str) -> str:
    """Prefix a message with the name of the scan, unless what precedes its first colon contains it.

    Parameters in it become options.

    >>> with_scan("sub-01", "DN_L was not found")
    'sub-01: DN_L was not found'
    >>> with_scan("sub-01", "sub-01_Chimap.nii.gz: all voxels are 0")
    'sub-01_Chimap.nii.gz: all voxels are 0'
    """
    message = as_options(message)
    return message if name in message.partition(":")[0] else f"{name}: {message}"
