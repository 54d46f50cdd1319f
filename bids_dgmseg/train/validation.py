"""Try the averaged weights of a training on maps that stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bids_dgmseg.segmentation.inference import forward_batch
from bids_dgmseg.train.curve import go_on_with_table
from bids_dgmseg.train.loop import Reached, hard_dice

FIRST_MAP = 8_000_000
"""Beyond the samples that a training of any length has seen, before those of the calibration."""

SEED = 0
"""Of the fixed maps, whatever the seed of a training, so that trainings can be compared."""


class Validation:
    """Measures the averaged weights, which are what ships, on a fixed set of simulated maps, and keeps a table.

    Parameters
    ----------
    maps : Dataset
        Of which `n_maps` from `FIRST_MAP` on are tried: input (channels, X, Y, Z) and classes (X, Y, Z).
    n_maps : int
        How many; 0 for none.
    network : Module
        Of the training; a copy takes the averaged weights.
    average : mapping of str to Tensor
        The averaged weights, which change while the training goes on.
    path : path
        Table; an existing one goes on, without what lies behind `step`.
    classes : sequence of str
        Names of the classes, background left out.
    device : torch.device
        Where to compute.
    say : callable
        Gets a line each time.
    step, seconds : int, float
        Where the training stands, and how long it has learned.
    every_minutes : float
        How long the training learns between two measurements.
    """

    def __init__(
        self,
        maps: Dataset[tuple[Tensor, Tensor]],
        *,
        n_maps: int,
        network: nn.Module,
        average: Mapping[str, Tensor],
        path: Path,
        classes: Sequence[str],
        device: torch.device,
        say: Callable[[str], None],
        step: int = 0,
        seconds: float = 0.0,
        every_minutes: float = 10.0,
    ) -> None:
        self.average, self.path, self.classes, self.device, self.say = average, path, classes, device, say
        self.every_seconds = 60 * every_minutes
        self._network = copy.deepcopy(network).eval()
        self._maps, self._drawn = maps, [FIRST_MAP + number for number in range(n_maps)]
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._measured, self._next_seconds = step, seconds + self.every_seconds
        if n_maps:
            go_on_with_table(path, ["step", *classes], step=step)

    def add(self, now: Reached) -> None:
        """Measure if it is time for it."""
        if now.seconds >= self._next_seconds:
            self._next_seconds = now.seconds + self.every_seconds
            self.measure(now.step)

    def measure(self, step: int) -> None:
        """Note the mean Dice of each class after a step, unless it is known."""
        if not self._drawn or step == self._measured:
            return
        self._measured = step
        self._samples = self._samples or [self._maps[index] for index in self._drawn]
        self._network.load_state_dict(dict(self.average))
        dice = torch.stack(
            [
                hard_dice(
                    forward_batch(self._network, inputs[None].numpy(), self.device.type).cpu(), labels[None].cpu()
                )
                for inputs, labels in self._samples
            ]
        ).nanmean(dim=0)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join([str(step), *(f"{value:.4f}" for value in dice.tolist())]) + "\n")
        count = len(self._samples)
        self.say(f"step {step}, Dice {float(dice.nanmean()):.3f} on {count} simulated maps not learned from")
