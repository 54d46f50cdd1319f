import math

import pytest
import torch
from torch import Tensor, nn

from bids_dgmseg.lab.train.core import StepResult
from bids_dgmseg.lab.train.losses import AttentionUNetLoss, DCNNetLoss, DeepQSMSegLoss, DiceCrossEntropyLoss
from bids_dgmseg.networks.dcn_net import Attended, DCNNet

NETWORK = nn.Identity()


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
            [[0.6, 0.4], [0.2, 0.8]], (0, 1), 1 - 2.6 / 3.2, -(math.log(0.6) + 3 * math.log(0.8)) / 4, id="two classes"
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
    loss = DiceCrossEntropyLoss()(NETWORK, _logits(probabilities), _labels(*labels))
    assert float(loss) == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_dice_of_a_step_counts_voxels():
    # Predicted 1, 1, 0, 2 for 1, 0, 1, 0: class 1 has 2 * 1 / (2 + 2); class 2 is absent in truth.
    predicted = nn.functional.one_hot(torch.tensor([1, 1, 0, 2]), 3).T[None, :, None, None, :].float()
    dice = StepResult(0.0, predicted, _labels(1, 0, 1, 0), None, 0.0).dice
    assert dice[0] == 0.5
    assert dice[1].isnan()


# The papers' losses. Two voxels of a two-class head: background .8 and .4, nucleus .2 and .6; the second is nucleus.
HEAD = [[0.8, 0.2], [0.4, 0.6]]
# Background has too much of .4 (times .3) and lacks .2 (times .7), the nucleus .2 and .4; each class sees its own voxel
# in the focal term; one voxel each: both weigh 1/2.
TVERSKY = [1 - 0.8 / (0.8 + 0.3 * 0.4 + 0.7 * 0.2), 1 - 0.6 / (0.6 + 0.3 * 0.2 + 0.7 * 0.4)]
FOCAL = [-(0.2**2 * math.log(0.8)) / 2, -(0.4**2 * math.log(0.6)) / 2]
HYBRID = 0.25 * sum((*TVERSKY, *FOCAL))


def test_hybrid_loss_averages_its_terms():
    assert DCNNetLoss().hybrid(_logits(HEAD), _labels(0, 1)).item() == pytest.approx(HYBRID, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        pytest.param((0, 0, 0, 1), [0.25, 0.75], id="three to one: 1/3 and 1 over their sum"),
        pytest.param((0, 0, 0, 0), [1.0, 0.0], id="a class that is absent has no frequency"),
    ],
)
def test_class_weights_are_inverse_frequencies(labels, weights):
    # All p are 1/2 and the focal term is off: with n of N voxels TL is 1 - n / (n + .3 (N - n) + .7 n).
    tversky = [1 - n / (n + 0.3 * (4 - n) + 0.7 * n) for n in (labels.count(0), labels.count(1))]
    loss = DCNNetLoss(tversky=1, focal=0).hybrid(torch.zeros(1, 2, 1, 1, 4), _labels(*labels))
    assert loss.item() == pytest.approx(sum(w * tl for w, tl in zip(weights, tversky, strict=True)), rel=1e-5)


