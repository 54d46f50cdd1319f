"""The frame of every training: the request, and the folder with its record, checkpoint, log and learning curve."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from bids_dgmseg import __version__
from bids_dgmseg.bids.labelled_scans import LabelledMap, read_labelled_maps
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_json, sha256, to_json, write_bytes, write_json, write_text
from bids_dgmseg.lab.train.core import Run, Samples, State, StepResult, read_checkpoint, train
from bids_dgmseg.lab.train.recipe import NnunetRecipe, Recipe
from bids_dgmseg.models.model_folder import TRAINING, save_weights, to_channels_last
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import color_of
from bids_dgmseg.report.figures import DPI, INK, SOFT, TEXT, WIDTH_IN, style_axes, to_png, with_default_settings

CHECKPOINT = "checkpoint.pt"

_EVERY = 50
"""Steps per row of the learning curve of a training without epochs."""

_LINE_S = 60.0
"""Longest time without a line."""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train on what, for how long and where; each source of maps uses the fields that it needs."""

    model: Model
    out: Path
    dataset: Path = Path()
    """BIDS dataset of labelled maps."""
    recipe: Recipe | NnunetRecipe | None = None
    """Of the folds of a published network."""
    folds: tuple[int, ...] = ()
    """Folds to train, counted from 0."""
    scans: int | None = None
    """Number of training participants per fold; None for all."""
    start: Path | None = None
    """Model folder, or file with an encoder's weights, to start from; None: random or, to fine-tune, shipped ones."""
    pretrain_on: tuple[Path, ...] = ()
    """Model outputs for maps without manual labels, used before the manual labels."""
    distill: tuple[Path, ...] = ()
    """The same, used together with the manual labels."""
    holdout: tuple[str, ...] = ()
    """Participants, without ``sub-``, that are not trained on."""
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()
    part: str = "segmenter"
    """Network that is trained on simulated maps."""
    template: Path | None = None
    """Label template of simulated maps; None for the analytic phantom."""
    minutes: float | None = None
    """Training time; of simulated maps, and with `steps`, the time limit of this call."""
    steps: int | None = None
    """Length of the whole training of networks without epochs."""
    learning_rate: float | None = None
    seed: int = 1
    device: str = "auto"
    workers: int = 0
    checkpoint_minutes: float = 2.0


@dataclass(frozen=True)
class Outcome:
    """Where a training is at the end of a call."""

    state: State
    done: bool
    sha256: str
    """Of the weights."""


class Log(Protocol):
    """Where messages go; `bids_dgmseg.console.StatusLine` is one."""

    def log(self, text: str) -> None:
        """Print a line that stays."""

    def update(self, text: str) -> None:
        """Replace the status line."""


def read_maps(request: TrainingRequest, arrays: Path, log: Log) -> list[LabelledMap]:
    """Read the labelled maps of a request, with their arrays in files of a folder."""
    return read_labelled_maps(
        request.dataset,
        request.model,
        derivatives=request.derivatives,
        choose=request.choose,
        warn=log.log,
        progress=log.update,
        arrays=arrays,
    )


def check_holdout(labelled: Sequence[LabelledMap], holdout: Collection[str]) -> list[LabelledMap]:
    """Return the maps of the other participants; InputError if a held-out one has no map, or if none is left."""
    participants = {row.participant for row in labelled}
    if missing := sorted(set(holdout) - participants):
        raise InputError(
            f"`holdout` {missing[0]}: no labelled scan of this participant (labelled: {list_some(participants)})"
        )
    left = [row for row in labelled if row.participant not in holdout]
    if not left:
        raise InputError("`holdout`: leaves no training scan; hold out fewer participants")
    return left


def fit(
    network: nn.Module,
    samples: Samples,
    run: Run,
    weights: Path | None,
    *,
    log: Log,
    record: Mapping[str, Any],
    validation: Samples | None = None,
) -> Outcome:
    """Train a network, resuming from its checkpoint, and write its learning curve and weights.

    The folder of the checkpoint, named after what is trained, also gets ``curve.tsv`` and ``curve.png``. Afterwards the
    network has the weights to keep. `record` is kept in the checkpoint.

    Raises
    ------
    InputError
        If the loss is not finite.
    """
    folder = run.checkpoint.parent
    folder.mkdir(parents=True, exist_ok=True)
    state = State.start(to_channels_last(network, run.device), run.schedule)
    if run.checkpoint.is_file():
        state.load(run.checkpoint)
    state.record = dict(record)
    name = f"{folder.parent.name}/{folder.name}" if folder.parent.name.startswith("fold_") else folder.name
    curve = TrainingLog(run, log, name)
    try:
        train(state, samples, run, validation=validation, report=curve.step, finish_epoch=curve.epoch)
    except FloatingPointError as error:
        raise InputError(f"{name}: {error}; choose a new OUT and a lower learning rate") from error
    curve.finish(state)
    network.load_state_dict(state.weights)
    return Outcome(state, run.schedule.finished(state), save_weights(state.weights, weights) if weights else "")


