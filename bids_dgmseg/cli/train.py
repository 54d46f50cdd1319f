"""``dgmseg train``: train, resume or fine-tune a model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from bids_dgmseg.cli import train_nnunet as _nnunet
from bids_dgmseg.cli import train_recipes as _recipes
from bids_dgmseg.cli.options import (
    LABELLED,
    NNUNET,
    PAPER_MODELS,
    RECIPES,
    SIMULATED,
    absolute_path,
    entity,
    non_negative_int,
    positive_float,
    positive_int,
    refuse_foreign,
    seed,
)
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import ALIASES, MODELS, Model, get_model, weights_folder

HELP = "train, resume or fine-tune a model; OUT becomes a folder for --weights"

AFTER_INTERRUPT = "; run the same command again to go on"

_SIMULATED_MINUTES, _SIMULATED_STEPS = 60.0, 4500

_CALIBRATION_MAPS = 40

_VALIDATION_MAPS = 10

_LABELLED_MINUTES, _LABELLED_RATE = 10.0, 5e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"which model to train: default, {', '.join([*PAPER_MODELS, NNUNET])}"
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        type=Path,
        help="BIDS dataset of maps with manual labels (_dseg, in it or its derivatives) to fine-tune "
        "on; or a label template (.nii.gz, as `dgmseg template` writes it) from which maps are "
        "simulated while training; `phantom` takes the analytic phantom alone",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="model folder; an unfinished training in it is resumed")
    parser.add_argument(
        "--part",
        choices=("localizer", "segmenter", "calibration"),
        default="segmenter",
        help="which of the two networks, or the temperatures and biases of the trained segmenter in "
        "OUT; labelled maps train the segmenter (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=positive_float,
        help="on labelled maps the whole length, unless --steps is given; on simulated maps that of "
        f"this slice (default: {_LABELLED_MINUTES:g} and {_SIMULATED_MINUTES:g})",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        help=f"length of the whole training (default: {_SIMULATED_STEPS} on simulated maps, --minutes "
        f"on labelled ones); number of maps to calibrate on (default: {_CALIBRATION_MAPS})",
    )
    parser.add_argument("--seed", type=seed, default=1, help="of weights and samples (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=non_negative_int, default=1, help="processes that make samples (default: %(default)s)"
    )
    parser.add_argument(
        "--from",
        metavar="FOLDER",
        dest="start",
        help="weights to start from: a folder, or `default`, the model's own (default: those on "
        "labelled maps, random ones on simulated maps)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=positive_float,
        help=f"highest learning rate (default: {_LABELLED_RATE:g} on labelled maps, 0.002 on simulated "
        "ones, or the paper's)",
    )
    simulated = parser.add_argument_group("on simulated maps")
    simulated.add_argument(
        "--validation-maps",
        metavar="N",
        type=non_negative_int,
        help="how many simulated maps, always the same, the averaged weights are tried on every ten "
        f"minutes and at the end (default: {_VALIDATION_MAPS})",
    )
    simulated.add_argument(
        "--loss",
        choices=("cross-entropy", "focal"),
        default="cross-entropy",
        help="what is added to Dice (default: %(default)s)",
    )
    simulated.add_argument(
        "--watch",
        metavar="DATASET",
        type=absolute_path,
        help="labelled BIDS dataset to score after each slice; nothing is learned from it",
    )
    labelled = parser.add_argument_group("on labelled maps")
    labelled.add_argument(
        "--holdout",
        metavar="LABEL",
        nargs="+",
        action="extend",
        default=[],
        type=_label,
        help="participants not to learn from; fine-tuning scores them",
    )
    labelled.add_argument(
        "--derivatives",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        help="derivative datasets with maps or labels (default: all below DATASET/derivatives)",
    )
    labelled.add_argument(
        "--choose",
        metavar="ENTITY",
        nargs="+",
        action="extend",
        default=[],
        type=entity,
        help="where a scan has several segmentations, take those with one of these entities, such as desc-manual",
    )
    _recipes.add_arguments(parser)
    _nnunet.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train one part of a model for a slice of time, or fine-tune it on labelled maps."""
    model = get_model(args.model, option="")
    kind = _kind(model, args.dataset)
    if kind == SIMULATED:
        _check_template(args.dataset)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    refuse_foreign(args, kind, parser)
    if kind in (RECIPES, NNUNET) and not args.dataset.is_dir():
        raise InputError(
            f"{args.dataset}: no such folder; {model.name} learns from a labelled BIDS dataset (make one "
            "with `dgmseg simulate`)"
        )
    return _TRAININGS[kind](model, args)


