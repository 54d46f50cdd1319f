"""Loss functions of the papers, and objectives: losses with their parameters, as recipes name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.networks.dcn_net import Attended, DCNNet, split_heads
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy
from bids_dgmseg.train.recipe_values import AnyLength


@dataclass(frozen=True)
class DCNNetTerms:
    """Weights of the terms of DCN-Net's loss (eqs. 3, 5 and 9; the paper's values)."""

    heads: tuple[float, ...] = (1.0, 1.0)
    """λ of dentate and interposed."""
    attention: float = 0.5
    overlap: float = 0.1
    tversky: float = 0.5
    focal: float = 0.5
    alpha: float = 0.3
    """Weight of false positives in the Tversky term."""
    beta: float = 0.7
    """Weight of false negatives in the Tversky term."""


def dcn_net_loss(
    logits: Tensor, labels: Tensor, *, attention: Tensor | None = None, terms: DCNNetTerms = DCNNetTerms()
) -> Tensor:
    r"""Total loss of DCN-Net (Kim et al. 2020, eq. 9).

    .. math:: \sum_h \lambda_h L_h + \lambda_A L_A + \lambda_O L_O

    Each head's :math:`L_h` is `hybrid_loss` (eq. 5). :math:`L_A` is the cross-entropy of the attention map and
    the union of the nuclei, averaged over voxels (eq. 7). :math:`L_O` is `overlap_penalty` (eq. 8).

    Parameters
    ----------
    logits : Tensor of shape (B, 2 · nuclei, X, Y, Z)
        Background and nucleus of each head in turn.
    labels : Tensor of shape (B, X, Y, Z), integer
        0 background, k the nucleus of head k, counted from 1.
    attention : Tensor of shape (B, 2, X, Y, Z), optional
        The network's auxiliary logits; without them (in evaluation mode) their term is left out.
    terms : DCNNetTerms
        The weights.

    Raises
    ------
    ValueError
        If the logits have not two channels for each of ``terms.heads``.
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
        loss = loss + terms.overlap * overlap_penalty(one, other)
    return loss


def hybrid_loss(logits: Tensor, labels: Tensor, *, terms: DCNNetTerms = DCNNetTerms()) -> Tensor:
    r"""Tversky and focal terms of every class, weighted by how rare it is (Kim et al. 2020, eq. 5).

    .. math:: \sum_c w_c (\pi_T TL_c + \pi_F FL_c)

    Parameters
    ----------
    logits : Tensor of shape (B, C, X, Y, Z)
        Channel 0 is background; two channels per head of DCN-Net, all classes when they are estimated jointly.
    labels : Tensor of shape (B, X, Y, Z), integer or bool
        Class of each voxel.
    terms : DCNNetTerms
        The weights.

    Returns
    -------
    Tensor
        Scalar; :math:`w_c` is `inverse_frequency` over the batch.
    """
    logits = logits.float()
    truth = _one_hot(labels, logits)
    tversky = tversky_loss(logits.softmax(dim=1), truth, alpha=terms.alpha, beta=terms.beta)
    focal = squared_error_focal_loss(logits, truth)
    return (inverse_frequency(truth) * (terms.tversky * tversky + terms.focal * focal)).sum()


def inverse_frequency(truth: Tensor) -> Tensor:
    r"""Weigh the classes of a batch by the inverse of their share of it.

    .. math:: w_c = N_c^{-1} / \sum_k N_k^{-1}

    Parameters
    ----------
    truth : Tensor of shape (B, C, ...)
        One-hot.

    Returns
    -------
    Tensor of shape (C,)
        Sums to 1. A class without a voxel has no frequency and weighs 0.
    """
    counts = truth.sum((0, *range(2, truth.ndim)))
    inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))
    return inverse / inverse.sum()


