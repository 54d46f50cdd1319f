"""What the steps hand to each other: small JSON files, fractions in whole numbers, the quality record."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

import bids_dgmseg
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import SHIPPED_WEIGHTS, RunConfig
from bids_dgmseg.image.boxes import Box, OrientedBox
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.units import ChiMap
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image, write_like
from bids_dgmseg.measurement.field_of_view import FieldOfView
from bids_dgmseg.measurement.reference import Reference
from bids_dgmseg.measurement.scan import ScanMeasures
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.regions import resample_regions
from bids_dgmseg.segmentation.results import ProbabilityBlock
from bids_dgmseg.study.results import SCANNER_FIELDS

Slices = tuple[slice, slice, slice]

_LIBRARIES = ("nibabel", "nipype", "numpy", "scipy", "torch")


def write_json(data: Any, path: Path) -> Path:
    """Write a file of the working directory."""
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
    return path


def read_json(path: str | Path) -> Any:
    """Read a file of the working directory."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def to_fractions(probabilities: NDArray[np.floating], block: Slices, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Spread the probabilities of a block over the whole grid, in 255ths.

    Parameters
    ----------
    probabilities : ndarray of shape (C, x, y, z)
        From 0 to 1, one channel a nucleus.
    block : tuple of 3 slice
        Where the block lies.
    shape : tuple of 3 int
        The whole grid (X, Y, Z).

    Returns
    -------
    ndarray of shape (X, Y, Z, C)
        As probseg files store them; 0 outside the block.
    """
    fractions = np.zeros((*shape, len(probabilities)), np.uint8)
    for channel, probability in enumerate(probabilities):
        fractions[(*block, channel)] = np.rint(np.clip(probability, 0, 1) * 255)
    return fractions


def describe_block(block: ProbabilityBlock) -> dict[str, Any]:
    """Say what part was segmented (voxels, RAS+ axes) and which nuclei the network saw in it, for `read_block`."""
    return {"bounds": [[piece.start, piece.stop] for piece in block.slices], "seen": list(block.seen)}


def read_block(path: str | Path) -> tuple[Slices, tuple[str, ...]]:
    """Read the bounds of a block of voxels and the nuclei seen in it."""
    said = read_json(path)
    x, y, z = (slice(start, stop) for start, stop in said["bounds"])
    return (x, y, z), tuple(said["seen"])


def describe_box(box: Box) -> dict[str, Any]:
    """Say where the localizer's box lies, for `read_box` and the sidecars; mm, RAS+."""
    corners = {"low": list(box.low_mm), "high": list(box.high_mm)}
    if box.oriented is None:
        return corners
    return {**corners, "rotation_deg": list(box.oriented.rotation_deg), "rotated_size": list(box.oriented.size_mm)}


def read_box(path: str | Path) -> Box:
    """Read the localizer's box."""
    said = read_json(path)
    tilt = OrientedBox(tuple(said["rotation_deg"]), tuple(said["rotated_size"])) if "rotation_deg" in said else None
    return Box(tuple(said["low"]), tuple(said["high"]), tilt)


def read_fractions(path: str | Path, block: Slices) -> NDArray[np.float32]:
    """Read a block of a probseg file as (C, x, y, z) from 0 to 1, without scaling the whole of it."""
    image = load_image(path)
    proxy: Any = image.dataobj
    stored = np.asanyarray(proxy.get_unscaled())
    turned: NDArray[Any] = orientations.apply_orientation(stored, orientations.io_orientation(image.affine))
    fractions: NDArray[np.float32] = np.moveaxis(turned[block], -1, 0).astype(np.float32)
    return fractions * np.float32(proxy.slope)


def write_regions(
    labels: Volume | None, like: str | Path, chi: Volume, *, names: Sequence[str], folder: Path
) -> dict[str, str]:
    """Write the regions of the whole-head step as masks on the map's grid: region → path; none without labels."""
    if labels is None:
        return {}
    shown = FieldOfView.of(is_valid(chi.array), voxel_size_mm=chi.voxel_size_mm)
    regions = resample_regions(labels, Grid(chi.shape, chi.affine), names=names, valid=shown.inside)
    return {
        name: str(write_like(mask.astype(np.uint8), like, folder / f"{name}.nii.gz")) for name, mask in regions.items()
    }


def describe_input(path: Path, checked: ChiMap) -> dict[str, Any]:
    """Fill the ``input`` part of the quality record, and the warnings."""
    image = load_image(path)
    return {
        "file": path.name,
        "units": checked.units,
        "units_from": checked.units_from,
        "reference": checked.reference,
        "n_replaced": checked.n_replaced,
        "shape": [int(size) for size in image.shape[:3]],
        "voxel_size_mm": [round(float(edge), 4) for edge in voxel_sizes(image.affine)],
        "orientation": "".join(orientations.aff2axcodes(image.affine)),
        "warnings": list(checked.warnings),
    }


def describe_findings(found: ScanMeasures, reference: Reference | None, warnings: Sequence[str]) -> dict[str, Any]:
    """Fill the measured part of the quality record."""
    said = (
        {}
        if reference is None
        else {
            "reference": {
                "region": reference.region,
                "source": reference.source,
                "mean_ppm": reference.mean_ppm,
                "std_ppm": reference.std_ppm,
                "sem_ppm": reference.sem_ppm,
                "n_voxels": reference.n_voxels,
            }
        }
    )
    problems = [reference.problem] if reference and reference.problem else []
    return {
        "rating": found.rating,
        "reasons": list(found.reasons),
        **found.quality,
        **said,
        "warnings": [*warnings, *problems],
    }


def describe_quality(
    scan: Scan,
    model: Model,
    config: RunConfig,
    *,
    check: Mapping[str, Any],
    box_mm: Mapping[str, Any],
    found: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put together the record that the page shows; it depends on nothing but the scan, options and versions."""
    record, measured, reconstruction = dict(check), dict(found), dict(made or {})
    warnings = [*reconstruction.pop("warnings", []), *record.pop("warnings"), *measured.pop("warnings")]
    if reconstruction:
        record["reconstructed_from"] = f"{len(reconstruction['EchoTime'])} echoes"
    return {
        "scan": scan.name,
        "model": model.name,
        "input": record,
        **({"reconstruction": reconstruction} if reconstruction else {}),
        "scanner": {name: scan.sidecar[name] for name in SCANNER_FIELDS if name in scan.sidecar},
        "box_mm": dict(box_mm),
        **measured,
        "warnings": [about(scan.name, warning) for warning in warnings],
        "settings": {
            "model": model.name,
            "weights": config.segmentation.weights.name if config.segmentation.weights else SHIPPED_WEIGHTS,
            "device": config.resources.device,
            "mirrored": read_model_folder(model, config.segmentation.weights).uses_mirroring,
            "ensemble": model.ensemble,
            "masks": config.segmentation.masks,
            "reference": config.reference.kind,
            **({"reference_structure": config.reference.structure} if config.reference.structure else {}),
            **({"reference_mask": config.reference.masks.name} if config.reference.masks else {}),
            **({"phase_sign": config.reconstruction.phase_sign} if made else {}),
        },
        "versions": {
            "bids_dgmseg": bids_dgmseg.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
    }


def about(name: str, message: str) -> str:
    """Say which scan a message is about, unless it does.

    >>> about("sub-01", "DN_L was not found")
    'sub-01: DN_L was not found'
    >>> about("sub-01", "sub-01_Chimap.nii.gz: all voxels are 0")
    'sub-01_Chimap.nii.gz: all voxels are 0'
    """
    return message if message.startswith(name) else f"{name}: {message}"
