"""Engines: networks of this package, and nnU-Net model folders. `engine_of` is the only place that tells them apart.

Importing this module does not import torch, so that a dry run can choose the labels of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.label_map import match_labels
from bids_dgmseg.models.registry import MODELS, Model

if TYPE_CHECKING:  # with torch
    from bids_dgmseg.segmentation.records import InferenceOptions, Location, ProbabilityBlock


class Engine(Protocol):
    """Runs the two steps of a model on maps in ppm: finite, without small separate components, within ±5 ppm."""

    supports_ensemble: ClassVar[bool]
    """Whether mirror images and checkpoints can be averaged."""

    supports_longitudinal: ClassVar[bool]
    """Whether the sessions of a participant can be seen on one grid."""

    labels_from_folder: ClassVar[bool]
    """Whether the folder of the weights decides which nuclei are labelled."""

    model: Model
    """The model with what its folder states."""

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        """Read the description of the model folder, but no weights."""

    @staticmethod
    def choose_labels(model: Model, weights: Path | None, label_map: Path | None) -> tuple[Model, list[str]]:
        """Return the model with the nuclei that it labels with these weights, and warnings."""

    def check(self) -> list[str]:
        """Load all weights; return warnings."""

    def localize(self, chi: Volume) -> Location:
        """Find the box of the nuclei."""

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Compute the probability of each nucleus inside the box."""


class NetworkEngine:
    """Networks of `bids_dgmseg.networks`, in model folders with ``model.toml``."""

    supports_ensemble: ClassVar[bool] = True
    supports_longitudinal: ClassVar[bool] = True
    labels_from_folder: ClassVar[bool] = False

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        from bids_dgmseg.models.model_folder import read_model_folder

        self.model, self._options = read_model_folder(model, options.weights), options

    @staticmethod
    def choose_labels(model: Model, weights: Path | None, label_map: Path | None) -> tuple[Model, list[str]]:
        """Return the model with the classes of the folder; `InputError` if there is a label map."""
        if label_map:
            raise InputError(f"`label_map` has no effect on {model.name}; omit it or use `model` nnunet2step")
        if weights is None:
            return model, []
        from bids_dgmseg.models.model_folder import read_model_folder

        trained = read_model_folder(model, weights)
        fewer = trained.labels != model.labels
        return replace(model, labels=trained.labels, heads=trained.heads) if fewer else model, []

    def check(self) -> list[str]:
        """Load the networks of both steps and of the guard, and the atlases."""
        from bids_dgmseg.models.model_folder import load_segmenters, load_weights, localizer_network

        model, options, localizer = self.model, self._options, self.model.localizer
        if localizer.network:
            load_weights(localizer_network(model), model, "localizer", options.weights)
        if model.network:
            load_segmenters(model, options.weights, folds=options.folds)
        if localizer.guard:
            guard = MODELS[localizer.guard]
            load_weights(localizer_network(guard), guard, "localizer")
        if localizer.kind == "atlas":
            from bids_dgmseg.segmentation.localize import read_atlases

            read_atlases(model, options)
        return []

    def localize(self, chi: Volume) -> Location:
        """Run the localizer."""
        from bids_dgmseg.segmentation.localize import run_localizer

        return run_localizer(chi, self.model, self._options)

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Predict on the network's grid, then resample to the map's own."""
        from bids_dgmseg.segmentation.predict import predict_block

        return predict_block(chi, location, self.model, self._options)


class NnunetEngine:
    """Model folders of nnU-Net v2: the cerebellum, then nuclei inside its box; or one network for the whole map."""

    supports_ensemble: ClassVar[bool] = False
    supports_longitudinal: ClassVar[bool] = False
    labels_from_folder: ClassVar[bool] = True

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        self.model, self._options = model, options

    @staticmethod
    def choose_labels(model: Model, weights: Path | None, label_map: Path | None) -> tuple[Model, list[str]]:
        """Match the labels of the folder, by name or by the user's table."""
        return match_labels(model, weights, label_map)

    def check(self) -> list[str]:
        """Read the folders of both steps."""
        from bids_dgmseg.segmentation.nnunet import check_nnunet

        return check_nnunet(self.model, self._options)

    def localize(self, chi: Volume) -> Location:
        """Find the box of the cerebellum."""
        from bids_dgmseg.segmentation.nnunet import localize_cerebellum

        return localize_cerebellum(chi, self.model, self._options)

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Predict in the box; nnU-Net resamples on its own."""
        from bids_dgmseg.segmentation.nnunet import predict_in_box

        return predict_in_box(chi, location.box, self.model, self._options)


_ENGINES: Mapping[str, type[Engine]] = {"networks": NetworkEngine, "nnunet": NnunetEngine}


def engine_of(model: Model, *, ensemble: bool = False, longitudinal: bool = False) -> type[Engine]:
    """Return the class of a model's engine; `InputError` if it does not support what is asked for."""
    engine = _ENGINES[model.engine]
    if ensemble and not engine.supports_ensemble:
        raise InputError(
            f"`ensemble`: not supported by {model.name}, whose labels are side-specific, so that mirrored images "
            "cannot be averaged; omit it"
        )
    if longitudinal and not engine.supports_longitudinal:
        raise InputError(f"`longitudinal`: not supported by {model.name}, which resamples each map itself; omit it")
    return engine


def choose_labels(
    model: Model, weights: Path | None = None, label_map: Path | None = None, *, ensemble: bool = False
) -> tuple[Model, list[str]]:
    """Return a model with the nuclei that it labels with these weights.

    Parameters
    ----------
    model : Model
        Registry entry; returned unchanged unless the folder of its weights decides.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    label_map : path, optional
        The user's table of labels and abbreviations, for nnU-Net folders.
    ensemble : bool
        Whether the model is going to be run as an ensemble.

    Returns
    -------
    Model
        With the labels of the folder; for nnU-Net see `bids_dgmseg.models.label_map.match_labels`.
    list of str
        Warnings about labels without a match.

    Raises
    ------
    InputError
        If the folder or the table cannot be read, no label matches a nucleus, or an option has no effect on the model.
    """
    return engine_of(model, ensemble=ensemble).choose_labels(model, weights, label_map)
