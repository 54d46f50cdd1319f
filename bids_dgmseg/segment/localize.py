"""Step one: where the nuclei are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box, box_of_mask
from bids_dgmseg.images.resample import resample, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import Model, ModelInput
from bids_dgmseg.segment.normalize import NORMALIZATIONS
from bids_dgmseg.segment.predict import forward
from bids_dgmseg.segment.weights import load_weights, localizer_network

_BELOW_MM, _BEHIND_MM = 20.0, 30.0
"""How far the dentates reach below and behind the other nuclei."""

_ZERO_PPM = 1e-4
"""A tenth of a ppb: below any map's noise, above what 16 bits make of a zero."""

_SMALLEST_BRAIN_MM3 = 200_000.0
"""A fifth of a small adult brain: less is no head, however the view is cut."""


@dataclass(frozen=True)
class Location:
    """What the whole-head step found."""

    box: Box
    labels: Volume | None
    """Regions, numbered from 1 in the order of ``localizer.labels``; None where no network looked."""


def localize(chi: Volume, model: Model, *, weights: Path | None = None, device: str = "cpu") -> Location:
    """Find the box that holds the nuclei.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 (or noise) outside the brain.
    model : Model
        Whose localizer.
    weights : path, optional
        Folder that takes the place of the model's own weights.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.

    Returns
    -------
    Location
        The box may reach beyond the map where the field of view is cut.

    Raises
    ------
    InputError
        If there is no head in the map.
    """
    if model.localizer.kind == "nnunet":
        from bids_dgmseg.segment.nnunet import localize_cerebellum  # imports this module

        _check_size(np.abs(chi.array) > _ZERO_PPM, chi)
        return localize_cerebellum(chi, model, weights=weights, device=device)
    if model.localizer.kind == "centre" or model.localizer.input is None:
        return Location(Box.centred(np.array(_measured_box(chi).centre_mm), model.input.patch_mm), None)
    # Shown a few voxels among zeros, a network labels whole heads.
    _check_size(np.abs(chi.array) > _ZERO_PPM, chi)
    labels = _label_head(chi, model, model.localizer.input, weights, device)
    return Location(_nuclei_box(labels, model), labels)


def _measured_box(chi: Volume) -> Box:
    """Enclose what is not zero, whatever type the file stores zeros in."""
    measured = np.abs(chi.array) > _ZERO_PPM
    if not measured.any():
        raise InputError("the map is 0 everywhere; check how it was made")
    return box_of_mask(chi.with_array(measured))


def _check_size(brain: NDArray[np.bool_], grid: Volume) -> None:
    brain_mm3 = np.count_nonzero(brain) * np.prod(grid.voxel_size_mm)
    if brain_mm3 < _SMALLEST_BRAIN_MM3:
        raise InputError(f"no brain found ({brain_mm3 / 1000:.0f} mL); check that the map shows a head, in ppm")


def _label_head(chi: Volume, model: Model, shown: ModelInput, weights: Path | None, device: str) -> Volume:
    """Label the regions of the head on the localizer's coarse grid."""
    view = Box.centred(np.array(_measured_box(chi).centre_mm), shown.patch_mm)
    coarse = resample(chi, world_grid(view, shown.spacing_mm), antialias=True)
    network = load_weights(localizer_network(model), model, "localizer", weights)
    probabilities = forward(network, NORMALIZATIONS[shown.normalization](coarse.array)[None], device)
    return coarse.with_array(probabilities.argmax(dim=0).to(torch.uint8).cpu().numpy())


def _nuclei_box(labels: Volume, model: Model) -> Box:
    """Lay the segmenter's patch about the nuclei, dentates included even where the map does not show them."""
    numbers = {name: number for number, name in enumerate(model.localizer.labels, 1)}
    _check_size(labels.array > 0, labels)
    upper = _large_parts(labels.array == numbers["nuclei"])
    if not upper.any():
        raise InputError("no deep nuclei found in the brain; check units, orientation and field of view of the map")
    box = box_of_mask(labels.with_array(upper))
    lower = _large_parts(labels.array == numbers["cerebellar_nuclei"])
    if lower.any():
        other = box_of_mask(labels.with_array(lower))
        low, high = np.minimum(box.low_mm, other.low_mm), np.maximum(box.high_mm, other.high_mm)
    else:
        low, high = np.subtract(box.low_mm, (0, _BEHIND_MM, _BELOW_MM)), np.asarray(box.high_mm)
    size = np.maximum(high - low + 2 * model.localizer.margin_mm, model.input.patch_mm)
    # A head larger than any in training must not make the box grow without bound.
    x, y, z = np.minimum(size, 1.25 * np.asarray(model.input.patch_mm)).tolist()
    return Box.centred((low + high) / 2, (x, y, z))


def _large_parts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Drop connected parts smaller than a fifth of the largest."""
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= 0.2 * sizes.max())[parts]
    return kept & mask