def _kind(model: Model, dataset: Path) -> str:
    """Choose the training by the model and what it is to learn from."""
    if model.name == NNUNET:
        return NNUNET
    if model.name in PAPER_MODELS:
        return RECIPES
    if not model.network or not model.localizer.network:
        raise InputError(f"{model.name}: has no networks of its own to train; choose default")
    return LABELLED if str(dataset) != "phantom" and dataset.is_dir() else SIMULATED


def _check_template(path: Path) -> None:
    if str(path) != "phantom" and not path.is_file():
        raise InputError(
            f"{path}: no such label template or dataset; give a labelled BIDS dataset, make a template with "
            "`dgmseg template`, or say phantom"
        )


def _train_on_simulations(model: Model, args: argparse.Namespace) -> int:
    if args.watch and args.part != "segmenter":
        raise InputError(f"--watch: labels of nuclei cannot score the {args.part}; leave it out")
    template = None if str(args.dataset) == "phantom" else args.dataset
    if args.part == "calibration":
        from bids_dgmseg.train.calibration import calibrate

        calibrate(
            model,
            template,
            args.out,
            n_maps=args.steps or _CALIBRATION_MAPS,
            seed=args.seed,
            device=args.device,
            say=StatusLine().log,
        )
        print(f"temperatures in {args.out.name}/model.toml, biases in {args.out.name}/segmenter.safetensors")
        return 0
    from bids_dgmseg.train.simulated import Slice, train_on_simulations

    steps = args.steps or _SIMULATED_STEPS
    start = None if args.start is None else _start(model, args.start) or weights_folder(model)
    validation_maps = _VALIDATION_MAPS if args.validation_maps is None else args.validation_maps
    this = Slice(
        args.part,
        steps,
        args.minutes or _SIMULATED_MINUTES,
        args.seed,
        args.device,
        args.workers,
        args.learning_rate or Slice.learning_rate,
        validation_maps,
        start,
        args.loss,
    )
    with StatusLine() as line:
        outcome = train_on_simulations(model, template, args.out, this, say=line.log, show=line.update)
        if args.watch:
            from bids_dgmseg.train.external_validation import watch

            watch(model, args.watch, args.out, step=outcome.step, device=args.device, say=line.log)
    _draw_curve(args)
    print(f"{args.part}: step {outcome.step} of {steps}, sha256 {outcome.sha256}")
    if not outcome.done:
        print("run the same command again to go on")
    return 0


def _fine_tune(model: Model, args: argparse.Namespace) -> int:
    if args.part != "segmenter":
        raise InputError(f"--part {args.part}: labels of nuclei cannot train it; leave --part out")
    from bids_dgmseg.train.finetune import FineTuning
    from bids_dgmseg.train.run_finetuning import Request, run_fine_tuning, summarize

    training = FineTuning(
        minutes=args.minutes or (math.inf if args.steps else _LABELLED_MINUTES),
        steps=args.steps,
        seed=args.seed,
        learning_rate=args.learning_rate or _LABELLED_RATE,
        device=args.device,
        workers=args.workers,
    )
    request = Request(
        model,
        args.dataset.absolute(),
        args.out.absolute(),
        _start(model, args.start),
        training,
        tuple(args.holdout),
        tuple(args.derivatives),
        tuple(args.choose),
    )
    with StatusLine() as line:
        outcome, table = run_fine_tuning(request, say=line.log, show=line.update)
    _draw_curve(args)
    print(summarize(table))
    print(f"step {outcome.step}, sha256 {outcome.sha256}; scores of each scan in {args.out.name}/dice.tsv")
    again = "run the same command again to go on"
    print(f"use them with bids_dgmseg --weights {args.out}" if outcome.done else again)
    return 0


def _start(model: Model, name: str | None) -> Path | None:
    """Give the folder of the starting weights, None for the model's own."""
    if name is None or ALIASES.get(name, name) == model.name:
        return None
    if name in MODELS:
        raise InputError(f"--from {name}: its network is not that of {model.name}; give {model.name} or a folder")
    folder = absolute_path(name)
    if not folder.is_dir():
        raise InputError(f"--from {name}: no such folder or model; give {model.name} or a folder of its weights")
    return folder


def _draw_curve(args: argparse.Namespace) -> None:
    from bids_dgmseg.report.learning_curve import draw_curve

    draw_curve(args.out / f"{args.part}_curve.tsv")


def _label(text: str) -> str:
    return text.removeprefix("sub-")


_TRAININGS: Mapping[str, Callable[[Model, argparse.Namespace], int]] = {
    SIMULATED: _train_on_simulations,
    LABELLED: _fine_tune,
    RECIPES: _recipes.run,
    NNUNET: _nnunet.run,
}
