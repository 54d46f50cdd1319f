"""The learning curve, as a table and as lines to read along."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor


class Curve:
    """Averages figures over some steps, appends them to a TSV and says them.

    Parameters
    ----------
    path : path
        Table; an existing one goes on, without what lies behind `step`: it will be learned again.
    classes : sequence of str
        Names of the classes, background left out.
    say : callable
        Gets a line to show.
    every : int
        Steps a row.
    step : int
        Where the training stands.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], *, say: Callable[[str], None], every: int = 50, step: int = 0
    ) -> None:
        self.path, self.classes, self.say, self.every = path, classes, say, every
        self._rows: list[tuple[float, Tensor]] = []
        self._started = time.monotonic()
        rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        kept = [row for row in rows if int(row.split("\t")[0]) <= step]
        lines = ["\t".join(["step", "seconds", "loss", *classes]), *kept]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def add(self, step: int, loss: float, dice: Tensor) -> None:
        """Take one step's figures; each simulated map is new, so its Dice is that of an unseen map."""
        self._rows.append((loss, dice))
        if (step + 1) % self.every:
            return
        mean_loss = sum(loss for loss, _ in self._rows) / len(self._rows)
        mean_dice = torch.stack([dice for _, dice in self._rows]).nanmean(dim=0).tolist()
        self._rows.clear()
        seconds = time.monotonic() - self._started
        row = [str(step + 1), f"{seconds:.0f}", f"{mean_loss:.4f}", *(f"{value:.3f}" for value in mean_dice)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join(row) + "\n")
        names = " ".join(f"{name} {value:.2f}" for name, value in zip(self.classes, mean_dice, strict=True))
        self.say(f"step {step + 1}, {seconds:.0f} s, loss {mean_loss:.3f}, Dice {names}")
