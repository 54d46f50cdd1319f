"""Real trainings of one or two steps on balls of 32 voxels; too short to learn anything."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.nnunet.step import (
    NnunetCase,
    crop_to_cerebellum,
    environment,
    halve_state,
    train_step,
    write_raw_dataset,
)
from bids_dgmseg.lab.train.splits import Part
from bids_dgmseg.models.nnunet_folder import read_folder
from bids_dgmseg.models.registry import get_model, weights_folder
from bids_dgmseg.segmentation.nnunet import Network, quiet
from tests.lab.train.recorder import Lines
from tests.segmentation.nnunet_folders import predict_with_stock, write_folder

SHORT = NnunetTraining(epochs=1, iterations=1, validation_iterations=1, device="cpu", plan="small")
NAMES = ("DN_L", "DN_R")
FOREVER = """
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.log import PlainLog
from bids_dgmseg.lab.train.nnunet.step import train_step
from tests.lab.train.test_nnunet_step import NAMES, make_cases
short = dict(iterations=1, validation_iterations=1, device="cpu", checkpoint_minutes=0.0, plan="small")
this = NnunetTraining(epochs=100000, **short)
train_step("dentate", make_cases, NAMES, __import__("pathlib").Path("OUT"), this, log=PlainLog())
"""


def make_cases() -> list[NnunetCase]:
    """Two bright balls in noise, left the brighter."""
    random, cases = np.random.default_rng(0), []
    x, y, z = np.meshgrid(np.arange(32), np.arange(28), np.arange(26), indexing="ij")
    parts: tuple[Part, ...] = ("train", "train", "tune")
    for number, part in enumerate(parts):
        labels = np.zeros(x.shape, np.uint8)
        for label, place in ((1, 9), (2, 22)):
            labels[(x - place) ** 2 + (y - 14) ** 2 + (z - 13) ** 2 < 30] = label
        chi = np.array([0, 0.2, 0.1])[labels] + 0.02 * random.normal(size=labels.shape)
        grid = np.diag([0.9, 1.0, 1.1, 1.0])
        cases.append(NnunetCase(f"sub-{number}", Volume(chi.astype(np.float32), grid), labels, part))
    return cases


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """OUT after one step of gradient descent."""
    out: Path = tmp_path_factory.mktemp("trained")
    log = Lines()
    outcome = train_step("dentate", make_cases, NAMES, out, SHORT, log=log)
    assert outcome.folder == out / "dentate"
    assert log.lines[0] == "dentate: 2 training scans, 1 validation scan; planning and preprocessing"
    assert log.lines[1].startswith("dentate: epoch 1, ")
    assert len(log.status) == 1
    assert re.fullmatch(
        r"dentate: epoch 1/1, step 1/1, \d+\.\d min, 0\.0 left, loss -?\d\.\d{3}, Dice n/a", log.status[0]
    )
    return out


def test_workers_end_with_the_training(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    train_step("dentate", make_cases, NAMES, out, replace(SHORT, epochs=2, workers=2), log=Lines())
    assert not multiprocessing.active_children()
    assert [thread.name for thread in threading.enumerate() if "results_loop" in thread.name] == []


def write_chi(path: Path) -> Path:
    chi = make_cases()[0].chi
    nib.Nifti1Image(chi.array, chi.affine).to_filename(path)
    return path


@pytest.mark.usefixtures("without_bfloat16")
def test_stock_nnunet_gives_the_same_labels(trained, tmp_path):
    image = write_chi(tmp_path / "c_0000.nii.gz")
    stock = predict_with_stock(trained / "dentate", image, tmp_path)
    ours = Network(read_folder(trained / "dentate"), device="cpu", sided=True)(Volume.read(image))
    np.testing.assert_array_equal(ours.argmax(axis=0), stock.array)


def test_checkpoint_is_small_and_never_mirrors(trained):
    path = trained / "dentate" / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    assert {values.dtype for values in content["network_weights"].values()} == {torch.float16}
    assert set(content) == {
        "network_weights",
        "trainer_name",
        "init_args",
        "inference_allowed_mirroring_axes",
        "current_epoch",
    }
    assert content["trainer_name"] == "nnUNetTrainerNoMirroring"
    assert content["inference_allowed_mirroring_axes"] is None
    distinct = {values.data_ptr(): values.numel() for values in content["network_weights"].values()}
    assert path.stat().st_size < 2.2 * sum(distinct.values()) + 200_000  # each parameter once, whatever its names


def test_plan_follows_the_paper(trained):
    plan = json.loads((trained / "dentate" / "plans.json").read_text())["configurations"]
    assert list(plan) == ["3d_fullres"]
    assert plan["3d_fullres"]["spacing"] == [0.86, 0.86, 0.86]
    assert plan["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]


def test_finished_training_is_not_repeated(trained):
    def cases() -> list[NnunetCase]:
        raise AssertionError("preprocessed before")

    before = (trained / "dentate_curve.tsv").read_text()
    assert train_step("dentate", cases, NAMES, trained, SHORT, log=Lines()).epochs == 1
    assert (trained / "dentate_curve.tsv").read_text() == before


def test_longer_training_continues(trained):
    rows = read_curve(trained / "dentate_curve.tsv")
    longer = NnunetTraining(epochs=2, iterations=1, validation_iterations=1, device="cpu")
    log = Lines()
    assert train_step("dentate", make_cases, NAMES, trained, longer, log=log).epochs == 2
    assert [re.sub(r"\d+\.\d+|n/a", "#", line) for line in log.status] == [
        "dentate: epoch 2/2, step 1/1, # min, # left, loss #, Dice #"
    ]
    assert not log.status[0].endswith("n/a")  # that of the first epoch
    later = read_curve(trained / "dentate_curve.tsv")
    assert [row["epoch"] for row in later] == ["1", "2"]
    assert later[0] == rows[0]
    assert float(later[1]["learning_rate"]) == pytest.approx(0.01 * 0.5**0.9, abs=1e-6)


def test_folds_share_a_folder(tmp_path):
    held = [["sub-0"], ["sub-1", "sub-2"]]
    for fold in (1, 0):
        training = replace(SHORT, fold=fold)
        outcome = train_step("dentate", make_cases, NAMES, tmp_path, training, log=Lines(), validation=held)
        assert (outcome.name, (tmp_path / f"{outcome.name}_curve.tsv").is_file()) == (f"dentate_fold_{fold}", True)
    (splits,) = tmp_path.glob("training/dentate/preprocessed/*/splits_final.json")
    assert json.loads(splits.read_text()) == [
        {"train": ["sub-1", "sub-2"], "val": ["sub-0"]},
        {"train": ["sub-0"], "val": ["sub-1", "sub-2"]},
    ]
    first, second = read_folder(tmp_path / "dentate").parameters  # averaged in use
    assert any((first[name] != second[name]).any() for name in first)


def test_time_ends_the_training(trained):
    epochs = len(read_curve(trained / "dentate_curve.tsv"))
    over = NnunetTraining(epochs=1000, minutes=1e-4, iterations=1, validation_iterations=1, device="cpu")
    assert train_step("dentate", make_cases, NAMES, trained, over, log=Lines()).epochs == epochs
    assert len(read_curve(trained / "dentate_curve.tsv")) == epochs


def read_curve(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def wait_for(path: Path, *, rows: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(5000):
        if path.is_file() and len(read_curve(path)) >= rows:
            return
        assert process.poll() is None, "the training ended by itself"
        time.sleep(0.1)
    raise AssertionError(f"no {rows} rows in {path}")


@pytest.mark.parametrize(("names", "new_heads"), [(NAMES, False), (("DN_R", "DN_L"), True)])
def test_training_starts_from_other_weights(trained, tmp_path, names, new_heads):
    """One step of SGD at 0.01, with gradients clipped at norm 12, changes them by a norm of 0.24 at most."""
    start, log = tmp_path / "start", Lines()
    shutil.copytree(trained / "dentate", start)
    plans = json.loads((start / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [0.95, 0.95, 0.95]
    (start / "plans.json").write_text(json.dumps(plans))
    training = replace(SHORT, seed=5)  # other random weights than those of `trained`
    train_step("dentate", make_cases, names, tmp_path / "out", training, log=log, start=start)
    assert log.lines[1] == f"dentate: initialized from {start}{', with new output layers' if new_heads else ''}"
    before, after = read_folder(start), read_folder(tmp_path / "out" / "dentate")
    assert after.plans["configurations"] == before.plans["configurations"]  # patch, voxels and network are theirs
    for name, values in after.parameters[0].items():
        if values.ndim == 5:  # convolutions; others have the same first values in every training
            old = before.parameters[0][name]
            near = bool((values.float() - old.float()).norm() < 0.5 * old.float().norm())
            assert near is not (new_heads and ".seg_layers." in name), name
    longer = replace(training, epochs=2)
    assert train_step("dentate", make_cases, names, tmp_path / "out", longer, log=log, start=start).epochs == 2
    assert sum("initialized" in line for line in log.lines) == 1  # what has begun is resumed


def test_weights_that_cannot_be_started_from(tmp_path):
    def start(folder: Path) -> None:
        train_step("dentate", make_cases, NAMES, tmp_path / "out", SHORT, log=Lines(), start=folder)

    checkpoint = Path("fold_0") / "checkpoint_final.pth"
    other = write_folder(tmp_path / "other")
    shutil.copy(weights_folder(get_model("nnunet2step")) / "dentate" / checkpoint, other / checkpoint)
    with pytest.raises(InputError, match=r"^`start` other: its checkpoint does not fit its plans.json; copy the whole"):
        start(other)
    flat = write_folder(tmp_path / "flat")
    content = torch.load(flat / checkpoint, weights_only=True)
    torch.save({**content, "init_args": {"configuration": "2d"}}, flat / checkpoint)
    plans = json.loads((flat / "plans.json").read_text())
    plans["configurations"]["2d"] = plans["configurations"]["3d_fullres"]
    (flat / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(InputError, match=r"^`start` flat: a network of 2d; pass a folder of 3d_fullres$"):
        start(flat)


@pytest.mark.slow
def test_killed_training_resumes(tmp_path):
    root = Path(__file__).parents[3]
    code = FOREVER.replace("OUT", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL)
    results = tmp_path / "training/dentate/results/Dataset001_Dentate"
    curve = results / "DentateTrainer__nnUNetPlans__3d_fullres/fold_0/curve.tsv"
    try:
        wait_for(curve, rows=3, process=process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = read_curve(curve)
    resumed = NnunetTraining(epochs=len(before) + 2, iterations=1, validation_iterations=1, device="cpu")
    outcome = train_step("dentate", make_cases, NAMES, tmp_path, resumed, log=Lines())
    after = read_curve(tmp_path / "dentate_curve.tsv")
    assert outcome.epochs == len(after) == len(before) + 2
    kept = len(before) - 1  # the last epoch may have been logged before its checkpoint was written
    assert after[:kept] == before[:kept]


def test_checkpoint_on_a_full_disk_names_its_file(tmp_path, monkeypatch):
    from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

    def fail(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DentateTrainer.__base__, "save_checkpoint", lambda self, file: torch.save({}, file))
    monkeypatch.setattr(Path, "write_bytes", fail)
    trainer, path = DentateTrainer.__new__(DentateTrainer), tmp_path / "checkpoint_latest.pth"
    with pytest.raises(OSError, match="No space left on device") as error:
        trainer.save_checkpoint(str(path))
    assert error.value.filename == str(path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("without_bfloat16")
def test_model_of_stock_nnunet_runs(tmp_path):
    """Stock trainer on preprocessed data: its checkpoint has optimizer, logs of NumPy numbers and mirroring."""
    train_step("dentate", make_cases, NAMES, tmp_path, SHORT, log=Lines())
    work = tmp_path / "training" / "dentate"
    with quiet(), environment(work, workers=0):
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        folder = work / "preprocessed" / "Dataset001_Dentate"
        plans, dataset = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
        del dataset["orientation"]
        trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
        trainer.run_training()
        made = Path(trainer.output_folder_base)
    image = write_chi(tmp_path / "c_0000.nii.gz")
    stock = predict_with_stock(made, image, tmp_path, mirrored=(0, 1))
    found = read_folder(made)
    assert found.mirror_axes == (0, 1, 2)
    ours = Network(found, device="cpu", sided=True)(Volume.read(image))
    np.testing.assert_array_equal(ours.argmax(axis=0), stock.array)


def test_bfloat16_changes_the_loss_little(trained, monkeypatch):
    work = trained / "training" / "dentate"
    losses: list[float] = []
    folder = work / "preprocessed" / "Dataset001_Dentate"
    plans, dataset = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    for quick in (False, True):
        monkeypatch.setattr("bids_dgmseg.segmentation.inference._has_fast_bfloat16", lambda device, quick=quick: quick)
        with quiet(), environment(work, workers=0):
            from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

            torch.manual_seed(1)
            ours = {**plans, "continue_training": True}
            trainer = DentateTrainer(ours, "3d_fullres", 0, dataset, torch.device("cpu"))
            trainer.configure(SHORT, log=Lines(), step="dentate")
            trainer.on_train_start()
            if not losses:
                batch = next(trainer.dataloader_train)
            losses.append(float(trainer.train_step(dict(batch))["loss"]))
        assert {values.dtype for values in trainer.network.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)  # of about 1.5; bfloat16 has three digits


def test_no_training_scan_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^dentate: no training scan; add labelled scans$"):
        train_step("dentate", list, NAMES, tmp_path, SHORT, log=Lines())


def test_shared_tensors_stay_shared():
    values = torch.ones(3)
    halves = halve_state({"encoder.weight": values, "decoder.encoder.weight": values, "bias": torch.zeros(3)})
    assert halves["encoder.weight"] is halves["decoder.encoder.weight"]
    assert halves["bias"].dtype == torch.float16


def test_environment_is_restored(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/somewhere")
    monkeypatch.delenv("nnUNet_results", raising=False)
    before = dict(os.environ)
    with environment(tmp_path, workers=1):
        assert os.environ["nnUNet_raw"] == str(tmp_path / "raw")
        assert os.environ["nnUNet_results"] == str(tmp_path / "results")
    assert dict(os.environ) == before


def make_case(part="train", name="sub-01") -> NnunetCase:
    chi = np.arange(10 * 8 * 6, dtype=np.float32).reshape(10, 8, 6)
    labels = np.zeros(chi.shape, np.uint8)
    labels[4, 3, 2], labels[6, 3, 2] = 1, 2
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-9, -7, -5)
    return NnunetCase(name, Volume(chi, affine), labels, part)


def test_crop_is_the_box_with_its_margin():
    case, cerebellum = make_case(), np.zeros((10, 8, 6), bool)
    cerebellum[4:7, 3:5, 2:4] = True
    cropped = crop_to_cerebellum(case, cerebellum, margin_mm=2.0)  # a voxel more on every side
    assert cropped.chi.shape == (5, 4, 4)
    np.testing.assert_array_equal(cropped.chi.array, case.chi.array[3:8, 2:6, 1:5])
    np.testing.assert_array_equal(np.argwhere(cropped.labels), [[1, 1, 1], [3, 1, 1]])
    assert cropped.chi.affine[:3, 3].tolist() == [-3.0, -3.0, -3.0]  # -9 + 3 * 2, -7 + 2 * 2, -5 + 1 * 2


def test_raw_dataset_omits_the_test_set(tmp_path):
    parts = write_raw_dataset(tmp_path / "raw", [make_case(), make_case("test", "sub-02")], ("DN_L", "DN_R"))
    assert parts == {"train": ["sub-01"], "tune": [], "test": ["sub-02"]}
    assert [path.name for path in (tmp_path / "raw" / "imagesTr").iterdir()] == ["sub-01_0000.nii.gz"]
    labels = nib.nifti1.load(tmp_path / "raw" / "labelsTr" / "sub-01.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), make_case().labels)
    dataset = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "DN_L": 1, "DN_R": 2}
    assert (dataset["numTraining"], dataset["orientation"]) == (1, "RAS")
