import math

import msgspec
import pytest
import torch
from torch import Tensor

from bids_dgmseg.lab.train.losses import (
    DCNNetLoss,
    DCNNetTerms,
    attention_unet_loss,
    dcn_net_loss,
    deepqsmseg_loss,
    dice_and_cross_entropy,
    hard_dice,
    hybrid_loss,
    inverse_frequency,
    pooled_tversky_loss,
    squared_error_focal_loss,
    tversky_loss,
)
from bids_dgmseg.networks.dcn_net import DCNNet


def _logits(probabilities: list[list[float]]) -> Tensor:
    """Logits (1, C, 1, 1, N) whose softmax is the given (N, C)."""
    return torch.tensor(probabilities).log().T[None, :, None, None, :]


def _labels(*values: int) -> Tensor:
    return torch.tensor([[[list(values)]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("probabilities", "labels", "dice", "cross_entropy"),
    [
        # Class 1 is true in the second voxel only: overlap (2 * 0.8 + 1) / (0.4 + 0.8 + 1 + 1); weights 1 and 3.
        pytest.param(
            [[0.6, 0.4], [0.2, 0.8]],
            (0, 1),
            1 - 2.6 / 3.2,
            -(math.log(0.6) + 3 * math.log(0.8)) / 4,
            id="two classes",
        ),
        # Class 2 is nowhere; its false probability shows in the cross-entropy alone.
        pytest.param(
            [[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]],
            (0, 1),
            1 - (2 * 0.7 + 1) / (0.2 + 0.7 + 1 + 1),
            -(math.log(0.5) + 3 * math.log(0.7)) / 4,
            id="absent class",
        ),
        pytest.param([[0.5, 0.5], [0.25, 0.75]], (0, 0), 0.0, -(math.log(0.5) + math.log(0.25)) / 2, id="empty patch"),
    ],
)
def test_dice_and_cross_entropy_of_two_voxels(probabilities, labels, dice, cross_entropy):
    loss = dice_and_cross_entropy(_logits(probabilities), _labels(*labels))
    assert float(loss) == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_hard_dice_counts_voxels():
    # Predicted 1, 1, 0, 2 for 1, 0, 1, 0: class 1 has 2 * 1 / (2 + 2); class 2 is absent in truth.
    predicted = torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 2]), 3).T[None, :, None, None, :].float()
    dice = hard_dice(predicted, _labels(1, 0, 1, 0))
    assert dice[0] == 0.5
    assert dice[1].isnan()


# The papers' losses. Two voxels of a two-class head: background .8 and .4, nucleus .2 and .6; the second is nucleus.
HEAD = [[0.8, 0.2], [0.4, 0.6]]
TVERSKY = [1 - 0.8 / (0.8 + 0.3 * 0.2 + 0.7 * 0.4), 1 - 0.6 / (0.6 + 0.3 * 0.2 + 0.7 * 0.4)]
FOCAL = [-(0.2**2 * math.log(0.8) + 0.4**2 * math.log(0.4)) / 2, -(0.2**2 * math.log(0.2) + 0.4**2 * math.log(0.6)) / 2]


def _truth(*values: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([[[values]]]), 2).movedim(-1, 1).float()


def test_tversky_penalizes_missed_nuclei_more():
    # Nucleus: 0.6 hit, 0.2 too much (times 0.3), 0.4 missed (times 0.7). Background has the same two errors.
    loss = tversky_loss(_logits(HEAD).softmax(1), _truth(0, 1))
    assert loss.tolist() == pytest.approx(TVERSKY, rel=1e-5)


@pytest.mark.parametrize(
    ("found", "labels", "expected"),
    [
        pytest.param([(1, 0, 0)], [(1, 1, 0)], 1 - 1 / 1.7, id="one of two missed: 1 - 1 / (1 + 0.7)"),
        pytest.param([(1, 1, 0)], [(1, 0, 0)], 1 - 1 / 1.3, id="one too many: 1 - 1 / (1 + 0.3)"),
        # One sample right (0), one without any hit (1); their pooled voxels would give another value.
        pytest.param([(1, 1, 1), (0, 1, 0)], [(1, 1, 1), (1, 0, 1)], 0.5, id="mean over samples"),
    ],
)
def test_tversky_of_hard_labels(found, labels, expected):
    one, other = (torch.cat([_truth(*values) for values in samples]) for samples in (found, labels))
    assert tversky_loss(one, other)[1].item() == pytest.approx(expected)


