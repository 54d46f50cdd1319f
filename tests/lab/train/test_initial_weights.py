"""Trainings that start from other weights or use pseudo-labels."""

import tomllib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bids_dgmseg.bids.labelled_scans import read_pseudo_labels
from bids_dgmseg.console import StatusLine
from bids_dgmseg.io.files import sha256, write_json
from bids_dgmseg.lab.train.folds import build_trainable, initialize, list_failed
from bids_dgmseg.lab.train.recipe import RECIPES
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.attention_unet import AttentionUNet25D, ResNet50AttentionUNet25D
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import write_map
from tests.lab.train.recipe_trainings import BRIEF, GRID, curve, label, make_dataset, phantom, read, record, train

pytestmark = pytest.mark.usefixtures("small_recipes")


def test_pseudo_labels_pretrain_the_network(dataset, tmp_path):
    label(tmp_path / "results", "sub-04", seg="dcnnet")
    label(tmp_path / "results", "sub-01", seg="dcnnet")  # has manual labels, which count
    out = tmp_path / "out"
    assert train("dcnnet", dataset, out, "--pretrain-on", str(tmp_path / "results"), epochs=1) == 0
    assert list(record(out)["pseudo_labels"]) == ["sub-04"]
    assert record(out)["pseudo_labels_for"] == "pretrain_on"
    early, late = curve(out / "fold_0" / "pretraining"), curve(out / "fold_0")
    assert [len(rows) for rows in (early, late)] == [1, 1]
    assert int(late[0]["steps"]) > int(early[0]["steps"])  # two maps with manual labels, one with pseudo-labels


def test_pseudo_labels_that_raters_failed_are_left_out(dataset, tmp_path, capsys):
    results = tmp_path / "results"
    label(results, "sub-04", seg="dcnnet")
    decisions, lines = results / "qc_decisions.tsv", "scan\tnucleus\tdecision\n"
    decisions.write_text(lines + "sub-04\tRN_L\tfail\nsub-04\tDN_L\tpass\n")  # a nucleus of other models
    assert list_failed([results], MODELS["dcnnet"], StatusLine()) == set()
    decisions.write_text(lines + "sub-04\tDN\tfail\n")
    assert list_failed([results], MODELS["dcnnet"], StatusLine()) == {"sub-04"}
    assert train("dcnnet", dataset, tmp_path / "out", "--pretrain-on", str(results), epochs=1) == 2
    captured = capsys.readouterr()
    assert "failed in qc_decisions.tsv: sub-04; left out" in captured.out
    assert "no labels for a map of" in captured.err


@pytest.mark.slow
def test_distilled_labels_are_a_majority_vote(dataset, tmp_path):
    folders = [tmp_path / f"model-{number}" for number in range(3)]
    for folder, moved_mm in zip(folders, (0.0, 0.0, 10.0), strict=True):
        label(folder, "sub-04", seg="dcnnet", moved_mm=moved_mm)
    manual = {"sub-01", "sub-02", "sub-03"}
    (scan,) = read_pseudo_labels(
        dataset, MODELS["dcnnet"], folders, exclude=manual, parameter="distill", warn=lambda line: None
    )
    truth = PHANTOM.dseg(GRID).array
    assert np.array_equal(scan.channel_map.array, np.where(truth <= 4, truth, 0))  # DN_L, DN_R, IN_L, IN_R are 1 to 4
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train("dcnnet", dataset, alone, epochs=1) == 0
    assert train("dcnnet", dataset, together, "--distill", *map(str, folders), epochs=1) == 0
    assert int(curve(together / "fold_0")[0]["steps"]) > int(curve(alone / "fold_0")[0]["steps"])


