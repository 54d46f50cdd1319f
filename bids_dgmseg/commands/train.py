"""``dgmseg train``: train or resume a model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.errors import InputError
from bids_dgmseg.models import Model, get_model

if TYPE_CHECKING:
    from torch import Tensor

HELP = "train or resume a model; OUT becomes a folder for --weights"
_PRINT_EVERY = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("model", metavar="MODEL", help="which model to train: default")
    parser.add_argument("dataset", metavar="TEMPLATE", type=Path,
                        help="label template (.nii.gz, as `dgmseg template` writes it) from which maps are simulated "
                             "while training; `phantom` takes the analytic phantom alone")  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="model folder; an unfinished training in it is resumed")
    parser.add_argument("--part", choices=("localizer", "segmenter"), default="segmenter",
                        help="which of the two networks (default: %(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60.0, help="length of this slice (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="length of the whole training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train one part of a model for a slice of time."""
    import torch

    from bids_dgmseg.segment.weights import (
        localizer_network,
        pick_device,
        save_weights,
        segmenter_network,
        to_channels_last,
    )
    from bids_dgmseg.training.loop import Progress, Schedule, train, use_cores

    model, device = get_model(args.model), pick_device(args.device)
    use_cores()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    network = localizer_network(model) if args.part == "localizer" else segmenter_network(model)
    schedule = Schedule(steps=args.steps)
    progress = Progress.start(to_channels_last(network, device), schedule)
    checkpoint = args.out / f"{args.part}_checkpoint.pt"
    if checkpoint.is_file():
        progress.load(checkpoint)
    curve = Curve(args.out / f"{args.part}_curve.tsv", _classes(model, args.part))
    done = train(progress, _samples(model, args), schedule=schedule, checkpoint=checkpoint, minutes=args.minutes,
                 device=device, report=curve.add, workers=args.workers)  # fmt: skip
    checksum = save_weights(progress.average, args.out / f"{args.part}.safetensors")
    print(f"{args.part}: step {progress.step} of {args.steps}, sha256 {checksum}")
    if not done:
        print("run the same command again to go on")
    return 0


def _classes(model: Model, part: str) -> tuple[str, ...]:
    return model.localizer.labels if part == "localizer" else model.labels


def _samples(model: Model, args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import numpy as np

    from bids_dgmseg.images.volume import Volume
    from bids_dgmseg.segment.normalize import NORMALIZATIONS
    from bids_dgmseg.simulate import sample
    from bids_dgmseg.training.sampling import SimulatedMaps, training_heads

    if str(args.dataset) != "phantom" and not args.dataset.is_file():
        raise InputError(f"{args.dataset}: no such label template; make one with `dgmseg template`, or say phantom")
    template = None if str(args.dataset) == "phantom" else Volume.read(args.dataset, np.uint8)
    localizer = args.part == "localizer"
    shown = model.localizer.input if localizer and model.localizer.input else model.input
    return SimulatedMaps(
        training_heads(template), sample.LOCALIZER_VIEW if localizer else sample.SEGMENTER_VIEW, seed=args.seed,
        classes_of=sample.region_labels if localizer else sample.nuclei_labels,
        normalize=NORMALIZATIONS[shown.normalization],
    )  # fmt: skip


class Curve:
    """Write the learning curve as TSV, averaged over some steps, and print it."""

    def __init__(self, path: Path, classes: tuple[str, ...]) -> None:
        self.path, self.classes = path, classes
        self.rows: list[tuple[float, Tensor]] = []
        self.started = time.monotonic()
        if not path.is_file():
            path.write_text("\t".join(["step", "seconds", "loss", *classes]) + "\n", encoding="utf-8")

    def add(self, step: int, loss: float, dice: Tensor) -> None:
        """Take one step's figures; each map is new, so its Dice is that of an unseen map."""
        import torch

        self.rows.append((loss, dice))
        if (step + 1) % _PRINT_EVERY:
            return
        mean_loss = sum(loss for loss, _ in self.rows) / len(self.rows)
        mean_dice = torch.stack([dice for _, dice in self.rows]).nanmean(dim=0).tolist()
        seconds = time.monotonic() - self.started
        row = [str(step + 1), f"{seconds:.0f}", f"{mean_loss:.4f}", *(f"{value:.3f}" for value in mean_dice)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join(row) + "\n")
        print(f"step {step + 1}, {seconds:.0f} s, loss {mean_loss:.3f}, Dice "
              + " ".join(f"{name} {value:.2f}" for name, value in zip(self.classes, mean_dice, strict=True)),
              flush=True)  # fmt: skip
        self.rows.clear()
