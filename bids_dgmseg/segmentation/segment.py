"""Segment one map: localize, predict, postprocess."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.masks import fill_holes
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import load_segmenters, load_weights, localizer_network, pick_device
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.segmentation.localize import Location, localize
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.predict import ProbabilityBlock, predict


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
        Box and head regions.
    model : Model
        The model that was used.
    """

    labels: NDArray[np.uint8]
    block: ProbabilityBlock
    location: Location
    model: Model


def segment_map(
    chi: Volume,
    model: Model,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    ensemble: bool = False,
    location: Location | None = None,
) -> SegmentedMap:
    """Segment the nuclei of a map.

    Parameters
    ----------
    chi : Volume
        Susceptibility in ppm, 0, NaN or noise outside the brain; NaN in holes, which are filled for the networks.
    model : Model
        Registry entry; for nnU-Net folders the result of `bids_dgmseg.models.label_map.choose_labels`.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "auto"}
        Where the networks run.
    ensemble : bool
        Average over mirror images and all checkpoints of the weights: slower, slightly more accurate.
    location : Location, optional
        Result of `bids_dgmseg.segmentation.localize.localize`; by default the model's localizer is run with the same
        weights.

    Returns
    -------
    SegmentedMap
        Labels on the grid of `chi`.

    Raises
    ------
    InputError
        If the map shows no head or the weights cannot be loaded.
    """
    chi = chi.with_array(fill_holes(chi.array, chi.voxel_size_mm))
    if ensemble:
        model = replace(model, ensemble=True)
    if location is None:
        location = localize(chi, model, weights=weights, device=device)
    block = predict(chi, location.box, model, weights=weights, device=device)
    return SegmentedMap(label_grid(block, model, chi.shape), block, location, model)


def check_ready(model: Model, *, weights: Path | None, device: str) -> list[str]:
    """Load the weights of a model once, so that a run that cannot work ends before its first scan.

    Parameters
    ----------
    model : Model
        Registry entry.
    weights : path or None
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "auto"}
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
    if model.localizer.kind == "nnunet":
        from bids_dgmseg.segmentation.nnunet import check_nnunet

        return check_nnunet(model, weights=weights)
    if model.localizer.network:
        load_weights(localizer_network(model), model, "localizer", weights)
    if model.network:
        load_segmenters(model, weights)
    if model.localizer.guard:
        guard = MODELS[model.localizer.guard]
        load_weights(localizer_network(guard), guard, "localizer")
    if model.localizer.kind == "atlas":
        from bids_dgmseg.segmentation.registration import read_atlases  # with SimpleITK

        read_atlases(model, weights)
    return []
