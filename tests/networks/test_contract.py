from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bids_dgmseg.models.model_folder import load_object, localizer_network, segmenter_network
from bids_dgmseg.models.registry import MODELS, NETWORKS, Model
from bids_dgmseg.networks.attention_unet import ResNet50AttentionUNet25D, UNet3D
from bids_dgmseg.networks.dcn_net import DilatedDenseNet, FCDenseNet
from bids_dgmseg.networks.deepqsmseg import DeepQSMSeg, VNet


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Case:
    build: Callable[[bool], nn.Module]
    """Takes deep_supervision."""
    logits: int
    channels: int = 1
    axes: int = 3
    sizes: tuple[tuple[int, int, int], ...] = ((16, 16, 16), (17, 21, 12), (5, 1, 3))

    def shown(self, size: tuple[int, int, int], *, batch: int = 1) -> Tensor:
        grid = size if self.axes == 3 else size[::2]  # 2.5D networks see X and Z
        return torch.randn(batch, self.channels, *grid, generator=torch.Generator().manual_seed(0))


def _registered(model: Model, part: str) -> Case:
    def build(deep: bool) -> nn.Module:
        network = (segmenter_network if part == "segmenter" else localizer_network)(model)
        network.deep_supervision = deep  # type: ignore[assignment]  # a module's attribute
        return network

    shown = model.input if part == "segmenter" else model.localizer.input
    assert shown is not None
    groups = model.groups if part == "segmenter" else (model.localizer.labels,)
    dotted = model.network if part == "segmenter" else model.localizer.network
    # Instance normalization needs more than one value on the smallest grid.
    sizes = ((32, 32, 32), (32, 33, 40), (17, 21, 35)) if dotted.endswith(":PlainUNet") else Case.sizes
    return Case(
        build,
        sum(1 + len(group) for group in groups),
        channels=shown.channels * max(shown.slices, 1),
        axes=2 if shown.slices else 3,
        sizes=sizes,
    )


CASES = {
    **{
        f"{name}-{part}": _registered(model, part)
        for name, model in MODELS.items()
        if model.network
        for part in ("segmenter", "localizer")
        if part == "segmenter" or model.localizer.network
    },
    "attention_unet_resnet50": Case(lambda deep: ResNet50AttentionUNet25D(1, 4, deep), 4, channels=3, axes=2),
    "deepqsmseg_paper_size": Case(lambda deep: DeepQSMSeg(1, 11, deep), 11),
    "vnet": Case(lambda deep: VNet(1, 11, deep, features=(4, 8, 16), blocks=(1, 1, 2)), 11),
    "unet": Case(lambda deep: UNet3D(1, 3, deep, features=(4, 8, 16)), 3),
    "attention_unet": Case(lambda deep: UNet3D(1, 3, deep, features=(4, 8, 16), attention=True), 3),
    "fc_densenet": Case(lambda deep: FCDenseNet(1, 3, deep), 3),
    "dilated_densenet": Case(lambda deep: DilatedDenseNet(1, 3, deep), 3),
}
"""Registered networks, and others of the papers."""


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request):
    return request.param


def test_logits_are_on_the_input_grid(case):
    network = case.build(False).eval()
    for size in case.sizes:
        shown = case.shown(size)
        with torch.inference_mode():
            assert network(shown).shape == (1, case.logits, *shown.shape[2:]), size


def test_deep_supervision_returns_all_scales(case):
    network = case.build(True).eval()
    with torch.inference_mode():
        logits = network(case.shown((32, 32, 32)))
    assert [part.shape[-1] for part in logits] == [32 // 2**scale for scale in range(len(logits))]


def test_every_parameter_has_a_gradient(case):
    network = case.build(True).train()
    answer = network(case.shown(case.sizes[0], batch=2))  # batch statistics of a single value do not exist
    logits, *auxiliary = answer if isinstance(answer, tuple) else (answer,)
    sum(part.square().mean() for part in (*logits, *auxiliary)).backward()
    dead = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", NETWORKS)
def test_deep_supervision_has_the_same_weights(name):
    plain, supervised = (load_object(name)(1, 4, deep).state_dict() for deep in (False, True))
    assert plain.keys() == supervised.keys()


@pytest.mark.parametrize("model", [model for model in MODELS.values() if model.network], ids=lambda model: model.name)
def test_shipped_models_are_small(model: Model):
    networks = [segmenter_network(model), *([localizer_network(model)] if model.localizer.network else [])]
    assert 2 * sum(map(count_parameters, networks)) <= 16e6  # float16, megabytes
