"""Train the two nnU-Nets of nnunet2step by nnU-Net's own commands: planning, preprocessing and training.

Each command is a new process with default signal handling: nnU-Net's pools of processes would inherit handlers of this
program, and a worker that ignores the signal to end would be waited for without end.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.labelled_scans import LabelledMap, list_derivatives
from bids_dgmseg.bids.masks_and_maps import find_images, match_scans
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, check_grid, covering_block
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import LOCK, read_json, sha256, wait_for_lock, write_bytes, write_json, write_text
from bids_dgmseg.lab.train.frame import Log, TrainingRequest, draw_curve, write_curve
from bids_dgmseg.lab.train.recipe import NnunetPlan, NnunetRecipe, Split
from bids_dgmseg.models.model_folder import halve, pick_device
from bids_dgmseg.models.nnunet_folder import CEREBELLUM, FULL_RESOLUTION, STEPS, read_checkpoint
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.segmentation.localize import find_cerebellum

_TRAINER, _DATASET, _CHECKPOINT = "DentateTrainer", "Dataset001_QSM", "checkpoint_final.pth"

_STOCK_TRAINER = "nnUNetTrainerNoMirroring"
"""Named in our model folders, since stock ``nnUNetv2_predict`` knows it; it builds the same network."""

_COMMANDS = {
    "plan": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry",
    "preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry",
    "train": "nnunetv2.run.run_training:run_training_entry",
}
"""Entry points of ``nnUNetv2_plan_and_preprocess``, ``nnUNetv2_preprocess`` and ``nnUNetv2_train``."""


def train_nnunet(
    request: TrainingRequest,
    recipe: NnunetRecipe,
    maps: Sequence[LabelledMap],
    splits: Sequence[Split],
    *,
    masks: Mapping[Path, Path],
    log: Log,
) -> None:
    """Train folds of both steps; ``OUT`` gets the model folders ``cerebellum`` and ``dentate``.

    ``OUT/training/STEP`` has nnU-Net's own folders, which are needed to resume, and ``nnunet.log``. `masks` are those
    of `find_cerebellum_masks`.
    """
    minutes = request.minutes / (len(STEPS) * len(request.folds)) if request.minutes else ""
    for step in STEPS:
        work = request.out / "training" / step
        names = (CEREBELLUM,) if step == CEREBELLUM else request.model.labels
        nnunet = _Commands(
            work,
            {
                **{f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")},
                "nnUNet_extTrainer": str(Path(__file__).with_name("nnunet_trainer")),
                "nnUNet_def_n_proc": "1",
                "nnUNet_compile": "f",
                "nnUNet_wandb_enabled": "0",
                "DGMSEG_EPOCHS": str(recipe.epochs),
                "DGMSEG_MINUTES": str(minutes),
                "DGMSEG_SEED": str(request.seed),
            },
            request.workers if request.workers > 1 else 0,
            log,
        )
        with wait_for_lock(work / LOCK):  # other folds may be trained at the same time
            if not (work / "ready").is_file():
                cases = (_make_case(request, labelled, masks, step) for labelled in maps)
                _prepare(nnunet, cases, names, splits, getattr(recipe, step))
                (work / "ready").touch()
        for fold in request.folds:
            device = pick_device(request.device).type
            nnunet.run("train", [_DATASET, FULL_RESOLUTION, str(fold), "-tr", _TRAINER, "--c", "-device", device])
            epochs, digest = write_model(work, request.out / step, fold, names)
            log.log(f"{step} fold {fold}: {epochs} epoch(s), sha256 {digest}")


@dataclass(frozen=True)
class _Commands:
    """nnU-Net's commands in new processes."""

    work: Path
    settings: Mapping[str, str]
    """Environment variables."""
    workers: int
    """Processes that draw samples; with 0 the training process does."""
    log: Log

    def run(self, command: str, options: Sequence[str]) -> None:
        """Run a command, and show the last line of its output as status; InputError if it fails."""
        module, _, entry = _COMMANDS[command].partition(":")
        code = f"from {module} import {entry}; {entry}()"
        workers = self.workers if command == "train" else 1  # planning divides by their number
        path, last = self.work / "nnunet.log", "no output"
        with (
            path.open("a", encoding="utf-8") as file,
            subprocess.Popen(
                [sys.executable, "-c", code, *options],
                env={**os.environ, **self.settings, "nnUNet_n_proc_DA": str(workers)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    print(line.rstrip(), file=file, flush=True)
                    last = line.strip() or last
                    self.log.update(f"{self.work.name}: {last[:80]}")
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise InputError(
                f"{self.work.name}: nnU-Net ended with exit code {process.returncode} ({last}); see {path}, then run "
                "the same command again"
            )


def _prepare(
    nnunet: _Commands, cases: Iterable[LabelledMap], names: Sequence[str], splits: Sequence[Split], plan: NnunetPlan
) -> None:
    """Export the labelled maps as an nnU-Net dataset, plan and preprocess."""
    raw, preprocessed = nnunet.work / "raw" / _DATASET, nnunet.work / "preprocessed" / _DATASET
    for half_done in (raw, preprocessed):
        shutil.rmtree(half_done, ignore_errors=True)
    participants = export_dataset(raw, cases, names)
    nnunet.log.log(f"{nnunet.work.name}: planning and preprocessing {len(participants)} map(s)")
    plans = preprocessed / "nnUNetPlans.json"
    options = ["-d", "1", "-npfp", "1", "--no_pp", "-gpu_memory_target", str(plan.memory_gb)]
    options += ["-overwrite_target_spacing", *[str(plan.spacing_mm)] * 3, "-overwrite_plans_name", plans.stem]
    nnunet.run("plan", options)
    if plan.features is not None:
        content = read_json(plans)
        arguments = content["configurations"][FULL_RESOLUTION]["architecture"]["arch_kwargs"]
        first, most = plan.features
        arguments["features_per_stage"] = [min(first * 2**stage, most) for stage in range(arguments["n_stages"])]
        write_text(json.dumps(content, indent=2), plans)
    nnunet.run("preprocess", ["-d", "1", "-c", FULL_RESOLUTION, "-np", "1"])
    folds = []
    for split in splits:
        training, validation = (
            [name for name, participant in participants.items() if participant in part]
            for part in (split.training, split.validation)
        )
        folds.append({"train": training, "val": validation or training})
    write_text(json.dumps(folds, indent=2), preprocessed / "splits_final.json")
    shutil.rmtree(raw)


def export_dataset(folder: Path, cases: Iterable[LabelledMap], names: Sequence[str]) -> dict[str, str]:
    """Write an nnU-Net raw dataset ``DatasetNNN_NAME``, in RAS+, and return the participant of each of its cases."""
    participants = {}
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for case in cases:
        participants[case.name] = case.participant
        chi = np.asarray(case.chi.array, np.float32)
        nib.Nifti1Image(chi, case.chi.affine).to_filename(folder / "imagesTr" / f"{case.name}_0000.nii.gz")
        nib.Nifti1Image(case.channel_map.array, case.chi.affine).to_filename(
            folder / "labelsTr" / f"{case.name}.nii.gz"
        )
    content = {
        "channel_names": {"0": "QSM"},
        "labels": {"background": 0, **{name: number for number, name in enumerate(names, start=1)}},
        "numTraining": len(participants),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "orientation": "RAS",
    }
    write_json(content, folder / "dataset.json")
    return participants


def write_model(work: Path, folder: Path, fold: int, names: Sequence[str]) -> tuple[int, str]:
    """Write a model folder that stock nnU-Net reads, in half precision and without the optimizer, and its curve.

    ``plans.json`` is written last: if it exists, the folder is complete. Returns the number of epochs and the checksum
    of the weights.
    """
    results = work / "results" / _DATASET / f"{_TRAINER}__nnUNetPlans__{FULL_RESOLUTION}"
    state = read_checkpoint(results / f"fold_{fold}" / _CHECKPOINT)
    halves: dict[int, Tensor] = {}  # a tensor with several names in nnU-Net's networks stays one tensor
    for values in state["network_weights"].values():
        halves.setdefault(values.data_ptr(), halve(values))
    content = io.BytesIO()  # saved to a file, the archive would contain the random name that it is written under
    torch.save(
        {
            "network_weights": {name: halves[values.data_ptr()] for name, values in state["network_weights"].items()},
            "trainer_name": _STOCK_TRAINER,
            "init_args": {"configuration": FULL_RESOLUTION, "fold": fold},
            "inference_allowed_mirroring_axes": None,
            "current_epoch": state["current_epoch"],
        },
        content,
    )
    weights = folder / f"fold_{fold}" / _CHECKPOINT
    write_bytes(content.getvalue(), weights)
    logged = state["logging"]
    rows = [
        {
            "epoch": epoch,
            "learning_rate": float(logged["lrs"][epoch - 1]),
            "loss": float(logged["train_losses"][epoch - 1]),
            "validation_loss": float(logged["val_losses"][epoch - 1]),
            **dict(zip(names, map(float, logged["dice_per_class_or_region"][epoch - 1]), strict=True)),
        }
        for epoch in range(1, state["current_epoch"] + 1)
    ]
    write_curve(rows, weights.with_name("curve.tsv"))
    write_bytes(draw_curve(rows, names, best=None, title=f"{folder.name} fold {fold}"), weights.with_name("curve.png"))
    for name in ("dataset", "plans"):
        # Not write_json: nnU-Net's plans may contain values, such as NaN, that must stay as they are.
        write_text((results / f"{name}.json").read_text(encoding="utf-8"), folder / f"{name}.json")
    return state["current_epoch"], sha256(weights)


def find_cerebellum_masks(request: TrainingRequest, maps: Sequence[LabelledMap], log: Log) -> dict[Path, Path]:
    """Find the masks of the cerebellum (``label-cerebellum``) by the label images of their scans.

    Masks that a model of this program wrote are left out.
    """
    predicted = {f"desc-{name}" for name in MODELS} - set(request.choose)
    images: list[Path] = []
    for root in (request.dataset, *(request.derivatives or list_derivatives(request.dataset))):
        with suppress(InputError):  # a dataset without masks
            images += find_images(root, "mask")
    masks = []
    for path in images:
        entities = split_entities(path.name.partition(".")[0])
        if entities.get("label") == CEREBELLUM and f"desc-{entities.get('desc')}" not in predicted:
            masks.append(path)
    matches = match_scans([labelled.dseg for labelled in maps], masks, choose=request.choose) if masks else {}
    if without := [labelled.name for labelled in maps if labelled.dseg not in matches]:
        log.log(f"no label-cerebellum mask for {list_some(without)}; predicted by the localizer of dgm16")
    return matches


def _make_case(request: TrainingRequest, labelled: LabelledMap, masks: Mapping[Path, Path], step: str) -> LabelledMap:
    """Return a scan for step one, or its crop to the box that step one passes to step two."""
    chi = labelled.chi
    labelled = replace(labelled, name=labelled.name.replace("_", "-"))  # "_" has a meaning in nnU-Net's file names
    mask = _read_cerebellum(labelled, masks.get(labelled.dseg), request.device)
    if step == CEREBELLUM:
        return replace(labelled, channel_map=chi.with_array(mask.astype(np.uint8)))
    box = box_of_mask(chi.with_array(mask)).expanded(request.model.localizer.margin_mm)
    block = covering_block(Grid(chi.shape, chi.affine), box)
    crops = [Volume(volume.array[block], block_affine(chi.affine, block)) for volume in (chi, labelled.channel_map)]
    return replace(labelled, chi=crops[0], channel_map=crops[1])


def _read_cerebellum(labelled: LabelledMap, path: Path | None, device: str) -> NDArray[np.bool_]:
    """Read the mask of the cerebellum on the grid of a map, or predict it with the default model's localizer."""
    try:
        mask = find_cerebellum(labelled.chi, device=device) if path is None else None
    except InputError as error:
        raise InputError(f"{labelled.name}: {error}") from error
    if path is not None:
        volume = Volume.read(path)
        check_grid(path, volume, labelled.chi, other=labelled.name)
        mask = volume.array > 0.5
    if mask is None or not mask.any():
        raise InputError(f"{path.name if path else labelled.name}: no cerebellum found; add a label-cerebellum mask")
    return mask
