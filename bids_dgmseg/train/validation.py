"""Validate a training on simulated maps: on fixed simulated maps during it, and on labelled scans at its end."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.io.tables import write_tsv
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import forward_batch
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice
from bids_dgmseg.train.core import State, hard_dice
from bids_dgmseg.train.data import manual_labels, read_labelled_maps
from bids_dgmseg.train.log import Log, read_steps

FIRST_MAP = 8_000_000
"""Beyond the samples of a training of any length, and before those of the calibration."""

SEED = 0
"""Of the fixed maps, whatever the seed of a training, so that trainings can be compared."""


class FixedMaps:
    """Measures the averaged weights on a fixed set of simulated maps, every few minutes.

    Parameters
    ----------
    maps : Dataset
        Maps from number `FIRST_MAP` on are used: input (channels, X, Y, Z) and classes (X, Y, Z).
    state : State
        Of the training; a copy of its network gets the averaged weights.
    n_maps : int
        Number of maps; 0 for none.
    path : path
        Table; rows of earlier calls are kept.
    classes : sequence of str
        Names of the classes except background.
    device : torch.device
        Where to compute.
    log : Log
        Gets a line per measurement.
    every_minutes : float
        Training time between two measurements.
    """

    def __init__(
        self,
        maps: Dataset[tuple[Tensor, Tensor]],
        state: State,
        *,
        n_maps: int,
        path: Path,
        classes: Sequence[str],
        device: torch.device,
        log: Log,
        every_minutes: float = 10.0,
    ) -> None:
        self.state, self.path, self.classes, self.device, self.log = state, path, tuple(classes), device, log
        self.every_seconds = 60 * every_minutes
        self._network = copy.deepcopy(state.network).eval()
        self._maps, self._indices = maps, range(FIRST_MAP, FIRST_MAP + n_maps)
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._measured, self._next_seconds = state.step, state.seconds + self.every_seconds
        if n_maps:
            self._table = read_steps(path, until=state.step)
            self._write()

    def step(self) -> None:
        """Measure if it is time."""
        if self.state.seconds >= self._next_seconds:
            self._next_seconds = self.state.seconds + self.every_seconds
            self.measure()

    def measure(self) -> None:
        """Add the mean Dice per class to the table, unless this step was measured before."""
        step = self.state.step
        if not self._indices or step == self._measured:
            return
        self._measured = step
        self._samples = self._samples or [self._maps[index] for index in self._indices]
        self._network.load_state_dict(self.state.weights)
        scores = torch.stack([self._score(*sample) for sample in self._samples]).nanmean(dim=0)
        row = pd.DataFrame([{"step": step, **dict(zip(self.classes, scores.tolist(), strict=True))}])
        self._table = pd.concat([self._table, row]) if len(self._table) else row
        self._write()
        n_maps = len(self._samples)
        self.log.log(f"step {step}, Dice {float(scores.nanmean()):.3f} on {n_maps} simulated validation maps")

    def _score(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = forward_batch(self._network, inputs[None].numpy(), self.device.type)
        return hard_dice(logits.cpu(), labels[None].cpu())

    def _write(self) -> None:
        table = self._table if len(self._table) else pd.DataFrame(columns=["step", *self.classes])
        write_tsv(table, self.path, float_format="%.4f")


def evaluate_on_dataset(model: Model, dataset: Path, out: Path, *, step: int, device: str, log: Log) -> Path:
    """Evaluate a model folder on a labelled dataset that is not used for training.

    Parameters
    ----------
    model : Model
        Whose segmenter is in ``out``.
    dataset : path
        BIDS dataset of labelled maps.
    out : path
        Model folder; its localizer is used if there is one, else that of the package.
    step : int
        Number of training steps so far.
    device : {"cpu", "cuda", "auto"}
        Where to compute.
    log : Log
        Gets the mean Dice of each nucleus, left and right together.

    Returns
    -------
    path
        ``segmenter_external_validation.tsv`` in `out`: step, scan, abbreviation, Dice. Rows of earlier steps are kept.

    Raises
    ------
    InputError
        If the dataset has no labelled maps.
    """
    borrows = bool(model.localizer.network) and not (out / "localizer.safetensors").is_file()
    scores = score_dataset(dataset, model, weights=out, localizer=None if borrows else out, device=device, log=log)
    table = scores.assign(step=step)[["step", "scan", "abbreviation", "dice"]]
    nuclei = table["dice"].groupby(table["abbreviation"].str.split("_").str[0], sort=False).mean()
    means = " ".join(f"{name} {value:.3f}" for name, value in nuclei.items())
    n_scans = table["scan"].nunique()
    log.log(f"step {step}, Dice on {n_scans} scans of {dataset.name}: {means} mean {nuclei.mean():.3f}")
    path = out / "segmenter_external_validation.tsv"
    earlier = read_steps(path, until=step - 1)
    return write_tsv(pd.concat([earlier, table]) if len(earlier) else table, path, float_format="%.4f")


def score_dataset(
    dataset: Path, model: Model, *, weights: Path | None, localizer: Path | None, device: str, log: Log
) -> pd.DataFrame:
    """Segment every labelled map of a dataset and compute the Dice.

    Parameters
    ----------
    dataset : path
        BIDS dataset of labelled maps.
    model : Model
        Which nuclei.
    weights, localizer : path or None
        Folders of the segmenter and of the localizer; None for those in the package.
    device : {"cpu", "cuda", "auto"}
        Where to compute.
    log : Log
        Gets warnings about the labels.

    Returns
    -------
    DataFrame
        The columns of `dice`, scan and seconds; one row per scan and nucleus that is labelled in it.

    Raises
    ------
    InputError
        If the dataset has no labelled maps.
    """
    tables = []
    for one in read_labelled_maps(dataset, model, warn=log.log):
        started = time.perf_counter()
        location = localize(one.chi, model, weights=localizer, device=device)
        found = segment_map(one.chi, model, weights=weights, device=device, location=location).labels
        seconds = time.perf_counter() - started
        known = [model.structures[channel - 1] for channel in one.channels]
        table = dice(manual_labels(one, model), found, structures=known)
        tables.append(table.assign(scan=one.name, seconds=seconds))
    return pd.concat(tables)
