"""``dgmseg train``: train or resume a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from bids_dgmseg.errors import InputError
from bids_dgmseg.models import get_model

HELP = "train or resume a model; OUT becomes a folder for --weights"


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
    parser.add_argument("--steps", type=int, default=4500, help="length of the whole training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and samples (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where to compute (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train one part of a model for a slice of time."""
    model = get_model(args.model)
    if not model.network or not model.localizer.network:
        raise InputError(f"{model.name}: has no networks of its own to train; choose default")
    template = None if str(args.dataset) == "phantom" else args.dataset
    if template and not template.is_file():
        raise InputError(f"{template}: no such label template; make one with `dgmseg template`, or say phantom")
    from bids_dgmseg.training.simulated import Slice, train_on_simulations

    this = Slice(args.part, args.steps, args.minutes, args.seed, args.device, args.workers)
    outcome = train_on_simulations(model, template, args.out, this, say=lambda line: print(line, flush=True))
    print(f"{args.part}: step {outcome.step} of {args.steps}, sha256 {outcome.sha256}")
    if not outcome.done:
        print("run the same command again to go on")
    return 0
