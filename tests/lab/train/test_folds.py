"""Trainings of folds by the papers' recipes on labelled phantoms, with networks of a few hundred weights."""

import os
import re
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import atlas_files, load_segmenters, read_model_folder
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import start_dataset, write_map
from tests.lab.train.recipe_trainings import GRID, SMALL, command, curve, label, make_dataset, predict, record, train
from tests.terminal import Terminal

pytestmark = pytest.mark.usefixtures("small_recipes")


@pytest.mark.parametrize("model", SMALL)
def test_training_writes_a_model_folder(model, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(model, dataset, out) == 0
    (network,) = load_segmenters(read_model_folder(MODELS[model], out), out)
    assert all(torch.isfinite(value).all() for value in network.parameters())
    block = predict(MODELS[model], out)
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


def test_terminal_shows_the_scan_being_read_and_prepared(dataset, tmp_path, monkeypatch):
    terminal = Terminal.connected(monkeypatch)
    assert train("deepqsmseg", dataset, tmp_path / "out", epochs=1) == 0
    expected = [f"{step} sub-0{number}, {number} of 3" for step in ("reading", "preparing") for number in (1, 2, 3)]
    assert terminal.shown[:6] == expected


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
    assert len(load_segmenters(read_model_folder(MODELS["deepqsmseg"], out), out)) == 2
    splits = record(out)["folds"]
    assert sorted(one for fold in splits for one in fold["test"]) == ["01", "02", "03"]
    assert all(len(fold["training"]) == 2 and fold["validation"] == [] for fold in splits)


def test_killed_training_resumes_to_the_same_curve(dataset, tmp_path):
    epochs = 12
    assert train("dcnnet", dataset, tmp_path / "whole", epochs=epochs) == 0
    out = tmp_path / "killed"
    options = command("dcnnet", dataset, out, "--checkpoint-minutes", "0", epochs=epochs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bids_dgmseg.cli.main", *options], stdout=subprocess.DEVNULL, env=environment
    )
    table = out / "fold_0" / "curve.tsv"
    while process.poll() is None and not (table.is_file() and len(table.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "fold_0.safetensors").exists()
    assert train("dcnnet", dataset, out, epochs=epochs) == 0
    assert len(curve(out / "fold_0")) == epochs
    assert not list(out.glob(".arrays-*"))
    assert table.read_bytes() == (tmp_path / "whole" / "fold_0" / "curve.tsv").read_bytes()
    one, other = (load_file(folder / "fold_0.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_seed_changes_the_network_but_not_the_split(dataset, tmp_path):
    # --minutes 0.001 ends after a step; a learning rate of a billionth leaves the initial weights as they are.
    for name, seed, split_seed in (("one", "1", 1), ("two", "2", 1), ("other", "1", 3)):
        options = ["--fold", "0", "--minutes", "0.001", "--seed", seed]
        changes = {"pace.learning_rate": 1e-9, "split_seed": split_seed}
        assert train("dcnnet", dataset, tmp_path / name, *options, epochs=1, folds=3, changes=changes) == 0
    one, two, other = (record(tmp_path / name)["folds"] for name in ("one", "two", "other"))
    assert one == two != other
    start, second, same = (load_file(tmp_path / name / "fold_0.safetensors") for name in ("one", "two", "other"))
    name = "first.weight"
    assert torch.equal(start[name], same[name])
    assert not torch.allclose(start[name], second[name], atol=0.01)


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
    (out / "training.json").unlink()  # the checkpoint knows it, too
    assert train("deepqsmseg", dataset, out, "--seed", "5") == 2
    assert "out: contains a different training (differs in seed); choose a new OUT" in capsys.readouterr().err


def test_processes_that_prepare_maps_change_nothing(dataset, tmp_path):
    for workers in ("0", "2"):
        assert train("attunet25d", dataset, tmp_path / workers, "--workers", workers, epochs=1) == 0
    one, two = ((tmp_path / workers / "fold_0.safetensors").read_bytes() for workers in ("0", "2"))
    assert one == two


@pytest.mark.parametrize("workers", ["0", "2"])
def test_map_that_cannot_be_prepared_is_named(workers, tmp_path, capsys):
    root = make_dataset(tmp_path / "study")
    chi = PHANTOM.chi(GRID, seed=1)
    small = np.zeros_like(chi.array)
    small[22:38, 30:46, 24:40] = chi.array[22:38, 30:46, 24:40]
    for scan in ("sub-01", "sub-02", "sub-03"):
        write_map(root, scan, chi.with_array(small))
    options, changes = ["--workers", workers], {"sampling.region": "localizer"}
    assert train("dcnnet", root, tmp_path / "out", *options, epochs=1, changes=changes) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: sub-0[123]: no brain found \(64 mL\); check that the map", error)  # 16³ · 2.5³ mm³


@pytest.mark.parametrize(
    ("model", "options", "changes", "message"),
    [
        ("dcnnet", "--folds 4", {}, "--folds 4: only 3 labelled participants; use 3 or fewer"),
        ("dcnnet", "--fold 3", {}, "--fold 3: choose from 0 to 0"),
        ("dcnnet", "--from nowhere", {}, "--from nowhere: no such folder or file"),
        ("dcnnet", "--holdout 9", {}, "--holdout 9: no labelled scan of this participant (labelled: 01, 02, 03)"),
        ("dcnnet", "", {"arch.depth": 3}, "got an unexpected keyword argument 'depth'"),
        ("deepqsmseg", "", {"sampling.empty": 0, "sampling.size": [1, 1, 1]}, "fold_0: there is no training sample"),
        ("attunet25d", "", {"arch.scales": 2}, "scale_weights has 3 values for 2 scales"),
        ("attunet25d", "", {"sampling.stack_axis": 2}, "sampling.stack_axis: attunet25d uses 1 for prediction"),
        ("dcnnet", "", {"sampling.normalized": "sample"}, "sampling.normalized: dcnnet uses region for prediction"),
        ("attunet25d", "", {"arch.slices": 5}, "arch or sampling.size do not fit"),
    ],
)
def test_invalid_options_are_refused(model, options, changes, message, dataset, tmp_path, capsys):
    assert train(model, dataset, tmp_path / "out", *options.split(), changes=changes) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_folder_is_used_as_trained(dataset, tmp_path):
    changes: dict[str, object] = {"spacing_mm": [2.5, 2.5, 2.5], "sampling.normalization": "zscore"}
    assert train("dcnnet", dataset, tmp_path / "out", epochs=1, changes=changes) == 0
    shown = read_model_folder(MODELS["dcnnet"], tmp_path / "out").input
    assert (shown.spacing_mm, shown.normalization, shown.patch_mm) == ((2.5,) * 3, "zscore", (16 * 2.5,) * 3)
    changes = {"arch.slices": 5, "sampling.size": [32, 5, 32]}
    assert train("attunet25d", dataset, tmp_path / "thick", epochs=1, changes=changes) == 0
    assert read_model_folder(MODELS["attunet25d"], tmp_path / "thick").input.slices == 5
    assert predict(MODELS["attunet25d"], tmp_path / "thick").probabilities.sum(axis=0) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "changes"),
    list[tuple[str, dict[str, object]]](
        [
            ("dcnnet", {"arch.independent": False}),
            ("dcnnet", {"arch.attention": False}),
            ("attunet25d", {"arch.attention": False}),
            ("attunet25d", {"arch.scales": 2, "loss.scale_weights": [0.7, 0.3]}),
            ("deepqsmseg", {"network": "bids_dgmseg.networks.plain_unet:PlainUNet"}),
        ]
    ),
    ids=["joint classes", "no attention modules", "no gates", "two scales", "another network"],
)
def test_ablations_of_the_papers_are_recipes(model, changes, dataset, tmp_path):
    if "network" in changes:
        changes = {**changes, "arch.features": [2, 4], "sampling.size": [16, 16, 16]}
    small = "network" not in changes
    options = ["--scans", "1"]
    assert train(model, dataset, tmp_path / "out", *options, epochs=1, changes=changes, small=small) == 0
    assert len(record(tmp_path / "out")["folds"][0]["training"]) == 1
    described, names = (
        read_model_folder(MODELS[model], tmp_path / "out"),
        load_file(tmp_path / "out/fold_0.safetensors"),
    )
    if "arch.independent" in changes:
        assert described.groups == (("DN", "IN"),)
    if "arch.attention" in changes:
        assert not [name for name in names if "gate" in name or name.startswith("attention")]
    if "arch.scales" in changes:
        assert {name for name in names if "heads" in name and "bias" in name} == {"heads.0.bias", "heads.1.bias"}
    (network,) = load_segmenters(described, tmp_path / "out")
    assert isinstance(network, PlainUNet) is ("network" in changes)
