"""Train nnunet2step on the labelled scans of a dataset, and evaluate it on the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.labelled_scans import (
    LabelledMap,
    describe_learned,
    label_checksums,
    list_derivatives,
    manual_labels,
    read_labelled_maps,
)
from bids_dgmseg.bids.masks_and_maps import find_images, match_scans
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import MISSING, sha256, write_json, write_tsv
from bids_dgmseg.io.mapped_arrays import arrays_folder
from bids_dgmseg.lab.train.log import Log, write_record
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.nnunet.step import NnunetCase, StepOutcome, crop_to_cerebellum, train_step
from bids_dgmseg.lab.train.splits import Part, check_holdout, read_sites, split_by_site, stratified_folds
from bids_dgmseg.models.model_folder import list_folds, list_learned_maps
from bids_dgmseg.models.nnunet_folder import CEREBELLUM, STEPS, nnunet_step_folder
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.segmentation.engine import choose_labels
from bids_dgmseg.segmentation.localize import find_cerebellum
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

Mask = NDArray[np.bool_]

DICE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scan": {"Description": "Entities of the map's file name; only scans of the test set"},
    "abbreviation": {"Description": "Nucleus and hemisphere, such as DN_L; left is the patient's left"},
    "dice": {"Description": "Dice of the manual label and the segmentation by both steps"},
}


@dataclass(frozen=True, kw_only=True)
class NnunetRequest:
    """What to train on what."""

    model: Model
    dataset: Path
    out: Path
    steps: tuple[str, ...] = STEPS
    training: NnunetTraining = field(default_factory=NnunetTraining)
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()
    folds: int = 1
    """With more than one, training and validation set together are divided into this number of folds."""
    fold: tuple[int, ...] = ()
    """Folds to train, counted from 0; by default all."""
    split: Callable[[Mapping[str, str]], Mapping[str, Part]] | None = None
    """Participant → site to participant → part; by default `split_by_site`."""
    holdout: tuple[str, ...] = ()
    """Participants of the test set; by default a fifth of all."""
    start: Path | None = None
    """Folder with the model folders to start from, or one of them for the second step; its plans are used."""


def run_nnunet_training(request: NnunetRequest, *, log: Log) -> tuple[list[StepOutcome], pd.DataFrame]:
    """Train the folds of the steps one after the other; ``OUT`` becomes a folder of weights.

    Returns
    -------
    list of StepOutcome
        One per step and fold.
    DataFrame
        The columns of `DICE_COLUMNS`, empty if the test set is empty or a step is not trained yet.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    with arrays_folder(request.out) as arrays:
        maps = read_labelled_maps(
            request.dataset,
            request.model,
            derivatives=request.derivatives,
            choose=request.choose,
            warn=log.log,
            progress=log.update,
            arrays=arrays,
        )
        return _train_and_evaluate(request, maps, log)


def _train_and_evaluate(
    request: NnunetRequest, maps: Sequence[LabelledMap], log: Log
) -> tuple[list[StepOutcome], pd.DataFrame]:
    """Do `run_nnunet_training` with the labelled maps."""
    model, seed = request.model, request.training.seed
    sites = read_sites(request.dataset, {one.participant for one in maps})
    check_holdout(maps, request.holdout)
    parts = request.split(sites) if request.split else split_by_site(sites, seed=seed, test=request.holdout)
    held = [{one for one in sites if parts[one] == "tune"}]
    if request.folds > 1:
        held = _divide({one: site for one, site in sites.items() if parts[one] != "test"}, request.folds, seed=seed)
    starts = find_starts(request)
    masks = _CerebellumMasks(request, maps, log)
    splits = [
        {
            "training": sorted(one for one in sites if parts[one] != "test" and one not in own),
            "validation": sorted(own),
            "test": sorted(one for one in sites if parts[one] == "test"),
        }
        for own in held
    ]
    record: dict[str, Any] = {
        "model": model.name,
        **label_checksums(maps),
        "masks": masks.checksums,
        "maps": {one.name: sha256(one.file) for one in maps},
        "seed": seed,
        "plan": request.training.plan,
        "start": {
            step: [sha256(path) for path in sorted(folder.glob("fold_*/*.pth"))] for step, folder in starts.items()
        },
        "start_maps": list_start_maps(request),
        "folds": splits,
    }
    write_record(request.out, record, begun=True)
    test = [one for one in maps if parts[one.participant] == "test"]
    if line := describe_learned(test, {digest for fold in record["start_maps"] for digest in fold}):
        log.log(line)
    rows = [{"participant_id": f"sub-{one}", "site": sites[one], "part": parts[one]} for one in sorted(sites)]
    table = pd.DataFrame(rows)
    if request.folds > 1:
        table["fold"] = [
            next((str(fold) for fold, own in enumerate(held) if one in own), MISSING) for one in sorted(sites)
        ]
        table["part"] = table["part"].replace("tune", "train")
    write_tsv(table, request.out / "split.tsv")

    def name_case(one: LabelledMap) -> str:
        return one.name.replace("_", "-")  # underscores have a meaning in nnU-Net's file names

    def cases(step: str) -> Iterator[NnunetCase]:
        for one in maps:
            if (part := parts[one.participant]) != "test":
                mask = masks.read(one)
                if step == CEREBELLUM:
                    yield NnunetCase(name_case(one), one.chi, mask.astype(np.uint8), part)
                else:
                    case = NnunetCase(name_case(one), one.chi, one.channel_map.array, part)
                    yield crop_to_cerebellum(case, mask, margin_mm=model.localizer.margin_mm)

    validation = [{name_case(one) for one in maps if one.participant in own} for own in held]
    outcomes = []
    for step, fold in product(request.steps, request.fold or range(request.folds)):
        names, training = (CEREBELLUM,) if step == CEREBELLUM else model.labels, replace(request.training, fold=fold)
        folds = validation if request.folds > 1 else None
        outcome = train_step(
            step,
            partial(cases, step),
            names,
            request.out,
            training,
            log=log,
            validation=folds,
            start=starts.get(step),
        )
        outcomes.append(outcome)
    table = _evaluate(test, request)
    write_tsv(table, request.out / "dice.tsv", float_format="%.4f")
    write_json(DICE_COLUMNS, request.out / "dice.json")
    return outcomes, table


