from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.learner import build_trainable, initialize
from bids_dgmseg.lab.train.recipe import AttentionUNetObjective
from bids_dgmseg.lab.train.recipes import get_recipe
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.attention_unet import AttentionUNet25D, ResNet50AttentionUNet25D

ZHAO = replace(MODELS["attunet25d"], arch={"features": (2, 4, 8, 16)})


def unet(classes):
    return AttentionUNet25D(1, classes, features=(2, 4, 8), scales=2)


def test_seed_determines_initial_weights():
    one, same, other = (
        build_trainable(ZHAO, get_recipe("attunet25d"), seed=seed).state_dict()["heads.0.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_encoder_starts_from_imagenet(tmp_path):
    network = build_trainable(replace(ZHAO, arch={}), get_recipe("attunet25d", "resnet50"), seed=1)
    assert isinstance(network, ResNet50AttentionUNet25D)
    published = {name: value + 1 for name, value in network.encoder.state_dict().items()}
    save_file({**published, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "resnet50.safetensors")
    kept = initialize(network, tmp_path / "resnet50.safetensors", new_heads=True)
    assert torch.equal(network.encoder.conv1.weight, published["conv1.weight"])
    assert {name.split(".")[0] for name in kept} == {"gates", "enlarge", "up", "heads"}
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_bad_file_and_unknown_argument_are_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_text("no")
    with pytest.raises(ValueError, match="header"):
        initialize(unet(3), tmp_path / "weights.safetensors", new_heads=True)
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        build_trainable(replace(ZHAO, arch={"depth": 3}), get_recipe("attunet25d"), seed=1)


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("deepqsmseg", {"normalization": "instance"}, "normalization: 'instance': choose from batch, group, none"),
        ("deepqsmseg", {"reduction": 0}, "division"),
        ("attunet25d", {"features": []}, r"features: \[\]: expected finite numbers"),
        ("attunet25d", {"attention": 1}, "attention: 1: expected bool, got int"),
        ("attunet25d", {"gate_convolutions": 3}, "gate_convolutions: 3: choose from 1, 2"),
        ("attunet25d", {"features": [2, 4], "scales": 1, "slices": 5}, r"samples of \(96, 3, 96\) do not fit .*5"),
    ],
)
def test_invalid_arguments_are_refused(name, arch, message):
    with pytest.raises(ValueError, match=message):
        build_trainable(replace(MODELS[name], arch=arch), get_recipe(name), seed=1)


@pytest.mark.parametrize(("scales", "weights"), [(2, (0.6, 0.3, 0.1)), (3, (0.7, 0.3)), (1, ())])
def test_scale_weights_must_match_the_network(scales, weights):
    model = replace(ZHAO, arch={**ZHAO.arch, "scales": scales})
    recipe = get_recipe("attunet25d")
    message = f"`recipe` loss: scale_weights has {len(weights)} values for {scales} scales of the network; give"
    with pytest.raises(InputError, match=message):
        build_trainable(model, replace(recipe, loss=AttentionUNetObjective(scale_weights=weights)), seed=1)
    build_trainable(model, replace(recipe, loss=AttentionUNetObjective(scale_weights=(0.5,) * scales)), seed=1)


def test_transfer_skips_output_layers(tmp_path):
    torch.manual_seed(0)
    source, target = unet(3), unet(4)
    before = target.state_dict()["heads.0.weight"].clone()
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    kept = initialize(target, tmp_path / "source.safetensors", new_heads=True)
    assert kept == [f"heads.{scale}.{part}" for scale in (0, 1) for part in ("weight", "bias")]
    state = target.state_dict()
    assert torch.equal(state["heads.0.weight"], before)
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items() if name not in kept)
    assert all(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize(
    ("classes", "without", "new_heads", "difference"),
    [(3, "nothing", False, r"heads\.0\.weight"), (4, "image", True, "image")],
)
def test_weights_of_another_network_are_refused(tmp_path, classes, without, new_heads, difference):
    weights = {name: value for name, value in unet(classes).state_dict().items() if without not in name}
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"weights of another network \(first difference: {difference}"):
        initialize(unet(4), tmp_path / "other.safetensors", new_heads=new_heads)
