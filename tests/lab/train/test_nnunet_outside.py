"""A model that nnU-Net's own commands trained outside of this program, on labels that it does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import start_dataset, write_map
from tests.segmentation.nnunet_folders import predict_with_stock

SHAPE = (16, 12, 20)
AFFINE = np.array([[5.0, 0, 0, -40], [0, 5, 0, -30], [0, 0, 5, -50], [0, 0, 0, 1]])
PPM = np.array([0.0, 0.1, 0.2])
"""Of the background, of the block on the patient's left and of that on the right."""


RUN = """
import multiprocessing, os, random, sys, numpy, torch
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("fork")

from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
sys.argv = ["nnUNetv2_plan_and_preprocess", *"-d 7 -c 3d_fullres -npfp 1 -np 1".split()]
plan_and_preprocess_entry()

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
begin = nnUNetTrainer.initialize
def shorten(self):
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 30, 2
    begin(self)
nnUNetTrainer.initialize = shorten
os.environ["nnUNet_n_proc_DA"] = "0"  # planning wants one
for seed in (random.seed, numpy.random.seed, torch.manual_seed):  # some starts learn nothing in 30 steps
    seed(1)
sys.argv = ["nnUNetv2_train", *"7 3d_fullres 0 -tr nnUNetTrainer_1epoch -device cpu".split()]
run_training_entry()
"""
"""nnUNetv2_plan_and_preprocess and nnUNetv2_train with fewer steps than 250, in one process as each start of a process
imports nnU-Net again."""


def draw(seed: int) -> tuple[Volume, np.ndarray]:
    """Two blocks in noise, which lie a little elsewhere in each map."""
    random = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.uint8)
    for label, corner, size in ((1, (1, 1, 3), (4, 6, 7)), (2, (8, 5, 10), (5, 4, 6))):
        start = np.add(corner, random.integers(0, 3, 3))
        labels[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] = label
    chi = PPM[labels] + 0.02 * random.normal(size=SHAPE)
    return Volume(chi.astype(np.float32), AFFINE), labels


def write_raw(folder: Path) -> None:
    """What a user of nnU-Net prepares by hand."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for number in range(5):
        chi, labels = draw(number)
        nib.Nifti1Image(chi.array, AFFINE).to_filename(folder / "imagesTr" / f"block_{number:03d}_0000.nii.gz")
        nib.Nifti1Image(labels, AFFINE).to_filename(folder / "labelsTr" / f"block_{number:03d}.nii.gz")
    described = {
        "channel_names": {"0": "QSM"},
        "labels": {"background": 0, "sinister": 1, "dexter": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """The model folder that nnU-Net's own programs leave after an epoch of 30 steps."""
    work: Path = tmp_path_factory.mktemp("outside")
    write_raw(work / "raw" / "Dataset007_Blocks")
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    plain = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **folders, **plain}
    subprocess.run([sys.executable, "-c", RUN], check=True, capture_output=True, env=environment)
    return work / "results" / "Dataset007_Blocks" / "nnUNetTrainer_1epoch__nnUNetPlans__3d_fullres"


@pytest.mark.slow
@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.timeout(1800)  # an epoch takes ten seconds of a core that is free
def test_model_trained_by_nnunet_commands_segments(outside, tmp_path, capsys):
    chi, truth = draw(99)
    start_dataset(tmp_path / "ds")
    image = write_map(tmp_path / "ds", "sub-01", chi)
    table, out = tmp_path / "map.tsv", tmp_path / "out"
    table.write_text("label\tabbreviation\nsinister\tRN_L\n2\tRN_R\n", encoding="utf-8")
    options = f"--model nnunet2step --weights {outside} --label-map {table} --device cpu --nprocs 1"
    given = [*options.split(), "--skip-bids-validation", "-w", str(tmp_path / "work")]
    assert main([str(tmp_path / "ds"), str(out), "participant", *given]) == 0
    assert "its trainer (nnUNetTrainer_1epoch) mirrors left and right" in capsys.readouterr().err
    found = Volume.read(next(out.rglob("*_seg-nnunet2step_dseg.nii.gz")), np.uint8).array
    stock = predict_with_stock(outside, image, tmp_path, mirrored=(0, 1)).array  # not left and right
    numbers = [0, *(STRUCTURES.named(name).index for name in ("RN_L", "RN_R"))]
    for label, number in enumerate(numbers):
        assert dice(found == number, truth == label) > 0.8
    differing = found != np.array(numbers)[stock]
    assert not found[differing].any()  # stray parts are dropped, nothing else is changed
    assert differing.mean() < 0.01


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))
