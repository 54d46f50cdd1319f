import math

import pytest
import torch

from bids_dgmseg.training.loop import hard_dice
from bids_dgmseg.training.losses import dice_and_cross_entropy


def _logits(probabilities):
    """Logits (1, C, 1, 1, N) whose softmax is the given (N, C)."""
    return torch.tensor(probabilities).log().T[None, :, None, None, :]


def _labels(*values):
    return torch.tensor([[[list(values)]]], dtype=torch.uint8)


def test_the_loss_of_two_voxels_by_hand():
    # Class 1 is true in the second voxel only: overlap (2 * 0.8 + 1) / (0.4 + 0.8 + 1 + 1) = 2.6 / 3.2.
    # Cross-entropy with weights 1 and 3: -(1 ln 0.6 + 3 ln 0.8) / 4.
    loss = dice_and_cross_entropy(_logits([[0.6, 0.4], [0.2, 0.8]]), _labels(0, 1))
    expected = (1 - 2.6 / 3.2) - (math.log(0.6) + 3 * math.log(0.8)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_class_that_is_absent_does_not_count_for_dice():
    # Class 2 is nowhere; its false probability shows in the cross-entropy alone.
    loss = dice_and_cross_entropy(_logits([[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]]), _labels(0, 1))
    expected = 1 - (2 * 0.7 + 1) / (0.2 + 0.7 + 1 + 1) - (math.log(0.5) + 3 * math.log(0.7)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_an_empty_patch_has_cross_entropy_alone():
    loss = dice_and_cross_entropy(_logits([[0.5, 0.5], [0.25, 0.75]]), _labels(0, 0))
    assert float(loss) == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2, rel=1e-5)


def test_hard_dice_counts_voxels():
    # Predicted 1, 1, 0, 2 for 1, 0, 1, 0: class 1 has 2 * 1 / (2 + 2); class 2 is absent in truth.
    predicted = torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 2]), 3).T[None, :, None, None, :].float()
    dice = hard_dice(predicted, _labels(1, 0, 1, 0))
    assert dice[0] == 0.5
    assert dice[1].isnan()
