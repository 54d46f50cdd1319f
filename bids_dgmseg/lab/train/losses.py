"""Losses of the recipes: those of the papers, and soft Dice with cross-entropy; Dice of labels.

Logits have shape (B, C, X, Y, Z), with background in channel 0, and labels (B, X, Y, Z) hold the class of each voxel.
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.networks.dcn_net import Attended, DenseNetwork, split_heads

Weight = Annotated[float, msgspec.Meta(ge=0)]


def _kind(name: str) -> str:
    return name.removesuffix("Loss").lower()


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag=_kind):
    """Loss of a recipe; ``kind`` in its TOML file is the name of the class in lower case, without Loss.

    It is called with a network, its output in training mode, and the labels.
    """


class DCNNetLoss(Loss, frozen=True):
    r"""Total loss of DCN-Net (Kim et al. 2020, eq. 9), with the L2 penalty of the published program.

    .. math:: \sum_h \lambda_h L_h + \lambda_A L_A + \lambda_O L_O

    Each head's :math:`L_h` is `hybrid` (eq. 5). :math:`L_A` is the cross-entropy of the attention map and the union of
    the nuclei, averaged over voxels (eq. 7); it counts in training mode alone. :math:`L_O` is the soft Dice of the
    probabilities of two nuclei, which must not overlap, over the voxels j of the batch (eq. 8):

    .. math:: \frac{2 \sum_j p^D_j p^I_j}{\sum_j (p^D_j + p^I_j)}

    The logits have two channels per head, background and nucleus; label k is the nucleus of head k, counted from 1.
    Jointly estimated classes (``independent = false``) have the hybrid loss alone.
    """

    heads: tuple[Weight, ...] = (1.0, 1.0)
    """λ of dentate and interposed."""
    attention: Weight = 0.5
    overlap: Weight = 0.1
    tversky: Weight = 0.5
    focal: Weight = 0.5
    alpha: Weight = 0.3
    """Weight of false positives in the Tversky term."""
    beta: Weight = 0.7
    """Weight of false negatives in the Tversky term."""
    l2: Weight = 1e-4

    def __call__(self, network: nn.Module, answer: Attended | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        logits = main_logits(answer).float()
        if logits.shape[1] != 2 * len(self.heads):
            loss = self.hybrid(logits, labels)
        else:
            heads = split_heads(logits)
            loss = logits.new_zeros(())
            for number, (head, weight) in enumerate(zip(heads, self.heads, strict=True), start=1):
                loss = loss + weight * self.hybrid(head, labels == number)
            if isinstance(answer, Attended):
                union = (labels > 0).long()
                loss = loss + self.attention * functional.cross_entropy(answer.auxiliary.float(), union)
            for first, second in combinations([head.softmax(dim=1)[:, 1] for head in heads], 2):
                penalty = 2 * (first * second).sum() / (first + second).sum().clamp(min=1e-10)
                loss = loss + self.overlap * penalty
        if self.l2 and isinstance(network, DenseNetwork):
            squares = torch.stack([weight.square().sum() for weight in network.decayed_weights()])
            loss = loss + self.l2 * squares.sum()
        return loss

    def hybrid(self, logits: Tensor, labels: Tensor) -> Tensor:
        r"""Tversky and focal terms of every class, weighted by how rare it is (Kim et al. 2020, eq. 5).

        .. math:: \sum_c w_c (\pi_T TL_c + \pi_F FL_c), \quad w_c = N_c^{-1} / \sum_k N_k^{-1}

        .. math:: TL_c = 1 - \frac{\sum_j p_{jc} g_{jc}}
                  {\sum_j p_{jc} g_{jc} + \alpha \sum_j p_{jc} (1 - g_{jc}) + \beta \sum_j (1 - p_{jc}) g_{jc}}

        .. math:: FL_c = -\frac{1}{n} \sum_j g_{jc} (1 - p_{jc})^2 \log p_{jc}

        The sums run over the n voxels of the batch, as in the published program; :math:`N_c` is the number of voxels
        of class c, and an absent class weighs 0. As printed, eq. 3 averages over samples, so that one without the
        nucleus has the constant 1, and eq. 4 has no factor :math:`g`, so that it falls outside a nucleus as its
        probability rises beyond 0.6. The classes are those of one head (background and nucleus), or all of them.
        """
        truth, p = _one_hot(labels, logits), logits.softmax(dim=1)
        axes = (0, *range(2, truth.ndim))
        hits = (p * truth).sum(axes)
        errors = self.alpha * (p * (1 - truth)).sum(axes) + self.beta * ((1 - p) * truth).sum(axes)
        tversky = 1 - hits / (hits + errors).clamp(min=1e-10)
        focal = -(truth * (1 - p).square() * logits.log_softmax(dim=1)).mean(axes)
        counts = truth.sum(axes)
        inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))
        return (inverse / inverse.sum() * (self.tversky * tversky + self.focal * focal)).sum()


class AttentionUNetLoss(Loss, frozen=True):
    r"""Dice and binary cross-entropy of each nucleus at each scale (Zhao et al. 2022).

    .. math:: \sum_s \lambda_s \sum_c w_c \left[ 1 - \frac{2 \sum_i p_i g_i + \epsilon}
              {\sum_i p_i + \sum_i g_i + \epsilon}
              - \frac{1}{N} \sum_i (g_i \log p_i + (1 - g_i) \log (1 - p_i)) \right]

    :math:`p_i` is the softmax probability of nucleus c in pixel i, :math:`g_i` whether it is there; the sums run
    over the N pixels of the batch. There is no background term.

    Logits are 2D, (B, C, X, Z) for labels (B, X, Z): one tensor, which counts in full, or one per scale, full
    resolution first; coarser scales see every second, every fourth, … label.
    """

    class_weights: tuple[Weight, ...] = (0.4, 0.2, 0.4)
    """Red nucleus, substantia nigra and subthalamic nucleus; 0.8 and 0.2 for the source classes."""
    scale_weights: tuple[Weight, ...] = (0.6, 0.3, 0.1)
    """λ, full resolution first, as many as the network has scales; 0.6, 0.2 and 0.1 for the source network."""
    smooth: Weight = 1e-2
    """ε, in pixels."""

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; ValueError if there are other numbers of weights than of nuclei or scales."""
        scales, weights = ([answer], (1.0,)) if isinstance(answer, Tensor) else (answer, self.scale_weights)
        if len(scales) != len(weights):
            raise ValueError(f"scale_weights has {len(weights)} values for {len(scales)} scales")
        if scales[0].shape[1] != 1 + len(self.class_weights):
            raise ValueError(f"logits have {scales[0].shape[1]} channels, expected {1 + len(self.class_weights)}")
        loss = scales[0].new_zeros((), dtype=torch.float32)
        for scale, weight in zip(scales, weights, strict=True):
            seen = functional.interpolate(labels[:, None].float(), size=scale.shape[2:], mode="nearest")[:, 0]
            for number, share in enumerate(self.class_weights, start=1):
                values = scale.float()  # for each nucleus again: the order in which bfloat16 gradients are added up
                rest = torch.cat((values[:, :number], values[:, number + 1 :]), dim=1)
                nucleus = values[:, number] - rest.logsumexp(dim=1)  # its sigmoid is the softmax probability
                truth = (seen == number).to(nucleus.dtype)
                p = nucleus.sigmoid()
                overlap = (2 * (p * truth).sum() + self.smooth) / (p.sum() + truth.sum() + self.smooth)
                cross_entropy = functional.binary_cross_entropy_with_logits(nucleus, truth)
                loss = loss + weight * share * (1 - overlap + cross_entropy)
        return loss


