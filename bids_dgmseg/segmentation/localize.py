"""Step one: where the nuclei are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box, OrientedBox, box_of_mask
from bids_dgmseg.image.grids import (
    MAX_ROTATION_DEG,
    Grid,
    axis_directions,
    integer_ratio,
    max_axis_angle_deg,
    world_grid,
)
from bids_dgmseg.image.masks import is_valid, large_components
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.weights import load_weights, localizer_network
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, forward
from bids_dgmseg.segmentation.regions import clip_and_remove_small_components, valid_box, valid_mask
from bids_dgmseg.segmentation.registration import find_by_atlas, read_atlases
from bids_dgmseg.segmentation.results import Location

_LEAST_PITCH_DEG = 12.0
"""Networks are at ease below; beyond, upright grids help more than turning the map harms."""

_LARGEST_OBLIQUITY_DEG = 30.0
"""Slices are laid along a head that lies so; beyond, they are laid along something else."""

_LARGEST_PITCH_DEG = 50.0
"""No head nods farther in a scanner: beyond, the cerebellum was not found where it is."""

_CEREBELLUM_DEG = 31.3
"""How far below the horizon the middle of the cerebellum lies, seen from that of the nuclei, in the label template."""

_LEAST_CEREBELLUM = 4.0
"""A whole cerebellum has five times the volume of the nuclei."""

_BELOW_MM, _BEHIND_MM = 20.0, 30.0
"""How far the dentates reach below and behind the other nuclei."""

_LOWER = {"DN", "IN"}
"""Nuclei in the cerebellum."""

_CORNER = 1 / 16
"""Edges of the corners of a map, where no head reaches, relative to the map's."""

_SMALLEST_BRAIN_MM3 = 200_000.0
"""A fifth of a small adult brain: less is no head, however the view is cut."""


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
        from bids_dgmseg.segmentation.nnunet import localize_cerebellum

        _check_size(valid_mask(chi).array, chi)
        return localize_cerebellum(clip_and_remove_small_components(chi), model, weights=weights, device=device)
    return run_localizer(
        clip_and_remove_small_components(chi), read_model_folder(model, weights), weights=weights, device=device
    )


def run_localizer(chi: Volume, model: Model, *, weights: Path | None = None, device: str = "cpu") -> Location:
    """Find the box of a model whose input is as given, whatever its folder says; else as `localize`."""
    if model.localizer.kind == "centre":
        box = Box.centred(np.array(valid_box(chi).centre_mm), model.input.patch_mm)
        if not model.localizer.guard:
            return Location(box, None)
    # Shown a few voxels among zeros, a network labels whole heads, and a registration lays one over them.
    _check_size(valid_mask(chi).array, chi)
    if model.localizer.kind == "network":
        labels = _label_head(chi, model, weights, device)
        return Location(_nuclei_box(labels, model, _slice_axes(chi, model)), labels)
    if model.localizer.kind == "atlas":
        box = find_by_atlas(chi, read_atlases(model, weights), model)
    return Location(_shift_box_to_cover(box, chi, model, device), None)


def _shift_box_to_cover(box: Box, chi: Volume, model: Model, device: str) -> Box:
    """Move a box as little as it takes to cut none of the model's nuclei that a whole-head network sees."""
    if not model.localizer.guard:
        return box
    guard = MODELS[model.localizer.guard]
    seen = _nuclei_mask(_label_head(chi, guard, None, device), guard, model)
    return box.shifted_to_cover(box_of_mask(seen).expanded(model.localizer.margin_mm)) if seen.array.any() else box


def _nuclei_mask(labels: Volume, guard: Model, model: Model) -> Volume:
    """Mark where a whole-head network sees nuclei of a model."""
    lower = {structure.nucleus for structure in model.structures} <= _LOWER
    return labels.with_array(_region(labels, guard, "cerebellar_nuclei") if lower else _upper_nuclei(labels, guard))


def _check_size(brain: NDArray[np.bool_], grid: Volume) -> None:
    brain_mm3 = np.count_nonzero(brain) * np.prod(grid.voxel_size_mm)
    if brain_mm3 < _SMALLEST_BRAIN_MM3:
        raise InputError(f"no brain found ({brain_mm3 / 1000:.0f} mL); check that the map shows a head, in ppm")


def _label_head(chi: Volume, model: Model, weights: Path | None, device: str) -> Volume:
    """Label the regions of the head on the localizer's coarse grid."""
    shown = model.localizer.input
    if shown is None:
        raise ValueError(f"{model.name}: its localizer {model.localizer.kind!r} has no network")
    view = Box.centred(np.array(valid_box(chi).centre_mm), shown.patch_mm)
    coarse = _extend_noise(resample(chi, world_grid(view, shown.spacing_mm), antialias=True), chi)
    network = load_weights(localizer_network(model), model, "localizer", weights)
    probabilities = forward(network, NORMALIZATIONS[shown.normalization](coarse.array)[None], device)
    return coarse.with_array(probabilities.argmax(dim=0).to(torch.uint8).cpu().numpy())


