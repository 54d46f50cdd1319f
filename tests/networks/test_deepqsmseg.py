import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import nn

from bids_dgmseg.networks.deepqsmseg import ChannelAttention, DeepQSMSeg, VoxelAttention


@pytest.fixture(scope="module")
def network():
    return DeepQSMSeg(1, 11).eval()


def test_kernels_and_channels_match_the_paper(network):
    kernels = {module.kernel_size for module in network.modules() if isinstance(module, nn.Conv3d)}
    assert kernels == {(5, 5, 3), (2, 2, 2), (1, 1, 1)}
    assert [(part.kernel_size, part.stride) for part in network.enlarge] == 4 * [((2, 2, 2), (2, 2, 2))]
    channels = [16, 32, 64, 128, 256]
    assert [(part.in_channels, part.out_channels) for part in network.shrink] == list(pairwise(channels))
    assert [part.out_channels for part in network.enlarge] == channels[-2::-1]


def test_decoder_mirrors_the_encoder(network):
    def blocks(*parts: nn.Module) -> list[int]:
        convolutions = ([m for m in part.modules() if isinstance(m, nn.Conv3d)] for part in parts)
        return [sum(convolution.kernel_size == (5, 5, 3) for convolution in inside) for inside in convolutions]

    assert blocks(network.first, *network.down) == [1, 2, 3, 3, 3]
    assert blocks(*network.up, network.last) == [3, 3, 2, 1, 1]


def test_attention_is_in_the_lowest_stages(network):
    def attended(parts: Iterable[nn.Module]) -> list[bool]:
        return [any(isinstance(module, ChannelAttention) for module in part.modules()) for part in parts]

    assert attended(network.down) == [False, False, True, True]
    assert attended(network.up) == [True, True, False, False]


def test_channel_attention_by_hand():
    attention = ChannelAttention(2, reduction=2)
    attention.load_state_dict(
        {
            "mlp.0.weight": torch.tensor([[1.0, 1.0]]),
            "mlp.0.bias": torch.zeros(1),
            "mlp.2.weight": torch.tensor([[1.0], [-1.0]]),
            "mlp.2.bias": torch.zeros(2),
        }
    )
    x = torch.tensor([[0.0, 0.2], [0.4, 0.4]]).reshape(1, 2, 1, 1, 2)
    # Means 0.1 and 0.4 give 0.5, maxima 0.2 and 0.4 give 0.6: the channels get +1.1 and -1.1.
    up, down = (1 / (1 + math.exp(-logit)) for logit in (1.1, -1.1))
    assert attention(x).flatten().tolist() == pytest.approx([0.0, 0.2 * up, 0.4 * down, 0.4 * down])


def test_voxel_attention_by_hand():
    attention = VoxelAttention()
    weight = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1, 1)
    attention.load_state_dict({"score.weight": weight, "score.bias": torch.zeros(1)})
    x = torch.tensor([[0.0, 1.0], [1.0, 3.0]]).reshape(1, 2, 1, 1, 2)
    # Voxel 1: mean 0.5, maximum 1, logit 2.5. Voxel 2: mean 2, maximum 3, logit 8.
    first, two = (1 / (1 + math.exp(-logit)) for logit in (2.5, 8.0))
    assert attention(x).flatten().tolist() == pytest.approx([0.0, two, first, 3 * two])