class DeepQSMSegLoss(Loss, frozen=True):
    r"""Dice loss plus focal loss (Guan et al. 2021, eqs. 1 to 3).

    .. math:: \frac{1}{C} \sum_c \left[ 1 - \frac{2 \sum_n p_n g_n + \epsilon}{\sum_n (p_n + g_n) + \epsilon}
              \right] - \lambda \operatorname{mean} \left( g_n (1 - p_n)^2 \log (p_n + \epsilon) \right)

    The paper prints eq. 2 without its minus. Dice sums over the voxels of the batch for each class, background
    included; the mean runs over voxels and channels alike (the paper is silent on both). It gives no value of ε
    either: the focal term stops moving probabilities that are less, and Dice hardly moves small ones, so a nucleus
    once below a larger ε would never be seen again.
    """

    focal_weight: Weight = 0.5
    """λ."""
    epsilon: Weight = 1e-20

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        p = main_logits(answer).float().softmax(dim=1)
        truth = _one_hot(labels, p)
        axes = (0, *range(2, truth.ndim))
        dice = (2 * (p * truth).sum(axes) + self.epsilon) / ((p + truth).sum(axes) + self.epsilon)
        focal = -(truth * (1 - p).square() * (p + self.epsilon).log()).mean()
        return (1 - dice).mean() + self.focal_weight * focal


