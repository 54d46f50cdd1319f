import math

import pytest
import torch

from bids_dgmseg.networks.dcn_net import DCNNet, SkipAttention, split_heads


@pytest.fixture
def network():
    return DCNNet(1, 3)


def _dense(inputs: int, layers: int) -> int:
    """Parameters of a dense block: each layer has scale and shift of its inputs and a 3³ convolution to 8."""
    return sum((2 + 27 * 8) * (inputs + 8 * layer) for layer in range(layers))


def test_number_of_parameters_matches_the_paper(network):
    # Encoder: 16 filters, then 40, 72, 112. The pyramid doubles 72, 112 and the bottleneck's 112.
    encoder = 27 * 16 + 2 * 16 + _dense(16, 3) + _dense(40, 4) + _dense(72, 5)
    pyramid = (27 + 2) * (72 + 112 + 112)
    # Transposed convolutions (with bias) keep 48, 40, 32 filters; the attended skip has as many again.
    decoder = sum(27 * f * f + f for f in (48, 40, 32)) + _dense(96, 5) + _dense(80, 4) + _dense(64, 3)
    # Skip and gate to f filters, squeeze, score of three maps with bias.
    attention = sum(skip * f + f * f + f + 3 + 1 for skip, f in ((224, 48), (144, 40), (40, 32)))
    heads = 2 * 2 * (64 + 24) + (3 * 2 + 2)
    by_hand = encoder + pyramid + _dense(224, 6) + decoder + attention + heads
    assert sum(parameter.numel() for parameter in network.parameters()) == by_hand
    # Table I says 890k: thousands, rounded or cut, so within one thousand.
    assert by_hand == pytest.approx(890_000, abs=1_000)


def test_skips_without_attention_are_convolutions():
    network, whole = DCNNet(1, 3, attention=False), DCNNet(1, 3)
    # Without gate (f^2), squeeze (f) and score (3 and a bias) of three skips, and the convolution of their scores.
    less = sum(f * f + f + 3 + 1 for f in (48, 40, 32)) + (3 * 2 + 2)
    counts = [sum(weights.numel() for weights in each.parameters()) for each in (whole, network)]
    assert counts[0] - counts[1] == less
    trained = network.train()(torch.zeros(1, 1, 16, 16, 16))
    assert trained.shape == (1, 4, 16, 16, 16)
    assert len(list(whole.decayed_weights())) - len(list(network.decayed_weights())) == 3 * 3


def test_heads_are_independent(network):
    shown = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        before = split_heads(network.eval()(shown))
        network.heads[1].weight.zero_()
        after = split_heads(network(shown))
    assert [part.shape[1] for part in before] == [2, 2]
    assert torch.equal(before[0], after[0])
    assert not after[1].any()


def test_joint_estimation_has_one_softmax():
    network = DCNNet(1, 3, dilations=((1,), (1,)), independent=False).eval()
    assert network(torch.zeros(1, 1, 4, 4, 4)).shape[1] == 3


def test_skip_attention_by_hand():
    attention = SkipAttention(skip=1, gate=1, features=2)
    weights = {
        "skip.weight": [[1], [-1]],
        "gate.weight": [[1], [2]],
        "squeeze.weight": [[1, 1]],
        "score.weight": [[1, 2, 3]],
    }
    state = {name: torch.tensor(values)[:, :, None, None, None] for name, values in weights.items()}
    attention.load_state_dict({**state, "score.bias": torch.tensor([-20.0])})
    scaled, score = attention(torch.full((1, 1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1, 1), 1.0))
    # Skip (4, -4), gate (1, 2), sum (5, -2): mean 1.5, maximum 5, squeeze 3; 1.5 + 2 * 5 + 3 * 3 - 20 = 0.5.
    expected = 1 / (1 + math.exp(-0.5))
    assert score.item() == pytest.approx(expected)
    assert scaled.flatten().tolist() == pytest.approx([4 * expected, -4 * expected])


def test_decayed_weights_match_the_published_code(network):
    names = {id(weight): name for name, weight in network.named_parameters()}
    assert sorted(names[id(weight)] for weight in network.decayed_weights()) == sorted(
        [
            "first.weight",
            *(f"pyramid.{place}.conv.weight" for place in range(3)),
            *(f"enlarge.{place}.weight" for place in range(3)),
            *(
                f"attend.{place}.{part}.weight" for place in range(3) for part in ("skip", "gate", "squeeze", "score")
            ),  # all four are of 1³
        ]
    )
