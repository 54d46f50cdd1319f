"""Trainings by the papers' recipes on labelled phantoms, with networks of a few hundred weights."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.cli.bids_app import main as app
from bids_dgmseg.cli.main import build_parser, main
from bids_dgmseg.cli.train import make_training
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import atlas_files, load_object, load_segmenters, read_model_folder
from bids_dgmseg.models.registry import MODELS, Localizer, weights_folder
from bids_dgmseg.networks.dcn_net import DCNNet
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.segmentation.predict import predict
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.train.labelled_maps import read_pseudo_labels
from tests.conftest import start_dataset, write_map
from tests.terminal import Terminal

GRID = world_grid(Box((-75, -110, -80), (75, 74, 80)), (2.5, 2.5, 2.5))
SMALL = {
    "dcnnet": "--arch dilations=[[1],[1,2]] growth=2 initial_features=2 bottleneck_layers=1 "
    "--recipe sampling.size=[16,16,16] sampling.step=[20,20,20] pace.batch=4",
    "attunet25d": "--arch features=[2,4,8,16] scales=3 "
    "--recipe sampling.size=[32,3,32] sampling.step=[0,8,0] pace.batch=4",
    "deepqsmseg": "--arch features=[2,4] blocks=[1,1] attended=1 --recipe sampling.size=[64,64,32]",
}
BOX = Box((-20, -40, -40), (20, 0, 0))
"""Around the dentate nuclei of the phantom."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and boxes in the middle of the phantom instead of where a large network sees it."""
    monkeypatch.setattr("bids_dgmseg.train.folds.use_all_cores", lambda: torch.set_num_threads(1))
    for name in SMALL:
        if MODELS[name].localizer.kind == "centre":
            monkeypatch.setitem(MODELS, name, replace(MODELS[name], localizer=Localizer(kind="centre")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four phantoms of two sites, three of them labelled."""
    return make_dataset(tmp_path_factory.mktemp("training") / "ds")


def make_dataset(root):
    start_dataset(root)
    rows = ["participant_id\tsite"]
    for number in range(1, 5):
        scan = f"sub-{number:02d}"
        rows.append(f"{scan}\t{'AB'[number % 2]}")
        write_map(root, scan, PHANTOM.chi(GRID, seed=number))
        if number < 4:
            label(root / "derivatives" / "manual", scan, seg="manual")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def label(derivative, scan, *, seg, moved_mm=0.0):
    """Write the phantom's truth, moved, as labels of a scan."""
    shift = np.eye(4)
    shift[1, 3] = moved_mm
    start_dataset(derivative, DatasetType="derivative")
    folder = derivative / scan / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    dseg = PHANTOM.dseg(Grid(GRID.shape, shift @ GRID.affine)).array
    nib.Nifti1Image(dseg, GRID.affine).to_filename(folder / f"{scan}_seg-{seg}_dseg.nii.gz")


def command(model, dataset, out, *options, epochs=2, folds=1, small=None):
    """Return the arguments of a training, with the options of a small network unless others are given."""
    length = f"--epochs {epochs} --folds {folds} --workers 0 --device cpu {SMALL[model] if small is None else small}"
    return ["train", model, str(dataset), str(out), *length.split(), *options]


def train(*args, **options):
    return main(command(*args, **options))


def record(out):
    return json.loads((out / "training.json").read_text())


def curve(folder):
    lines = (folder / "curve.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("model", SMALL)
def test_training_writes_a_model_folder(model, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(model, dataset, out) == 0
    (network,) = load_segmenters(MODELS[model], out)
    assert all(torch.isfinite(value).all() for value in network.parameters())
    block = predict(PHANTOM.chi(GRID), BOX, MODELS[model], weights=out)
    assert len(block.probabilities) == len(MODELS[model].labels) + 1
    assert block.probabilities.sum(axis=0) == pytest.approx(1, abs=1e-4)
    trained = read_model_folder(MODELS[model], out)
    axis, size_mm = {"dcnnet": (0, 16 * 1.25), "attunet25d": (0, 32 * 0.83), "deepqsmseg": (2, 32 * 2.0)}[model]
    assert trained.input.patch_mm[axis] == pytest.approx(size_mm)
    rows = curve(out / "fold_0")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0])[5:] == list(MODELS[model].classes)
    assert (out / "fold_0" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert f"use it with bids_dgmseg --model {model} --weights {out}" in capsys.readouterr().out
    if model == "dcnnet":
        names = [chi.name for chi, _ in atlas_files(MODELS[model], out)]
        assert names == [f"sub-0{number}_Chimap.nii.gz" for number in (1, 2, 3)]


def test_terminal_shows_the_scan_being_prepared(dataset, tmp_path, monkeypatch):
    terminal = Terminal.connected(monkeypatch)
    assert train("deepqsmseg", dataset, tmp_path / "out", epochs=1) == 0
    assert terminal.shown[:3] == [f"preparing sub-0{number}, {number} of 3" for number in (1, 2, 3)]


def test_references_are_coarse_training_maps(dataset, tmp_path):
    assert train("dcnnet", dataset, tmp_path / "out", "--minutes", "0.001") == 0
    for number, (chi, labels) in enumerate(atlas_files(MODELS["dcnnet"], tmp_path / "out"), start=1):
        reference, drawn = Volume.read(chi), Volume.read(labels, np.uint8)
        assert reference.voxel_size_mm == pytest.approx((2, 2, 2))
        whole = Volume.read(dataset / f"sub-0{number}" / "anat" / f"sub-0{number}_Chimap.nii.gz")
        same_places = resample(whole, Grid(reference.shape, reference.affine)).array  # 2.5 mm: nothing to average
        np.testing.assert_allclose(reference.array, same_places, atol=1e-4)
        assert set(np.unique(drawn.array)) == {0, 1, 2, 3, 4}
        assert (drawn.array == 1).sum() == (PHANTOM.dseg(GRID).array == 1).sum()


def test_references_are_used_scans_alone(dataset, tmp_path):
    out = tmp_path / "out"
    (out / "references").mkdir(parents=True)
    (out / "references" / "sub-09_Chimap.nii.gz").touch()  # left over from an earlier call
    for fold in (0, 1):
        assert train("dcnnet", dataset, out, "--fold", str(fold), epochs=1, folds=3) == 0
        splits = record(out)["folds"][: fold + 1]
        learned = {one for split in splits for one in (*split["training"], *split["validation"])}
        references = {chi.name.split("_")[0] for chi, _ in atlas_files(MODELS["dcnnet"], out)}
        assert references == {f"sub-{participant}" for participant in learned}
        assert len(references) == 2 + fold
    assert not list(out.glob("references/sub-09*"))


def test_folds_are_trained_one_by_one(dataset, tmp_path):
    out = tmp_path / "out"
    for fold in ("1", "0"):
        assert train("deepqsmseg", dataset, out, "--fold", fold, epochs=1, folds=3) == 0
    assert len(load_segmenters(MODELS["deepqsmseg"], out)) == 2
    splits = record(out)["folds"]
    assert sorted(one for fold in splits for one in fold["test"]) == ["01", "02", "03"]
    assert all(len(fold["training"]) == 2 and fold["validation"] == [] for fold in splits)


def test_killed_training_resumes_to_the_same_curve(dataset, tmp_path):
    epochs = 12
    assert train("dcnnet", dataset, tmp_path / "whole", epochs=epochs) == 0
    out = tmp_path / "killed"
    given = command("dcnnet", dataset, out, "--checkpoint-minutes", "0", epochs=epochs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-m", "bids_dgmseg.cli", *given]
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, env=environment)
    table = out / "fold_0" / "curve.tsv"
    while process.poll() is None and not (table.is_file() and len(table.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "fold_0.safetensors").exists()
    assert train("dcnnet", dataset, out, epochs=epochs) == 0
    assert len(curve(out / "fold_0")) == epochs
    assert table.read_bytes() == (tmp_path / "whole" / "fold_0" / "curve.tsv").read_bytes()
    one, other = (load_file(folder / "fold_0.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


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
    assert app([*segment, str(source)]) == 2
    assert "source: its network has the classes RN, SN-STN, attunet25d needs RN, SN, STN" in capsys.readouterr().err


def test_folder_is_used_as_trained(dataset, tmp_path):
    changed = ["spacing_mm=[2.5, 2.5, 2.5]", "sampling.normalization=zscore"]
    assert train("dcnnet", dataset, tmp_path / "out", *changed, epochs=1) == 0  # --recipe is the last of SMALL
    shown = read_model_folder(MODELS["dcnnet"], tmp_path / "out").input
    assert (shown.spacing_mm, shown.normalization, shown.patch_mm) == ((2.5,) * 3, "zscore", (16 * 2.5,) * 3)
    seen = []

    class Oracle:
        def __init__(self, model, *, weights, device):
            pass

        def __call__(self, volume):
            seen.append(volume.voxel_size_mm)
            return np.full((3, *volume.shape), 1 / 3, np.float32)

    predict(PHANTOM.chi(GRID), BOX, replace(MODELS["dcnnet"], predictor=Oracle), weights=tmp_path / "out")
    assert seen == [(2.5, 2.5, 2.5)]


def test_same_classes_keep_their_output_layers(dataset, tmp_path, capsys):
    assert train("deepqsmseg", dataset, tmp_path / "one", epochs=1) == 0
    assert train("deepqsmseg", dataset, tmp_path / "two", "--from", str(tmp_path / "one"), epochs=1) == 0
    assert "initialized from one\n" in capsys.readouterr().out


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
        dataset, MODELS["dcnnet"], folders, exclude=manual, option="--distill", warn=lambda line: None
    )
    truth = PHANTOM.dseg(GRID).array
    assert np.array_equal(one.labels.array, np.where(truth <= 4, truth, 0))  # DN_L, DN_R, IN_L, IN_R are 1 to 4
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train("dcnnet", dataset, alone, epochs=1) == 0
    assert train("dcnnet", dataset, together, "--distill", *map(str, folders), epochs=1) == 0
    assert int(curve(together / "fold_0")[0]["steps"]) > int(curve(alone / "fold_0")[0]["steps"])


def test_seed_changes_the_network_but_not_the_split(dataset, tmp_path):
    # --minutes 0.001 ends after a step; a learning rate of a billionth leaves the initial weights as they are.
    options = ["--learning-rate", "1e-9", "--minutes", "0.001"]
    for name, more in (("one", []), ("two", ["--seed", "2"]), ("other", ["--recipe", "split_seed=3"])):
        assert train("dcnnet", dataset, tmp_path / name, "--fold", "0", *options, *more, epochs=1, folds=3) == 0
    one, two, other = (record(tmp_path / name)["folds"] for name in ("one", "two", "other"))
    assert one == two != other
    start, second, same = (load_file(tmp_path / name / "fold_0.safetensors") for name in ("one", "two", "other"))
    name = "first.weight"
    assert torch.equal(start[name], same[name])
    assert not torch.allclose(start[name], second[name], atol=0.01)


def test_other_pseudo_labels_are_a_different_training(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    for folder, moved_mm in (("one", 0.0), ("two", 10.0)):
        label(tmp_path / folder, "sub-04", seg="dcnnet", moved_mm=moved_mm)
    assert train("dcnnet", dataset, out, "--distill", str(tmp_path / "one"), epochs=1) == 0
    assert train("dcnnet", dataset, out, "--distill", str(tmp_path / "two"), epochs=1) == 2
    assert "out: contains a different training (differs in pseudo_labels)" in capsys.readouterr().err


def test_test_participants_give_no_pseudo_labels(tmp_path, capsys):
    root, results = make_dataset(tmp_path / "ds"), tmp_path / "results"
    write_map(root, "sub-03_acq-other", PHANTOM.chi(GRID, seed=9))
    label(results, "sub-03", seg="dcnnet")  # manual ones count
    dseg = results / "sub-03" / "anat" / "sub-03_seg-dcnnet_dseg.nii.gz"
    dseg.rename(dseg.with_name("sub-03_acq-other_seg-dcnnet_dseg.nii.gz"))
    options = ["--pretrain-on", str(results), "--recipe", "sampling.step=[20, 20, 20]"]
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
    assert "--pretrain-on: all maps belong to validation or test participants of fold " in capsys.readouterr().err


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


def test_thicker_stacks_are_used_for_prediction(dataset, tmp_path):
    options = ["--arch", "slices=5", "--recipe", "sampling.size=[32, 5, 32]"]
    assert train("attunet25d", dataset, tmp_path / "out", *options, epochs=1) == 0
    assert read_model_folder(MODELS["attunet25d"], tmp_path / "out").input.slices == 5
    block = predict(PHANTOM.chi(GRID), BOX, MODELS["attunet25d"], weights=tmp_path / "out")
    assert block.probabilities.sum(axis=0) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("model", "classes"), [("deepqsmseg", 10), ("dcnnet", 2)])
def test_recipe_may_replace_the_network(model, classes, dataset, tmp_path):
    small = "--recipe " + SMALL[model].partition("--recipe ")[2]
    options = ["network=bids_dgmseg.networks.plain_unet:PlainUNet", "--arch", "features=[4, 8]"]
    if model == "dcnnet":
        options += ["--recipe", "loss.terms.attention=0"]
    assert train(model, dataset, tmp_path / "out", *options, epochs=1, small=small) == 0
    (network,) = load_segmenters(MODELS[model], tmp_path / "out")
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
    (network,) = load_segmenters(MODELS["dcnnet"], tmp_path / "out")
    assert type(network) is PlainUNet
    assert predict(PHANTOM.chi(GRID), BOX, MODELS["dcnnet"], weights=tmp_path / "out").probabilities.shape[0] == 5


def test_patch_size_may_change(dataset, tmp_path, monkeypatch):
    seen, forward = set(), DCNNet.forward

    def look(network, x):
        seen.add((network.training, tuple(x.shape[1:])))
        return forward(network, x)

    monkeypatch.setattr(DCNNet, "forward", look)
    assert train("dcnnet", dataset, tmp_path / "out", "--recipe", "sampling.size=[24, 24, 24]", epochs=1) == 0
    assert seen == {(True, (1, 24, 24, 24)), (False, (1, 24, 24, 24))}
    assert read_model_folder(MODELS["dcnnet"], tmp_path / "out").input.patch_mm == (30, 30, 30)  # 24 · 1.25 mm


def test_unlabelled_nucleus_is_reported(tmp_path, capsys):
    root = tmp_path / "ds"
    start_dataset(root)
    for number in (1, 2):
        write_map(root, f"sub-0{number}", PHANTOM.chi(GRID, seed=number))
        label(root / "derivatives" / "manual", f"sub-0{number}", seg="manual")
    path = next(root.rglob("sub-02_seg-manual_dseg.nii.gz"))
    truth = PHANTOM.dseg(GRID).array
    nib.Nifti1Image(np.where(np.isin(truth, (3, 4)), 0, truth), GRID.affine).to_filename(path)  # without IN_L, IN_R
    assert train("dcnnet", root, tmp_path / "out", epochs=1) == 0
    assert "no IN in the labels of sub-02: treated as background; use --holdout" in capsys.readouterr().out


def test_longer_training_continues(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert train("deepqsmseg", dataset, out, epochs=1) == 0
    assert train("deepqsmseg", dataset, out, epochs=3) == 0
    assert [row["epoch"] for row in curve(out / "fold_0")] == ["1", "2", "3"]
    assert train("deepqsmseg", dataset, out, "--seed", "5") == 2
    assert "out: contains a different training (differs in seed); choose a new OUT" in capsys.readouterr().err


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
        ("attunet25d", "--arch slices=5", "--arch slices=5: samples have 3 slices; change --recipe sampling.size too"),
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