class DiceCrossEntropyLoss(Loss, frozen=True):
    r"""Soft Dice over the classes C that are present, plus cross-entropy.

    .. math:: 1 - \frac{1}{|C|} \sum_{c \in C} \frac{2 \sum_i p_{ci} g_{ci} + s}{\sum_i p_{ci} + \sum_i g_{ci} + s}
              - \frac{\sum_i w_{g_i} \log p_{g_i i}}{\sum_i w_{g_i}}

    The sums run over the voxels of the batch.
    """

    foreground_weight: Weight = 3.0
    """w of every class but the background."""
    smooth: Weight = 1.0
    """s, in voxels."""

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        logits, labels = main_logits(answer).float(), labels.long()
        p, truth = logits.softmax(dim=1), _one_hot(labels, logits)
        axes = (0, *range(2, truth.ndim))
        true = truth.sum(axes)
        overlap = (2 * (p * truth).sum(axes) + self.smooth) / (p.sum(axes) + true + self.smooth)
        present = (true > 0)[1:]
        dice = ((1 - overlap[1:]) * present).sum() / present.sum().clamp(min=1)
        weights = torch.full((logits.shape[1],), self.foreground_weight, device=logits.device)
        weights[0] = 1.0
        return dice + functional.cross_entropy(logits, labels, weight=weights)


AnyLoss = DCNNetLoss | AttentionUNetLoss | DeepQSMSegLoss | DiceCrossEntropyLoss


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Spread labels (B, ...) over the channels (B, C, ...) of logits or probabilities."""
    return functional.one_hot(labels.long(), like.shape[1]).movedim(-1, 1).to(like.dtype)


def main_logits(answer: Any) -> Tensor:
    """Return the logits at full resolution of a network's output in training or evaluation mode."""
    logits = answer.logits if isinstance(answer, Attended) else answer
    full: Tensor = logits[0] if isinstance(logits, list) else logits
    return full


def most_probable_classes(logits: Tensor, classes: int) -> Tensor:
    """Return the most probable class (B, ...) of each voxel.

    Logits have one softmax over all `classes`, background included, or one with two channels per nucleus. Of such
    independent nuclei the most probable one is returned, if its probability exceeds one half.
    """
    if logits.shape[1] == classes:
        return logits.max(dim=1).indices  # argmax takes ten times as long on CPUs
    nuclei = torch.stack([head[:, 1] - head[:, 0] for head in split_heads(logits)], dim=1)
    highest, place = nuclei.max(dim=1)
    return torch.where(highest > 0, place + 1, 0)


def class_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the voxels per class (3, classes): of the reference, of the prediction, of both."""
    truth, both = labels.flatten(), labels[labels == predicted].flatten()
    return torch.stack(
        [torch.bincount(values.long(), minlength=classes).float() for values in (truth, predicted.flatten(), both)]
    )


def dice_of_counts(counts: Tensor) -> Tensor:
    """Compute the Dice per class except background from `class_counts`; NaN for classes absent from the reference."""
    truth, predicted, both = counts
    return torch.where(truth > 0, 2 * both / (truth + predicted), torch.nan)[1:]