@pytest.mark.parametrize("with_attention", [True, False])
def test_dcn_net_loss_weights_its_terms(with_attention):
    # Voxel 1 is interposed, voxel 2 dentate. Interposed's head is dentate's with the voxels exchanged, so that
    # both have the same loss; nuclei .2, .6 and .6, .2 overlap by 2 (.12 + .12) / 1.6.
    logits = torch.cat((_logits(HEAD), _logits(HEAD[::-1])), dim=1)
    expected = 2 * 1.0 * HYBRID + 0.1 * (0.48 / 1.6)
    answer: Tensor | Attended = logits
    if with_attention:
        answer = Attended(logits, _logits([[0.1, 0.9], [0.3, 0.7]]))
        expected += 0.5 * -(math.log(0.9) + math.log(0.7)) / 2
    assert DCNNetLoss()(NETWORK, answer, _labels(2, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_overlap_is_a_sum_over_the_batch():
    # Voxels of .5 and .5, of .1 and .1 in another sample: 2 (.25 + .01) / 1.2
    same = torch.cat([_logits([[0.5, 0.5]]), _logits([[0.9, 0.1]])])
    loss = DCNNetLoss(heads=(0, 0), overlap=1)(NETWORK, torch.cat((same, same), dim=1), _labels(0).expand(2, 1, 1, 1))
    assert loss.item() == pytest.approx(0.52 / 1.2)


def test_l2_penalty_is_a_sum_of_squares():
    network = DCNNet(1, 3, initial_features=2, growth=2, dilations=((1,),), bottleneck_layers=1)
    logits = torch.cat((_logits(HEAD), _logits(HEAD)), dim=1)
    with_penalty, without = (DCNNetLoss(l2=l2)(network, logits, _labels(0, 1)) for l2 in (0.1, 0.0))
    squares = sum(float(weight.detach().square().sum()) for weight in network.decayed_weights())
    assert (with_penalty - without).item() == pytest.approx(0.1 * squares, rel=1e-4)


def test_attention_unet_loss_of_two_pixels():
    # Nucleus .2 and .6, the second is true, pixel sums .6, .8, 1 with 0.01 added.
    dice = 1 - (2 * 0.6 + 0.01) / (0.8 + 1 + 0.01)
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    loss = AttentionUNetLoss(class_weights=(1.0,))(NETWORK, _logits(HEAD)[:, :, 0], _labels(0, 1)[0])
    assert loss.item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_nuclei_are_weighted():
    # One pixel of class 2, all four classes probable alike: p = 1/4.
    absent = 1 - 0.01 / (0.25 + 0.01) - math.log(0.75)
    there = 1 - (0.5 + 0.01) / (0.25 + 1 + 0.01) - math.log(0.25)
    loss = AttentionUNetLoss()(NETWORK, torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]]))
    assert loss.item() == pytest.approx((0.4 + 0.4) * absent + 0.2 * there, rel=1e-5)


def test_scales_are_weighted():
    # All p = 1/2. Four pixels with one of nucleus; the half scale keeps the corner, which is nucleus.
    labels = torch.tensor([[[1, 0], [0, 0]]])
    full = 1 - (2 * 0.5 + 0.01) / (2 + 1 + 0.01) + math.log(2)
    half = 1 - (2 * 0.5 + 0.01) / (0.5 + 1 + 0.01) + math.log(2)
    scales = [torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 1, 1)]
    loss = AttentionUNetLoss(class_weights=(1.0,), scale_weights=(0.6, 0.3))(NETWORK, scales, labels)
    assert loss.item() == pytest.approx(0.6 * full + 0.3 * half, rel=1e-5)


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="logits have 3 channels, expected 4"):
        AttentionUNetLoss()(NETWORK, torch.zeros(1, 3, 1, 2), torch.zeros(1, 1, 2))


def test_deepqsmseg_loss_of_two_voxels():
    # Dice: background 2 * .8 / (1.2 + 1), nucleus 2 * .6 / (.8 + 1). Focal: true classes only, mean of four values.
    dice = 1 - (1.6 / 2.2 + 1.2 / 1.8) / 2
    focal = -(0.2**2 * math.log(0.8) + 0.4**2 * math.log(0.6)) / 4
    loss = DeepQSMSegLoss()(NETWORK, _logits(HEAD), _labels(0, 1))
    assert loss.item() == pytest.approx(dice + 0.5 * focal, rel=1e-5)


def test_deepqsmseg_loss_keeps_a_gradient():
    # p of the nucleus is e^-25 at its one voxel. Dice has no slope there; focal -0.5 (1 - p)^2 log(p) / 4 has -1/8.
    logits = torch.tensor([[0.0, 0.0], [-25.0, -25.0]])[None, :, None, None].requires_grad_()
    (gradient,) = torch.autograd.grad(DeepQSMSegLoss()(NETWORK, logits, _labels(0, 1)), logits)
    assert gradient[0, 1, 0, 0, 1].item() == pytest.approx(-1 / 8, rel=1e-4)


PAPERS = {
    "dcn_net": lambda logits, labels: DCNNetLoss()(NETWORK, Attended(logits, logits[:, :2]), labels),
    "attention_unet": lambda logits, labels: AttentionUNetLoss()(NETWORK, logits[:, :, 0], labels[:, 0]),
    "deepqsmseg": lambda logits, labels: DeepQSMSegLoss()(NETWORK, logits, labels),
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
