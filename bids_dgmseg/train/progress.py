"""What a training says while it goes, and the curve that it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from bids_dgmseg.io.files import write_bytes, write_text
from bids_dgmseg.report.learning_curve import draw_learning_curve
from bids_dgmseg.train.epochs import State
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.status_line import live_line, seconds_left


class Teller:
    """Says how a training goes, and writes its curve.

    Parameters
    ----------
    name : str
        Of the training.
    recipe : Recipe
        Gives the classes and the length.
    folder : path
        Gets ``curve.tsv`` and ``curve.png``.
    say, show : callable
        Get lines to keep, and lines that the next one may replace.
    """

    def __init__(
        self, name: str, recipe: Recipe, folder: Path, say: Callable[[str], None], show: Callable[[str], None]
    ) -> None:
        self.name, self.recipe, self.folder, self.say, self.show = name, recipe, folder, say, show

    def step(self, state: State, steps: int, loss: float) -> None:
        """Show where the training is, with the Dice of the last epoch; it may end before, by patience."""
        pace = self.recipe.pace
        part = pace.part(state.epoch + state.step / steps, state.seconds)
        self.show(
            live_line(
                f"{self.name}: epoch {state.epoch + 1}/{pace.epochs}, step {state.step}/{steps}",
                seconds=state.seconds,
                left=seconds_left(state.seconds, part),
                loss=loss,
                dice=state.rows[-1].dice if state.rows else (),
            )
        )

    def epoch(self, state: State) -> None:
        """Write the table of the curve and say its last row."""
        self._write(state)
        last, names = state.rows[-1], self.recipe.classes
        dice = " ".join(
            f"{name} {'n/a' if math.isnan(value) else f'{value:.3f}'}"
            for name, value in zip(names, last.dice, strict=True)
        )
        best = " (best)" if state.stale == 0 and state.best else ""
        self.say(
            f"{self.name}: epoch {last.epoch}, loss {last.loss:.4f}, validation {_number(last.validation_loss)}"
            f"{best}, Dice {dice}"
        )

    def _write(self, state: State) -> None:
        header = ["epoch", "steps", "learning_rate", "loss", "validation_loss", *self.recipe.classes]
        lines = [
            [
                str(row.epoch),
                str(row.steps),
                f"{row.learning_rate:g}",
                *(_number(value) for value in (row.loss, row.validation_loss, *row.dice)),
            ]
            for row in state.rows
        ]
        write_text("\n".join("\t".join(line) for line in [header, *lines]), self.folder / "curve.tsv")

    def finish(self, state: State) -> None:
        """Write and draw the curve, and say which weights are kept."""
        self._write(state)
        rows = state.rows
        loss = {"training": [row.loss for row in rows], "validation": [row.validation_loss for row in rows]}
        dice = {name: [row.dice[place] for row in rows] for place, name in enumerate(self.recipe.classes)}
        best = len(rows) - state.stale if state.best else None
        kept = "the last weights are kept" if best is None else f"the weights of epoch {best} are kept"
        self.say(f"{self.name}: over after {len(rows)} epochs and {state.seconds / 60:.1f} min, {kept}")
        write_bytes(draw_learning_curve(loss, dice, best=best, title=self.name), self.folder / "curve.png")


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.6g}"
