"""Segment a map by labelled atlases that are registered to it: the class of tool that networks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box, box_of_mask
from bids_dgmseg.images.resample import Grid, covering_block, resample, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import Localizer, Model, ModelInput
from bids_dgmseg.segment.atlas import Head, Reference, align_affinely, align_rigidly
from bids_dgmseg.segment.carry import carry
from bids_dgmseg.segment.deform import deform
from bids_dgmseg.segment.found import Block
from bids_dgmseg.segment.fusion import Warped
from bids_dgmseg.segment.measured import find_measured, measured_box
from bids_dgmseg.structures import STRUCTURES

Fuse = Callable[..., NDArray[np.float32]]
"""As `bids_dgmseg.segment.fusion.vote_locally`."""

MULTI_ATLAS = Model(
    name="multiatlas", title="Registered atlases, fused by locally weighted voting",
    labels=tuple(structure.abbreviation for structure in STRUCTURES),
    input=ModelInput(spacing_mm=(1.0, 1.0, 1.0), patch_mm=(1.0, 1.0, 1.0)),
    localizer=Localizer(kind="atlas", margin_mm=12.0),
)  # fmt: skip
"""The registry does not have it: without atlases there is nothing to ship."""


def segment_by_atlases(chi: Volume, atlases: Sequence[Reference], model: Model, *, fuse: Fuse) -> Block:
    """Register each atlas to a map (rigid, affine, bent) and fuse their labels.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 (or noise) outside the brain.
    atlases : sequence of Reference
        Their labels are the channels of `model`.
    model : Model
        Spacing, margin about the nuclei, and channels.
    fuse : callable
        `vote_locally` or `join_labels` of `bids_dgmseg.segment.fusion`.

    Returns
    -------
    Block
        Shares of the votes on the map's own grid.

    Raises
    ------
    InputError
        If the map is 0 everywhere, no atlas has a nucleus, or a package is not installed.
    """
    aligned = _align(chi, atlases)
    box = _nuclei_box(chi, aligned, model.localizer.margin_mm)
    grid = world_grid(box, model.input.spacing_mm)
    warped = [_warp(chi, atlas, box, grid) for atlas in aligned]
    probabilities = fuse(resample(chi, grid, antialias=True).array, warped, n_channels=len(model.labels) + 1)
    own = Grid(chi.shape, chi.affine)
    slices = covering_block(own, box)
    return Block(carry(probabilities, grid, own, slices), slices, voxel_size_mm=chi.voxel_size_mm)


def _align(chi: Volume, atlases: Sequence[Reference]) -> list[Reference]:
    """Move each atlas onto the map by an affine transform of its world; no voxel is resampled."""
    head = Head(chi)
    aligned = []
    for atlas in atlases:
        to_map = align_affinely(head, atlas, align_rigidly(head, atlas)).to_map
        moved = [Volume(volume.array, to_map @ volume.affine) for volume in (atlas.chi, atlas.labels)]
        aligned.append(Reference(atlas.name, *moved))
    return aligned


def _nuclei_box(chi: Volume, aligned: Sequence[Reference], margin_mm: float) -> Box:
    """Enclose the nuclei of all atlases and a margin, inside what the map shows."""
    boxes = [box_of_mask(atlas.labels) for atlas in aligned if atlas.labels.array.any()]
    if not boxes:
        raise InputError("atlases: no nucleus in any; check their labels")
    view = measured_box(chi)
    low = np.maximum(np.min([box.low_mm for box in boxes], axis=0) - margin_mm, view.low_mm)
    high = np.minimum(np.max([box.high_mm for box in boxes], axis=0) + margin_mm, view.high_mm)
    x, y, z = (high - low).tolist()
    return Box.centred((low + high) / 2, (x, y, z))


def _warp(chi: Volume, atlas: Reference, box: Box, grid: Grid) -> Warped:
    """Bend an aligned atlas onto the map and sample it on a grid."""
    points_mm = deform(chi, atlas.chi, box).on_grid(grid).points_mm()
    measured = find_measured(atlas.chi)
    return Warped(
        chi=_sample(atlas.chi, points_mm, order=1),
        labels=_sample(atlas.labels, points_mm, order=0),
        measured=_sample(measured.with_array(measured.array.astype(np.uint8)), points_mm, order=0) > 0,
    )


def _sample(volume: Volume, points_mm: NDArray[np.float64], *, order: int) -> NDArray[Any]:
    """Sample a volume at points (3, X, Y, Z) of its world; 0 outside."""
    to_index = np.linalg.inv(volume.affine)
    indices = np.tensordot(to_index[:3, :3], points_mm, axes=1) + to_index[:3, 3, None, None, None]
    sampled: NDArray[Any] = ndimage.map_coordinates(volume.array, indices, order=order, mode="constant", cval=0)
    return sampled