def test_focal_term_counts_every_class():
    # (g - p)^2 log p: nucleus sees (0 - .2)^2 ln .2 and (1 - .6)^2 ln .6.
    assert squared_error_focal_loss(_logits(HEAD), _truth(0, 1)).tolist() == pytest.approx(FOCAL, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "weights"),
    [
        pytest.param([(0, 0, 0, 1)], [0.25, 0.75], id="three to one: 1/3 and 1 over their sum"),
        pytest.param([(0, 0, 0, 0)], [1.0, 0.0], id="a class that is absent has no frequency"),
        pytest.param([(0, 0), (0, 1)], [0.25, 0.75], id="over the whole batch"),
    ],
)
def test_class_weights_are_inverse_frequencies(batch, weights):
    truth = torch.cat([_truth(*labels) for labels in batch])
    assert inverse_frequency(truth).tolist() == pytest.approx(weights)


PAPER = DCNNetTerms(equations="paper")
# The program: background has too much of .4 (times .3) and lacks .2 (times .7); each class sees its own voxel alone.
PROGRAM_TVERSKY = [1 - 0.8 / (0.8 + 0.3 * 0.4 + 0.7 * 0.2), TVERSKY[1]]
PROGRAM_FOCAL = [-(0.2**2 * math.log(0.8)) / 2, -(0.4**2 * math.log(0.6)) / 2]


@pytest.mark.parametrize(
    ("terms", "tversky", "focal"),
    [
        pytest.param(PAPER, TVERSKY, FOCAL, id="paper"),
        pytest.param(DCNNetTerms(), PROGRAM_TVERSKY, PROGRAM_FOCAL, id="program"),
    ],
)
def test_hybrid_loss_averages_its_terms(terms, tversky, focal):
    # One voxel each: both classes weigh 1/2.
    expected = sum(0.5 * (0.5 * one + 0.5 * other) for one, other in zip(tversky, focal, strict=True))
    assert hybrid_loss(_logits(HEAD), _labels(0, 1), terms=terms).item() == pytest.approx(expected, rel=1e-5)


def test_pooled_tversky_sums_over_the_batch():
    # Samples (1, 1) found (1, 0) and (0, 0) found (0, 1): one hit, one too many, one missed.
    found, truth = (torch.cat([_truth(*one), _truth(*other)]) for one, other in (((1, 0), (0, 1)), ((1, 1), (0, 0))))
    assert pooled_tversky_loss(found, truth)[1].item() == pytest.approx(1 - 1 / (1 + 0.3 + 0.7))
    assert tversky_loss(found, truth)[1].item() == pytest.approx((1 - 1 / 1.7 + 1) / 2)


@pytest.mark.parametrize("with_attention", [True, False])
def test_dcn_net_loss_weights_its_terms(with_attention):
    # Voxel 1 is interposed, voxel 2 dentate. Interposed's head is dentate's with the voxels exchanged, so that
    # both have the same loss; nuclei .2, .6 and .6, .2 overlap by 2 (.12 + .12) / 1.6.
    logits = torch.cat((_logits(HEAD), _logits(HEAD[::-1])), dim=1)
    head = hybrid_loss(_logits(HEAD), _labels(0, 1)).item()
    attention = _logits([[0.1, 0.9], [0.3, 0.7]]) if with_attention else None
    expected = 2 * 1.0 * head + 0.1 * (0.48 / 1.6)
    if with_attention:
        expected += 0.5 * -(math.log(0.9) + math.log(0.7)) / 2
    assert dcn_net_loss(logits, _labels(2, 1), attention=attention).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("terms", "expected"), [(PAPER, (0.5 + 0.1) / 2), (DCNNetTerms(), 0.52 / 1.2)])
def test_overlap_is_a_sum_over_the_batch(terms, expected):
    # Voxels of .5 and .5, of .1 and .1 in another sample: 2 (.25) / 1 and 2 (.01) / .2, mean or pooled.
    same = torch.cat([_logits([[0.5, 0.5]]), _logits([[0.9, 0.1]])])
    terms = msgspec.structs.replace(terms, heads=(0, 0), overlap=1)
    loss = dcn_net_loss(torch.cat((same, same), dim=1), torch.cat([_labels(0), _labels(0)]), terms=terms)
    assert loss.item() == pytest.approx(expected)


def test_l2_penalty_is_a_sum_of_squares():
    network = DCNNet(1, 3, initial_features=2, growth=2, dilations=((1,),), bottleneck_layers=1)
    logits = torch.cat((_logits(HEAD), _logits(HEAD)), dim=1)
    with_penalty, without = (DCNNetLoss(l2=l2)(network, logits, _labels(0, 1)) for l2 in (0.1, 0.0))
    squares = sum(float(weight.detach().square().sum()) for weight in network.decayed_weights())
    assert (with_penalty - without).item() == pytest.approx(0.1 * squares, rel=1e-4)


