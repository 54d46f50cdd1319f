"""Train one step of nnunet2step: settings, raw dataset, preprocessing, training, model folder."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_dgmseg.errors import InputError, count
from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, covering_block
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import sha256, write_bytes, write_json, write_text
from bids_dgmseg.io.locks import LOCK, wait_for_lock
from bids_dgmseg.lab.train.log import Log
from bids_dgmseg.lab.train.nnunet.settings import SIZES, NnunetTraining
from bids_dgmseg.lab.train.schedule import mix
from bids_dgmseg.lab.train.splits import FRACTIONS, Part
from bids_dgmseg.models.model_folder import halve, pick_device
from bids_dgmseg.models.nnunet_folder import FULL_RESOLUTION, NnunetModel, check_names, read_folder, read_labels
from bids_dgmseg.resources import environment_variables
from bids_dgmseg.segmentation.nnunet import quiet

_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class NnunetCase:
    """One labelled scan of an nnU-Net dataset."""

    name: str
    chi: Volume
    """In ppm, finite."""
    labels: NDArray[np.uint8]
    """On the grid of `chi`: 1, 2, … in the order of the dataset's names."""
    part: Part


@dataclass(frozen=True)
class StepOutcome:
    """Result of training a step."""

    epochs: int
    folder: Path
    sha256: str
    name: str = ""
    """Step, and fold if there are several."""


def train_step(
    step: str,
    cases: Callable[[], Iterable[NnunetCase]],
    names: Sequence[str],
    out: Path,
    training: NnunetTraining,
    *,
    log: Log,
    validation: Sequence[Collection[str]] | None = None,
    start: Path | None = None,
) -> StepOutcome:
    """Train one fold of one of the two networks; resumes the training in ``OUT``.

    Parameters
    ----------
    step : str
        ``cerebellum`` or ``dentate``, the name of the model folder.
    cases : callable
        Returns the labelled scans; only called if they are not preprocessed yet.
    names : sequence of str
        Of the labels 1, 2, …
    out : path
        Gets the model folder ``STEP`` and, in ``training/STEP``, all files needed to resume.
    training : NnunetTraining
        Settings.
    log : Log
        Gets a line per epoch.
    validation : sequence of collection of str, optional
        Cases that validate each fold, the others train it; by default one fold, validated by the part ``tune``.
    start : path, optional
        Model folder to start from: its plans, and the weights of the same fold, else those of its first one.

    Raises
    ------
    InputError
        If a fold has no training case, or `start` is no model folder of a 3D network.
    """
    work, dataset = out / "training" / step, f"Dataset001_{step.capitalize()}"
    log, initial = _LogToStdout(log), None if start is None else read_initial_model(start, training.fold)
    with quiet():
        with environment(work, workers=1):  # planning divides by the number of workers
            _prepare(step, cases, names, work, dataset, training, validation, log, initial)
        with environment(work, workers=training.workers if training.workers > 1 else 0):
            from bids_dgmseg.lab.train.nnunet.planner import PLANS
            from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

            plans, description = (
                json.loads((work / "preprocessed" / dataset / f"{name}.json").read_text(encoding="utf-8"))
                for name in (PLANS, "dataset")
            )
            # An interrupted training may have been copied from elsewhere.
            check_names(plans, plans["configurations"][FULL_RESOLUTION], where=f"training/{step}/{PLANS}.json")
            fold, name = training.fold, step if validation is None else f"{step}_fold_{training.fold}"
            seed_generators(training.seed + fold)
            device = pick_device(training.device)
            trainer = DentateTrainer({**plans, "continue_training": True}, FULL_RESOLUTION, fold, description, device)
            trainer.configure(training, log=log, step=name.replace("_", " "))
            if initial is not None and not trainer.latest.is_file():
                _start_from(trainer, initial, names, log)
            trainer.resume()
            if trainer.current_epoch:  # otherwise the first samples would be drawn again after each interruption
                seed_generators(mix(training.seed + fold, trainer.current_epoch))
            trainer.run_training()
    folder = write_model(trainer, out / step)
    for curve in ("curve.tsv", "progress.png"):
        shutil.copy(Path(trainer.output_folder) / curve, out / f"{name}_{curve}")
    return StepOutcome(trainer.current_epoch, folder, sha256(folder / f"fold_{fold}" / _CHECKPOINT), name)


def read_initial_model(folder: Path, fold: int) -> NnunetModel:
    """Read the model folder that a fold starts from, with one state: of the same fold, else of the first one.

    InputError if it is none of a 3D network at full resolution.
    """
    same = (fold,) if (folder / f"fold_{fold}").is_dir() else ()
    model = read_folder(folder, folds=same)
    if model.configuration != FULL_RESOLUTION:
        raise InputError(
            f"`start` {folder.name}: a network of {model.configuration}; pass a folder of {FULL_RESOLUTION}"
        )
    return replace(model, parameters=model.parameters[:1])


def _start_from(trainer: Any, initial: NnunetModel, names: Sequence[str], log: Log) -> None:
    """Give a trainer its first weights, without those of the output layers if the labels differ."""
    new_heads = read_labels(initial.folder) != {name: number for number, name in enumerate(names, start=1)}
    try:
        trainer.start_from(initial.parameters[0], new_heads=new_heads)
    except RuntimeError as error:
        raise InputError(
            f"`start` {initial.folder.name}: its checkpoint does not fit its plans.json; copy the whole model folder"
        ) from error
    log.log(f"{trainer.step_name}: initialized from {initial.folder}{', with new output layers' if new_heads else ''}")


