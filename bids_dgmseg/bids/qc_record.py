"""The QC record of a scan (``_qc.json``): reports and warnings of its steps, options and versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.entities import ScanName
from bids_dgmseg.errors import as_options
from bids_dgmseg.models.registry import Model

_LIBRARIES = ("nibabel", "nipype", "numpy", "scipy", "torch")


def build_qc_record(
    scan: ScanName,
    model: Model,
    *,
    given_map: Mapping[str, Any],
    box_mm: Mapping[str, Any],
    measures: Mapping[str, Any],
    warnings: Iterable[str] = (),
    reconstruction: Mapping[str, Any] | None = None,
    correction: Mapping[str, Any] | None = None,
    scanner: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Combine the reports of the steps to the content of ``_qc.json``, see docs/outputs.md.

    The record depends only on the scan, the options and the versions.

    Parameters
    ----------
    scan : ScanName
    model : Model
    given_map : mapping
        How the map was read (`bids_dgmseg.image.units.describe_chi`).
    box_mm : mapping
        Result of the localizer (`bids_dgmseg.image.grids.Box.to_dict`).
    measures : mapping
        Rating, quality of the map and reference region (`bids_dgmseg.measurement.scan.describe_measures`).
    warnings : iterable of str
    reconstruction : mapping, optional
        How the map was reconstructed (`bids_dgmseg.qsm.provenance.describe_reconstruction`).
    correction : mapping, optional
        Manual correction of the labels: ``file``, ``hash``, and the ``edited`` nuclei.
    scanner, settings : mapping, optional
        Metadata that identify the scanner; options of the run.
    """
    from_echoes = {"reconstructed_from": f"{len(reconstruction['EchoTime'])} echoes"} if reconstruction else {}
    return {
        "scan": scan.name,
        "model": model.name,
        "input": {**given_map, **from_echoes},
        **({"reconstruction": dict(reconstruction)} if reconstruction else {}),
        **({"correction": dict(correction)} if correction else {}),
        "scanner": dict(scanner or {}),
        "box_mm": dict(box_mm),
        **measures,
        "warnings": [with_scan(scan.name, warning) for warning in warnings],
        "settings": dict(settings or {}),
        "versions": {
            "bids_dgmseg": bids_dgmseg.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
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
