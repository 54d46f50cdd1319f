"""Train the default model's two networks on maps, and the brain mask on magnitudes, simulated during training.

A training is validated on fixed simulated maps while it runs, and on labelled scans at its end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.bids.labelled_scans import manual_labels, read_labelled_maps
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import shape_to_cover
from bids_dgmseg.io.files import sha256, write_tsv
from bids_dgmseg.lab.simulate.anatomy import LabelMap
from bids_dgmseg.lab.simulate.label_template import read_template
from bids_dgmseg.lab.simulate.sample import (
    LOCALIZER_VIEW,
    SEGMENTER_VIEW,
    TYPICAL_WIDTH,
    View,
    class_labels,
    draw_sample,
    missing_classes,
    phantom_head,
    phantom_labels,
    read_training_head,
    region_labels,
    typical_view,
)
from bids_dgmseg.lab.simulate.whole_head import WholeHead, draw_magnitude, prepare_whole_head
from bids_dgmseg.lab.train.core import Run, State, StepResult, hard_dice, read_checkpoint, train, use_all_cores
from bids_dgmseg.lab.train.log import Log, StepLog, check_record, read_steps
from bids_dgmseg.lab.train.losses import dice_and_cross_entropy, dice_and_focal
from bids_dgmseg.lab.train.schedule import StepSchedule
from bids_dgmseg.models.model_folder import (
    load_weights,
    localizer_network,
    pick_device,
    read_model_folder,
    save_weights,
    segmenter_network,
    to_channels_last,
    write_model_toml,
)
from bids_dgmseg.models.registry import BRAIN_MASK, Model
from bids_dgmseg.models.structures import join_parts
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, forward_batch
from bids_dgmseg.segmentation.segment import localize, segment_map
from bids_dgmseg.stats.overlap import dice

PHANTOM_FRACTION = 0.15
"""Fraction of the samples that show the ellipsoids of the phantom instead of the template."""

TYPICAL_EVERY = 3
"""Every third sample of the segmenter's training is a typical map: rare maps teach more, but most maps are not rare."""

FIRST_FIXED_MAP, FIXED_SEED = 8_000_000, 0
"""Fixed maps for validation: beyond the samples of a training of any length and before those of the calibration; with a
fixed seed, so that trainings can be compared."""

NetworkPart = Literal["localizer", "segmenter", "brain-mask"]

Loss = Literal["cross-entropy", "focal"]

