"""``dgmseg finetune``: fine-tune the default model on labelled maps."""

from __future__ import annotations

import argparse
import math

from bids_dgmseg.cli import training_options as shared
from bids_dgmseg.cli.options import positive_float, positive_int
from bids_dgmseg.cli.training_options import AFTER_INTERRUPT as AFTER_INTERRUPT
from bids_dgmseg.console import StatusLine

HELP = "fine-tune the default model on labelled maps; OUT is a folder for --weights"

_MINUTES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    shared.add_positionals(
        parser, models="default", source="BIDS dataset of maps with manual labels (_dseg, in it or its derivatives)"
    )
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=positive_float,
        help=f"training time (default: {_MINUTES:g}); with --steps, time until the run stops (the same command "
        "resumes it)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive_int, help="training length in steps, for reproducible results"
    )
    parser.add_argument(
        "--from", metavar="FOLDER", dest="start", help="starting weights (default: those that ship with the model)"
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=positive_float,
        default=5e-4,
        help="maximum learning rate (default: %(default)g)",
    )
    shared.add_holdout_option(parser, purpose="participants to evaluate only, not to train on")
    shared.add_label_options(parser)
    shared.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Fine-tune, and print the Dice before and after."""
    model = shared.find_model(args.model, "finetune")
    dataset = shared.check_dataset(args.dataset)
    from bids_dgmseg.report.learning_curve import write_learning_curve
    from bids_dgmseg.train.finetune import FineTuning, FineTuningRequest, finetune, summarize

    training = FineTuning(
        minutes=args.minutes or (math.inf if args.steps else _MINUTES),
        steps=args.steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        device=args.device,
        workers=args.workers,
    )
    request = FineTuningRequest(
        model,
        dataset,
        args.out.absolute(),
        shared.find_start(model, args.start),
        training,
        tuple(args.holdout),
        tuple(args.derivatives),
        tuple(args.choose),
    )
    with StatusLine() as line:
        outcome, table = finetune(request, log=line)
    write_learning_curve(args.out / "segmenter_curve.tsv")
    print(summarize(table))
    print(f"step {outcome.step}, sha256 {outcome.sha256}; Dice of each scan in {args.out.name}/dice.tsv")
    print(f"use it with bids_dgmseg --weights {args.out}" if outcome.done else "run the same command again to continue")
    return 0
