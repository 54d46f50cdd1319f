"""How much surer than right a network is, class by class."""

from __future__ import annotations

import math
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
    logits : Tensor of shape (passes, N, classes)
        Of voxels that the network has not learned from, seen once or more, such as mirrored too; the probabilities of
        the passes are averaged.
    labels : Tensor of shape (N,), integer
        Their true classes.
    shared : sequence of sequence of int
        Classes that share a temperature: left and right.
    n_iterations : int
        Of L-BFGS, at most.

    Returns
    -------
    Tensor of shape (classes,)
        The mean of ``softmax(logits / temperatures)`` has the least cross-entropy; above 1 where the network was too
        sure, 0.01 to 100: a network that needs more or less knows nothing of the class.

    Notes
    -----
    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks), with a temperature a class or a
    group of classes.
    """
    logits, labels = logits.double(), labels.long()
    of_class = torch.arange(logits.shape[2])
    for classes in shared:
        of_class[list(classes)] = classes[0]
    fitted = torch.zeros(logits.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=n_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        passes = (logits * torch.exp(-fitted[of_class])).log_softmax(dim=2)
        value = functional.nll_loss(passes.logsumexp(dim=0) - math.log(len(passes)), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return fitted.detach()[of_class].exp().clamp(_LOWEST, _HIGHEST).float()


def pick_voxels(logits: Tensor, labels: Tensor, *, n_voxels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw voxels in and near the nuclei, where a map has its doubts.

    Parameters
    ----------
    logits : Tensor of shape (passes, classes, X, Y, Z)
        Of one map, background first.
    labels : Tensor of shape (X, Y, Z), integer
        Their true classes.
    n_voxels : int
        How many, at most.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    logits : Tensor of shape (passes, n, classes)
    labels : Tensor of shape (n,)
    """
    doubtful = _find_doubtful(logits.softmax(dim=1)[:, 0].mean(dim=0), labels)
    chosen = doubtful[torch.randperm(len(doubtful), generator=generator)[:n_voxels]]
    return logits.flatten(2)[:, :, chosen].transpose(1, 2), labels.flatten()[chosen]


def doubtful_voxels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Take the voxels (n, classes) and (n,) of one map (classes, X, Y, Z) that are not surely background."""
    chosen = _find_doubtful(logits.softmax(dim=0)[0], labels)
    return logits.flatten(1)[:, chosen].T, labels.flatten()[chosen]


def _find_doubtful(background: Tensor, labels: Tensor) -> Tensor:
    """Find the places, in the flat array, of voxels that a nucleus has or that are not surely background."""
    return ((background < _SURELY_BACKGROUND) | (labels > 0)).flatten().nonzero()[:, 0]
