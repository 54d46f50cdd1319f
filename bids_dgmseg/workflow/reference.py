"""The reference region of one scan: from the model's labels or the user's mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.reference import Reference, describe_erosion, erode_ventricles, measure_reference
from bids_dgmseg.measurement.scan import SegmentedScan
from bids_dgmseg.models.registry import Model


@dataclass(frozen=True)
class ReferenceChoice:
    """Which region susceptibilities are referred to."""

    kind: str
    """``none``, ``whole-brain``, ``csf`` or ``structure``."""
    structure: str = ""
    """A nucleus, or one side of it."""
    mask: Path | None = None
    """The user's mask of this scan."""
    wants_mask: bool = False
    """Whether the user gave masks at all; a scan without one has no reference then."""

    @classmethod
    def of(cls, config: RunConfig, mask: Path | None) -> ReferenceChoice:
        """Gather the options of a run and the mask of a scan."""
        wants_mask = config.reference.masks is not None
        return cls(config.reference.kind, config.reference.structure or "", mask, wants_mask)


def take_reference(
    choice: ReferenceChoice, scan: SegmentedScan, *, regions: Mapping[str, str], model: Model
) -> Reference | None:
    """Measure the reference of a scan.

    Parameters
    ----------
    choice : ReferenceChoice
        What was asked for.
    scan : SegmentedScan
        Map and segmentation.
    regions : mapping
        Region → mask file of the whole-head step; empty where the model has none.
    model : Model
        What labelled.

    Returns
    -------
    Reference or None
        None where no reference was asked for. One without a value says why.

    Raises
    ------
    InputError
        If the user's mask cannot be read or does not lie on the map's grid.
    """
    if choice.kind == "none":
        return None
    name = choice.structure or choice.kind
    if choice.wants_mask and choice.mask is None:
        return Reference(name, "", problem=f"reference {name}: no mask of this scan; its referenced values are n/a")
    region, source = _find_region(choice, scan, regions, model)
    return measure_reference(
        scan.chi.array, region & scan.fov.inside, name=name, source=source, voxel_size_mm=scan.chi.voxel_size_mm
    )


def _find_region(
    choice: ReferenceChoice, scan: SegmentedScan, regions: Mapping[str, str], model: Model
) -> tuple[NDArray[np.bool_], str]:
    """Find the voxels, and say in words what they are."""
    if choice.kind == "structure":
        numbers = [one.index for one in scan.structures if choice.structure in (one.nucleus, one.abbreviation)]
        return np.isin(scan.dseg.array, numbers), f"{choice.structure} labelled by {model.name}"
    if choice.mask is not None:
        return _read_mask(choice.mask, scan.chi), f"mask {choice.mask.name}"
    if choice.kind == "whole-brain":
        if "brain" in regions:
            return _read_region(regions["brain"]), f"brain labelled by {model.name}"
        return scan.fov.inside, "field of view of the map"
    label_size_mm = model.localizer.input.spacing_mm if model.localizer.input else (0.0, 0.0, 0.0)
    size_mm: dict[str, Any] = {"voxel_size_mm": scan.chi.voxel_size_mm, "label_size_mm": label_size_mm}
    core = erode_ventricles(_read_region(regions["ventricles"]), **size_mm)
    return core, f"lateral ventricles labelled by {model.name}, {describe_erosion(**size_mm)}"


def _read_region(path: str) -> NDArray[np.bool_]:
    region: NDArray[np.bool_] = Volume.read(path, np.uint8).array > 0
    check_intact(path)
    return region


def _read_mask(path: Path, chi: Volume) -> NDArray[np.bool_]:
    mask = Volume.read(path)
    check_intact(path)
    if apart := describe_grid_mismatch(chi, mask):
        raise InputError(f"{path.name}: does not lie on the grid of the map ({apart}); resample the mask first")
    inside: NDArray[np.bool_] = mask.array > 0.5
    return inside
