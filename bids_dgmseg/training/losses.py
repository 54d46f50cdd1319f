"""What networks are taught to make small."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dice_and_cross_entropy(
    logits: Tensor, labels: Tensor, *, foreground_weight: float = 3.0, smooth: float = 1.0
) -> Tensor:
    r"""Soft Dice over the classes that are there, plus cross-entropy.

    .. math:: 1 - \frac{1}{|C|} \sum_{c \in C} \frac{2 \sum_i p_{ci} g_{ci} + s}{\sum_i p_{ci} + \sum_i g_{ci} + s}
              - \frac{\sum_i w_{g_i} \log p_{g_i i}}{\sum_i w_{g_i}}

    Parameters
    ----------
    logits : Tensor of shape (B, C, X, Y, Z)
        Channel 0 is background.
    labels : Tensor of shape (B, X, Y, Z), integer
        Class of each voxel.
    foreground_weight : float
        Weight w of every class but the background in the cross-entropy.
    smooth : float
        s, in voxels.

    Returns
    -------
    Tensor
        Scalar; the Dice part sums over the batch before it divides.
    """
    logits, labels = logits.float(), labels.long()
    classes = logits.shape[1]
    probabilities = logits.softmax(dim=1)
    truth = functional.one_hot(labels, classes).movedim(-1, 1).to(probabilities.dtype)
    axes = (0, 2, 3, 4)
    overlap = (2 * (probabilities * truth).sum(axes) + smooth) / (probabilities.sum(axes) + truth.sum(axes) + smooth)
    there = truth.sum(axes)[1:] > 0
    dice_loss = 1 - overlap[1:][there].mean() if there.any() else probabilities.new_zeros(())
    weights = torch.full((classes,), foreground_weight, device=logits.device)
    weights[0] = 1.0
    return dice_loss + functional.cross_entropy(logits, labels, weight=weights)
