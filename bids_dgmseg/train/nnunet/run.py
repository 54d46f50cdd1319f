"""Train nnunet2step on the labelled scans of a dataset, and score it on those kept aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.segmentations import find_images, match_scans
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch
from bids_dgmseg.image.masks import large_components
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import read_json, sha256, write_json, write_text
from bids_dgmseg.io.tables import write_tsv
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.nnunet_folder import CEREBELLUM, STEPS
from bids_dgmseg.models.registry import MODELS, Model, get_model
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.regions import resample_regions, valid_mask
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice
from bids_dgmseg.train.data import Labelled, own_derivatives, read_labelled_maps
from bids_dgmseg.train.folds import read_sites
from bids_dgmseg.train.nnunet.data import Case, NnunetTraining, Part, crop_to_cerebellum, split_by_site
from bids_dgmseg.train.nnunet.step import StepOutcome, train_step
from bids_dgmseg.train.run_finetuning import given_labels
from bids_dgmseg.train.status_line import unseen

Say = Callable[[str], None]

Mask = NDArray[np.bool_]

DICE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scan": {"Description": "Entities of the map's name; none of these scans was learned from or watched"},
    "abbreviation": {"Description": "Nucleus and side, such as DN_L; left is the patient's left"},
    "dice": {"Description": "Dice of the given label and that of both steps together"},
}


@dataclass(frozen=True)
class NnunetRequest:
    """What to train on what."""

    model: Model
    dataset: Path
    out: Path
    steps: tuple[str, ...] = STEPS
    training: NnunetTraining = field(default_factory=NnunetTraining)
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()


def run_nnunet_training(
    request: NnunetRequest, *, say: Say, show: Say = unseen
) -> tuple[list[StepOutcome], pd.DataFrame]:
    """Train the steps one after the other; ``OUT`` becomes a folder for ``--weights``.

    `say` gets lines to keep, `show` lines that the next one may replace.

    Returns
    -------
    list of StepOutcome
        One a step.
    DataFrame
        The columns of `DICE_COLUMNS`, empty where no scan was kept aside or a step is still missing.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    model = request.model
    maps = read_labelled_maps(request.dataset, model, derivatives=request.derivatives, choose=request.choose, say=say)
    sites = read_sites(request.dataset, {one.participant for one in maps})
    parts = split_by_site(sites, seed=request.training.seed)
    masks = _Cerebella(request, maps, say)
    _claim(request, maps)
    write_text(_split_table(sites, parts), request.out / "split.tsv")
    outcomes = []
    for step in request.steps:
        names = (CEREBELLUM,) if step == CEREBELLUM else model.labels
        cases = partial(_CASES[step], maps, parts, masks, model)
        outcomes.append(train_step(step, cases, names, request.out, request.training, say=say, show=show))
    table = _score([one for one in maps if parts[one.participant] == "test"], request)
    write_tsv(table, request.out / "dice.tsv", float_format="%.4f")
    write_json(DICE_COLUMNS, request.out / "dice.json")
    return outcomes, table


def _split_table(sites: Mapping[str, str], parts: Mapping[str, Part]) -> str:
    lines = [f"sub-{name}\t{sites[name]}\t{parts[name]}" for name in sorted(parts)]
    return "\n".join(["participant_id\tsite\tpart", *lines]) + "\n"


