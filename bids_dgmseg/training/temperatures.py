"""How much surer than right a network is, class by class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_SURELY_BACKGROUND = 0.99
"""Where even a network that is too sure has no doubt."""
_LOWEST, _HIGHEST = 0.01, 100.0


def fit_temperatures(
    logits: Tensor, labels: Tensor, shared: Sequence[Sequence[int]] = (), *, n_iterations: int = 50
) -> Tensor:
    """Find the temperatures that make the probabilities hold.

    Parameters
    ----------
    logits : Tensor of shape (N, classes)
        Of voxels that the network has not learned from.
    labels : Tensor of shape (N,), integer
        Their true classes.
    shared : sequence of sequence of int
        Classes that share a temperature: left and right.
    n_iterations : int
        Of L-BFGS, at most.

    Returns
    -------
    Tensor of shape (classes,)
        ``softmax(logits / temperatures)`` has the least cross-entropy; above 1 where the network was too sure, 0.01 to
        100: a network that needs more or less knows nothing of the class.

    Notes
    -----
    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks), one temperature a class.
    """
    logits, labels = logits.double(), labels.long()
    of_class = torch.arange(logits.shape[1])
    for classes in shared:
        of_class[list(classes)] = classes[0]
    fitted = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=n_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(logits * torch.exp(-fitted[of_class]), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return fitted.detach()[of_class].exp().clamp(_LOWEST, _HIGHEST).float()


def pick_voxels(logits: Tensor, labels: Tensor, *, n_voxels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw voxels in and near the nuclei, where a map has its doubts.

    Parameters
    ----------
    logits : Tensor of shape (classes, X, Y, Z)
        Of one map, background first.
    labels : Tensor of shape (X, Y, Z), integer
        Their true classes.
    n_voxels : int
        How many, at most.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    logits : Tensor of shape (n, classes)
    labels : Tensor of shape (n,)
    """
    logits, labels = doubtful_voxels(logits, labels)
    chosen = torch.randperm(len(labels), generator=generator)[:n_voxels]
    return logits[chosen], labels[chosen]


def doubtful_voxels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Take the voxels (n, classes) and (n,) of one map that are not surely background; else as `pick_voxels`."""
    near = (logits.softmax(dim=0)[0] < _SURELY_BACKGROUND) | (labels > 0)
    chosen = near.flatten().nonzero()[:, 0]
    return logits.flatten(1)[:, chosen].T, labels.flatten()[chosen]
