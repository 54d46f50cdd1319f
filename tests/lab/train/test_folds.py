"""Trainings of folds by the papers' recipes on labelled phantoms, with networks of a few hundred weights."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.cli.main import main
from bids_dgmseg.image.grids import Grid, box_of_mask, resample
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import atlas_files, load_segmenters, read_model_folder
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.segment import segment_map
from tests.conftest import write_map
from tests.lab.train.recipe_trainings import (
    BRIEF,
    GRID,
    SMALL,
    command,
    curve,
    make_dataset,
    phantom,
    predict,
    record,
    train,
)

pytestmark = pytest.mark.usefixtures("small_recipes")

KILLED = """
import os, signal, sys
from bids_dgmseg.cli.main import main
from bids_dgmseg.lab.train.core import State

def save_and_die(state, path, save=State.save):
    save(state, path)
    if (state.epoch, state.step) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)

State.save = save_and_die
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Two epochs of DCN-Net."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train("dcnnet", dataset, out) == 0
    return out


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(dataset, whole, tmp_path, capsys):
    out = tmp_path / "out"
    options = command("dcnnet", dataset, out, "--checkpoint-minutes", "0")
    process = subprocess.run([sys.executable, "-c", KILLED, *options], stdout=subprocess.DEVNULL, check=False)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "fold_0.safetensors").exists()
    assert len(curve(out / "fold_0")) == 1
    assert main(options) == 0  # the same command
    said = capsys.readouterr().out
    assert "fold_0: epoch 2," in said
    assert "fold_0: epoch 1," not in said
    assert not list(out.glob(".arrays-*"))
    assert (out / "fold_0" / "curve.tsv").read_bytes() == (whole / "fold_0" / "curve.tsv").read_bytes()
    first, second = (load_file(folder / "fold_0.safetensors") for folder in (whole, out))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_images_of_another_contrast_are_for_weights_trained_on_it(dataset, tmp_path, capsys):
    root = tmp_path / "b0"
    shutil.copytree(dataset, root)
    for path in root.glob("sub-*/anat/*_Chimap.nii.gz"):  # nuclei are dark, values large and positive
        image: Any = nib.load(path)
        inverted = np.where(image.get_fdata() != 0, 900 - 2000 * image.get_fdata(), 0)
        nib.Nifti1Image(inverted.astype(np.float32), image.affine).to_filename(path)
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text('{"Contrast": "b0"}')
    assert train("dcnnet", root, tmp_path / "out", epochs=1) == 2
    assert 'its contrast is b0 ("Contrast" in its sidecar), expected chi' in capsys.readouterr().err
    assert train("dcnnet", root, tmp_path / "out", epochs=1, changes={"contrast": "b0"}) == 0
    assert train("dcnnet", dataset, tmp_path / "other", epochs=1, changes={"contrast": "b0"}) == 2
    trained = read_model_folder(MODELS["dcnnet"], tmp_path / "out")
    assert (trained.input.contrast, trained.localizer.guard) == ("b0", "")
    seen = check_chi(next(root.glob("sub-01/anat/*.nii.gz")), {"Contrast": "b0"}, contrast="b0")
    assert np.percentile(seen.chi_ppm.array[seen.chi_ppm.array > 0], 99) == pytest.approx(0.1, rel=1e-5)
    box = segment_map(seen.chi_ppm, MODELS["dcnnet"], weights=tmp_path / "out").location.box
    nuclei = np.isin(PHANTOM.dseg(GRID).array, [1, 2, 3, 4])
    truth = box_of_mask(Volume(nuclei, GRID.affine))  # registered to itself, with a margin of 6 mm
    assert (np.array(box.low_mm) <= truth.low_mm).all()
    assert (np.array(box.high_mm) >= truth.high_mm).all()


STRANGER = """
from torch import nn

class Line(nn.Module):
    def __init__(self, channels, classes, deep_supervision=False, *, width=3):
        super().__init__()
        self.body, self.head = nn.Conv3d(channels, width, 3, padding=1), nn.Conv3d(width, classes, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())
"""


