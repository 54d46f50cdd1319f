import math

import pytest
import torch

from bids_dgmseg.networks.attention_unet import AttentionGate, AttentionUNet25D, ResNet50AttentionUNet25D


def _twice(inputs: int, outputs: int) -> int:
    """Parameters of two 3×3 convolutions with bias, each with scale and shift."""
    return 9 * inputs * outputs + 9 * outputs * outputs + 2 * (1 + 2) * outputs


def test_number_of_parameters_by_hand():
    # The paper gives none; filters are the published program's 16 to 256.
    pairs = [(16, 32), (32, 64), (64, 128), (128, 256)]
    image = sum(_twice(3, outputs) for outputs in (16, 16, 32, 64))
    encoder = _twice(32, 32) + _twice(64, 64) + _twice(128, 128) + _twice(128, 256)
    decoder = sum(4 * low * high + high + _twice(2 * high, high) for high, low in pairs)
    gates = sum(high * low + low + low + 1 for high, low in pairs)
    heads = 4 * sum(width + 1 for width in (16, 32, 64))
    network = AttentionUNet25D(1, 4)
    assert sum(parameter.numel() for parameter in network.parameters()) == image + encoder + decoder + gates + heads


def test_three_scales_are_supervised():
    network = AttentionUNet25D(1, 4, True, features=(2, 4, 8, 16, 32)).eval()
    shown = torch.randn(1, 3, 96, 48)
    several = network(shown)
    assert [part.shape for part in several] == [(1, 4, 96, 48), (1, 4, 48, 24), (1, 4, 24, 12)]
    network.deep_supervision = False
    assert torch.equal(network(shown), several[0])


def test_image_enters_at_four_scales():
    network = AttentionUNet25D(1, 4, features=(2, 4, 8, 16, 32))
    sizes = []
    for image in network.image:
        image.register_forward_hook(lambda module, shown, answer: sizes.append(shown[0].shape[1:]))
    network.eval()(torch.zeros(1, 3, 16, 32))
    assert sizes == [(3, 16, 32), (3, 8, 16), (3, 4, 8), (3, 2, 4)]


def test_attention_gate_by_hand():
    gate = AttentionGate(1, 2)
    gate.load_state_dict(
        {
            "to_gate.weight": torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1),
            "to_gate.bias": torch.zeros(2),
            "score.weight": torch.full((1, 2, 1, 1), 0.25),
            "score.bias": torch.tensor([0.5]),
        }
    )
    # Stride 2 takes the skip's corner, 3, alone: (3, -3) + (2, 1) = (5, -2), after ReLU (5, 0): 0.5 + 0.25 * 5.
    skip = torch.tensor([[[[3.0, 7.0], [8.0, 9.0]]]])
    scaled = gate(skip, torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1))
    torch.testing.assert_close(scaled, skip / (1 + math.exp(-1.75)))


def test_all_but_the_heads_transfers():
    source, target = (AttentionUNet25D(1, classes, features=(2, 4, 8), scales=2) for classes in (3, 4))
    kept = {name: value for name, value in source.state_dict().items() if not name.startswith("heads.")}
    missing = target.load_state_dict(kept, strict=False).missing_keys
    assert sorted({name.split(".")[0] for name in missing}) == ["heads"]


def test_resnet_encoder_loads_published_weights():
    models = pytest.importorskip("torchvision.models", reason="torchvision is the second implementation")
    published, network = models.resnet50(weights=None).eval(), ResNet50AttentionUNet25D(1, 4).eval()
    network.load_imagenet(published.state_dict())
    shown = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        x = published.maxpool(published.relu(published.bn1(published.conv1(shown))))
        expected = published.layer4(published.layer3(published.layer2(published.layer1(x))))
        torch.testing.assert_close(network.encoder(shown)[-1], expected)