def seed_generators(seed: int) -> None:
    """Seed the global generators, from which nnU-Net and its augmentation draw."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - as nnU-Net


class _LogToStdout:
    """A log that writes to the current standard output, although nnU-Net's own output is silenced later."""

    def __init__(self, log: Log) -> None:
        self._log, self._stream = log, sys.stdout

    def log(self, text: str) -> None:
        with contextlib.redirect_stdout(self._stream):
            self._log.log(text)

    def update(self, text: str) -> None:
        with contextlib.redirect_stdout(self._stream):
            self._log.update(text)


def crop_to_cerebellum(case: NnunetCase, cerebellum: NDArray[np.bool_], *, margin_mm: float) -> NnunetCase:
    """Crop a case to the box that step one passes to step two."""
    box = box_of_mask(case.chi.with_array(cerebellum)).expanded(margin_mm)
    block = covering_block(Grid(case.chi.shape, case.chi.affine), box)
    chi = Volume(case.chi.array[block], block_affine(case.chi.affine, block))
    return NnunetCase(case.name, chi, case.labels[block], case.part)


def write_raw_dataset(folder: Path, cases: Iterable[NnunetCase], names: Sequence[str]) -> dict[Part, list[str]]:
    """Write a new nnU-Net raw dataset ``DatasetNNN_NAME`` and return the names of the cases of each part.

    Test cases are left out; axes are RAS+; `names` are those of the labels 1, 2, …
    """
    written: dict[Part, list[str]] = {part: [] for part in FRACTIONS}
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for case in cases:
        written[case.part].append(case.name)
        if case.part != "test":
            chi = np.asarray(case.chi.array, np.float32)
            nib.Nifti1Image(chi, case.chi.affine).to_filename(folder / "imagesTr" / f"{case.name}_0000.nii.gz")
            nib.Nifti1Image(case.labels, case.chi.affine).to_filename(folder / "labelsTr" / f"{case.name}.nii.gz")
    content = {
        "channel_names": {"0": "QSM"},
        "labels": {"background": 0, **{name: number for number, name in enumerate(names, start=1)}},
        "numTraining": len(written["train"]) + len(written["tune"]),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "orientation": "RAS",
    }
    write_json(content, folder / "dataset.json")
    return written


def environment(work: Path, *, workers: int) -> AbstractContextManager[None]:
    """Set nnU-Net's environment variables, and restore them afterwards."""
    return environment_variables(
        {
            **{f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_n_proc_DA": str(workers),
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "nnUNet_wandb_enabled": "0",
        }
    )


def _prepare(
    step: str,
    cases: Callable[[], Iterable[NnunetCase]],
    names: Sequence[str],
    work: Path,
    dataset: str,
    training: NnunetTraining,
    validation: Sequence[Collection[str]] | None,
    log: Log,
    initial: NnunetModel | None,
) -> None:
    """Convert, plan and preprocess once; start again after an interruption."""
    from bids_dgmseg.lab.train.nnunet.planner import plan_and_preprocess

    raw, preprocessed, ready = work / "raw" / dataset, work / "preprocessed" / dataset, work / "prepared.json"
    with wait_for_lock(work / LOCK):  # other folds may be trained at the same time
        if ready.is_file():
            return
        for half_done in (raw, preprocessed):
            shutil.rmtree(half_done, ignore_errors=True)
        parts = write_raw_dataset(raw, cases(), names)
        learned = [*parts["train"], *parts["tune"]]
        folds = [[name for name in learned if name in own] for own in validation or [parts["tune"]]]
        splits = [{"train": [name for name in learned if name not in own], "val": own or learned} for own in folds]
        if not all(split["train"] for split in splits):
            raise InputError(f"{step}: no training scan; add labelled scans")
        sizes = f"{count(len(learned) - len(folds[0]), 'training scan')}, {count(len(folds[0]), 'validation scan')}"
        log.log(f"{step}: {sizes}{' in the first fold' if validation else ''}; planning and preprocessing")
        plan_and_preprocess(
            raw, preprocessed, SIZES[training.plan][step], plans=None if initial is None else initial.plans
        )
        write_text(json.dumps(splits, indent=2), preprocessed / "splits_final.json")
        shutil.rmtree(raw)
        write_json({str(part): names for part, names in parts.items()}, ready)


def write_model(trainer: Any, folder: Path) -> Path:
    """Write a model folder that stock nnU-Net reads, in half precision and without the optimizer.

    ``plans.json`` is written last: if it exists, the folder is complete, also for the training of the other step.
    """
    from bids_dgmseg.lab.train.nnunet.trainer import STOCK_TRAINER

    content = io.BytesIO()  # saved to a file, the archive would contain the random name that it is written under
    torch.save(
        {
            "network_weights": halve_state(trainer.network.state_dict()),
            "trainer_name": STOCK_TRAINER,
            "init_args": {"configuration": FULL_RESOLUTION, "fold": trainer.fold},
            "inference_allowed_mirroring_axes": None,
            "current_epoch": trainer.current_epoch,
        },
        content,
    )
    write_bytes(content.getvalue(), folder / f"fold_{trainer.fold}" / _CHECKPOINT)
    for name, description in (("dataset", trainer.dataset_json), ("plans", trainer.plans_manager.plans)):
        # Not write_json: nnU-Net's plans may contain values, such as NaN, that must stay as they are.
        write_text(json.dumps(description, indent=2), folder / f"{name}.json")
    return folder


def halve_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters as `halve` does; a tensor with several names in nnU-Net's networks stays one tensor."""
    halves: dict[int, Tensor] = {}
    for values in state.values():
        halves.setdefault(values.data_ptr(), halve(values.detach().cpu()))
    return {name: halves[values.data_ptr()] for name, values in state.items()}
