"""Loss functions: those of the papers, and soft Dice with cross-entropy; Dice of labels.

Logits have shape (B, C, X, Y, Z), with background in channel 0, and labels (B, X, Y, Z) hold the class of each voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.networks.dcn_net import Attended, DCNNet, split_heads

Weight = Annotated[float, msgspec.Meta(ge=0)]


class DCNNetTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the terms of DCN-Net's loss (eqs. 3, 5 and 9; the paper's values), and which equations."""

    equations: Literal["program", "paper"] = "program"
    """Those of the published program, which sums over the batch, or eqs. 3, 4 and 8 as printed."""
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


_TERMS = DCNNetTerms()


def dcn_net_loss(
    logits: Tensor, labels: Tensor, *, attention: Tensor | None = None, terms: DCNNetTerms = _TERMS
) -> Tensor:
    r"""Total loss of DCN-Net (Kim et al. 2020, eq. 9).

    .. math:: \sum_h \lambda_h L_h + \lambda_A L_A + \lambda_O L_O

    Each head's :math:`L_h` is `hybrid_loss` (eq. 5). :math:`L_A` is the cross-entropy of the attention map and
    the union of the nuclei, averaged over voxels (eq. 7). :math:`L_O` is `overlap_penalty` (eq. 8), of the whole batch
    with the program's equations.

    The logits have two channels for each of ``terms.heads``, background and nucleus (ValueError if not); label k is the
    nucleus of head k, counted from 1. `attention` are the network's auxiliary logits (B, 2, X, Y, Z); without them (in
    evaluation mode) their term is left out.
    """
    if logits.shape[1] != 2 * len(terms.heads):
        raise ValueError(f"logits have {logits.shape[1]} channels, expected {2 * len(terms.heads)}, two per head")
    heads = split_heads(logits.float())
    loss = logits.new_zeros((), dtype=torch.float32)
    for number, (head, weight) in enumerate(zip(heads, terms.heads, strict=True), start=1):
        loss = loss + weight * hybrid_loss(head, labels == number, terms=terms)
    if attention is not None:
        loss = loss + terms.attention * functional.cross_entropy(attention.float(), (labels > 0).long())
    nuclei = [head.softmax(dim=1)[:, 1] for head in heads]
    for one, other in combinations(nuclei, 2):
        if terms.equations == "program":
            one, other = one.flatten()[None], other.flatten()[None]
        loss = loss + terms.overlap * overlap_penalty(one, other)
    return loss


def hybrid_loss(logits: Tensor, labels: Tensor, *, terms: DCNNetTerms = _TERMS) -> Tensor:
    r"""Tversky and focal terms of every class, weighted by how rare it is (Kim et al. 2020, eq. 5).

    .. math:: \sum_c w_c (\pi_T TL_c + \pi_F FL_c)

    As printed (``terms.equations="paper"``) :math:`TL_c` averages over samples: one without the nucleus has the
    constant 1. :math:`FL_c` has no factor :math:`g`, and falls in voxels outside a nucleus as its probability rises
    beyond 0.6. The published program has neither property: it sums :math:`TL_c` over the batch, with the false
    positives and negatives of each class, background too, and :math:`FL_c` over the voxels of class c alone.

    :math:`w_c` is `inverse_frequency` over the batch. The classes are those of one head of DCN-Net (background and
    nucleus), or all of them when they are estimated jointly.
    """
    logits = logits.float()
    truth, probabilities = _one_hot(labels, logits), logits.softmax(dim=1)
    if terms.equations == "program":
        tversky = pooled_tversky_loss(probabilities, truth, alpha=terms.alpha, beta=terms.beta)
        axes = (0, *range(2, truth.ndim))
        focal = -(truth * (1 - probabilities).square() * logits.log_softmax(dim=1)).mean(axes)
    else:
        tversky = tversky_loss(probabilities, truth, alpha=terms.alpha, beta=terms.beta)
        focal = squared_error_focal_loss(logits, truth)
    return (inverse_frequency(truth) * (terms.tversky * tversky + terms.focal * focal)).sum()


