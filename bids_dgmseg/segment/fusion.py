"""From the labels of several registered atlases to probabilities."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError

_RADIUS = 2
"""Of the neighbourhood in which maps are compared, in voxels."""
_LEAST_PPM = 0.002
"""Maps of one head differ by this much."""
_SEARCH = 1
"""Voxels by which joint label fusion may move an atlas's neighbourhood."""


@dataclass(frozen=True)
class Warped:
    """An atlas on the grid of the map that is segmented.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Its map in ppm.
    labels : ndarray of shape (X, Y, Z)
        Channels, 0 for background.
    measured : ndarray of shape (X, Y, Z)
        Whether the atlas shows anything there: beyond it has no vote.
    """

    chi: NDArray[np.float32]
    labels: NDArray[np.uint8]
    measured: NDArray[np.bool_]


def vote_locally(chi: NDArray[np.floating], atlases: Sequence[Warped], *, n_channels: int) -> NDArray[np.float32]:
    r"""Let atlases vote in each voxel, those that look like the map there with more weight.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        The map in ppm.
    atlases : sequence of Warped
        On its grid.
    n_channels : int
        Channels of the result, background included.

    Returns
    -------
    ndarray of shape (n_channels, X, Y, Z)
        Shares of the votes; they sum to 1. Where no atlas has a vote it is background.

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
        weight = 1 / (np.maximum(apart, 0) / _LEAST_PPM**2 + 1)  # the filter's running sums may end just below 0
        votes[atlas.labels.ravel(), voxels] += np.where(atlas.measured, weight, 0).ravel()
    total = votes.sum(axis=0)
    votes[0, total == 0] = 1
    shares: NDArray[np.float32] = votes / votes.sum(axis=0)
    return shares.reshape(n_channels, *chi.shape)


def join_labels(chi: NDArray[np.floating], atlases: Sequence[Warped], *, n_channels: int) -> NDArray[np.float32]:
    """Fuse labels by ANTs' joint label fusion, which counts atlases that err alike less; else as `vote_locally`.

    Raises
    ------
    InputError
        If ANTsPy is not installed.

    Notes
    -----
    Wang H, et al. Multi-atlas segmentation with joint label fusion. IEEE Trans Pattern Anal Mach Intell 35 (2013)
    611-623. doi:10.1109/TPAMI.2012.143. ANTs' own settings, but for a search of one voxel.
    """
    ants = import_ants()
    near = ndimage.binary_dilation(np.any([atlas.labels > 0 for atlas in atlases], axis=0), iterations=2)
    probabilities = np.zeros((n_channels, *chi.shape), np.float32)
    if near.any():
        with tempfile.TemporaryDirectory(prefix="joint_label_fusion_") as folder:
            joined = ants.joint_label_fusion(
                _to_ants(chi), _to_ants(near), [_to_ants(atlas.chi) for atlas in atlases], rad=[_RADIUS] * 3,
                label_list=[_to_ants(atlas.labels) for atlas in atlases], r_search=_SEARCH,
                output_prefix=str(Path(folder) / "joined"),
            )  # fmt: skip
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
        raise InputError("ANTsPy: not installed; run `pip install antspyx` or take multiatlas") from error


def _to_ants(array: NDArray[Any]) -> Any:
    return import_ants().from_numpy(array.astype(np.float32))
