"""The learning curve, as a table and as lines to read along."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bids_dgmseg.train.loop import Reached
from bids_dgmseg.train.status_line import live_line, unseen


class Curve:
    """Averages figures over some steps, appends them to a TSV and says them.

    Parameters
    ----------
    path : path
        Table; an existing one goes on, without what lies behind `step`: it will be learned again.
    classes : sequence of str
        Names of the classes, background left out.
    say, show : callable
        Get lines to keep, and lines that the next one may replace.
    every : int
        Steps a row.
    step : int
        Where the training stands.
    steps : int, optional
        How long it is, where that is a number of steps.
    """

    def __init__(
        self,
        path: Path,
        classes: Sequence[str],
        *,
        say: Callable[[str], None],
        show: Callable[[str], None] = unseen,
        every: int = 50,
        step: int = 0,
        steps: int | None = None,
    ) -> None:
        self.path, self.classes, self.say, self.show, self.every = path, classes, say, show, every
        self._of = f"/{steps}" if steps is not None else ""
        self._rows: list[Reached] = []
        self._started = time.monotonic()
        go_on_with_table(path, ["step", "seconds", "loss", *classes], step=step)

    def add(self, now: Reached) -> None:
        """Take one step's figures; each simulated map is new, so its Dice is that of an unseen map."""
        self.show(
            live_line(
                f"step {now.step}{self._of}", seconds=now.seconds, left=now.left, loss=now.loss, dice=now.dice.tolist()
            )
        )
        self._rows.append(now)
        if now.step % self.every:
            return
        mean_loss = sum(row.loss for row in self._rows) / len(self._rows)
        mean_dice = torch.stack([row.dice for row in self._rows]).nanmean(dim=0).tolist()
        self._rows.clear()
        seconds = time.monotonic() - self._started
        row = [str(now.step), f"{seconds:.0f}", f"{mean_loss:.4f}", *(f"{value:.3f}" for value in mean_dice)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join(row) + "\n")
        names = " ".join(f"{name} {value:.2f}" for name, value in zip(self.classes, mean_dice, strict=True))
        self.say(f"step {now.step}, {seconds:.0f} s, loss {mean_loss:.3f}, Dice {names}")


def go_on_with_table(path: Path, columns: Sequence[str], *, step: int) -> None:
    """Begin a table whose first column is the step, or take off of an earlier one what will be learned again."""
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    kept = [row for row in rows if int(row.split("\t")[0]) <= step]
    path.write_text("\n".join(["\t".join(columns), *kept]) + "\n", encoding="utf-8")