@pytest.mark.slow
def test_network_of_another_package_is_trained_and_used(dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "strange_nets.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"network": "strange_nets:Line", "arch.width": 2}
    options = {"small": False, "epochs": 1, "changes": {**changes, "sampling.step": [20, 20, 20]}}
    assert train("dcnnet", dataset, tmp_path / "out", **options) == 2
    assert "network strange_nets:Line is not one of" in capsys.readouterr().err
    about = tmp_path / "strange_nets-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: strange-nets\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[bids_dgmseg.networks]\nline = strange_nets:Line\n")
    assert train("dcnnet", dataset, tmp_path / "out", **options) == 0
    trained = read_model_folder(MODELS["dcnnet"], tmp_path / "out")
    assert (trained.network, dict(trained.arch), trained.groups) == ("strange_nets:Line", {"width": 2}, (("DN", "IN"),))
    assert predict(trained, tmp_path / "out").probabilities.shape[0] == 5


@pytest.mark.parametrize("model", SMALL)
def test_training_writes_a_model_folder(model, dataset, whole, tmp_path):
    out = whole if model == "dcnnet" else tmp_path / "out"
    assert train(model, dataset, out, epochs=2 if model == "dcnnet" else 1) == 0
    trained = read_model_folder(MODELS[model], out)
    (network,) = load_segmenters(trained, out)
    assert all(torch.isfinite(value).all() for value in network.parameters())
    if model == "deepqsmseg":
        block = predict(MODELS[model], out)
        assert len(block.probabilities) == len(MODELS[model].labels) + 1
        assert block.probabilities.sum(axis=0) == pytest.approx(1, abs=1e-4)
    axis, size_mm = {"dcnnet": (0, 16 * 1.25), "attunet25d": (0, 32 * 0.83), "deepqsmseg": (2, 32 * 2.0)}[model]
    assert trained.input.patch_mm[axis] == pytest.approx(size_mm)
    row = curve(out / "fold_0")[0]
    assert list(row)[5:] == list(MODELS[model].classes)
    assert (out / "fold_0" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_references_are_coarse_training_maps(dataset, whole):
    files = list(atlas_files(MODELS["dcnnet"], whole))
    assert [chi.name for chi, _ in files] == [f"sub-0{number}_Chimap.nii.gz" for number in (1, 2, 3)]
    reference, drawn = Volume.read(files[0][0]), Volume.read(files[0][1], np.uint8)
    assert reference.voxel_size_mm == pytest.approx((2, 2, 2))
    chi = Volume.read(dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz")
    same_places = resample(chi, Grid(reference.shape, reference.affine)).array  # 2.5 mm: nothing to average
    np.testing.assert_allclose(reference.array, same_places, atol=1e-4)
    assert set(np.unique(drawn.array)) == {0, 1, 2, 3, 4}
    assert (drawn.array == 1).sum() == (PHANTOM.dseg(GRID).array == 1).sum()


def test_folds_are_trained_one_by_one(dataset, tmp_path):
    out = tmp_path / "out"
    (out / "references").mkdir(parents=True)
    (out / "references" / "sub-09_Chimap.nii.gz").touch()  # left over from an earlier call
    for number, fold in enumerate((1, 0), start=1):
        assert train("dcnnet", dataset, out, "--fold", str(fold), *BRIEF, epochs=1, folds=3) == 0
        assert len(load_segmenters(read_model_folder(MODELS["dcnnet"], out), out)) == number
        splits = record(out)["folds"]
        trained = [splits[fold] for fold in (1, 0)[:number]]
        learned = {f"sub-{name}" for split in trained for name in (*split["training"], *split["validation"])}
        assert {chi.name.split("_")[0] for chi, _ in atlas_files(MODELS["dcnnet"], out)} == learned
    assert not list(out.glob("references/sub-09*"))
    assert sorted(name for split in splits for name in split["test"]) == ["01", "02", "03"]


def test_longer_training_continues(dataset, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    assert train("dcnnet", dataset, out, epochs=3) == 0
    assert [row["epoch"] for row in curve(out / "fold_0")] == ["1", "2", "3"]
    (out / "training.json").unlink()  # the checkpoint has the record, too
    assert train("dcnnet", dataset, out, "--seed", "5") == 2


@pytest.mark.slow
def test_processes_that_prepare_maps_change_nothing(dataset, tmp_path):
    for workers in ("0", "2"):
        assert train("attunet25d", dataset, tmp_path / workers, *BRIEF, "--workers", workers, epochs=1) == 0
    first, second = ((tmp_path / workers / "fold_0.safetensors").read_bytes() for workers in ("0", "2"))
    assert first == second


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_map_that_cannot_be_prepared_is_named(workers, tmp_path, capsys):
    root = make_dataset(tmp_path / "study")
    chi = phantom(1)
    small = np.zeros_like(chi.array)
    small[22:38, 30:46, 24:40] = chi.array[22:38, 30:46, 24:40]
    for scan in ("sub-01", "sub-02", "sub-03"):
        write_map(root, scan, chi.with_array(small))
    options, changes = ["--workers", workers], {"sampling.region": "localizer"}
    assert train("dcnnet", root, tmp_path / "out", *options, epochs=1, changes=changes) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: sub-0[123]: no brain found \(64 mL\); check that the map", error)  # 16³ · 2.5³ mm³


def test_unlabelled_nucleus_is_reported(tmp_path, capsys):
    root = make_dataset(tmp_path / "ds")
    path = next(root.rglob("sub-02_seg-manual_dseg.nii.gz"))
    truth = PHANTOM.dseg(GRID).array
    nib.Nifti1Image(np.where(np.isin(truth, (3, 4)), 0, truth), GRID.affine).to_filename(path)  # without IN_L, IN_R
    assert train("dcnnet", root, tmp_path / "out", *BRIEF, epochs=1) == 0
    assert "no IN in the labels of sub-02: treated as background; use --holdout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "changes", "message"),
    [
        ("dcnnet", "--folds 4", {}, "--folds 4: only 3 labelled participants; use 3 or fewer"),
        ("dcnnet", "--fold 3", {}, "--fold 3: choose from 0 to 0"),
        ("dcnnet", "--holdout 9", {}, "--holdout 9: no labelled scan of this participant (labelled: 01, 02, 03)"),
        ("dcnnet", "", {"arch.depth": 3}, "got an unexpected keyword argument 'depth'"),
        ("deepqsmseg", "", {"sampling.empty": 0, "sampling.size": [1, 1, 1]}, "fold_0: there is no training sample"),
        ("attunet25d", "", {"arch.scales": 2}, "scale_weights has 3 values for 2 scales"),
        ("dcnnet", "", {"sampling.normalized": "sample"}, "sampling.normalized: dcnnet uses region for prediction"),
        ("attunet25d", "", {"arch.slices": 5}, "network, sampling or loss do not fit together"),
    ],
)
def test_invalid_options_are_refused(model, options, changes, message, dataset, tmp_path, capsys):
    assert train(model, dataset, tmp_path / "out", *options.split(), changes=changes) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_folder_is_used_as_trained(dataset, tmp_path):
    changes: dict[str, object] = {"spacing_mm": [2.5, 2.5, 2.5], "sampling.normalization": "zscore"}
    assert train("dcnnet", dataset, tmp_path / "out", *BRIEF, epochs=1, changes=changes) == 0
    shown = read_model_folder(MODELS["dcnnet"], tmp_path / "out").input
    assert (shown.spacing_mm, shown.normalization, shown.patch_mm) == ((2.5,) * 3, "zscore", (16 * 2.5,) * 3)
    changes = {"arch.slices": 5, "sampling.size": [32, 5, 32]}
    assert train("attunet25d", dataset, tmp_path / "thick", *BRIEF, epochs=1, changes=changes) == 0
    assert read_model_folder(MODELS["attunet25d"], tmp_path / "thick").input.slices == 5


@pytest.mark.parametrize(
    ("model", "changes"),
    list[tuple[str, dict[str, object]]](
        [
            ("dcnnet", {"arch.independent": False}),
            ("attunet25d", {"arch.attention": False, "arch.scales": 2, "loss.scale_weights": [0.7, 0.3]}),
            ("deepqsmseg", {"network": "bids_dgmseg.networks.plain_unet:PlainUNet"}),
        ]
    ),
    ids=["joint classes", "two scales without gates", "another network"],
)
def test_ablations_of_the_papers_are_recipes(model, changes, dataset, tmp_path):
    out = tmp_path / "out"
    small = "network" not in changes
    if not small:
        changes = {**changes, "arch.features": [2, 4], "sampling.size": [16, 16, 16]}
    assert train(model, dataset, out, "--scans", "1", *BRIEF, epochs=1, changes=changes, small=small) == 0
    assert len(record(out)["folds"][0]["training"]) == 1
    described, names = read_model_folder(MODELS[model], out), load_file(out / "fold_0.safetensors")
    if model == "dcnnet":
        assert described.groups == (("DN", "IN"),)
    if model == "attunet25d":
        assert not [name for name in names if "gate" in name]
        assert {name for name in names if "heads" in name and "bias" in name} == {"heads.0.bias", "heads.1.bias"}
    (network,) = load_segmenters(described, out)
    assert isinstance(network, PlainUNet) is not small