def _flat(probabilities: list[list[float]]) -> Tensor:
    """Logits (1, C, 1, N) whose softmax is the given (N, C)."""
    return _logits(probabilities)[:, :, 0]


def test_attention_unet_loss_of_two_pixels():
    # Nucleus .2 and .6, the second is true, pixel sums .6, .8, 1 with 0.01 added.
    dice = 1 - (2 * 0.6 + 0.01) / (0.8 + 1 + 0.01)
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    loss = attention_unet_loss(_flat(HEAD), _labels(0, 1)[0], class_weights=[1.0])
    assert loss.item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_nuclei_are_weighted():
    # One pixel of class 2, all four classes probable alike: p = 1/4.
    absent = 1 - 0.01 / (0.25 + 0.01) - math.log(0.75)
    there = 1 - (0.5 + 0.01) / (0.25 + 1 + 0.01) - math.log(0.25)
    loss = attention_unet_loss(torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]]))
    assert loss.item() == pytest.approx((0.4 + 0.4) * absent + 0.2 * there, rel=1e-5)


def test_scales_are_weighted():
    # All p = 1/2. Four pixels with one of nucleus; the half scale keeps the corner, which is nucleus.
    labels = torch.tensor([[[1, 0], [0, 0]]])
    full = 1 - (2 * 0.5 + 0.01) / (2 + 1 + 0.01) + math.log(2)
    half = 1 - (2 * 0.5 + 0.01) / (0.5 + 1 + 0.01) + math.log(2)
    scales = [torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 1, 1)]
    loss = attention_unet_loss(scales, labels, class_weights=[1.0], scale_weights=(0.6, 0.3))
    assert loss.item() == pytest.approx(0.6 * full + 0.3 * half, rel=1e-5)


@pytest.mark.parametrize("loss", [dcn_net_loss, attention_unet_loss])
def test_wrong_number_of_channels_is_refused(loss):
    with pytest.raises(ValueError, match="logits have 3 channels, expected 4"):
        loss(torch.zeros(1, 3, 1, 2), torch.zeros(1, 1, 2))


def test_deepqsmseg_loss_of_two_voxels():
    # Dice: background 2 * .8 / (1.2 + 1), nucleus 2 * .6 / (.8 + 1). Focal: true classes only, mean of four values.
    dice = 1 - (1.6 / 2.2 + 1.2 / 1.8) / 2
    focal = -(0.2**2 * math.log(0.8) + 0.4**2 * math.log(0.6)) / 4
    loss = deepqsmseg_loss(_logits(HEAD), _labels(0, 1), epsilon=1e-9)
    assert loss.item() == pytest.approx(dice + 0.5 * focal, rel=1e-5)
    assert deepqsmseg_loss(_logits(HEAD), _labels(0, 1), focal_weight=0, epsilon=1e-9).item() == pytest.approx(dice)


def test_deepqsmseg_loss_keeps_a_gradient():
    # p of the nucleus is e^-25 at its one voxel. Dice has no slope there; focal -0.5 (1 - p)^2 log(p) / 4 has -1/8.
    logits = torch.tensor([[0.0, 0.0], [-25.0, -25.0]])[None, :, None, None].requires_grad_()
    (gradient,) = torch.autograd.grad(deepqsmseg_loss(logits, _labels(0, 1)), logits)
    assert gradient[0, 1, 0, 0, 1].item() == pytest.approx(-1 / 8, rel=1e-4)


PAPERS = {
    "dcn_net": lambda logits, labels: dcn_net_loss(logits, labels, attention=logits[:, :2]),
    "attention_unet": lambda logits, labels: attention_unet_loss(logits[:, :, 0], labels[:, 0]),
    "deepqsmseg": deepqsmseg_loss,
}


@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS)
@pytest.mark.parametrize("size", [0.0, 300.0])
def test_losses_and_gradients_are_finite(loss, size):
    logits = (size * torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [0.0, 1.0]]))[None, :, None, None]
    logits.requires_grad_()
    value = loss(logits, _labels(0, 1))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS)
def test_empty_patch_lowers_probabilities(loss):
    logits = torch.zeros(1, 4, 1, 1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, _labels(0, 0, 0)), logits)
    assert (gradient[:, 1] > 0).all()