def tversky_loss(probabilities: Tensor, truth: Tensor, *, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    r"""Tversky loss of every class, averaged over samples (Kim et al. 2020, eq. 3).

    .. math:: TL_c = 1 - \frac{1}{n} \sum_i \frac{\sum_j p_{ijc} g_{ijc}}
              {\sum_j p_{ijc} g_{ijc} + \alpha F^+_{ic} + \beta F^-_{ic}}

    :math:`F^+_{ic} = \sum_j p_{ijc} (1 - g_{ijc})` and :math:`F^-_{ic} = \sum_j (1 - p_{ijc}) g_{ijc}` of a
    nucleus. The paper's sums have the same indices for both classes, so background has them the other way round:
    what is missed is always the foreground. They are printed with α and β exchanged; the prose holds, where β
    weighs false negatives.

    Parameters
    ----------
    probabilities : Tensor of shape (B, C, X, Y, Z)
        Channel 0 is background.
    truth : Tensor of the same shape
        One-hot.
    alpha, beta : float
        Weights of false positives and of false negatives.

    Returns
    -------
    Tensor of shape (C,)
        From 0 to 1.
    """
    axes = tuple(range(2, truth.ndim))
    hits = (probabilities * truth).sum(axes)
    too_much = (probabilities * (1 - truth)).sum(axes)
    missed = ((1 - probabilities) * truth).sum(axes)
    errors = alpha * too_much + beta * missed
    errors = torch.cat((alpha * missed[:, :1] + beta * too_much[:, :1], errors[:, 1:]), dim=1)
    return 1 - (hits / (hits + errors).clamp(min=1e-10)).mean(dim=0)


def squared_error_focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    r"""Focal term of DCN-Net for every class (Kim et al. 2020, eq. 4).

    .. math:: FL_c = -\frac{1}{nm} \sum_i \sum_j (g_{ijc} - p_{ijc})^2 \log p_{ijc}

    Unlike the usual focal loss it has no factor :math:`g`: voxels of other classes count too.

    Parameters
    ----------
    logits : Tensor of shape (B, C, X, Y, Z)
        Before the softmax.
    truth : Tensor of the same shape
        One-hot.

    Returns
    -------
    Tensor of shape (C,)
    """
    log_probabilities = logits.log_softmax(dim=1)
    terms = (truth - log_probabilities.exp()).square() * log_probabilities
    return -terms.mean((0, *range(2, truth.ndim)))


def overlap_penalty(one: Tensor, other: Tensor) -> Tensor:
    r"""Soft Dice of two nuclei that must not overlap (Kim et al. 2020, eq. 8).

    .. math:: \frac{1}{n} \sum_i \frac{2 \sum_j p^D_{ij} p^I_{ij}}{\sum_j (p^D_{ij} + p^I_{ij})}

    Parameters
    ----------
    one, other : Tensor of shape (B, X, Y, Z)
        Probabilities of the nuclei.
    """
    axes = tuple(range(1, one.ndim))
    return (2 * (one * other).sum(axes) / (one + other).sum(axes).clamp(min=1e-10)).mean()


def l2_penalty(weights: Iterable[Tensor], *, factor: float = 1e-4) -> Tensor:
    """Sum of squares times a factor, for the weights that `DCNNet.decayed_weights` yields."""
    return factor * torch.stack([weight.square().sum() for weight in weights]).sum()


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

    Parameters
    ----------
    logits : Tensor of shape (B, C, X, Z), or one per scale, full resolution first
        Channel 0 is background. A single tensor counts in full.
    labels : Tensor of shape (B, X, Z), integer
        Class of each pixel; coarser scales see every second, every fourth, ….
    class_weights : sequence of C − 1 float
        Of red nucleus, substantia nigra and subthalamic nucleus; 0.8 and 0.2 for the two source classes.
    scale_weights : sequence of float
        λ; 0.6, 0.2, 0.1 for the source network.
    smooth : float
        ε, in pixels.

    Raises
    ------
    ValueError
        If the number of weights differs from that of the nuclei.
    """
    if isinstance(logits, Tensor):
        logits, scale_weights = [logits], [1.0]
    if logits[0].shape[1] != 1 + len(class_weights):
        raise ValueError(f"logits have {logits[0].shape[1]} channels, expected {1 + len(class_weights)}")
    loss = logits[0].new_zeros((), dtype=torch.float32)
    for scale, weight in zip(logits, scale_weights, strict=True):
        seen = functional.interpolate(labels[:, None].float(), size=scale.shape[2:], mode="nearest")[:, 0]
        for number, share in enumerate(class_weights, start=1):
            nucleus = _against_the_rest(scale.float(), number)
            loss = loss + weight * share * _dice_and_binary_cross_entropy(nucleus, seen == number, smooth)
    return loss


def _against_the_rest(logits: Tensor, number: int) -> Tensor:
    """Logit whose sigmoid is the softmax probability of one class."""
    rest = torch.cat((logits[:, :number], logits[:, number + 1 :]), dim=1)
    return logits[:, number] - rest.logsumexp(dim=1)


def _dice_and_binary_cross_entropy(logits: Tensor, labels: Tensor, smooth: float) -> Tensor:
    truth = labels.to(logits.dtype)
    probabilities = logits.sigmoid()
    overlap = (2 * (probabilities * truth).sum() + smooth) / (probabilities.sum() + truth.sum() + smooth)
    return 1 - overlap + functional.binary_cross_entropy_with_logits(logits, truth)


def deepqsmseg_loss(logits: Tensor, labels: Tensor, *, focal_weight: float = 0.5, epsilon: float = 1e-20) -> Tensor:
    r"""Dice loss plus focal loss (Guan et al. 2021, eqs. 1 to 3).

    .. math:: \frac{1}{C} \sum_c \left[ 1 - \frac{2 \sum_n p_n g_n + \epsilon}{\sum_n (p_n + g_n) + \epsilon}
              \right] - \lambda \operatorname{mean} \left( g_n (1 - p_n)^2 \log (p_n + \epsilon) \right)

    The paper prints eq. 2 without its minus. Dice sums over the voxels of the batch for each class, background
    included; the mean runs over voxels and channels alike (the paper is silent on both).

    Parameters
    ----------
    logits : Tensor of shape (B, C, X, Y, Z)
        Channel 0 is background.
    labels : Tensor of shape (B, X, Y, Z), integer
        Class of each voxel.
    focal_weight : float
        λ.
    epsilon : float
        ε of both equations (the paper gives no value). The focal term stops moving probabilities that are less, and
        Dice hardly moves small ones: a nucleus once below a larger ε would never be seen again.
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


class Objective(Protocol):
    """A loss function of a network's output in training mode."""

    def __call__(self, network: nn.Module, answer: Any, labels: Tensor) -> Tensor:
        """Compute the loss; labels (B, ...) hold classes."""


@dataclass(frozen=True)
class DCNNetObjective:
    """`dcn_net_loss`, and the L2 penalty of the published program; attention counts in training mode alone."""

    terms: DCNNetTerms = field(default_factory=DCNNetTerms)
    l2: float = 1e-4

    def __call__(self, network: nn.Module, answer: Attended | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; jointly estimated classes (``independent = false``) have the hybrid loss alone."""
        attention = answer.auxiliary.float() if isinstance(answer, Attended) else None
        logits = main_logits(answer)
        if logits.shape[1] == 2 * len(self.terms.heads):
            loss = dcn_net_loss(logits, labels, attention=attention, terms=self.terms)
        else:
            loss = hybrid_loss(logits, labels, terms=self.terms)
        if self.l2 and isinstance(network, DCNNet):
            loss = loss + l2_penalty(network.decayed_weights(), factor=self.l2)
        return loss


@dataclass(frozen=True)
class AttentionUNetObjective:
    """`attention_unet_loss`."""

    class_weights: tuple[float, ...] = (0.4, 0.2, 0.4)
    scale_weights: Annotated[tuple[float, ...], AnyLength()] = (0.6, 0.3, 0.1)
    """λ, full resolution first; as many as the network has scales."""
    smooth: float = 1e-2

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        if isinstance(answer, list) and len(answer) != len(self.scale_weights):
            found = f"{len(self.scale_weights)} values for {len(answer)} scales of the network"
            raise ValueError(f"scale_weights has {found}; give one per scale")
        return attention_unet_loss(
            answer, labels, class_weights=self.class_weights, scale_weights=self.scale_weights, smooth=self.smooth
        )


@dataclass(frozen=True)
class DeepQSMSegObjective:
    """`deepqsmseg_loss`."""

    focal_weight: float = 0.5
    epsilon: float = 1e-20

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        return deepqsmseg_loss(main_logits(answer), labels, focal_weight=self.focal_weight, epsilon=self.epsilon)


@dataclass(frozen=True)
class DiceCrossEntropyObjective:
    """`dice_and_cross_entropy`."""

    foreground_weight: float = 3.0
    smooth: float = 1.0

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        logits = main_logits(answer)
        return dice_and_cross_entropy(logits, labels, foreground_weight=self.foreground_weight, smooth=self.smooth)


def main_logits(answer: Any) -> Tensor:
    """Return the logits at full resolution of a network's output in training or evaluation mode."""
    logits = answer.logits if isinstance(answer, Attended) else answer
    full: Tensor = logits[0] if isinstance(logits, list) else logits
    return full


def most_probable_classes(logits: Tensor, classes: int) -> Tensor:
    """Return the most probable class of each voxel.

    Parameters
    ----------
    logits : Tensor of shape (B, classes, ...) or (B, 2 · (classes − 1), ...)
        One softmax over all classes, or one with two channels per nucleus.
    classes : int
        Background included.

    Returns
    -------
    Tensor of shape (B, ...)
        Of independent nuclei the most probable one, if its probability exceeds one half.
    """
    if logits.shape[1] == classes:
        return logits.argmax(dim=1)
    nuclei = torch.stack([head[:, 1] - head[:, 0] for head in split_heads(logits)], dim=1)
    highest, place = nuclei.max(dim=1)
    return torch.where(highest > 0, place + 1, 0)
