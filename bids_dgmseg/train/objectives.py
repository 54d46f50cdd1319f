"""Each paper's loss, from what its network answers in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from bids_dgmseg.networks.dcn_net import Attended, DCNNet, split_heads
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy
from bids_dgmseg.train.losses import (
    DCNNetTerms,
    attention_unet_loss,
    dcn_net_loss,
    deepqsmseg_loss,
    hybrid_loss,
    l2_penalty,
)
from bids_dgmseg.train.recipe_values import AnyLength


class Objective(Protocol):
    """What a training makes small."""

    def __call__(self, network: nn.Module, answer: Any, labels: Tensor) -> Tensor:
        """Compute the loss of an answer of the network; labels (B, ...) hold classes."""


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
            raise ValueError(f"scale_weights has {found}; give one a scale")
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
    """Take the logits of full resolution out of whatever a network answers."""
    logits = answer.logits if isinstance(answer, Attended) else answer
    full: Tensor = logits[0] if isinstance(logits, list) else logits
    return full


def most_probable_classes(logits: Tensor, classes: int) -> Tensor:
    """Decide the class of each voxel.

    Parameters
    ----------
    logits : Tensor of shape (B, classes, ...) or (B, 2 · (classes − 1), ...)
        One softmax over all classes, or one of two channels a nucleus.
    classes : int
        Background included.

    Returns
    -------
    Tensor of shape (B, ...)
        Of independent nuclei the most probable, where it is more probable than not.
    """
    if logits.shape[1] == classes:
        return logits.argmax(dim=1)
    nuclei = torch.stack([head[:, 1] - head[:, 0] for head in split_heads(logits)], dim=1)
    highest, place = nuclei.max(dim=1)
    return torch.where(highest > 0, place + 1, 0)
