"""``dgmseg train-simulated``: train the default model on maps that are simulated during training."""

from __future__ import annotations

import argparse
from pathlib import Path

from bids_dgmseg.cli import training_options as shared
from bids_dgmseg.cli.options import absolute_path, non_negative_int, positive_float, positive_int
from bids_dgmseg.cli.training_options import AFTER_INTERRUPT as AFTER_INTERRUPT
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model, weights_folder

HELP = "train the default model on simulated maps; OUT is a folder for --weights"

_STEPS, _CALIBRATION_MAPS = 4500, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    shared.add_positionals(
        parser,
        models="default",
        metavar="TEMPLATE",
        source="label template (.nii.gz, see `dgmseg template`) to simulate maps from, or `phantom` for the analytic "
        "phantom",
    )
    parser.add_argument(
        "--part",
        choices=("localizer", "segmenter", "calibration"),
        default="segmenter",
        help="which of the two networks to train, or calibration: fit the temperatures and biases of the trained "
        "segmenter in OUT (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=positive_int,
        help=f"length of the whole training (default: {_STEPS}); with --part calibration the number of maps "
        f"(default: {_CALIBRATION_MAPS})",
    )
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=positive_float,
        default=60.0,
        help="time until the run stops; the same command resumes the training (default: %(default)g)",
    )
    parser.add_argument(
        "--from",
        metavar="FOLDER",
        dest="start",
        help="initialize with these weights; `default` for the shipped ones (default: random initialization)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=positive_float,
        default=2e-3,
        help="maximum learning rate (default: %(default)g)",
    )
    parser.add_argument(
        "--loss",
        choices=("cross-entropy", "focal"),
        default="cross-entropy",
        help="loss that is added to Dice (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-maps",
        metavar="N",
        type=non_negative_int,
        default=10,
        help="number of fixed simulated maps for validation, every ten minutes and at the end (default: %(default)s)",
    )
    parser.add_argument(
        "--external-validation",
        metavar="DATASET",
        type=absolute_path,
        help="labelled BIDS dataset on which the segmenter is evaluated at the end; not used for training",
    )
    shared.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train one network for a while, or calibrate the segmenter."""
    model = shared.find_model(args.model, "train-simulated")
    if str(args.dataset) == "phantom":
        template = None
    elif args.dataset.is_file():
        template = args.dataset
    else:
        raise InputError(
            f"{args.dataset}: no such label template; create one with `dgmseg template`, pass `phantom`, or train on "
            "labelled maps with `dgmseg finetune`"
        )
    if args.external_validation and args.part != "segmenter":
        raise InputError(f"--external-validation: only evaluates the segmenter; omit it with --part {args.part}")
    return _calibrate(model, template, args) if args.part == "calibration" else _train(model, template, args)


def _calibrate(model: Model, template: Path | None, args: argparse.Namespace) -> int:
    from bids_dgmseg.train.calibration import calibrate

    n_maps = args.steps or _CALIBRATION_MAPS
    calibrate(model, template, args.out, n_maps=n_maps, seed=args.seed, device=args.device, log=StatusLine().log)
    print(f"temperatures in {args.out.name}/model.toml, biases in {args.out.name}/segmenter.safetensors")
    return 0


def _train(model: Model, template: Path | None, args: argparse.Namespace) -> int:
    from bids_dgmseg.report.learning_curve import write_learning_curve
    from bids_dgmseg.train.simulated import TrainingConfig, train_on_simulations
    from bids_dgmseg.train.validation import evaluate_on_dataset

    steps = args.steps or _STEPS
    start = None if args.start is None else shared.find_start(model, args.start) or weights_folder(model)
    config = TrainingConfig(
        args.part,
        steps,
        args.minutes,
        args.seed,
        args.device,
        args.workers,
        args.learning_rate,
        args.validation_maps,
        start,
        args.loss,
    )
    with StatusLine() as line:
        outcome = train_on_simulations(model, template, args.out, config, log=line)
        if args.external_validation:
            evaluate_on_dataset(
                model, args.external_validation, args.out, step=outcome.step, device=args.device, log=line
            )
    write_learning_curve(args.out / f"{args.part}_curve.tsv")
    print(f"{args.part}: step {outcome.step} of {steps}, sha256 {outcome.sha256}")
    if not outcome.done:
        print("run the same command again to continue")
    return 0