def _extend_noise(coarse: Volume, chi: Volume) -> Volume:
    """Let the noise about a head go on beyond the map; a network takes what ends somewhere for a head."""
    corners = _mark_corners(chi)
    if is_valid(chi.array[corners.array > 0]).mean() < 0.9:
        return coarse
    grid = Grid(coarse.shape, coarse.affine)
    beyond = resample(chi.with_array(np.ones(chi.shape, np.float32)), grid).array < 0.5
    level_ppm = coarse.array[resample(corners, grid, order=0).array > 0].std()
    noise = np.random.default_rng(0).normal(0, level_ppm, coarse.shape).astype(np.float32)
    return coarse.with_array(np.where(beyond, noise, coarse.array))


def _mark_corners(chi: Volume) -> Volume:
    """Mark the eight corners of a map."""
    ends = [np.minimum(np.arange(size), np.arange(size)[::-1]) < max(_CORNER * size, 1) for size in chi.shape]
    return chi.with_array((ends[0][:, None, None] & ends[1][:, None] & ends[2]).astype(np.uint8))


def _slice_axes(chi: Volume, model: Model) -> NDArray[np.float64]:
    """Give the axes (unit vectors, one a column) of oblique slices along which a model would see the map's own voxels.

    Those of the world where there are no such slices.
    """
    axes = axis_directions(chi.affine)
    right_angled = np.allclose(axes.T @ axes, np.eye(3), atol=1e-3)
    oblique = MAX_ROTATION_DEG < max_axis_angle_deg(axes) < _LARGEST_OBLIQUITY_DEG
    shown = model.input
    seen = (
        shown.native_voxel_tolerance
        and integer_ratio(shown.spacing_mm, chi.voxel_size_mm, shown.native_voxel_tolerance)[1].any()
    )
    return axes if right_angled and oblique and seen else np.eye(3)


def _nuclei_box(labels: Volume, model: Model, slice_axes: NDArray[np.float64]) -> Box:
    """Lay the segmenter's patch about the nuclei, dentates included even where the map does not show them.

    The patch lies along the slices, or follows a head that nods farther than networks like.
    """
    upper = _places_mm(_upper_nuclei(labels, model), labels)
    lower = _places_mm(_region(labels, model, "cerebellar_nuclei"), labels)
    axes = _find_axes(upper, _places_mm(_region(labels, model, "cerebellum"), labels), slice_axes)
    # The half voxel is what the voxels reach beyond their centres.
    found, half_mm = [points @ axes for points in (upper, lower) if len(points)], max(labels.voxel_size_mm) / 2
    low = np.min([points.min(axis=0) for points in found], axis=0) - half_mm
    high = np.max([points.max(axis=0) for points in found], axis=0) + half_mm
    if not len(lower):
        low -= (0, _BEHIND_MM, _BELOW_MM)
    size = np.maximum(high - low + 2 * model.localizer.margin_mm, model.input.patch_mm)
    # A head larger than any in training must not make the box grow without bound.
    x, y, z = np.minimum(size, 1.25 * np.asarray(model.input.patch_mm)).tolist()
    centre_mm = axes @ ((low + high) / 2)
    if (axes == np.eye(3)).all():
        return Box.centred(centre_mm, (x, y, z))
    return Box.around(centre_mm, OrientedBox.from_axes(axes, (x, y, z)))


def _find_axes(
    nuclei_mm: NDArray[np.float64], cerebellum_mm: NDArray[np.float64], slice_axes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Choose axes along which the head hardly nods: those of the slices, of the world, or else of the head."""
    for axes in (slice_axes, np.eye(3)):
        pitch_deg = _find_pitch(nuclei_mm @ axes, cerebellum_mm @ axes)
        if abs(pitch_deg) <= _LEAST_PITCH_DEG:
            return axes
    turned: NDArray[np.float64] = Rotation.from_euler("x", pitch_deg, degrees=True).as_matrix()
    return turned


def _find_pitch(nuclei_mm: NDArray[np.float64], cerebellum_mm: NDArray[np.float64]) -> float:
    """Tell how far a head nods, from where its cerebellum lies; 0 where the view cuts that or it cannot be there."""
    if len(cerebellum_mm) < _LEAST_CEREBELLUM * len(nuclei_mm):
        return 0.0
    _, back, down = nuclei_mm.mean(axis=0) - cerebellum_mm.mean(axis=0)
    pitch_deg = float(np.rad2deg(np.arctan2(down, back))) - _CEREBELLUM_DEG
    return pitch_deg if abs(pitch_deg) < _LARGEST_PITCH_DEG else 0.0


def _places_mm(mask: NDArray[np.bool_], grid: Volume) -> NDArray[np.float64]:
    """Give the places (n, 3) of a mask's voxels."""
    places: NDArray[np.float64] = np.argwhere(mask) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return places


def _upper_nuclei(labels: Volume, model: Model) -> NDArray[np.bool_]:
    """Mark the nuclei above the cerebellum, of which every head has some."""
    _check_size(labels.array > 0, labels)
    upper = _region(labels, model, "nuclei")
    if not upper.any():
        raise InputError("no deep nuclei found in the brain; check units, orientation and field of view of the map")
    return upper


def _region(labels: Volume, model: Model, name: str) -> NDArray[np.bool_]:
    """Find a region without components smaller than a fifth of the largest."""
    return large_components(labels.array == model.localizer.labels.index(name) + 1, 0.2, over_corners=True)