class TrainingLog:
    """Status line, lines and learning curve of a training: one row per epoch, or per 50 steps without epochs."""

    def __init__(self, run: Run, log: Log, name: str) -> None:
        self.run, self.log, self.name, self.classes = run, log, name, list(run.classes)
        self._logged_s = 0.0

    def step(self, state: State, result: StepResult) -> None:
        """Show the status; without epochs each sample is new, so its Dice is that of unseen data."""
        epochs = result.epoch_steps is not None
        where = f"epoch {state.epoch + 1}, step {state.step}/{result.epoch_steps}" if epochs else f"step {state.step}"
        dice = [state.rows[-1][name] for name in self.classes] if state.rows else []
        if not epochs:
            dice = result.dice.tolist()
            state.unlogged.append([result.loss, *dice])
            if state.step % _EVERY == 0:
                self._add_row(state)
        status = describe_status(f"{self.name}: {where}", state.seconds, result.seconds_left, result.loss, dice)
        self.log.update(status)
        if state.seconds - self._logged_s >= _LINE_S:
            self._logged_s = state.seconds
            self.log.log(status)

    def _add_row(self, state: State) -> None:
        loss, *dice = torch.tensor(state.unlogged).nanmean(dim=0).tolist()
        state.unlogged.clear()
        means = dict(zip(self.classes, dice, strict=True))
        state.rows.append({"step": state.step, "seconds": round(state.seconds), "loss": loss, **means})
        self.epoch(state)

    def epoch(self, state: State) -> None:
        """Write the learning curve and print its last row."""
        write_curve(state.rows, self.run.checkpoint.with_name("curve.tsv"))
        self._logged_s, row = state.seconds, state.rows[-1]
        texts = [f"{name} {_format(value)}" for name, value in row.items() if name != "steps" and not math.isnan(value)]
        best = ", best so far" if state.stale == 0 and state.best else ""
        self.log.log(f"{self.name}: {', '.join(texts)}{best}")

    def finish(self, state: State) -> None:
        """Write and draw the learning curve, and print which weights are kept."""
        if not state.rows:
            return
        folder = self.run.checkpoint.parent
        write_curve(state.rows, folder / "curve.tsv")
        best = len(state.rows) - state.stale if state.best else None
        write_bytes(draw_curve(state.rows, self.classes, best=best, title=self.name), folder / "curve.png")
        kept = "" if best is None else f", keeping the weights of epoch {best}"
        self.log.log(f"{self.name}: {state.seconds / 60:.1f} min of training{kept}")


def describe_status(where: str, seconds: float, left: float, loss: float, dice: Iterable[float]) -> str:
    """Describe the status of a training, with the mean of `dice`, whose absent values are NaN.

    Examples
    --------
    >>> describe_status("step 30", 90, 270, 0.5, [0.75, 0.85])
    'step 30, 1.5 min, 4.5 left, loss 0.500, Dice 0.80'
    """
    present = [value for value in dice if not math.isnan(value)]
    mean = f"{sum(present) / len(present):.2f}" if present else MISSING
    # A terminal may have 80 columns.
    spent, rest = (f"{time / 60:.{1 if time < 6000 else 0}f}" for time in (seconds, left))
    return f"{where}, {spent} min, {rest} left, loss {loss:.3f}, Dice {mean}"


def write_curve(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a learning curve; NaN becomes ``n/a``."""
    lines = [list(rows[0]), *([_format(value) for value in row.values()] for row in rows)]
    write_text("\n".join(map("\t".join, lines)), path)


def _format(value: float) -> str:
    return MISSING if math.isnan(value) else format(value, "d" if isinstance(value, int) else ".6g")


@with_default_settings
def draw_curve(rows: Sequence[Mapping[str, float]], classes: Sequence[str], *, best: int | None, title: str) -> bytes:
    """Plot losses, and the Dice of each class, over a training as a PNG.

    `rows` are those of ``curve.tsv``; `best` is the epoch, from 1, whose weights are kept.
    """
    unit = next(iter(rows[0]))
    x = [row[unit] for row in rows]
    figure = Figure(figsize=(WIDTH_IN, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for name, line in {"loss": "-", "validation_loss": "--"}.items():
        if name in rows[0]:
            values = [row[name] for row in rows]
            left.plot(x, values, color=INK, linewidth=1.3, linestyle=line, label=name.replace("_", " "))
    for name in classes:  # which may have no side, such as DN or CN-PUT
        colour = color_of(name if "_" in name else f"{name.partition('-')[0]}_L")
        right.plot(x, [row[name] for row in rows], color=colour, linewidth=1.3, label=name)
    right.set_ylim(-0.03, 1.03)
    for axes, label in ((left, "loss"), (right, "Dice of validation samples" if unit == "epoch" else "Dice")):
        if best is not None:
            axes.axvline(best, color=SOFT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(unit, color=INK, fontsize=8, **TEXT)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        style_axes(axes)
    return to_png(figure)


def write_record(
    request: TrainingRequest, record: Mapping[str, Any], *, length: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``training.json`` to the model folder, and return its content.

    `record` has what is trained on what (labels, maps, folds, …), `length` what may differ when a training is
    continued. The records in checkpoints are compared, too: ``training.json`` may be lost or of another folder.

    Raises
    ------
    InputError
        If the folder contains results of a different training.
    """
    out = request.out
    plain: dict[str, Any] = to_json({"model": request.model.name, "seed": request.seed, **record})
    checkpoints = sorted(out.rglob(CHECKPOINT))
    if checkpoints or any(out.glob("fold_*.safetensors")) or (out / "training").is_dir():
        records = [read_json(out / TRAINING)] if (out / TRAINING).is_file() else []
        for earlier in [*records, *(read_checkpoint(path).get("record") or {} for path in checkpoints)]:
            check_record(out, plain, earlier)
    write_json({**plain, **({"length": length} if length else {}), "version": __version__}, out / TRAINING)
    return plain


def check_record(out: Path, record: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raise InputError if the record of an earlier training in a folder differs from that of the present one."""
    # A key that an earlier version did not write cannot differ.
    differing = [name for name, value in record.items() if earlier.get(name, value) != value]
    if differing:
        names = ", ".join(differing)
        raise InputError(f"{out.name}: already contains a run with different settings ({names}); choose a new OUT")


def list_checksums(maps: Iterable[LabelledMap]) -> dict[str, str]:
    """Return the checksums of maps by the names of their scans."""
    return {labelled.name: sha256(labelled.file) for labelled in maps}
