"""Train one step of nnunet2step: raw dataset, plan, preprocessing, training, model folder; resumes after a kill."""

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
from bids_dgmseg.io.files import sha256, write_bytes, write_text
from bids_dgmseg.models.weights import pick_device
from bids_dgmseg.segmentation.nnunet import quiet
from bids_dgmseg.train.nnunet.data import Case, NnunetTraining, PlanName, write_raw
from bids_dgmseg.train.status_line import unseen

_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class StepOutcome:
    """What a step's training has come to."""

    epochs: int
    folder: Path
    sha256: str


def train_step(
    step: str,
    cases: Callable[[], Iterable[Case]],
    names: Sequence[str],
    out: Path,
    this: NnunetTraining,
    *,
    say: Callable[[str], None],
    show: Callable[[str], None] = unseen,
) -> StepOutcome:
    """Train one of the two networks, going on where ``OUT`` stopped.

    Parameters
    ----------
    step : str
        ``cerebellum`` or ``dentate``: names the model folder.
    cases : callable
        Gives the labelled scans; called where they are not preprocessed yet.
    names : sequence of str
        Of the labels 1, 2, …
    out : path
        Gets the model folder ``STEP`` and, in ``training/STEP``, all that a resumed training needs.
    this : NnunetTraining
        How long.
    say, show : callable
        Get a line an epoch, and lines between that the next one may replace.

    Raises
    ------
    InputError
        If no case is to be learned from.
    """
    work, dataset = out / "training" / step, f"Dataset001_{step.capitalize()}"
    say, show = _heard(say), _heard(show)
    with quiet():
        with environment(work, workers=1):  # planning divides by the number of workers
            _prepare(step, cases, names, work, dataset, this.plan, say)
        with environment(work, workers=this.workers if this.workers > 1 else 0):
            trainer = _train(step, work / "preprocessed" / dataset, this, say, show)
    folder = ship(trainer, out / step)
    for curve in ("curve.tsv", "progress.png"):
        shutil.copy(Path(trainer.output_folder) / curve, out / f"{step}_{curve}")
    return StepOutcome(trainer.current_epoch, folder, sha256(folder / "fold_0" / _CHECKPOINT))


def _heard(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Let lines go where they go now, whatever is silenced later."""
    stream = sys.stdout

    def tell_there(line: str) -> None:
        with contextlib.redirect_stdout(stream):
            tell(line)

    return tell_there


@contextlib.contextmanager
def environment(work: Path, *, workers: int) -> Iterator[None]:
    """Set the variables that nnU-Net looks for, and put back what was there."""
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
    cases: Callable[[], Iterable[Case]],
    names: Sequence[str],
    work: Path,
    dataset: str,
    plan: PlanName,
    say: Callable[[str], None],
) -> None:
    """Convert, plan and preprocess, once; what a kill left half done is done anew."""
    from bids_dgmseg.train.nnunet.plan import SIZES, plan_and_preprocess, write_splits

    raw, preprocessed, ready = work / "raw" / dataset, work / "preprocessed" / dataset, work / "prepared.json"
    if ready.is_file():
        return
    for half_done in (raw, preprocessed):
        shutil.rmtree(half_done, ignore_errors=True)
    parts = write_raw(raw, cases(), names)
    if not parts["train"]:
        raise InputError(f"{step}: no scan to learn from; give more labelled scans")
    say(f"{step}: {len(parts['train'])} scans to learn from, {len(parts['tune'])} to watch; planning and preprocessing")
    plan_and_preprocess(raw, preprocessed, SIZES[plan][step])
    write_splits(preprocessed, parts["train"], parts["tune"] or parts["train"])
    shutil.rmtree(raw)
    ready.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


def _train(
    step: str, preprocessed: Path, this: NnunetTraining, say: Callable[[str], None], show: Callable[[str], None]
) -> Any:
    from bids_dgmseg.train.nnunet.plan import CONFIGURATION, PLANS
    from bids_dgmseg.train.nnunet.trainer import DentateTrainer

    plans, dataset = (
        json.loads((preprocessed / f"{name}.json").read_text(encoding="utf-8")) for name in (PLANS, "dataset")
    )
    torch.manual_seed(this.seed)
    np.random.seed(this.seed)  # noqa: NPY002 - nnU-Net draws from the global generator
    trainer = DentateTrainer({**plans, "continue_training": True}, CONFIGURATION, 0, dataset, pick_device(this.device))
    trainer.use(this, say=say, show=show, step=step)
    trainer.resume()
    trainer.run_training()
    return trainer


def ship(trainer: Any, folder: Path) -> Path:
    """Write what predicts, in half precision and without the optimizer, as a folder that stock nnU-Net reads.

    ``plans.json`` is written last: where it lies, the folder is whole, also for the other step's training beside.
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
    """Convert parameters to float16; what has several names in nnU-Net's networks stays one tensor."""
    halves: dict[int, Tensor] = {}
    for values in state.values():
        halves.setdefault(values.data_ptr(), values.detach().cpu().half())
    return {name: halves[values.data_ptr()] for name, values in state.items()}
