"""The app with nnU-Net folders of random weights: the labels are noise, but all outputs must be consistent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from bids_dgmseg.bids.dataset import validate
from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.masks import large_components
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.nnunet_folder import read_folder
from bids_dgmseg.segmentation.engines import NnunetNetwork
from tests.segmentation.nnunet_folders import write_folder

pytestmark = pytest.mark.usefixtures("coarse_midplane")

WIDE: dict[str, Any] = {"patch_size": [32, 32, 32], "spacing": [5.0, 5.0, 5.0]}


def run(dataset: Path, out: Path, *options: str) -> int:
    arguments = ["--model", "nnunet2step", "-w", str(out.parent / "work"), "--nprocs", "1", "--device", "cpu"]
    return main([str(dataset), str(out), "participant", *arguments, "--skip-bids-validation", "--no-viewer", *options])


def test_cerebellum_folder_defines_the_box(bids_dataset, tmp_path):
    weights, out = tmp_path / "weights", tmp_path / "out"
    write_folder(weights / "cerebellum", labels={"background": 0, "cerebellum": 1}, seed=3, **WIDE)
    write_folder(weights / "dentate", seed=4, **WIDE)
    dataset = bids_dataset("sub-01")
    assert run(dataset, out, "--weights", str(weights)) == 0
    chi = Volume.read(dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz")
    seen = NnunetNetwork(read_folder(weights / "cerebellum"), device="cpu", sided=False)(chi).argmax(axis=0) == 1
    seen &= np.abs(chi.array) > 1e-4  # regions do not extend beyond the valid voxels
    anat = out / "sub-01" / "anat"
    mask = Volume.read(anat / "sub-01_space-orig_label-cerebellum_desc-nnunet2step_mask.nii.gz", np.uint8).array > 0
    np.testing.assert_array_equal(mask, large_components(seen))
    box_mm = json.loads((anat / "sub-01_seg-nnunet2step_qc.json").read_text())["box_mm"]
    corner = chi.affine @ [*(np.argwhere(mask).min(axis=0) - 0.5), 1]
    assert box_mm["low"] == pytest.approx(corner[:3] - 8)
    labels = Volume.read(anat / "sub-01_seg-nnunet2step_dseg.nii.gz", np.uint8).array
    assert set(np.unique(labels)) == {0, 2}
    assert ndimage.label(labels, np.ones((3, 3, 3)))[1] == 1  # of the network's noise, the largest component
    assert validate(out, tmp_path) is None


def test_external_folder_runs_by_the_names_of_its_labels(bids_dataset, tmp_path, capsys):
    labels = {"background": 0, "left red nucleus": 1, "RN_R": 2, "lesion": 3}
    folder = write_folder(tmp_path / "foreign", labels=labels, mirror_axes=(0, 1, 2), **WIDE)
    out = tmp_path / "out"
    assert run(bids_dataset("sub-01"), out, "--weights", str(folder)) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "foreign: label 3 (lesion) matches no nucleus; treated as background" in said
    assert "foreign: mirroring as in training (nnUNetTrainer) would exchange left and right" in said
    rows = (out / "sub-01" / "anat" / "sub-01_seg-nnunet2step_stats.tsv").read_text().splitlines()
    assert [row.split("\t")[2] for row in rows] == ["abbreviation", "RN_L", "RN_R"]
    assert not list(out.rglob("*label-cerebellum*"))