class _Cerebella:
    """Masks of the cerebellum: the dataset's own, else what the default model's whole-head network sees."""

    def __init__(self, request: NnunetRequest, maps: Sequence[Labelled], say: Say) -> None:
        self._device = request.training.device
        made = {f"desc-{name}" for name in MODELS} - set(request.choose)
        images: list[Path] = []
        for root in (request.dataset, *(request.derivatives or own_derivatives(request.dataset))):
            with suppress(InputError):  # a dataset without masks
                images += find_images(root, "mask")
        entities = {path: split_entities(path.name.partition(".")[0]) for path in images}
        masks = [
            path
            for path in images
            if entities[path].get("label") == CEREBELLUM and f"desc-{entities[path].get('desc')}" not in made
        ]
        self._paths = match_scans([one.dseg for one in maps], masks, choose=request.choose) if masks else {}
        if bare := [one.map.name for one in maps if one.dseg not in self._paths]:
            say(f"no label-cerebellum mask of {list_some(bare)}; the whole-head network of dgm16 says where it is")

    def of(self, one: Labelled) -> Mask:
        """Give the mask of a scan on its own grid."""
        path = self._paths.get(one.dseg)
        if path is None:
            return self._seen(one)
        mask = Volume.read(path, np.uint8)
        if apart := describe_grid_mismatch(one.map.chi, mask):
            raise InputError(f"{path.name}: does not lie on the grid of {one.map.name} ({apart}); resample it first")
        inside: Mask = mask.array > 0
        if not inside.any():
            raise InputError(f"{path.name}: is empty; draw the cerebellum or remove the file")
        return inside

    def _seen(self, one: Labelled) -> Mask:
        chi, default = one.map.chi, get_model("default")
        try:
            labels = localize(chi, default, device=self._device).labels
        except InputError as error:
            raise InputError(f"{one.map.name}: {error}") from error
        if labels is None:
            raise ValueError(f"{default.name}: has no whole-head network")
        regions = resample_regions(
            labels, Grid(chi.shape, chi.affine), names=default.localizer.labels, valid=valid_mask(chi).array
        )
        seen = large_components(regions[CEREBELLUM])  # as in use
        if not seen.any():
            raise InputError(
                f"{one.map.name}: the whole-head network sees no cerebellum; add a label-cerebellum mask, "
                "or take its labels out of the dataset"
            )
        return seen


def _whole(maps: Sequence[Labelled], parts: Mapping[str, Part], masks: _Cerebella, model: Model) -> Iterator[Case]:
    for one in maps:
        if (part := parts[one.participant]) != "test":
            yield Case(_case_name(one), one.map.chi, masks.of(one).astype(np.uint8), part)


def _crops(maps: Sequence[Labelled], parts: Mapping[str, Part], masks: _Cerebella, model: Model) -> Iterator[Case]:
    for one in maps:
        if (part := parts[one.participant]) != "test":
            case = Case(_case_name(one), one.map.chi, one.map.labels.array, part)
            yield crop_to_cerebellum(case, masks.of(one), margin_mm=model.localizer.margin_mm)


_CASES: Mapping[str, Callable[..., Iterator[Case]]] = {CEREBELLUM: _whole, STEPS[1]: _crops}


def _case_name(one: Labelled) -> str:
    """Name a case without underscores, which nnU-Net reads as its own."""
    return one.map.name.replace("_", "-")


def _claim(request: NnunetRequest, maps: Sequence[Labelled]) -> None:
    """Write what this training is, or see that the one in the folder is the same; only its length may change."""
    record: dict[str, Any] = {
        "model": request.model.name,
        "labels": {one.dseg.name: sha256(one.dseg) for one in maps},
        "seed": request.training.seed,
        "plan": request.training.plan,
    }
    path = request.out / "training.json"
    earlier = read_json(path) if path.is_file() else record
    if differing := [name for name, value in record.items() if earlier.get(name) != value]:
        raise InputError(
            f"{request.out.name}: holds another training (other {', '.join(differing)}); give a new folder for OUT"
        )
    write_json(record, path)


def _score(maps: Sequence[Labelled], request: NnunetRequest) -> pd.DataFrame:
    """Segment the scans that were kept aside, by both steps."""
    rows: list[pd.DataFrame] = []
    if maps and all((request.out / step / "plans.json").is_file() for step in STEPS):
        model, _ = choose_labels(request.model, request.out, None)
        device = request.training.device
        for one in maps:
            try:
                found = segment_map(one.map.chi, model, weights=request.out, device=device).labels
            except InputError:  # no cerebellum found: nothing is
                found = np.zeros(one.map.chi.shape, np.uint8)
            table = dice(given_labels(one.map, model), found, structures=model.structures)
            rows.append(table[["abbreviation", "dice"]].assign(scan=one.map.name))
    return pd.concat(rows, ignore_index=True)[list(DICE_COLUMNS)] if rows else pd.DataFrame(columns=list(DICE_COLUMNS))
