from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.attention_unet import ResNet50AttentionUNet25D
from bids_dgmseg.train.learner import Learner, Means
from bids_dgmseg.train.objectives import AttentionUNetObjective
from bids_dgmseg.train.recipes import get_recipe

ZHAO = replace(MODELS["attunet25d"], arch={"features": (2, 4, 8, 16)})


def test_the_same_seed_begins_with_the_same_weights():
    one, same, other = (
        Learner(ZHAO, get_recipe("attunet25d"), Means(seed=seed)).network.state_dict()["heads.0.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_an_encoder_begins_with_imagenet_and_the_decoder_untrained(tmp_path):
    learner = Learner(replace(ZHAO, arch={}), get_recipe("attunet25d", "resnet50"), Means())
    assert isinstance(learner.network, ResNet50AttentionUNet25D)
    published = {name: value + 1 for name, value in learner.network.encoder.state_dict().items()}
    save_file({**published, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "resnet50.safetensors")
    kept = learner.begin_with(tmp_path / "resnet50.safetensors", new_heads=True)
    assert torch.equal(learner.network.encoder.conv1.weight, published["conv1.weight"])
    assert {name.split(".")[0] for name in kept} == {"gates", "enlarge", "up", "heads"}
    assert all(parameter.requires_grad for parameter in learner.network.parameters())


def test_a_file_without_weights_and_unknown_arguments_are_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_text("no")
    with pytest.raises(ValueError, match="header"):
        Learner(ZHAO, get_recipe("attunet25d"), Means()).begin_with(tmp_path / "weights.safetensors", new_heads=True)
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        Learner(replace(ZHAO, arch={"depth": 3}), get_recipe("attunet25d"), Means())


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("deepqsmseg", {"normalization": "instance"}, "normalization: 'instance' is not one of batch, group, none"),
        ("deepqsmseg", {"reduction": 0}, "division"),
        ("attunet25d", {"features": []}, r"features: \[\] is not a list with values"),
        ("attunet25d", {"attention": 1}, "attention: 1 is not true or false"),
        ("attunet25d", {"gate_convolutions": 3}, "gate_convolutions: 3 is not one of 1, 2"),
        ("attunet25d", {"features": [2, 4], "scales": 1, "slices": 5}, r"samples of \(96, 3, 96\) do not fit .*5"),
    ],
)
def test_values_that_a_network_does_not_take_are_refused(name, arch, message):
    with pytest.raises(ValueError, match=message):
        Learner(replace(MODELS[name], arch=arch), get_recipe(name), Means())


@pytest.mark.parametrize(("scales", "weights"), [(2, (0.6, 0.3, 0.1)), (3, (0.7, 0.3)), (1, ())])
def test_as_many_scales_are_weighed_as_the_network_has(scales, weights):
    model = replace(ZHAO, arch={**ZHAO.arch, "scales": scales})
    recipe = get_recipe("attunet25d")
    message = f"--recipe loss: scale_weights has {len(weights)} values for {scales} scales of the network; give one a s"
    with pytest.raises(InputError, match=message):
        Learner(model, replace(recipe, loss=AttentionUNetObjective(scale_weights=weights)), Means())
    Learner(model, replace(recipe, loss=AttentionUNetObjective(scale_weights=(0.5,) * scales)), Means())


def test_saved_weights_are_halves_that_others_may_read(tmp_path):
    learner = Learner(ZHAO, get_recipe("attunet25d"), Means())
    learner.save(tmp_path / "fold_0.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "fold_0.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    before = learner.network.state_dict()["heads.0.weight"].clone()
    Learner(ZHAO, get_recipe("attunet25d"), Means(seed=5)).save(tmp_path / "other.safetensors")
    assert learner.begin_with(tmp_path / "other.safetensors", new_heads=False) == []
    assert not torch.equal(learner.network.state_dict()["heads.0.weight"], before)
