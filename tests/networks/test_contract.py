import pytest
import torch

from bids_dgmseg.models import MODELS, Model
from bids_dgmseg.segment.weights import localizer_network, segmenter_network


@pytest.fixture(params=[(name, part) for name, model in MODELS.items() if model.network
                        for part in ("segmenter", "localizer")], ids="-".join)  # fmt: skip
def network(request):
    name, part = request.param
    torch.manual_seed(0)
    return (segmenter_network if part == "segmenter" else localizer_network)(MODELS[name])


def _classes(network):
    return network.heads[-1].out_channels


@pytest.mark.parametrize("size", [(32, 32, 32), (32, 33, 40), (17, 21, 35)])
def test_logits_lie_on_the_input_grid(network, size):
    logits = network(torch.zeros(1, 1, *size))
    assert logits.shape == (1, _classes(network), *size)


def test_deep_supervision_gives_every_scale_full_resolution_first(network):
    network.deep_supervision = True
    logits = network(torch.zeros(1, 1, 32, 32, 32))
    assert [part.shape[-1] for part in logits] == [32 // 2**scale for scale in range(len(logits))]


def test_every_parameter_gets_a_gradient(network):
    network.deep_supervision = True
    sum(part.square().mean() for part in network(torch.randn(1, 1, 32, 32, 32))).backward()
    dead = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []


def test_deep_supervision_keeps_the_weights():
    from bids_dgmseg.networks.plain_unet import PlainUNet

    plain, supervised = (PlainUNet(1, 3, deep, features=(4, 8, 8)) for deep in (False, True))
    assert plain.state_dict().keys() == supervised.state_dict().keys()


@pytest.mark.parametrize("model", [model for model in MODELS.values() if model.network], ids=lambda model: model.name)
def test_a_model_of_the_package_is_small(model: Model):
    networks = [segmenter_network(model), localizer_network(model)]
    count = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert 2 * count <= 16e6  # float16, megabytes
