"""Train the default model's two networks on maps simulated during training.

Each sample is a new map, so that the Dice in the learning curve is that of unseen maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import shape_to_cover
from bids_dgmseg.io.files import sha256
from bids_dgmseg.lab.simulate.anatomy import LabelMap
from bids_dgmseg.lab.simulate.sample import (
    LOCALIZER_VIEW,
    SEGMENTER_VIEW,
    TYPICAL_WIDTH,
    View,
    class_labels,
    draw_sample,
    missing_classes,
    phantom_head,
    read_training_head,
    region_labels,
    typical_view,
)
from bids_dgmseg.lab.simulate.template import read_template
from bids_dgmseg.lab.train.core import Run, Samples, State, StepSchedule, read_checkpoint, use_all_cores
from bids_dgmseg.lab.train.frame import CHECKPOINT, Log, Outcome, TrainingRequest, check_record, fit
from bids_dgmseg.lab.train.losses import DiceCrossEntropyLoss
from bids_dgmseg.models.model_folder import (
    load_weights,
    localizer_network,
    pick_device,
    read_model_folder,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import NORMALIZATIONS

STEPS = 4500
"""Length of a training by default."""

PHANTOM_FRACTION = 0.15
"""Fraction of the samples that show the ellipsoids of the phantom instead of the template."""

TYPICAL_EVERY = 3
"""Every third sample of the segmenter's training is a typical map: it gains more from rare ones, but few are rare."""


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
        """Simulate sample `index`: input (1, X, Y, Z) and classes (X, Y, Z), those of most of each scan's voxel."""
        view = self.view if self.typical is None or index % TYPICAL_EVERY else self.typical
        with one_thread():
            chi, labels, grid = draw_sample(self._heads, view, self.seed * 10_000_000 + index)
            classes = grid.majority(self.classes_of(labels))
        return torch.from_numpy(self.normalize(chi.cpu().numpy()))[None], classes.cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: sums then have the same order in a worker process and here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_on_simulations(request: TrainingRequest, *, log: Log, samples: Samples | None = None) -> Outcome:
    """Train one network of a model for a limited time; resume the training in ``OUT``.

    ``OUT`` gets the weights ``PART.safetensors`` and a folder ``PART`` with checkpoint and learning curve. `samples`
    replace the maps of the model.
    """
    model, part, out = request.model, request.part, request.out
    use_all_cores()
    torch.manual_seed(request.seed)
    device = pick_device(request.device)
    network = localizer_network(model) if part == "localizer" else segmenter_network(model)
    if request.start is not None:
        network = load_weights(network, model, part, request.start).requires_grad_(True)
    maps = samples or simulated_maps(model, request.template, part, seed=request.seed, device=device)
    run = Run(
        StepSchedule(steps=request.steps or STEPS, learning_rate=request.learning_rate or StepSchedule.learning_rate),
        DiceCrossEntropyLoss(),
        out / part / CHECKPOINT,
        model.localizer.labels if part == "localizer" else model.classes,
        seed=request.seed,
        device=device,
        workers=request.workers,
        minutes=math.inf if request.minutes is None else request.minutes,
        checkpoint_minutes=request.checkpoint_minutes,
    )
    record = {
        "model": model.name,
        "part": part,
        "template": None if request.template is None else sha256(request.template),
        "seed": request.seed,
    }
    path = out / f"{part}.safetensors"
    if run.checkpoint.is_file():
        earlier = read_checkpoint(run.checkpoint)
        check_record(out, record, earlier["record"])
        if path.is_file() and earlier["step"] >= (request.steps or STEPS):  # finished, and perhaps calibrated since
            state = State.start(network, run.schedule)
            state.load(run.checkpoint)
            return Outcome(state, True, sha256(path))
    if part == "segmenter" and isinstance(maps, SimulatedMaps):
        maps = mix_in_typical_maps(maps, model)
    outcome = fit(network, maps, run, path, log=log, record=record)
    if part == "segmenter" and (described := read_model_folder(model, out)).temperatures:
        write_model_toml(described, out, about={})
        log.log("the calibration was that of the earlier weights and is removed; calibrate again")
    return outcome


def simulated_maps(
    model: Model, template: Path | None, part: str, *, seed: int, device: str | torch.device = "cpu"
) -> SimulatedMaps:
    """Return the simulated maps for training one network of a model."""
    head = None
    if template is not None:
        labels = read_template(template)
        if part == "segmenter" and (missing := missing_classes(labels, model.labels)):
            raise InputError(
                f"{template.name}: no label of {missing[0]}; create it with workflows/make_template of this version"
            )
        head = read_training_head(template)
    heads = [(phantom_head(), 1.0 if head is None else PHANTOM_FRACTION)]
    if head is not None:
        heads.insert(0, (head, 1 - PHANTOM_FRACTION))
    if part == "localizer" and model.localizer.input is not None:
        view, classes_of, shown = LOCALIZER_VIEW, region_labels, model.localizer.input
    else:
        view, classes_of, shown = SEGMENTER_VIEW, partial(class_labels, classes=model.classes), model.input
    if part == "segmenter" and any(structure.part_of for structure in model.structures):
        if template is None:
            raise InputError(f"{model.name}: the phantom has no parts of nuclei; pass a label template")
        heads = heads[:1]  # without the phantom
    normalize = NORMALIZATIONS[shown.normalization]
    return SimulatedMaps(heads, view, seed=seed, classes_of=classes_of, normalize=normalize, device=device)


def mix_in_typical_maps(maps: SimulatedMaps, model: Model) -> SimulatedMaps:
    """Replace every third sample by a typical map of the size that the network gets at inference."""
    view = maps.view
    shape = shape_to_cover(model.input.patch_mm, (view.spacing_mm,) * 3)
    # As many nuclei are cut off as in a smaller view.
    beyond_mm = (shape[2] - view.shape[2]) * view.spacing_mm / 2
    below_mm, above_mm = (cut_mm + beyond_mm for cut_mm in view.cut_mm)
    larger = replace(view, shape=shape, cut_mm=(below_mm, above_mm))
    return replace(maps, typical=typical_view(larger, TYPICAL_WIDTH))
