"""Log of a training: lines for the terminal, the learning curve, and the record of what is trained on what."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from bids_dgmseg import __version__
from bids_dgmseg.errors import InputError, count, for_terminal
from bids_dgmseg.io.files import MISSING, read_json, read_tsv, to_json, write_bytes, write_json, write_text
from bids_dgmseg.lab.train.core import State, StepResult, read_checkpoint
from bids_dgmseg.lab.train.learning_curve import draw_learning_curve
from bids_dgmseg.lab.train.schedule import Pace
from bids_dgmseg.models.model_folder import TRAINING


class Log(Protocol):
    """Where messages go; `bids_dgmseg.console.StatusLine` is one."""

    def log(self, text: str) -> None:
        """Print a line that stays."""

    def update(self, text: str) -> None:
        """Replace the status line."""


class PlainLog:
    """Print lines and show no status line."""

    def log(self, text: str) -> None:
        """Print a line."""
        sys.stdout.write(f"{for_terminal(text)}\n")
        sys.stdout.flush()

    def update(self, text: str) -> None:
        """Do nothing."""


_LINE_S = 60.0
"""Longest time without a line."""


class StepLog:
    """Log of a training without epochs: one row of the learning curve, a TSV file, per `every` steps.

    Slow steps are reported every minute, too. `classes` are those except background, `steps` is the length of the
    training, if it is given in steps.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], log: Log, *, steps: int | None = None, every: int = 50
    ) -> None:
        self.path, self.classes, self.log, self.every = path, tuple(classes), log, every
        self._total = f"/{steps}" if steps is not None else ""
        self._logged_s = 0.0

    def start(self, state: State) -> None:
        """Write the rows of earlier calls."""
        self._logged_s = state.seconds
        formats = {"step": "d", "seconds": ".0f", "loss": ".4f", **dict.fromkeys(self.classes, ".3f")}
        write_curve(state.rows, self.path, formats)

    def step(self, state: State, result: StepResult) -> None:
        """Show the status; each sample is new, so its Dice is that of unseen data."""
        dice = result.dice
        where = f"step {state.step}{self._total}"
        self.log.update(
            format_status(where, seconds=state.seconds, left=result.seconds_left, loss=result.loss, dice=dice.tolist())
        )
        state.unlogged.append([result.loss, *dice.tolist()])
        loss, *dice_means = torch.tensor(state.unlogged).nanmean(dim=0).tolist()
        if state.step % self.every:
            if state.seconds - self._logged_s >= _LINE_S:
                self._logged_s = state.seconds
                left = f"{result.seconds_left / 60:.1f} min left"
                self.log.log(f"{where}, {state.seconds:.0f} s, {left}, loss {loss:.3f}")
            return
        means = dict(zip(self.classes, dice_means, strict=True))
        state.unlogged.clear()
        state.rows.append({"step": state.step, "seconds": state.seconds, "loss": loss, **means})
        self.start(state)
        text = " ".join(f"{name} {value:.2f}" for name, value in means.items())
        self.log.log(f"step {state.step}, {state.seconds:.0f} s, loss {loss:.3f}, Dice {text}")


class EpochLog:
    """Log of a training in epochs: one row of the learning curve, ``curve.tsv`` in a folder, per epoch.

    `name` begins each line; `classes` are those except background.
    """

    def __init__(self, name: str, classes: Sequence[str], pace: Pace, folder: Path, log: Log) -> None:
        self.name, self.classes, self.pace, self.folder, self.log = name, tuple(classes), pace, folder, log

    def step(self, state: State, result: StepResult) -> None:
        """Show the status, with the Dice of the last epoch."""
        where = f"{self.name}: epoch {state.epoch + 1}/{self.pace.epochs}, step {state.step}/{result.epoch_steps}"
        dice = [state.rows[-1][name] for name in self.classes] if state.rows else ()
        self.log.update(
            format_status(where, seconds=state.seconds, left=result.seconds_left, loss=result.loss, dice=dice)
        )

    def epoch(self, state: State) -> None:
        """Write the learning curve and print its last row."""
        self._write(state)
        row = state.rows[-1]
        line = f"{self.name}: epoch {row['epoch']}, loss {row['loss']:.4f}"
        if not math.isnan(row["validation_loss"]):
            dice = " ".join(f"{name} {_format(row[name], '.3f')}" for name in self.classes)
            best = " (best)" if state.stale == 0 and state.best else ""
            line += f", validation {row['validation_loss']:.6g}{best}, Dice {dice}"
        self.log.log(line)

    def finish(self, state: State) -> None:
        """Write and draw the learning curve, and print which weights are kept."""
        self._write(state)
        best = len(state.rows) - state.stale if state.best else None
        kept = "keeping the last weights" if best is None else f"keeping the weights of epoch {best}"
        epochs, minutes = count(len(state.rows), "epoch"), f"{state.seconds / 60:.1f} min"
        self.log.log(f"{self.name}: finished after {epochs} and {minutes}, {kept}")
        columns = {name: [row[name] for row in state.rows] for name in ("loss", "validation_loss", *self.classes)}
        loss = {"training": columns.pop("loss"), "validation": columns.pop("validation_loss")}
        write_bytes(draw_learning_curve(loss, columns, best=best, title=self.name), self.folder / "curve.png")

    def _write(self, state: State) -> None:
        names = ("learning_rate", "loss", "validation_loss", *self.classes)
        write_curve(state.rows, self.folder / "curve.tsv", {"epoch": "d", "steps": "d", **dict.fromkeys(names, ".6g")})