def find_starts(request: NnunetRequest) -> dict[str, Path]:
    """Return the model folders that steps start from, if any; InputError if that of a step to be trained is missing."""
    if request.start is None:
        return {}
    folders = {step: nnunet_step_folder(request.start, step) for step in STEPS}
    found = {step: folder for step, folder in folders.items() if folder and (folder / "plans.json").is_file()}
    if missing := [step for step in request.steps if step not in found]:
        raise InputError(
            f"`start` {request.start.name}: no plans.json of a network for the step {missing[0]}; train the other step "
            "alone, or pass a folder with both"
        )
    return found


def list_start_maps(request: NnunetRequest) -> list[list[str]]:
    """List the checksums of the maps that the initial weights of each fold were trained on."""
    if request.start is None:
        return []
    known = list_folds(request.start)
    starts = [fold if fold in known else 0 for fold in range(request.folds)]
    return [list_learned_maps(request.start / f"fold_{fold}") for fold in starts]


def _divide(sites: Mapping[str, str], folds: int, *, seed: int) -> list[set[str]]:
    """Return the participants (→ site) that validate each fold."""
    try:
        return [set(own) for own in stratified_folds(sites, folds, seed=seed)]
    except ValueError as error:
        raise InputError(f"`folds` {folds}: {error} (without the test set); use fewer") from error


class _CerebellumMasks:
    """Masks of the cerebellum: those of the dataset, else those predicted by the default model's localizer."""

    def __init__(self, request: NnunetRequest, maps: Sequence[LabelledMap], log: Log) -> None:
        self._device = request.training.device
        predicted = {f"desc-{name}" for name in MODELS} - set(request.choose)
        images: list[Path] = []
        for root in (request.dataset, *(request.derivatives or list_derivatives(request.dataset))):
            with suppress(InputError):  # a dataset without masks
                images += find_images(root, "mask")
        entities = {path: split_entities(path.name.partition(".")[0]) for path in images}
        masks = [
            path
            for path in images
            if entities[path].get("label") == CEREBELLUM and f"desc-{entities[path].get('desc')}" not in predicted
        ]
        self._paths = match_scans([one.dseg for one in maps], masks, choose=request.choose) if masks else {}
        if without := [one.name for one in maps if one.dseg not in self._paths]:
            log.log(f"no label-cerebellum mask for {list_some(without)}; predicted by the localizer of dgm16")

    @property
    def checksums(self) -> dict[str, str]:
        """Checksums of the masks by the name of the label image of their scan."""
        return {dseg.name: sha256(path) for dseg, path in self._paths.items()}

    def read(self, one: LabelledMap) -> Mask:
        """Return the mask of a scan on its grid."""
        if path := self._paths.get(one.dseg):
            mask = Volume.read(path)
            if mismatch := describe_grid_mismatch(one.chi, mask):
                raise InputError(f"{path.name}: not on the grid of {one.name} ({mismatch}); resample it first")
            inside = mask.array > 0.5
            if not inside.any():
                raise InputError(f"{path.name}: the mask is empty; segment the cerebellum or delete the file")
            return inside
        try:
            predicted = find_cerebellum(one.chi, device=self._device)
        except InputError as error:
            raise InputError(f"{one.name}: {error}") from error
        if not predicted.any():
            raise InputError(
                f"{one.name}: the localizer finds no cerebellum; add a label-cerebellum mask or delete its labels"
            )
        return predicted


def _evaluate(maps: Sequence[LabelledMap], request: NnunetRequest) -> pd.DataFrame:
    """Segment the test set by both steps and compute the Dice."""
    rows: list[pd.DataFrame] = []
    if maps and all((request.out / step / "plans.json").is_file() for step in STEPS):
        model, _ = choose_labels(request.model, request.out)
        for one in maps:
            try:
                found = segment_map(one.chi, model, weights=request.out, device=request.training.device).labels
            except InputError:  # no cerebellum was found, so no nucleus either
                found = np.zeros(one.chi.shape, np.uint8)
            table = dice(manual_labels(one, model), found, structures=model.structures)
            rows.append(table[["abbreviation", "dice"]].assign(scan=one.name))
    return pd.concat(rows, ignore_index=True)[list(DICE_COLUMNS)] if rows else pd.DataFrame(columns=list(DICE_COLUMNS))
