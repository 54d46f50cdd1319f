"""Export and commands of nnunet2step; one training of a step per network by nnU-Net itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_dgmseg.bids.labelled_scans import LabelledMap
from bids_dgmseg.cli.main import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.train import nnunet_commands
from bids_dgmseg.models.nnunet_folder import read_folder
from bids_dgmseg.phantom.demo import Image, LabelledScan, add_scan, start_dataset, write_participants
from tests.lab.train.recipe_trainings import record
from tests.segmentation.nnunet_folders import write_folder

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
SHAPE = (20, 20, 20)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five scans of two sites; a cerebellum of 8 x 8 x 8 voxels around two dentates."""
    root, random, rows = tmp_path / "ds", np.random.default_rng(0), []
    start_dataset(root, name="Balls", readme="For a test.\n")
    for number in range(5):
        dseg, cerebellum = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        dseg[7:9, 6:8, 6:8], dseg[11:13, 6:8, 6:8] = 1, 2
        cerebellum[6:14, 3:11, 3:11] = 1
        chi = 0.2 * (dseg > 0) + 0.05 * random.normal(size=SHAPE)
        image, masks = Image("Chimap", chi.astype(np.float32)), {"cerebellum": cerebellum}
        add_scan(root, LabelledScan(f"{number:02d}", [image], dseg, AFFINE, {"Units": "ppm"}, masks=masks))
        rows.append({"participant_id": f"sub-{number:02d}", "site": "AB"[number % 2]})
    write_participants(root, rows, {})
    return root


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Commands of nnU-Net, recorded instead of run; plans are written, and model folders get random weights."""
    seen: list[tuple[str, list[str]]] = []

    def run(self, command, options):
        seen.append((command, list(options)))
        if command == "plan":
            plans = {"configurations": {"3d_fullres": {"architecture": {"arch_kwargs": {"n_stages": 5}}}}}
            path = self.work / "preprocessed" / "Dataset001_QSM" / "nnUNetPlans.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(plans))

    def write_model(work, folder, fold, names):
        if not folder.exists():
            write_folder(folder, labels={"background": 0, **{name: n for n, name in enumerate(names, start=1)}})
        return 1, "00ff"

    monkeypatch.setattr(nnunet_commands._Commands, "run", run)
    monkeypatch.setattr(nnunet_commands, "write_model", write_model)
    monkeypatch.setattr("bids_dgmseg.lab.train.folds.use_all_cores", lambda: None)
    return seen


def train(dataset: Path, out: Path, *options: str) -> int:
    return main(["train", "nnunet2step", str(dataset), str(out), "--workers", "0", "--device", "cpu", *options])


def test_folds_are_trained_by_nnunet_commands(dataset, commands, tmp_path):
    out = tmp_path / "out"
    assert train(dataset, out, "--fold", "1", "0", "--recipe", "nnunet2step-small") == 0
    assert [command for command, _ in commands] == ["plan", "preprocess", "train", "train"] * 2
    plan, training = commands[0][1], commands[2][1]
    assert plan[plan.index("-overwrite_target_spacing") :][1:4] == ["2.58"] * 3
    assert training[1:6] == ["3d_fullres", "0", "-tr", "DentateTrainer", "--c"]
    folder = out / "training/dentate/preprocessed/Dataset001_QSM"
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    features = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
    assert features == [16, 32, 64, 128, 128]
    splits = json.loads((folder / "splits_final.json").read_text())
    for fold, split in zip(record(out)["folds"], splits, strict=True):
        assert (len(fold["training"]), len(fold["validation"]), len(fold["test"])) == (3, 1, 1)
        assert split == {
            "train": [f"sub-{p}" for p in fold["training"]],
            "val": [f"sub-{p}" for p in fold["validation"]],
        }


def test_export_is_cropped_to_the_cerebellum(dataset, commands, tmp_path, monkeypatch):
    exported = {}

    def export(folder, cases, names):
        exported[folder.parents[1].name] = list(cases)
        return {case.name: case.participant for case in exported[folder.parents[1].name]}

    monkeypatch.setattr(nnunet_commands, "export_dataset", export)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    assert train(dataset, tmp_path / "out", "--fold", "0") == 0
    whole, crop = exported["cerebellum"][0], exported["dentate"][0]
    assert (whole.chi.shape, whole.channel_map.array.sum()) == (SHAPE, 8**3)
    assert crop.chi.shape == (12, 12, 12)  # 8 mm are two voxels on every side
    assert np.argwhere(crop.channel_map.array == 1).min(axis=0).tolist() == [3, 5, 5]


def test_raw_dataset_is_nnunets(tmp_path):
    chi = Volume(np.zeros((4, 5, 6), np.float32), AFFINE)
    case = LabelledMap("sub-01-run-1", chi, chi.with_array(np.ones((4, 5, 6), np.uint8)), "01")
    assert nnunet_commands.export_dataset(tmp_path, [case], ("DN_L", "DN_R")) == {"sub-01-run-1": "01"}
    assert nib.Nifti1Image.from_filename(tmp_path / "imagesTr" / "sub-01-run-1_0000.nii.gz").shape == (4, 5, 6)
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "DN_L": 1, "DN_R": 2}
    assert (content["numTraining"], content["orientation"]) == (1, "RAS")


def test_changed_masks_are_a_different_training(dataset, commands, tmp_path, capsys):
    """Preprocessed images of an earlier call contain the masks as they were."""
    out = tmp_path / "out"
    assert train(dataset, out, "--fold", "0") == 0
    assert train(dataset, out, "--fold", "0", "--epochs", "9") == 0
    path = dataset / "derivatives/truth/sub-00/anat/sub-00_label-cerebellum_mask.nii.gz"
    mask = nib.Nifti1Image.from_filename(path)
    nib.Nifti1Image(np.roll(np.asarray(mask.dataobj), 1, axis=2), AFFINE).to_filename(path)
    assert train(dataset, out, "--fold", "0") == 2
    assert "out: already contains a run with different settings (masks); choose a new OUT" in capsys.readouterr().err


def test_scan_without_cerebellum_is_refused(dataset, commands, tmp_path, monkeypatch, capsys):
    for path in (dataset / "derivatives" / "truth").rglob("*_mask.nii.gz"):
        path.unlink()

    monkeypatch.setattr(nnunet_commands, "find_cerebellum", lambda chi, device: np.zeros(chi.shape, bool))
    assert train(dataset, tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "no label-cerebellum mask for sub-00" in said.out
    assert "sub-00: no cerebellum found; add a label-cerebellum mask" in said.err


def test_failed_command_names_its_log(tmp_path, lines, monkeypatch):
    monkeypatch.setitem(nnunet_commands._COMMANDS, "train", "json.tool:main")  # starts faster than nnU-Net
    commands = nnunet_commands._Commands(tmp_path, {}, 1, lines)
    with pytest.raises(InputError, match=r"nnU-Net ended with exit code 2 \(.*nowhere.*\); see .*nnunet.log"):
        commands.run("train", ["nowhere"])


TRAINER_CHECK = """
import os, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
trainer = find("DentateTrainer")
transforms = trainer.get_training_transforms([32] * 3, (-1, 1), None, None, do_dummy_2d_data_aug=False).transforms
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
assert not any(isinstance(transform, MirrorTransform) for transform in transforms)
(spatial,) = [transform for transform in transforms if isinstance(transform, SpatialTransform)]
assert spatial.p_elastic_deform > 0
assert max(spatial.elastic_deform_scale) * 32 * 0.25 < 32 / 4  # displacement in voxels, far from folding
"""


@pytest.mark.slow
def test_trainer_is_found_and_elastic_without_mirroring():
    folder = Path(nnunet_commands.__file__).with_name("nnunet_trainer")
    environment = {**os.environ, "nnUNet_extTrainer": str(folder)}
    subprocess.run([sys.executable, "-c", TRAINER_CHECK], env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_ends_and_resumes(dataset, tmp_path, monkeypatch):
    """One epoch of both nnU-Nets, then a second one, with the planning's pool of processes in a child process."""
    monkeypatch.setenv("DGMSEG_STEPS", "1")
    out = tmp_path / "out"
    for epochs in ("1", "2"):
        assert train(dataset, out, "--fold", "0", "--recipe", "nnunet2step-small", "--epochs", epochs) == 0
        for step, labels in (("cerebellum", ["cerebellum"]), ("dentate", ["DN_L", "DN_R"])):
            rows = (out / step / "fold_0" / "curve.tsv").read_text().splitlines()
            assert rows[0].split("\t")[-len(labels) :] == labels
            assert len(rows) == 1 + int(epochs)
    model = read_folder(out / "dentate")
    assert (model.trainer, model.mirror_axes) == ("nnUNetTrainerNoMirroring", ())
    assert {values.dtype for values in model.parameters[0].values()} == {torch.float16}
    assert model.plans["configurations"]["3d_fullres"]["spacing"] == [0.86, 0.86, 0.86]
