"""Multi-atlas segmentation, the baseline that networks are compared with."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, box_of_mask, covering_block, resample, world_grid
from bids_dgmseg.image.masks import is_valid, valid_box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import atomic_write
from bids_dgmseg.models.registry import Localizer, Model, ModelInput
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.registration.align import Atlas, Head, align_affinely, align_rigidly, deform
from bids_dgmseg.segmentation.localize import find_regions
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.predict import Location, ProbabilityBlock, resample_back
from bids_dgmseg.segmentation.segment import SegmentedMap

Fuse = Callable[..., NDArray[np.float32]]
"""As `vote_locally`."""

MULTI_ATLAS = Model(
    name="multiatlas",
    title="Registered atlases, fused by locally weighted voting",
    labels=tuple(structure.abbreviation for structure in STRUCTURES),
    input=ModelInput(spacing_mm=(1.0, 1.0, 1.0), patch_mm=(1.0, 1.0, 1.0)),
    localizer=Localizer(kind="atlas", margin_mm=12.0),
)
"""Not in the registry, because it needs the user's atlases."""


def segment_by_atlases(chi: Volume, atlases: Sequence[Atlas], model: Model, *, fuse: Fuse) -> SegmentedMap:
    """Register each atlas to a map (rigid, affine, deformable) and fuse their labels.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 (or noise) outside the brain.
    atlases : sequence of Atlas
        Labels are the channels of `model`.
    model : Model
        Defines spacing, margin around the nuclei, and channels.
    fuse : callable
        `vote_locally` or `join_labels`.

    Returns
    -------
    SegmentedMap
        Probabilities are fractions of the votes.

    Raises
    ------
    InputError
        If the map is 0 everywhere, no atlas has a nucleus, or a package is not installed.
    """
    return fuse_atlases(chi, register_atlases(chi, atlases, model), model, fuse=fuse)


@dataclass(frozen=True)
class Warped:
    """An atlas resampled to the grid (X, Y, Z) of the map."""

    chi: NDArray[np.float32]
    """Its map in ppm."""
    labels: NDArray[np.uint8]
    """Channels, 0 for background."""
    valid: NDArray[np.bool_]
    """Valid voxels of the atlas; elsewhere it has no vote."""


@dataclass(frozen=True)
class Registered:
    """Atlases on the grid of a map around the nuclei."""

    box: Box
    atlases: list[Warped]
    saved_s: float = 0.0
    """Time of registrations that were read from a file instead."""


def register_atlases(chi: Volume, atlases: Sequence[Atlas], model: Model, folder: Path | None = None) -> Registered:
    """Register each atlas to a map; in `folder`, the results are kept for other fusions of the same images."""
    digest = hashlib.sha256()
    for volume in (chi, *(volume for atlas in atlases for volume in (atlas.chi, atlas.labels))):
        digest.update(np.ascontiguousarray(volume.array).tobytes() + volume.affine.tobytes())
    path = folder / f"{digest.hexdigest()}.npz" if folder else None
    if path and path.is_file():
        with np.load(path) as stored:
            parts = zip(*(stored[name] for name in ("chi", "labels", "valid")), strict=True)
            box = Box(tuple(stored["low_mm"].tolist()), tuple(stored["high_mm"].tolist()))
            return Registered(box, [Warped(*arrays) for arrays in parts], float(stored["seconds"]))
    start = time.perf_counter()
    head = Head(chi, find_regions(chi))
    aligned = []  # by changing affines; no voxel is resampled
    for atlas in atlases:
        to_map = align_affinely(head, atlas, align_rigidly(head, atlas)).to_map
        moved = [Volume(volume.array, to_map @ volume.affine) for volume in (atlas.chi, atlas.labels)]
        aligned.append(Atlas(atlas.name, *moved))
    boxes = [box_of_mask(atlas.labels) for atlas in aligned if atlas.labels.array.any()]
    if not boxes:
        raise InputError("atlases: none contains a nucleus; check their labels")
    margin_mm, valid = model.localizer.margin_mm, valid_box(chi)
    low = np.maximum(np.min([box.low_mm for box in boxes], axis=0) - margin_mm, valid.low_mm)
    high = np.minimum(np.max([box.high_mm for box in boxes], axis=0) + margin_mm, valid.high_mm)
    x, y, z = (high - low).tolist()
    box = Box.centred((low + high) / 2, (x, y, z))
    grid = world_grid(box, model.input.spacing_mm)
    warped = [_warp(chi, atlas, box, grid) for atlas in aligned]
    if path:
        arrays: dict[str, Any] = {
            name: np.stack([getattr(atlas, name) for atlas in warped]) for name in ("chi", "labels", "valid")
        }
        seconds = time.perf_counter() - start
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, low_mm=box.low_mm, high_mm=box.high_mm, seconds=seconds, **arrays)
    return Registered(box, warped)