def inverse_frequency(truth: Tensor) -> Tensor:
    r"""Weigh the classes of a one-hot batch (B, C, ...) by the inverse of their share of it.

    .. math:: w_c = N_c^{-1} / \sum_k N_k^{-1}

    The weights (C,) sum to 1. A class without a voxel has no frequency and weighs 0.
    """
    counts = truth.sum((0, *range(2, truth.ndim)))
    inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))
    return inverse / inverse.sum()


def tversky_loss(probabilities: Tensor, truth: Tensor, *, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    r"""Tversky loss (C,) of every class, averaged over samples (Kim et al. 2020, eq. 3); `truth` is one-hot.

    .. math:: TL_c = 1 - \frac{1}{n} \sum_i \frac{\sum_j p_{ijc} g_{ijc}}
              {\sum_j p_{ijc} g_{ijc} + \alpha F^+_{ic} + \beta F^-_{ic}}

    :math:`F^+_{ic} = \sum_j p_{ijc} (1 - g_{ijc})` and :math:`F^-_{ic} = \sum_j (1 - p_{ijc}) g_{ijc}` of a
    nucleus. The paper's sums have the same indices for both classes, so background has them the other way round:
    what is missed is always the foreground. They are printed with α and β exchanged; the prose holds, where β
    weighs false negatives.
    """
    axes = tuple(range(2, truth.ndim))
    hits = (probabilities * truth).sum(axes)
    too_much = (probabilities * (1 - truth)).sum(axes)
    missed = ((1 - probabilities) * truth).sum(axes)
    errors = alpha * too_much + beta * missed
    errors = torch.cat((alpha * missed[:, :1] + beta * too_much[:, :1], errors[:, 1:]), dim=1)
    return 1 - (hits / (hits + errors).clamp(min=1e-10)).mean(dim=0)


def pooled_tversky_loss(probabilities: Tensor, truth: Tensor, *, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    r"""Tversky loss (C,) of every class, its sums over the voxels j of the batch (DCN-Net's published program).

    .. math:: TL_c = 1 - \frac{\sum_j p_{jc} g_{jc}}
              {\sum_j p_{jc} g_{jc} + \alpha \sum_j p_{jc} (1 - g_{jc}) + \beta \sum_j (1 - p_{jc}) g_{jc}}
    """
    axes = (0, *range(2, truth.ndim))
    hits = (probabilities * truth).sum(axes)
    errors = alpha * (probabilities * (1 - truth)).sum(axes) + beta * ((1 - probabilities) * truth).sum(axes)
    return 1 - hits / (hits + errors).clamp(min=1e-10)


def squared_error_focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    r"""Focal term (C,) of DCN-Net for every class (Kim et al. 2020, eq. 4); `truth` is one-hot.

    .. math:: FL_c = -\frac{1}{nm} \sum_i \sum_j (g_{ijc} - p_{ijc})^2 \log p_{ijc}

    Unlike the usual focal loss it has no factor :math:`g`: voxels of other classes count too.
    """
    log_probabilities = logits.log_softmax(dim=1)
    terms = (truth - log_probabilities.exp()).square() * log_probabilities
    return -terms.mean((0, *range(2, truth.ndim)))


def overlap_penalty(one: Tensor, other: Tensor) -> Tensor:
    r"""Soft Dice of the probabilities (B, X, Y, Z) of two nuclei that must not overlap (Kim et al. 2020, eq. 8).

    .. math:: \frac{1}{n} \sum_i \frac{2 \sum_j p^D_{ij} p^I_{ij}}{\sum_j (p^D_{ij} + p^I_{ij})}
    """
    axes = tuple(range(1, one.ndim))
    return (2 * (one * other).sum(axes) / (one + other).sum(axes).clamp(min=1e-10)).mean()


def attention_unet_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    class_weights: Sequence[float] = (0.4, 0.2, 0.4),
    scale_weights: Sequence[float] = (0.6, 0.3, 0.1),
    smooth: float = 1e-2,
) -> Tensor:
    r"""Dice and binary cross-entropy of each nucleus at each scale (Zhao et al. 2022).

    .. math:: \sum_s \lambda_s \sum_c w_c \left[ 1 - \frac{2 \sum_i p_i g_i + \epsilon}
              {\sum_i p_i + \sum_i g_i + \epsilon}
              - \frac{1}{N} \sum_i (g_i \log p_i + (1 - g_i) \log (1 - p_i)) \right]

    :math:`p_i` is the softmax probability of nucleus c in pixel i, :math:`g_i` whether it is there; the sums run
    over the N pixels of the batch. There is no background term.

    Logits are 2D, (B, C, X, Z) for labels (B, X, Z): one tensor, which counts in full, or one per scale, full
    resolution first; coarser scales see every second, every fourth, … label. `class_weights` are those of red nucleus,
    substantia nigra and subthalamic nucleus (ValueError if there are not C − 1), 0.8 and 0.2 for the source classes.
    `scale_weights` are λ, 0.6, 0.2 and 0.1 for the source network. `smooth` is ε, in pixels.
    """
    if isinstance(logits, Tensor):
        logits, scale_weights = [logits], [1.0]
    if logits[0].shape[1] != 1 + len(class_weights):
        raise ValueError(f"logits have {logits[0].shape[1]} channels, expected {1 + len(class_weights)}")
    loss = logits[0].new_zeros((), dtype=torch.float32)
    for scale, weight in zip(logits, scale_weights, strict=True):
        seen = functional.interpolate(labels[:, None].float(), size=scale.shape[2:], mode="nearest")[:, 0]
        for number, share in enumerate(class_weights, start=1):
            values = scale.float()  # for each nucleus again: the order in which bfloat16 gradients are added up
            rest = torch.cat((values[:, :number], values[:, number + 1 :]), dim=1)
            nucleus = values[:, number] - rest.logsumexp(dim=1)  # its sigmoid is the softmax probability
            truth = (seen == number).to(nucleus.dtype)
            probabilities = nucleus.sigmoid()
            overlap = (2 * (probabilities * truth).sum() + smooth) / (probabilities.sum() + truth.sum() + smooth)
            cross_entropy = functional.binary_cross_entropy_with_logits(nucleus, truth)
            loss = loss + weight * share * (1 - overlap + cross_entropy)
    return loss


def deepqsmseg_loss(logits: Tensor, labels: Tensor, *, focal_weight: float = 0.5, epsilon: float = 1e-20) -> Tensor:
    r"""Dice loss plus focal loss (Guan et al. 2021, eqs. 1 to 3).

    .. math:: \frac{1}{C} \sum_c \left[ 1 - \frac{2 \sum_n p_n g_n + \epsilon}{\sum_n (p_n + g_n) + \epsilon}
              \right] - \lambda \operatorname{mean} \left( g_n (1 - p_n)^2 \log (p_n + \epsilon) \right)

    The paper prints eq. 2 without its minus. Dice sums over the voxels of the batch for each class, background
    included; the mean runs over voxels and channels alike (the paper is silent on both). It gives no value of ε
    either: the focal term stops moving probabilities that are less, and Dice hardly moves small ones, so a nucleus
    once below a larger ε would never be seen again. `focal_weight` is λ.
    """
    probabilities = logits.float().softmax(dim=1)
    truth = _one_hot(labels, probabilities)
    axes = (0, *range(2, truth.ndim))
    shared = 2 * (probabilities * truth).sum(axes) + epsilon
    dice = shared / ((probabilities + truth).sum(axes) + epsilon)
    focal = -(truth * (1 - probabilities).square() * (probabilities + epsilon).log()).mean()
    return (1 - dice).mean() + focal_weight * focal


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


def hard_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the Dice of the most probable labels per class except background; NaN for absent classes."""
    return dice_of_counts(class_counts(most_probable_classes(logits, logits.shape[1]), labels, logits.shape[1]))


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


def dice_and_cross_entropy(
    logits: Tensor, labels: Tensor, *, foreground_weight: float = 3.0, smooth: float = 1.0
) -> Tensor:
    r"""Soft Dice over the classes C that are present, plus cross-entropy.

    .. math:: 1 - \frac{1}{|C|} \sum_{c \in C} \frac{2 \sum_i p_{ci} g_{ci} + s}{\sum_i p_{ci} + \sum_i g_{ci} + s}
              - \frac{\sum_i w_{g_i} \log p_{g_i i}}{\sum_i w_{g_i}}

    The sums run over the voxels of the batch. `foreground_weight` is w of every class but the background, `smooth` is s
    in voxels.
    """
    logits, labels = logits.float(), labels.long()
    probabilities, truth = logits.softmax(dim=1), _one_hot(labels, logits)
    axes = (0, *range(2, truth.ndim))
    true = truth.sum(axes)
    overlap = (2 * (probabilities * truth).sum(axes) + smooth) / (probabilities.sum(axes) + true + smooth)
    present = (true > 0)[1:]
    dice = ((1 - overlap[1:]) * present).sum() / present.sum().clamp(min=1)
    weights = torch.full((logits.shape[1],), foreground_weight, device=logits.device)
    weights[0] = 1.0
    return dice + functional.cross_entropy(logits, labels, weight=weights)


def _kind(name: str) -> str:
    return name.removesuffix("Loss").lower()


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag=_kind):
    """Loss of a recipe; ``kind`` in its TOML file is the name of the class in lower case, without Loss."""


class DCNNetLoss(Loss, frozen=True):
    """`dcn_net_loss`, and the L2 penalty of the published program; attention counts in training mode alone."""

    terms: DCNNetTerms = _TERMS
    l2: Weight = 1e-4

    def __call__(self, network: nn.Module, answer: Attended | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; jointly estimated classes (``independent = false``) have the hybrid loss alone."""
        attention = answer.auxiliary.float() if isinstance(answer, Attended) else None
        logits = main_logits(answer)
        if logits.shape[1] == 2 * len(self.terms.heads):
            loss = dcn_net_loss(logits, labels, attention=attention, terms=self.terms)
        else:
            loss = hybrid_loss(logits, labels, terms=self.terms)
        if self.l2 and isinstance(network, DCNNet):
            squares = torch.stack([weight.square().sum() for weight in network.decayed_weights()])
            loss = loss + self.l2 * squares.sum()
        return loss


class AttentionUNetLoss(Loss, frozen=True):
    """`attention_unet_loss`."""

    class_weights: tuple[Weight, ...] = (0.4, 0.2, 0.4)
    scale_weights: tuple[Weight, ...] = (0.6, 0.3, 0.1)
    """λ, full resolution first; as many as the network has scales."""
    smooth: Weight = 1e-2

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        if isinstance(answer, list) and len(answer) != len(self.scale_weights):
            raise ValueError(f"scale_weights has {len(self.scale_weights)} values for {len(answer)} scales")
        return attention_unet_loss(
            answer, labels, class_weights=self.class_weights, scale_weights=self.scale_weights, smooth=self.smooth
        )


class DeepQSMSegLoss(Loss, frozen=True):
    """`deepqsmseg_loss`."""

    focal_weight: Weight = 0.5
    epsilon: Weight = 1e-20

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        return deepqsmseg_loss(main_logits(answer), labels, focal_weight=self.focal_weight, epsilon=self.epsilon)


class DiceCrossEntropyLoss(Loss, frozen=True):
    """`dice_and_cross_entropy`."""

    foreground_weight: Weight = 3.0
    smooth: Weight = 1.0

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        logits = main_logits(answer)
        return dice_and_cross_entropy(logits, labels, foreground_weight=self.foreground_weight, smooth=self.smooth)


AnyLoss = DCNNetLoss | AttentionUNetLoss | DeepQSMSegLoss | DiceCrossEntropyLoss
