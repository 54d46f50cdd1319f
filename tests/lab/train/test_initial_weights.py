"""Trainings that start from other weights or use pseudo-labels."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.bids.labelled_scans import read_pseudo_labels
from bids_dgmseg.cli.bids_app import main as app
from bids_dgmseg.io.files import sha256, write_json
from bids_dgmseg.models.registry import MODELS, weights_folder
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import start_dataset, write_map
from tests.lab.train.recipe_trainings import GRID, curve, label, make_dataset, record, train

pytestmark = pytest.mark.usefixtures("small_recipes")


def test_pseudo_labels_pretrain_the_network(dataset, tmp_path):
    label(tmp_path / "results", "sub-04", seg="dcnnet")
    label(tmp_path / "results", "sub-01", seg="dcnnet")  # has manual labels, which count
    out = tmp_path / "out"
    assert train("dcnnet", dataset, out, "--pretrain-on", str(tmp_path / "results"), epochs=1) == 0
    assert list(record(out)["pseudo_labels"]) == ["sub-04"]
    assert record(out)["pseudo_labels_for"] == "pretrain"
    early, late = curve(out / "fold_0" / "pretraining"), curve(out / "fold_0")
    assert [len(rows) for rows in (early, late)] == [1, 1]
    assert int(late[0]["steps"]) > int(early[0]["steps"])  # two maps with manual labels, one with pseudo-labels


def test_distilled_labels_are_a_majority_vote(dataset, tmp_path):
    folders = [tmp_path / f"model-{number}" for number in range(3)]
    for folder, moved_mm in zip(folders, (0.0, 0.0, 10.0), strict=True):
        label(folder, "sub-04", seg="dcnnet", moved_mm=moved_mm)
    manual = {"sub-01", "sub-02", "sub-03"}
    (one,) = read_pseudo_labels(
        dataset, MODELS["dcnnet"], folders, exclude=manual, parameter="distill", warn=lambda line: None
    )
    truth = PHANTOM.dseg(GRID).array
    assert np.array_equal(one.channel_map.array, np.where(truth <= 4, truth, 0))  # DN_L, DN_R, IN_L, IN_R are 1 to 4
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train("dcnnet", dataset, alone, epochs=1) == 0
    assert train("dcnnet", dataset, together, "--distill", *map(str, folders), epochs=1) == 0
    assert int(curve(together / "fold_0")[0]["steps"]) > int(curve(alone / "fold_0")[0]["steps"])


@pytest.mark.parametrize("option", ["--pretrain-on", "--distill"])
def test_pseudo_labels_without_a_nucleus_are_refused(option, dataset, tmp_path, capsys):
    label(tmp_path / "results", "sub-04", seg="dcnnet")
    (path,) = (tmp_path / "results").rglob("*_dseg.nii.gz")
    image = nib.Nifti1Image.from_filename(path)
    nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine).to_filename(path)
    assert train("dcnnet", dataset, tmp_path / "out", option, str(tmp_path / "results"), epochs=1) == 2
    said = capsys.readouterr()
    assert "no nucleus in the pseudo-labels of sub-04; left out" in said.out
    assert f"{option} results: no nucleus in any map; train the teacher for longer" in said.err


def test_other_pseudo_labels_are_a_different_training(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    for folder, moved_mm in (("one", 0.0), ("two", 10.0)):
        label(tmp_path / folder, "sub-04", seg="dcnnet", moved_mm=moved_mm)
    assert train("dcnnet", dataset, out, "--distill", str(tmp_path / "one"), epochs=1) == 0
    assert train("dcnnet", dataset, out, "--distill", str(tmp_path / "two"), epochs=1) == 2
    assert "out: contains a different training (differs in pseudo_labels)" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pretrain-on", "--distill"])
def test_test_participants_give_no_pseudo_labels(tmp_path, capsys, option):
    root, results = make_dataset(tmp_path / "ds"), tmp_path / "results"
    write_map(root, "sub-03_acq-other", PHANTOM.chi(GRID, seed=9))
    label(results, "sub-03", seg="dcnnet")  # manual ones count
    dseg = results / "sub-03" / "anat" / "sub-03_seg-dcnnet_dseg.nii.gz"
    dseg.rename(dseg.with_name("sub-03_acq-other_seg-dcnnet_dseg.nii.gz"))
    options = [option, str(results), "--recipe", "sampling.step=[20, 20, 20]"]
    assert train("dcnnet", root, tmp_path / "out", *options, "--holdout", "03", epochs=1) == 2
    assert "no labels for a map of ds without manual labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    ended = {
        fold: train("dcnnet", root, tmp_path / "folds", *options, "--fold", str(fold), epochs=1, folds=3)
        for fold in range(3)
    }
    folds = record(tmp_path / "folds")["folds"]
    assert ended == {fold: 0 if "03" in split["training"] else 2 for fold, split in enumerate(folds)}
    assert set(ended.values()) == {0, 2}
    assert f"{option}: all maps belong to validation or test participants of fold " in capsys.readouterr().err


def test_test_participants_who_taught_the_pseudo_labels_are_named(dataset, tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    label(results, "sub-04", seg="dcnnet")
    settings = {"training_maps": [sha256(dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz")]}
    write_json({"settings": settings}, results / "sub-04" / "anat" / "sub-04_seg-dcnnet_qc.json")
    assert train("dcnnet", dataset, out, "--pretrain-on", str(results), epochs=1, folds=3) == 0
    (tested,) = (fold for fold, split in enumerate(record(out)["folds"]) if "01" in split["test"])
    said = [line for line in capsys.readouterr().out.splitlines() if "the pseudo-labels come from networks" in line]
    assert len(said) == 1
    assert f"fold {tested}: the pseudo-labels come from networks trained on sub-01 of the test set" in said[0]


def test_pseudo_label_maps_may_be_derivatives(tmp_path):
    root, results, elsewhere = make_dataset(tmp_path / "ds"), tmp_path / "results", tmp_path / "qsm"
    start_dataset(elsewhere, DatasetType="derivative")
    (root / "sub-04" / "anat").rename(tmp_path / "moved")
    (elsewhere / "sub-04").mkdir()
    (tmp_path / "moved").rename(elsewhere / "sub-04" / "anat")
    label(results, "sub-04", seg="dcnnet")
    options = ["--pretrain-on", str(results), "--derivatives", str(elsewhere), str(root / "derivatives" / "manual")]
    assert train("dcnnet", root, tmp_path / "out", *options, epochs=1) == 0
    assert list(record(tmp_path / "out")["pseudo_labels"]) == ["sub-04"]


def test_source_network_initializes_the_target(dataset, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    slices = ["--recipe", "sampling.size=[32, 32, 3]", "sampling.step=[0, 0, 8]"]
    assert train("attunet25d", dataset, source, "--variant", "source", *slices, epochs=1) == 0
    assert f"continue with dgmseg train attunet25d DATASET OUT --from {source}\n" in capsys.readouterr().out
    assert train("attunet25d", dataset, target, "--from", str(source), epochs=1) == 0
    assert "initialized from source, with new output layers" in capsys.readouterr().out
    assert load_file(source / "fold_0.safetensors")["heads.0.weight"].shape[0] == 3
    assert load_file(target / "fold_0.safetensors")["heads.0.weight"].shape[0] == 4
    assert train("dcnnet", dataset, tmp_path / "other", "--from", str(source)) == 2
    assert "--from source: weights of another network" in capsys.readouterr().err
    segment = [str(dataset), str(tmp_path / "results"), "participant", "--model", "attunet25d", "--weights"]
    segment += [str(source), "--participant-label", "01", "--nprocs", "1", "--skip-bids-validation", "--no-viewer"]
    assert app(segment) == 0
    table = pd.read_csv(next((tmp_path / "results").rglob("*_stats.tsv")), sep="\t")
    assert table["abbreviation"].tolist() == ["RN_L", "RN_R", "SN_L", "SN_R"]


def test_same_classes_keep_their_output_layers(dataset, tmp_path, capsys):
    assert train("deepqsmseg", dataset, tmp_path / "one", epochs=1) == 0
    assert train("deepqsmseg", dataset, tmp_path / "two", "--from", str(tmp_path / "one"), epochs=1) == 0
    assert "initialized from one\n" in capsys.readouterr().out
    (tmp_path / "one" / "training.json").unlink()  # as in folders that are passed on
    assert train("deepqsmseg", dataset, tmp_path / "three", "--from", str(tmp_path / "one"), epochs=1) == 0
    assert "initialized from one\n" in capsys.readouterr().out


def test_result_may_be_a_mean_with_the_initial_weights(dataset, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    assert train("attunet25d", dataset, start, "--seed", "5", epochs=1) == 0
    weights = {}
    for share in ("0", "0.75"):  # the second call finds a finished training
        assert (
            train("attunet25d", dataset, out, "--from", str(start), "--recipe", f"start_share={share}", epochs=1) == 0
        )
        weights[share] = load_file(out / "fold_0.safetensors")
    initial = load_file(start / "fold_0.safetensors")
    statistics = [name for name in initial if "running" in name]
    learned = [name for name in initial if "weight" in name or "bias" in name]
    assert statistics
    for name in learned:
        expected = 0.75 * initial[name].float() + 0.25 * weights["0"][name].float()
        assert torch.allclose(weights["0.75"][name].float(), expected, rtol=2e-3, atol=1e-4)  # rounded to float16
    assert any(not torch.equal(initial[name], weights["0"][name]) for name in learned)
    # Statistics of batch normalization are computed again, not averaged.
    means = {name: 0.75 * initial[name].float() + 0.25 * weights["0"][name].float() for name in statistics}
    assert any(not torch.allclose(weights["0.75"][name].float(), means[name], rtol=0.01) for name in statistics)


def test_mean_is_the_same_in_each_call(dataset, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    assert train("dcnnet", dataset, start, epochs=1) == 0
    hashes = set()
    for _ in range(3):  # the first call trains, the others find a finished training
        assert train("dcnnet", dataset, out, "--from", str(start), "--recipe", "start_share=0.5", epochs=1) == 0
        hashes.add(sha256(out / "fold_0.safetensors"))
    assert len(hashes) == 1


def test_mean_needs_initial_weights_of_the_same_classes(dataset, tmp_path, capsys):
    assert train("attunet25d", dataset, tmp_path / "out", "--recipe", "start_share=0.5", epochs=1) == 2
    assert "--recipe start_share: there are no initial weights; name them with --from" in capsys.readouterr().err
    assert train("attunet25d", dataset, tmp_path / "out", "--recipe", "start_share=1", epochs=1) == 2
    assert "start_share" in capsys.readouterr().err
    slices = ["--recipe", "sampling.size=[32, 32, 3]", "sampling.step=[0, 0, 8]"]
    assert train("attunet25d", dataset, tmp_path / "source", "--variant", "source", *slices, epochs=1) == 0
    start = ["--from", str(tmp_path / "source"), "--recipe", "start_share=0.5"]
    assert train("attunet25d", dataset, tmp_path / "target", *start, epochs=1) == 2
    assert "source has no weights for the output layers" in capsys.readouterr().err


def test_training_may_start_from_shipped_weights(dataset, tmp_path):
    assert train("deepqsmseg", dataset, tmp_path / "tiny", "--from", "default", epochs=1) == 2  # other arguments
    options = "--variant small --from default --fold 0 --learning-rate 1e-9 "
    options += "--recipe pace.batch=1 sampling.size=[64,64,32]"
    assert train("deepqsmseg", dataset, tmp_path / "out", *options.split(), epochs=1, folds=3, small="") == 0
    shipped, learned = (
        load_file(folder / "fold_0.safetensors") for folder in (weights_folder(MODELS["deepqsmseg"]), tmp_path / "out")
    )
    # A rate of a billionth moves no weight beyond what float16 keeps.
    assert all(torch.allclose(learned[name], shipped[name], rtol=0, atol=1e-6) for name in shipped if "weight" in name)


def test_weights_of_torch_are_refused_before_maps_are_read(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bids_dgmseg.lab.train.folds.read_labelled_maps", lambda *given, **named: pytest.fail("read"))
    (tmp_path / "resnet50.pth").write_bytes(b"PK\x03\x04")
    assert train("deepqsmseg", dataset, tmp_path / "out", "--from", str(tmp_path / "resnet50.pth"), epochs=1) == 2
    error = "--from resnet50.pth: not a .safetensors file; convert it with safetensors.torch.save_file"
    assert error in capsys.readouterr().err