@pytest.mark.slow
def test_test_participants_give_no_pseudo_labels(tmp_path, capsys):
    option, root, results = "--distill", make_dataset(tmp_path / "ds"), tmp_path / "results"
    write_map(root, "sub-03_acq-other", phantom(9))
    label(results, "sub-03", seg="dcnnet")  # manual ones count
    dseg = results / "sub-03" / "anat" / "sub-03_seg-dcnnet_dseg.nii.gz"
    dseg.rename(dseg.with_name("sub-03_acq-other_seg-dcnnet_dseg.nii.gz"))
    options = [option, str(results)]
    assert train("dcnnet", root, tmp_path / "out", *options, "--holdout", "03", epochs=1) == 2
    assert "no labels for a map of ds without manual labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    ended = {
        fold: train("dcnnet", root, tmp_path / "folds", *options, *BRIEF, "--fold", str(fold), epochs=1, folds=3)
        for fold in range(3)
    }
    folds = record(tmp_path / "folds")["folds"]
    assert ended == {fold: 0 if "03" in split["training"] else 2 for fold, split in enumerate(folds)}
    assert set(ended.values()) == {0, 2}
    assert f"{option}: all maps belong to validation or test participants of fold " in capsys.readouterr().err


@pytest.mark.slow
def test_test_participants_who_taught_the_pseudo_labels_are_named(dataset, tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    label(results, "sub-04", seg="dcnnet")
    settings = {"training_maps": [sha256(dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz")]}
    write_json({"settings": settings}, results / "sub-04" / "anat" / "sub-04_seg-dcnnet_qc.json")
    assert train("dcnnet", dataset, out, "--pretrain-on", str(results), *BRIEF, epochs=1, folds=3) == 0
    (tested,) = (fold for fold, split in enumerate(record(out)["folds"]) if "01" in split["test"])
    said = [line for line in capsys.readouterr().out.splitlines() if "the pseudo-labels come from networks" in line]
    assert len(said) == 1
    assert f"fold_{tested}: the pseudo-labels come from networks trained on sub-01 of the test set" in said[0]


def test_source_network_initializes_the_target(dataset, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    changes = tomllib.loads((RECIPES / "attunet25d-source.toml").read_text())
    tables = [table for table in changes if table != "spacing_mm"]
    changes = {f"{table}.{key}": value for table in tables for key, value in changes[table].items()}
    changes |= {"spacing_mm": [0.63, 0.63, 2.0], "sampling.size": [32, 32, 3], "sampling.step": [0, 0, 8]}
    assert train("attunet25d", dataset, source, epochs=1, changes=changes) == 0
    assert f"continue with dgmseg train attunet25d DATASET OUT --from {source}\n" in capsys.readouterr().out
    assert train("attunet25d", dataset, target, "--from", str(source), epochs=1) == 0
    assert "initialized from source, with new output layers" in capsys.readouterr().out
    assert load_file(source / "fold_0.safetensors")["heads.0.weight"].shape[0] == 3
    assert load_file(target / "fold_0.safetensors")["heads.0.weight"].shape[0] == 4
    assert train("dcnnet", dataset, tmp_path / "other", "--from", str(source)) == 2
    assert "--from source: weights of another network" in capsys.readouterr().err


def test_weights_of_torch_are_refused(dataset, tmp_path, capsys):
    (tmp_path / "resnet50.pth").write_bytes(b"PK\x03\x04")
    assert train("deepqsmseg", dataset, tmp_path / "out", "--from", str(tmp_path / "resnet50.pth"), epochs=1) == 2
    error = "--from resnet50.pth: not a .safetensors file; convert it with safetensors.torch.save_file"
    assert error in capsys.readouterr().err


def unet(classes):
    return AttentionUNet25D(1, classes, features=(2, 4, 8), scales=2)


def test_encoder_starts_from_imagenet(tmp_path):
    model = MODELS["attunet25d"]
    network = build_trainable(model, read("attunet25d-resnet50"), seed=1)
    assert isinstance(network, ResNet50AttentionUNet25D)
    published = {name: value + 1 for name, value in network.encoder.state_dict().items()}
    save_file({**published, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "resnet50.safetensors")
    kept = initialize(network, tmp_path / "resnet50.safetensors", new_heads=True)
    assert torch.equal(network.encoder.conv1.weight, published["conv1.weight"])
    assert {name.split(".")[0] for name in kept} == {"gates", "enlarge", "up", "heads"}
    assert all(parameter.requires_grad for parameter in network.parameters())


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
    with pytest.raises(ValueError, match=rf"^weights of another network \(.*{difference}"):
        initialize(unet(4), tmp_path / "other.safetensors", new_heads=new_heads)
    (tmp_path / "weights.safetensors").write_text("no")
    with pytest.raises(ValueError, match="header"):
        initialize(unet(4), tmp_path / "weights.safetensors", new_heads=True)
