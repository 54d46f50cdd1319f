"""Reference region of one scan, from the user's mask or the segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.scan import Reference, SegmentedScan, describe_erosion, erode_ventricles, measure_reference
from bids_dgmseg.models.registry import Model


def find_reference(
    wanted: ReferenceRegion, scan: SegmentedScan, *, mask: Path | None, regions: Mapping[str, str], model: Model
) -> Reference | None:
    """Measure the reference region of a scan.

    Parameters
    ----------
    wanted : ReferenceRegion
        Region that the user asked for; with ``masks``, scans without a mask have no reference.
    scan : SegmentedScan
        Map and segmentation.
    mask : Path or None
        The user's mask of this scan.
    regions : mapping of str to path
        Masks of the head regions that the model segments; may be empty.
    model : Model
        The model of the segmentation.

    Returns
    -------
    Reference or None
        None if no reference was asked for. A reference without a value has a `problem`.

    Raises
    ------
    InputError
        If the user's mask cannot be read or does not lie on the map's grid.
    """
    if wanted.kind == "none":
        return None
    name = wanted.structure or wanted.kind
    if wanted.masks is not None and mask is None:
        return Reference(name, "", problem=f"reference {name}: no mask for this scan; its referenced values are n/a")
    region, source = _find_region(wanted, scan, mask, regions, model)
    return measure_reference(
        scan.chi.array, region & scan.fov.inside, name=name, source=source, voxel_size_mm=scan.chi.voxel_size_mm
    )


def _find_region(
    wanted: ReferenceRegion, scan: SegmentedScan, mask: Path | None, regions: Mapping[str, str], model: Model
) -> tuple[NDArray[np.bool_], str]:
    """Return the voxels of the region and their description."""
    if wanted.kind == "structure":
        indices = [one.index for one in scan.structures if wanted.structure in (one.nucleus, one.abbreviation)]
        return np.isin(scan.dseg.array, indices), f"{wanted.structure} labelled by {model.name}"
    if mask is not None:
        values = Volume.read(mask)
        check_intact(mask)
        if difference := describe_grid_mismatch(scan.chi, values):
            raise InputError(
                f"{mask.name}: does not lie on the grid of the map ({difference}); resample the mask first"
            )
        return np.asarray(values.array > 0.5), f"mask {mask.name}"
    if wanted.kind == "whole-brain":
        if "brain" in regions:
            return _read_region(regions["brain"]), f"brain labelled by {model.name}"
        return scan.fov.inside, "field of view of the map"
    voxel_size_mm = scan.chi.voxel_size_mm
    label_size_mm = model.localizer.input.spacing_mm if model.localizer.input else (0.0, 0.0, 0.0)
    core = erode_ventricles(
        _read_region(regions["ventricles"]), voxel_size_mm=voxel_size_mm, label_size_mm=label_size_mm
    )
    erosion = describe_erosion(voxel_size_mm=voxel_size_mm, label_size_mm=label_size_mm)
    return core, f"lateral ventricles labelled by {model.name}, {erosion}"


def _read_region(path: str) -> NDArray[np.bool_]:
    region = Volume.read(path, np.uint8).array > 0
    check_intact(path)
    return np.asarray(region)