def format_status(where: str, *, seconds: float, left: float, loss: float, dice: Iterable[float]) -> str:
    """Format a status line with the mean of `dice`, whose absent values are NaN.

    Examples
    --------
    >>> format_status("step 30/120", seconds=90, left=270, loss=0.5, dice=[0.75, 0.85])
    'step 30/120, 1.5 min, 4.5 left, loss 0.500, Dice 0.80'
    """
    known = [value for value in dice if not math.isnan(value)]
    mean = f"{sum(known) / len(known):.2f}" if known else MISSING
    # A terminal may have 80 columns.
    spent, left_over = (f"{time / 60:.{1 if time < 6000 else 0}f}" for time in (seconds, left))
    return f"{where}, {spent} min, {left_over} left, loss {loss:.3f}, Dice {mean}"


def write_curve(rows: Iterable[Mapping[str, float]], path: Path, formats: Mapping[str, str]) -> None:
    """Write a learning curve, one column per format; NaN becomes ``n/a``."""
    lines = [[_format(row[name], spec) for name, spec in formats.items()] for row in rows]
    write_text("\n".join("\t".join(line) for line in [list(formats), *lines]), path)


def _format(value: float, spec: str) -> str:
    return MISSING if math.isnan(value) else format(value, spec)


def read_steps(path: Path, *, until: int) -> pd.DataFrame:
    """Read the rows of a table up to a step; later ones are left over from a training that was started again."""
    return read_tsv(path).query("step <= @until") if path.is_file() else pd.DataFrame()


def write_record(
    out: Path,
    record: Mapping[str, Any],
    *,
    begun: bool,
    length: Mapping[str, Any] | None = None,
    checkpoints: Iterable[Path] = (),
) -> None:
    """Write ``training.json`` to a model folder; InputError if it contains results of a different training.

    `record` has what is trained on what (model, checksums of labels, seed, …), `begun` whether the folder contains
    results of a training, and `length` what may differ when a training is continued. The records in `checkpoints` are
    compared, too: ``training.json`` may be lost or of another folder.
    """
    path = out / TRAINING
    records = [read_checkpoint(checkpoint).get("record") for checkpoint in checkpoints]
    for earlier in filter(None, [read_json(path) if begun and path.is_file() else None, *records]):
        check_record(out, record, earlier)
    write_json({**record, **({"length": length} if length else {}), "version": __version__}, path)


def check_record(out: Path, record: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raise InputError if the record of an earlier training in a folder differs from that of the present one."""
    # A key that an earlier version did not write cannot differ.
    compared = [(name, earlier.get(name, value), value) for name, value in to_json(record).items()]
    if differing := [line for one in compared for line in _describe_difference(*one)]:
        begun_by = earlier.get("version", __version__)
        hint = "" if begun_by == __version__ else f", or resume it with version {begun_by} (this is {__version__})"
        raise InputError(
            f"{out.name}: contains a different training (differs in {', '.join(differing)}); choose a new OUT{hint}"
        )


def _describe_difference(name: str, before: Any, now: Any) -> list[str]:
    """Describe how a value of ``training.json`` differs; of the recipe each value, also one that was not written."""
    if before == now:
        return []
    if name.partition(".")[0] != "recipe":
        return [name]
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in _describe_difference(f"{name}.{key}", before.get(key), now.get(key))]
    return [f"{name}: {json.dumps(before)} before, {json.dumps(now)} now"]