def fuse_atlases(chi: Volume, registered: Registered, model: Model, *, fuse: Fuse) -> SegmentedMap:
    """Fuse the labels of registered atlases; see `segment_by_atlases`."""
    box, native = registered.box, Grid(chi.shape, chi.affine)
    grid = world_grid(box, model.input.spacing_mm)
    values = resample(chi, grid, antialias=True).array
    probabilities = fuse(values, registered.atlases, n_channels=len(model.labels) + 1)
    slices = covering_block(native, box)
    block = ProbabilityBlock(
        resample_back(probabilities, grid, native, slices), slices, voxel_size_mm=chi.voxel_size_mm
    )
    return SegmentedMap(label_grid(block, model, chi.array), block, Location(box, None), model)


def _warp(chi: Volume, atlas: Atlas, box: Box, grid: Grid) -> Warped:
    """Register an aligned atlas deformably and sample it on a grid; 0 outside the atlas."""
    deformation = deform(chi, atlas.chi, box).on_grid(grid)
    valid = atlas.chi.with_array(is_valid(atlas.chi.array).astype(np.uint8))
    sampled = [
        deformation.sample(volume, order=order) for volume, order in ((atlas.chi, 1), (atlas.labels, 0), (valid, 0))
    ]
    return Warped(chi=sampled[0], labels=sampled[1], valid=sampled[2] > 0)


_RADIUS = 2
"""Radius in voxels of the neighbourhood in which maps are compared."""

_NOISE_PPM = 0.002
"""Difference between repeated maps of a head."""

_SEARCH = 1
"""Voxels by which joint label fusion may shift the neighbourhood of an atlas."""


def vote_locally(chi: NDArray[np.floating], atlases: Sequence[Warped], *, n_channels: int) -> NDArray[np.float32]:
    r"""Fuse labels by voting, with more weight for atlases that locally resemble the map.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        The map in ppm.
    atlases : sequence of Warped
        Atlases on its grid.
    n_channels : int
        Channels of the result, including background.

    Returns
    -------
    ndarray of shape (n_channels, X, Y, Z)
        Fractions of the votes; they sum to 1. Background where no atlas has a vote.

    Notes
    -----
    The weight of an atlas is :math:`1 / (d + \epsilon^2)`, with the mean :math:`d` of the squared differences of the
    maps over :math:`5^3` voxels [1]_ and :math:`\epsilon` = 0.002 ppm.

    References
    ----------
    .. [1] Artaechevarria X, et al. Combination strategies in multi-atlas image segmentation: application to brain MR
       data. IEEE Trans Med Imaging 28 (2009) 1266-1277. doi:10.1109/TMI.2009.2014372
    """
    votes = np.zeros((n_channels, chi.size), np.float32)
    voxels = np.arange(chi.size)
    for atlas in atlases:
        apart = ndimage.uniform_filter(np.square(chi - atlas.chi), 2 * _RADIUS + 1, mode="nearest")
        # Rounding of the filter's running sums may leave negative values.
        weight = 1 / (np.maximum(apart, 0) / _NOISE_PPM**2 + 1)
        votes[atlas.labels.ravel(), voxels] += np.where(atlas.valid, weight, 0).ravel()
    total = votes.sum(axis=0)
    votes[0, total == 0] = 1
    shares: NDArray[np.float32] = votes / votes.sum(axis=0)
    return shares.reshape(n_channels, *chi.shape)


def join_labels(chi: NDArray[np.floating], atlases: Sequence[Warped], *, n_channels: int) -> NDArray[np.float32]:
    """Fuse labels by joint label fusion of ANTs, which gives correlated atlases less weight; see `vote_locally`.

    Raises
    ------
    InputError
        If ANTsPy is not installed, or there is only one atlas.

    Notes
    -----
    Wang H, et al. Multi-atlas segmentation with joint label fusion. IEEE Trans Pattern Anal Mach Intell 35 (2013)
    611-623. doi:10.1109/TPAMI.2012.143. Default settings of ANTs except for a search radius of one voxel.
    """
    ants = import_ants()
    if len(atlases) < 2:
        raise InputError("`atlases`: joint label fusion needs two or more labelled heads; add some, or use multiatlas")

    def to_ants(array: NDArray[Any]) -> Any:
        return ants.from_numpy(array.astype(np.float32))

    near = ndimage.binary_dilation(np.any([atlas.labels > 0 for atlas in atlases], axis=0), iterations=2)
    probabilities = np.zeros((n_channels, *chi.shape), np.float32)
    if near.any():
        with tempfile.TemporaryDirectory(prefix="joint_label_fusion_") as folder:
            joined = ants.joint_label_fusion(
                to_ants(chi),
                to_ants(near),
                [to_ants(atlas.chi) for atlas in atlases],
                rad=[_RADIUS] * 3,
                label_list=[to_ants(atlas.labels) for atlas in atlases],
                r_search=_SEARCH,
                output_prefix=str(Path(folder) / "joined"),
            )
            for number, image in zip(joined["segmentation_numbers"], joined["probabilityimages"], strict=True):
                probabilities[int(number)] = image.numpy() * near
    probabilities[0] = 1 - probabilities[1:].sum(axis=0)
    return probabilities


def import_ants() -> Any:
    """Import ANTsPy.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        return importlib.import_module("ants")
    except ImportError as error:
        raise InputError("ANTsPy: not installed; run `pip install antspyx` or use multiatlas") from error
