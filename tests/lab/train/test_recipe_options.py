"""Options of the recipes: other networks, samples and losses; each trains a network of a few hundred weights."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from bids_dgmseg.cli.main import build_parser
from bids_dgmseg.cli.train import make_training
from bids_dgmseg.models.model_folder import load_object, load_segmenters, read_model_folder
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.dcn_net import DCNNet
from bids_dgmseg.networks.plain_unet import PlainUNet
from tests.lab.train.recipe_trainings import SMALL, predict, record, train

pytestmark = pytest.mark.usefixtures("small_recipes")


def test_folder_is_used_as_trained(dataset, tmp_path):
    changed = ["spacing_mm=[2.5, 2.5, 2.5]", "sampling.normalization=zscore"]
    assert train("dcnnet", dataset, tmp_path / "out", *changed, epochs=1) == 0  # --recipe is the last of SMALL
    shown = read_model_folder(MODELS["dcnnet"], tmp_path / "out").input
    assert (shown.spacing_mm, shown.normalization, shown.patch_mm) == ((2.5,) * 3, "zscore", (16 * 2.5,) * 3)
    seen = []

    class Oracle:
        def __init__(self, model, options):
            pass

        def __call__(self, volume):
            seen.append(volume.voxel_size_mm)
            return np.full((3, *volume.shape), 1 / 3, np.float32)

    predict(replace(MODELS["dcnnet"], predictor=Oracle), tmp_path / "out")
    assert seen == [(2.5, 2.5, 2.5)]


def test_thicker_stacks_are_used_for_prediction(dataset, tmp_path):
    options = ["--arch", "slices=5", "--recipe", "sampling.size=[32, 5, 32]"]
    assert train("attunet25d", dataset, tmp_path / "out", *options, epochs=1) == 0
    assert read_model_folder(MODELS["attunet25d"], tmp_path / "out").input.slices == 5
    block = predict(MODELS["attunet25d"], tmp_path / "out")
    assert block.probabilities.sum(axis=0) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("model", "classes"), [("deepqsmseg", 10), ("dcnnet", 2)])
def test_recipe_may_replace_the_network(model, classes, dataset, tmp_path):
    small = "--recipe " + SMALL[model].partition("--recipe ")[2]
    options = ["network=bids_dgmseg.networks.plain_unet:PlainUNet", "--arch", "features=[4, 8]"]
    if model == "dcnnet":
        options += ["--recipe", "loss.terms.attention=0"]
    assert train(model, dataset, tmp_path / "out", *options, epochs=1, small=small) == 0
    (network,) = load_segmenters(read_model_folder(MODELS[model], tmp_path / "out"), tmp_path / "out")
    assert isinstance(network, PlainUNet)
    assert network.get_parameter(f"heads.{len(network.heads) - 1}.bias").shape == (classes + 1,)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dcnnet", ["--scans", "1"]),
        ("dcnnet", ["--arch", "independent=false"]),
        ("dcnnet", ["--recipe", "loss.terms.attention=0"]),
        ("dcnnet", ["--arch", "attention=false"]),
        ("attunet25d", ["--arch", "attention=false"]),
        ("attunet25d", ["--arch", "scales=2", "--recipe", "loss.scale_weights=[0.7, 0.3]"]),
    ],
    ids=["fewer scans", "joint classes", "no attention term", "no attention modules", "no attention", "two scales"],
)
def test_ablations_of_the_papers_are_options(model, options, dataset, tmp_path):
    assert train(model, dataset, tmp_path / "out", *options, epochs=1) == 0
    if "--scans" in options:
        assert len(record(tmp_path / "out")["folds"][0]["training"]) == 1
    if "independent=false" in options:
        assert read_model_folder(MODELS[model], tmp_path / "out").groups == (("DN", "IN"),)
    names = load_file(tmp_path / "out" / "fold_0.safetensors")
    if "attention=false" in options:
        assert not [name for name in names if "gate" in name or name.startswith("attention")]
    elif model == "dcnnet" and "independent=false" not in options:  # the bias is 0 at first
        assert bool(names["attention.bias"].any()) is ("loss.terms.attention=0" not in options)
    if "scales=2" in options:
        assert {name for name in names if "heads" in name and "bias" in name} == {"heads.0.bias", "heads.1.bias"}


def test_another_network_may_replace_that_of_the_paper(dataset, tmp_path):
    unet = "bids_dgmseg.networks.plain_unet:PlainUNet"
    small = f"--arch features=[2,4] --recipe network={unet} sampling.size=[16,16,16] sampling.step=[20,20,20]"
    assert train("dcnnet", dataset, tmp_path / "out", epochs=1, small=small) == 0
    (network,) = load_segmenters(read_model_folder(MODELS["dcnnet"], tmp_path / "out"), tmp_path / "out")
    assert type(network) is PlainUNet
    assert predict(MODELS["dcnnet"], tmp_path / "out").probabilities.shape[0] == 5


def test_patch_size_may_change(dataset, tmp_path, monkeypatch):
    seen, forward = set(), DCNNet.forward

    def look(network, x):
        seen.add((network.training, tuple(x.shape[1:])))
        return forward(network, x)

    monkeypatch.setattr(DCNNet, "forward", look)
    assert train("dcnnet", dataset, tmp_path / "out", "--recipe", "sampling.size=[24, 24, 24]", epochs=1) == 0
    assert seen == {(True, (1, 24, 24, 24)), (False, (1, 24, 24, 24))}
    assert read_model_folder(MODELS["dcnnet"], tmp_path / "out").input.patch_mm == (30, 30, 30)  # 24 · 1.25 mm


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("dcnnet", "--folds 4", "--folds 4: only 3 labelled participants; use --folds 3 or less"),
        ("dcnnet", "--fold 3", "--fold 3: choose from 0 to 0"),
        ("dcnnet", "--arch depth=3", "--arch: DCNNet.__init__() got an unexpected keyword argument 'depth'"),
        ("dcnnet", "--from nowhere", "--from nowhere: no such folder or file"),
        ("dcnnet", "--holdout 9", "--holdout 9: no labelled scan of this participant (labelled: 01, 02, 03)"),
        ("deepqsmseg", "--arch normalization=instance", "--arch: normalization: 'instance': choose from batch"),
        ("deepqsmseg", "--recipe sampling.empty=0 sampling.size=[1,1,1]", "fold_0: there is no training sample; see"),
        ("attunet25d", "--arch scales=2", "--recipe loss: scale_weights has 3 values for 2 scales of the network; gi"),
        ("deepqsmseg", "--variant source", "--variant source: unknown variant of deepqsmseg; choose from paper, small"),
        ("attunet25d", "--recipe sampling.stack_axis=2", "sampling.stack_axis: attunet25d uses 1 for prediction"),
        ("dcnnet", "--recipe sampling.normalized=sample", "sampling.normalized: dcnnet uses region for prediction"),
        (
            "attunet25d",
            "--arch slices=4 --recipe sampling.size=[32,4,32]",
            "--recipe sampling.size: 4 slices; take an odd number, as many on both sides",
        ),
        ("attunet25d", "--arch slices=5", "--arch slices=5: samples have 3 slices; change --recipe sampling.size, too"),
    ],
)
def test_invalid_options_are_refused(model, options, message, dataset, tmp_path, capsys):
    assert train(model, dataset, tmp_path / "out", *options.split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_failed_command_may_be_corrected(dataset, tmp_path):
    assert train("deepqsmseg", dataset, tmp_path / "out", "--arch", "depth=3", epochs=1) == 2
    assert train("deepqsmseg", dataset, tmp_path / "out", epochs=1) == 0


def test_deepqsmseg_is_trained_at_the_paper_size():
    sizes = {}
    for variant in ("paper", "small"):
        args = build_parser().parse_args(["train", "deepqsmseg", "ds", "out", "--variant", variant])
        training = make_training(MODELS["deepqsmseg"], args)
        network = load_object(training.model.network)(1, len(training.recipe.classes) + 1, **training.model.arch)
        sizes[variant] = sum(weights.numel() for weights in network.parameters())
    assert sizes == {"paper": 26_701_131, "small": 3_757_014}  # docs/papers.md, where another test counts them


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("attunet25d", "--variant resnet50 --arch slices=3"),
        ("deepqsmseg", "--recipe network=bids_dgmseg.networks.plain_unet:PlainUNet --arch slices=3"),
    ],
)
def test_other_networks_ignore_the_arguments_of_the_model(model, options):
    args = build_parser().parse_args(["train", model, "ds", "out", *options.split()])
    training = make_training(MODELS[model], args)
    assert training.recipe.network
    assert training.model.arch == {"slices": 3}