_LOSSES: Mapping[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": dice_and_cross_entropy,
    "focal": dice_and_focal,
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training on simulated maps."""

    part: NetworkPart
    steps: int
    """Length of the whole training."""
    minutes: float
    """Time limit of this call."""
    seed: int = 0
    device: str = "auto"
    workers: int = 1
    """Processes that simulate maps, on a GPU several at the same time."""
    learning_rate: float = StepSchedule.learning_rate
    validation_maps: int = 10
    """Number of simulated maps, the same in every training, for validation; 0 for none."""
    start: Path | None = None
    """Folder of the initial weights; None for random ones."""
    loss: Loss = "cross-entropy"
    """Loss that is added to Dice."""


@dataclass(frozen=True)
class Outcome:
    """Where a training is at the end of a call."""

    step: int
    done: bool
    sha256: str
    """Of the averaged weights, ``OUT/PART.safetensors``."""


@dataclass(frozen=True, eq=False)
class SimulatedMaps(Dataset[tuple[Tensor, Tensor]]):
    """Maps simulated on demand; sample i of a seed is always the same map."""

    heads: Sequence[tuple[LabelMap, float]]
    """Anatomies and their frequencies."""
    view: View
    """Field of view and parameter ranges."""
    seed: int
    """Two seeds share no sample."""
    classes_of: Callable[[Tensor], Tensor]
    """Converts the labels of the simulation into classes."""
    normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Converts ppm into the network's input."""
    typical: View | None = None
    """Replaces `view` in every third sample."""
    device: str | torch.device = "cpu"
    """Simulates the maps; samples are on the CPU."""

    @cached_property
    def _heads(self) -> list[tuple[LabelMap, float]]:
        """Heads on the device, copied in the process that simulates."""
        return [(head.to(self.device), weight) for head, weight in self.heads]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copies of the heads out when sent to another process."""
        return {name: value for name, value in vars(self).items() if name != "_heads"}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Simulate sample `index`: input (1, X, Y, Z) and classes (X, Y, Z)."""
        view = self.view if self.typical is None or index % TYPICAL_EVERY else self.typical
        with _one_thread():
            chi, labels = draw_sample(self._heads, view, self.seed * 10_000_000 + index)
        return torch.from_numpy(self.normalize(chi.cpu().numpy()))[None], self.classes_of(labels).cpu()


@dataclass(frozen=True, eq=False)
class SimulatedMagnitudes(Dataset[tuple[Tensor, Tensor]]):
    """Magnitude images of whole heads and their brains, drawn on demand like `SimulatedMaps`; on the CPU."""

    head: WholeHead
    seed: int
    """Two seeds share no sample."""
    normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and brain (X, Y, Z)."""
        with _one_thread():
            generator = torch.Generator().manual_seed(self.seed * 10_000_000 + index)
            magnitude, brain = draw_magnitude(self.head, generator)
        return torch.from_numpy(self.normalize(magnitude.numpy()))[None], brain


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: sums then have the same order in a worker process and here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_on_simulations(
    model: Model, template: Path | None, out: Path, config: TrainingConfig, *, log: Log
) -> Outcome:
    """Train one network of a model for a limited time; resume the training in ``OUT``.

    Parameters
    ----------
    model : Model
        With two networks, localizer and segmenter.
    template : path, optional
        Label template; None for the analytic phantom.
    out : path
        Model folder: per network a checkpoint, learning curve, Dice on fixed maps and weights.
    config : TrainingConfig
        What to train and how long.
    log : Log
        Where lines go.
    """
    use_all_cores()
    torch.manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(config.device)
    schedule = StepSchedule(steps=config.steps, learning_rate=config.learning_rate)
    if config.part == "brain-mask":
        model = BRAIN_MASK
    network = localizer_network(model) if config.part == "localizer" else segmenter_network(model)
    if config.start is not None:
        network = load_weights(network, model, config.part, config.start).requires_grad_(True)
    classes = model.localizer.labels if config.part == "localizer" else model.classes
    state = State.start(to_channels_last(network, device), schedule)
    record = {
        "model": model.name,
        "part": config.part,
        "template": None if template is None else sha256(template),
        "seed": config.seed,
        "loss": config.loss,
    }
    if (checkpoint := out / f"{config.part}_checkpoint.pt").is_file():
        check_record(out, record, read_checkpoint(checkpoint).get("record") or {})
        state.load(checkpoint)
    state.record, first = record, state.step
    curve = StepLog(out / f"{config.part}_curve.tsv", classes, log, steps=config.steps)
    curve.start(state)
    maps: SimulatedMaps | SimulatedMagnitudes
    if config.part == "brain-mask":
        maps = simulated_magnitudes(template, seed=config.seed)
    else:
        maps = simulated_maps(model, template, config.part, seed=config.seed, device=device)
    validation = FixedMaps(
        replace(maps, seed=FIXED_SEED),
        state,
        n_maps=config.validation_maps,
        path=out / f"{config.part}_validation.tsv",
        classes=classes,
        device=device,
        log=log,
    )

    def report(state: State, result: StepResult) -> None:
        curve.step(state, result)
        validation.step()

    loss = _LOSSES[config.loss]
    run = Run(
        schedule,
        lambda network, logits, labels: loss(logits, labels),
        checkpoint,
        seed=config.seed,
        device=device,
        workers=config.workers,
        minutes=config.minutes,
    )
    if config.part == "segmenter" and isinstance(maps, SimulatedMaps):
        maps = mix_in_typical_maps(maps, model)
    train(state, maps, run, report=report)
    validation.measure()
    path, done = out / f"{config.part}.safetensors", schedule.finished(state)
    if state.step == first and path.is_file():  # perhaps calibrated since
        return Outcome(state.step, done, sha256(path))
    if config.part == "segmenter" and (described := read_model_folder(model, out)).temperatures:
        write_model_toml(described, out, about={})
        log.log("the calibration was that of the earlier weights and is removed; calibrate again")
    return Outcome(state.step, done, save_weights(state.weights, path))


class FixedMaps:
    """Measures the averaged weights of a training on a fixed set of simulated maps, every few minutes.

    Maps from number `FIRST_FIXED_MAP` on are used. The table at `path` gets the mean Dice of each class except
    background; rows of earlier calls are kept.
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
        self._maps, self._indices = maps, range(FIRST_FIXED_MAP, FIRST_FIXED_MAP + n_maps)
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
        scores = torch.stack(
            [
                hard_dice(forward_batch(self._network, chi[None].numpy(), self.device.type).cpu(), labels[None].cpu())
                for chi, labels in self._samples
            ]
        ).nanmean(dim=0)
        row = pd.DataFrame([{"step": step, **dict(zip(self.classes, scores.tolist(), strict=True))}])
        self._table = pd.concat([self._table, row]) if len(self._table) else row
        self._write()
        n_maps = len(self._samples)
        self.log.log(f"step {step}, Dice {float(scores.nanmean()):.3f} on {n_maps} simulated validation maps")

    def _write(self) -> None:
        table = self._table if len(self._table) else pd.DataFrame(columns=["step", *self.classes])
        write_tsv(table, self.path, float_format="%.4f")


def simulated_maps(
    model: Model, template: Path | None, part: NetworkPart, *, seed: int, device: str | torch.device = "cpu"
) -> SimulatedMaps:
    """Return the simulated maps for training one network of a model."""
    head = None
    if template is not None:
        labels = read_template(template)
        if part == "segmenter" and (missing := missing_classes(labels, model.labels)):
            raise InputError(
                f"{template.name}: no label of {missing[0]}; create it with `dgmseg template` of this version"
            )
        head = read_training_head(template)
    heads = training_heads(head)
    if part == "localizer" and model.localizer.input is not None:
        view, classes_of, shown = LOCALIZER_VIEW, region_labels, model.localizer.input
    else:
        view, classes_of, shown = SEGMENTER_VIEW, partial(class_labels, classes=model.classes), model.input
    if part == "segmenter" and any(one.part_of for one in model.structures):
        if template is None:
            raise InputError(f"{model.name}: the phantom has no parts of nuclei; pass a label template")
        heads = heads[:1]  # without the phantom
    normalize = NORMALIZATIONS[shown.normalization]
    return SimulatedMaps(heads, view, seed=seed, classes_of=classes_of, normalize=normalize, device=device)


def simulated_magnitudes(template: Path | None, *, seed: int) -> SimulatedMagnitudes:
    """Return the simulated magnitudes for training the brain mask."""
    labels = phantom_labels() if template is None else read_template(template)
    return SimulatedMagnitudes(prepare_whole_head(labels), seed, NORMALIZATIONS[BRAIN_MASK.input.normalization])


def training_heads(template: LabelMap | None) -> list[tuple[LabelMap, float]]:
    """Return the anatomies of training and their frequencies: the label template, if there is one, and the phantom."""
    phantom = phantom_head()
    if template is None:
        return [(phantom, 1.0)]
    return [(template, 1 - PHANTOM_FRACTION), (phantom, PHANTOM_FRACTION)]


def mix_in_typical_maps(maps: SimulatedMaps, model: Model) -> SimulatedMaps:
    """Replace every third sample by a typical map of the size that the network gets at inference."""
    view = maps.view
    shape = shape_to_cover(model.input.patch_mm, (view.spacing_mm,) * 3)
    # As many nuclei are cut off as in a smaller view.
    beyond_mm = (shape[2] - view.shape[2]) * view.spacing_mm / 2
    below_mm, above_mm = (cut_mm + beyond_mm for cut_mm in view.cut_mm)
    larger = replace(view, shape=shape, cut_mm=(below_mm, above_mm))
    return replace(maps, typical=typical_view(larger, TYPICAL_WIDTH))


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
    dataset: Path,
    model: Model,
    *,
    weights: Path | None,
    localizer: Path | None,
    device: str,
    ensemble: bool = False,
    log: Log,
) -> pd.DataFrame:
    """Segment every labelled map of a dataset and compute the Dice of whole nuclei.

    `weights` and `localizer` are the folders of the segmenter and of the localizer; None for those in the package.
    Returns the columns of `dice`, scan and seconds, one row per scan and nucleus that is labelled in it. InputError if
    the dataset has no labelled maps.
    """
    tables = []
    whole = model.with_whole_nuclei()
    for one in read_labelled_maps(dataset, whole, warn=log.log, progress=log.update):
        started = time.perf_counter()
        location = localize(one.chi, model, weights=localizer, device=device)
        found = segment_map(one.chi, model, weights=weights, device=device, ensemble=ensemble, location=location).labels
        seconds = time.perf_counter() - started
        known = [whole.structures[channel - 1] for channel in one.channels]
        table = dice(manual_labels(one, whole), join_parts(found), structures=known)
        tables.append(table.assign(scan=one.name, seconds=seconds))
    return pd.concat(tables)
