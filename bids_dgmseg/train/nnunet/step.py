"""Train one step of nnunet2step: raw dataset, plan, preprocessing, training, model folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256, write_bytes, write_json, write_text
from bids_dgmseg.models.weights import pick_device
from bids_dgmseg.segmentation.nnunet import quiet
from bids_dgmseg.train.log import Log
from bids_dgmseg.train.nnunet.data import NnunetCase, NnunetTraining, PlanName, write_raw_dataset

_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class StepOutcome:
    """Result of training a step."""

    epochs: int
    folder: Path
    sha256: str


def train_step(
    step: str,
    cases: Callable[[], Iterable[NnunetCase]],
    names: Sequence[str],
    out: Path,
    training: NnunetTraining,
    *,
    log: Log,
) -> StepOutcome:
    """Train one of the two networks; resumes the training in ``OUT``.

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

    Raises
    ------
    InputError
        If there is no training case.
    """
    work, dataset = out / "training" / step, f"Dataset001_{step.capitalize()}"
    log = _LogToStdout(log)
    with quiet():
        with environment(work, workers=1):  # planning divides by the number of workers
            _prepare(step, cases, names, work, dataset, training.plan, log)
        with environment(work, workers=training.workers if training.workers > 1 else 0):
            trainer = _train(step, work / "preprocessed" / dataset, training, log)
    folder = write_model(trainer, out / step)
    for curve in ("curve.tsv", "progress.png"):
        shutil.copy(Path(trainer.output_folder) / curve, out / f"{step}_{curve}")
    return StepOutcome(trainer.current_epoch, folder, sha256(folder / "fold_0" / _CHECKPOINT))


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


@contextlib.contextmanager
def environment(work: Path, *, workers: int) -> Iterator[None]:
    """Set nnU-Net's environment variables, and restore them afterwards."""
    ours = {
        **{f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_n_proc_DA": str(workers),
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "nnUNet_wandb_enabled": "0",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepare(
    step: str,
    cases: Callable[[], Iterable[NnunetCase]],
    names: Sequence[str],
    work: Path,
    dataset: str,
    plan: PlanName,
    log: Log,
) -> None:
    """Convert, plan and preprocess once; start again after an interruption."""
    from bids_dgmseg.train.nnunet.plan import SIZES, plan_and_preprocess, write_splits

    raw, preprocessed, ready = work / "raw" / dataset, work / "preprocessed" / dataset, work / "prepared.json"
    if ready.is_file():
        return
    for half_done in (raw, preprocessed):
        shutil.rmtree(half_done, ignore_errors=True)
    parts = write_raw_dataset(raw, cases(), names)
    if not parts["train"]:
        raise InputError(f"{step}: no training scan; add labelled scans")
    counts = f"{len(parts['train'])} training, {len(parts['tune'])} validation scans"
    log.log(f"{step}: {counts}; planning and preprocessing")
    plan_and_preprocess(raw, preprocessed, SIZES[plan][step])
    write_splits(preprocessed, parts["train"], parts["tune"] or parts["train"])
    shutil.rmtree(raw)
    write_json({str(part): names for part, names in parts.items()}, ready)


def _train(step: str, preprocessed: Path, training: NnunetTraining, log: Log) -> Any:
    from bids_dgmseg.train.nnunet.plan import CONFIGURATION, PLANS
    from bids_dgmseg.train.nnunet.trainer import DentateTrainer

    plans, dataset = (
        json.loads((preprocessed / f"{name}.json").read_text(encoding="utf-8")) for name in (PLANS, "dataset")
    )
    torch.manual_seed(training.seed)
    np.random.seed(training.seed)  # noqa: NPY002 - nnU-Net draws from the global generator
    trainer = DentateTrainer(
        {**plans, "continue_training": True}, CONFIGURATION, 0, dataset, pick_device(training.device)
    )
    trainer.configure(training, log=log, step=step)
    trainer.resume()
    trainer.run_training()
    return trainer


def write_model(trainer: Any, folder: Path) -> Path:
    """Write a model folder that stock nnU-Net reads, in half precision and without the optimizer.

    ``plans.json`` is written last: if it exists, the folder is complete, also for the training of the other step.
    """
    from bids_dgmseg.train.nnunet.plan import CONFIGURATION
    from bids_dgmseg.train.nnunet.trainer import STOCK_TRAINER

    content = io.BytesIO()  # saved to a file, the archive would contain the random name that it is written under
    torch.save(
        {
            "network_weights": halve(trainer.network.state_dict()),
            "trainer_name": STOCK_TRAINER,
            "init_args": {"configuration": CONFIGURATION, "fold": 0},
            "inference_allowed_mirroring_axes": None,
            "current_epoch": trainer.current_epoch,
        },
        content,
    )
    write_bytes(content.getvalue(), folder / "fold_0" / _CHECKPOINT)
    for name, description in (("dataset", trainer.dataset_json), ("plans", trainer.plans_manager.plans)):
        # Not write_json: nnU-Net's plans may contain values, such as NaN, that must stay as they are.
        write_text(json.dumps(description, indent=2), folder / f"{name}.json")
    return folder


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters to float16; a tensor with several names in nnU-Net's networks stays one tensor."""
    halves: dict[int, Tensor] = {}
    for values in state.values():
        halves.setdefault(values.data_ptr(), values.detach().cpu().half())
    return {name: halves[values.data_ptr()] for name, values in state.items()}
