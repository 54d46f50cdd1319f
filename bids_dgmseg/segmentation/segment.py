"""Segment one map: localize, predict, postprocess."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box, Grid, block_affine, covering_block
from bids_dgmseg.image.masks import fill_holes, is_valid
from bids_dgmseg.image.units import CHI
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import pick_device
from bids_dgmseg.models.registry import LATERAL_VENTRICLE, Model, get_model
from bids_dgmseg.registration.midplane import find_midplane
from bids_dgmseg.segmentation.engines import engine_of
from bids_dgmseg.segmentation.localize import (
    SharedSpace,
    cerebellar_nuclei_mm,
    clear_other_side,
    clip_and_remove_small_components,
    find_regions,
    to_mid_space,
)
from bids_dgmseg.segmentation.postprocess import keep_best_placed, label_grid
from bids_dgmseg.segmentation.predict import (
    InferenceOptions,
    Location,
    ProbabilityBlock,
    network_grid,
    predict_on_grid,
    resample_back,
)

_SURELY_FLUID = 0.8
"""Probability of the ventricles: in some maps, fluid and corpus callosum hardly differ."""


@dataclass(frozen=True)
class SegmentedMap:
    """Labels and probabilities of one map.

    Parameters
    ----------
    labels : ndarray of shape (X, Y, Z)
        uint8, indices of structures.tsv on the map's grid; 0 is background.
    block : ProbabilityBlock
        Probabilities inside the box.
    location : Location
        Box, head regions and midplane.
    model : Model
        The model that was used, with what its folder states.
    """

    labels: NDArray[np.uint8]
    block: ProbabilityBlock
    location: Location
    model: Model


def localize(
    chi: Volume, model: Model, *, weights: Path | None = None, device: str = "cpu", midplane: bool = False
) -> Location:
    """Find the box that contains the nuclei of a model, and what else `segment_map` can reuse.

    Parameters
    ----------
    chi : Volume
        As in `segment_map`.
    model : Model
        Registry entry; for nnU-Net folders the result of `bids_dgmseg.segmentation.engines.choose_labels`.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "mps", "auto"}
        Where the network runs.
    midplane : bool
        Find the plane between the hemispheres even if the model does not need it, which takes about a second.

    Returns
    -------
    Location
        The box may extend beyond the map if the field of view is cut.

    Raises
    ------
    InputError
        If the map shows no head or the weights cannot be loaded.
    """
    engine = engine_of(model)(model, InferenceOptions(weights=weights, device=device))
    chi = clean(chi)
    return _add_midplane(engine.localize(chi), chi, engine.model, device=device, always=midplane)


def segment_map(
    chi: Volume,
    model: Model,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    folds: tuple[int, ...] = (),
    location: Location | None = None,
    shared: SharedSpace | None = None,
) -> SegmentedMap:
    """Segment the nuclei of a map.

    Parameters
    ----------
    chi : Volume
        Susceptibility in ppm, 0, NaN or noise outside the brain; NaN in holes, which are filled for the networks.
    model : Model
        Registry entry; for nnU-Net folders the result of `bids_dgmseg.segmentation.engines.choose_labels`.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "mps", "auto"}
        Where the networks run.
    folds : tuple of int
        Folds of the model folder to average; by default all.
    location : Location, optional
        Result of `localize`; by default the model's localizer is run with the same weights. A midplane that the model
        needs and that is missing is found.
    shared : SharedSpace, optional
        Result of `bids_dgmseg.segmentation.sessions.find_shared_spaces`: the network sees the map in the mid-space of
        the participant's sessions, on the grid that all of them share. Replaces `location`.

    Returns
    -------
    SegmentedMap
        Labels on the grid of `chi`.

    Raises
    ------
    InputError
        If the map shows no head, the weights cannot be loaded, or the model does not support a shared space.
    """
    options = InferenceOptions(weights=weights, device=device, folds=folds, own_voxels=shared is None)
    engine = engine_of(model, longitudinal=shared is not None)(model, options)
    chi = clean(chi)
    if shared:
        chi, location = to_mid_space(chi, shared.to_map), shared.location
    location = _add_midplane(location or engine.localize(chi), chi, engine.model, device=device)
    block = engine.predict(chi, location)
    block = _remove_false_patches(block, location, chi, engine.model, device=device)
    return SegmentedMap(label_grid(block, engine.model, chi.array), block, location, engine.model)


def find_ventricles(chi: Volume, box: Box, model: Model, *, device: str = "cpu") -> NDArray[np.bool_]:
    """Find the lateral ventricles inside the box of the nuclei.

    Parameters
    ----------
    chi : Volume
        As in `segment_map`.
    box : Box
        Of a `Location`; what lies outside is not found.
    model : Model
        Its ``ventricles`` names the model whose network is run, with the weights in the package.
    device : {"cpu", "cuda", "mps", "auto"}
        Where the network runs.

    Returns
    -------
    ndarray of bool, shape of `chi`
        Where their probability exceeds 0.8.

    Raises
    ------
    InputError
        If the weights cannot be loaded.
    """
    finder = get_model(model.ventricles)
    channel = 1 + len(finder.labels) + finder.auxiliary.index(LATERAL_VENTRICLE)
    chi = clean(chi)
    grid, native = network_grid(chi, box, finder), Grid(chi.shape, chi.affine)
    fluid = predict_on_grid(chi, grid, finder, InferenceOptions(device=device))[channel]
    slices = covering_block(native, box)
    ventricles = np.zeros(chi.shape, bool)
    ventricles[slices] = resample_back(np.stack([1 - fluid, fluid]), grid, native, slices)[1] > _SURELY_FLUID
    return ventricles & is_valid(chi.array)


def check_ready(model: Model, *, weights: Path | None, device: str) -> list[str]:
    """Load the weights of a model once, so that a run that cannot work ends before its first scan.

    Parameters
    ----------
    model : Model
        Registry entry.
    weights : path or None
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "mps", "auto"}
        Where the networks will run.

    Returns
    -------
    list of str
        Warnings about the weights.

    Raises
    ------
    InputError
        If weights are missing or damaged, or the device does not exist.
    """
    pick_device(device)
    return engine_of(model)(model, InferenceOptions(weights=weights, device=device)).check()


def clean(chi: Volume) -> Volume:
    """Fill holes, and remove what would disturb networks outside the head."""
    return clip_and_remove_small_components(chi.with_array(fill_holes(chi.array, chi.voxel_size_mm)))


def _remove_false_patches(
    block: ProbabilityBlock, location: Location, chi: Volume, model: Model, *, device: str
) -> ProbabilityBlock:
    """Remove what lies on the other side of the head, then all but the best placed component of each nucleus."""
    if not location.plane or not model.postprocessing.own_side_only:
        return block
    grid = Grid(block.probabilities.shape[1:], block_affine(chi.affine, block.slices))
    probabilities = clear_other_side(block.probabilities, grid, model, location.plane)
    if model.postprocessing.region_sd_mm:
        probabilities = keep_best_placed(
            probabilities,
            grid,
            model,
            location.plane,
            lambda: cerebellar_nuclei_mm(location.regions or find_regions(chi, device=device)),
        )
    return replace(block, probabilities=probabilities)


def _add_midplane(location: Location, chi: Volume, model: Model, *, device: str, always: bool = False) -> Location:
    """Find the plane between the hemispheres and the regions of the head, unless they are known or not needed."""
    needed = always or model.lacks_sides or model.postprocessing.own_side_only
    if not needed or location.plane is not None:
        return location
    regions = location.regions
    if regions is None and model.input.contrast == CHI:
        regions = find_regions(chi, device=device)
    return replace(location, plane=find_midplane(chi, regions), regions=regions)
