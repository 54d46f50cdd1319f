"""Predictors for tests; the oracle ignores the image and samples the phantom on its grid."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Localizer, Model, ModelInput
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.predict import InferenceOptions


class Oracle:
    """Return the fraction of each voxel inside each nucleus of the phantom."""

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        self._numbers = [structure.index for structure in model.structures]

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        nuclei = _fractions_of_nuclei(volume.shape, volume.affine.tobytes())[self._numbers]
        return np.concatenate([1 - nuclei.sum(axis=0, keepdims=True), nuclei])


@cache
def _fractions_of_nuclei(shape: tuple[int, int, int], affine: bytes) -> NDArray[np.float32]:
    """Fraction of each voxel inside each structure of structures.tsv, from eight points per voxel."""
    grid = Grid(shape, np.frombuffer(affine).reshape(4, 4))
    points = grid.centres_mm()
    labels = PHANTOM.labels(points)
    near = ndimage.binary_dilation((labels > 0) & (labels <= len(STRUCTURES)), iterations=2)
    offsets = np.array(np.meshgrid(*[[-0.25, 0.25]] * 3)).reshape(3, -1).T @ grid.affine[:3, :3].T
    shares = np.zeros((len(STRUCTURES) + 1, *shape), np.float32)
    for offset in offsets:
        inside = PHANTOM.labels(points[near] + offset)
        inside[inside > len(STRUCTURES)] = 0
        shares[(inside, *np.nonzero(near))] += 1 / len(offsets)
    return shares


class Blind:
    """Return background everywhere."""

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        self._channels = len(model.labels) + 1

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        shares = np.zeros((self._channels, *volume.shape), np.float32)
        shares[0] = 1
        return shares


class Greedy(Oracle):
    """Die like a process that the kernel kills for lack of memory."""

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Interrupted(Oracle):
    """Receive the Ctrl-C that a terminal sends to every process of a run."""

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(volume)


class Deaf(Oracle):
    """Receive SIGTERM where its exception becomes another one, as in an import or in C code."""

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ImportError("cannot import name 'x'")


def oracle_model(name: str = "oracle", predictor: str = "Oracle") -> Model:
    """Return a registry entry for one of the predictors above."""
    return Model(
        name=name,
        title="The phantom's own labels",
        labels=tuple(structure.abbreviation for structure in STRUCTURES),
        input=ModelInput(spacing_mm=(2.0, 2.0, 2.0), patch_mm=(110.0, 150.0, 130.0)),
        localizer=Localizer(kind="centre"),
        predictor=f"tests.oracle:{predictor}",
        memory_gb=0.5,
    )
