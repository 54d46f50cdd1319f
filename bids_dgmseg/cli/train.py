"""``dgmseg train``: train a published network on labelled maps, as its paper describes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.cli import training_options as shared
from bids_dgmseg.cli.options import absolute_path, non_negative_int, positive_float, positive_int
from bids_dgmseg.cli.training_options import AFTER_INTERRUPT as AFTER_INTERRUPT
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model, weights_folder

if TYPE_CHECKING:
    from bids_dgmseg.train.folds import RecipeTraining

HELP = "train a published network (dcnnet, attunet25d, deepqsmseg) on labelled maps; OUT is a folder for --weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    shared.add_positionals(
        parser, models=", ".join(shared.PAPER_MODELS), source="BIDS dataset of maps with labels (_dseg)"
    )
    parser.add_argument(
        "--folds",
        metavar="K",
        type=positive_int,
        help="number of folds, stratified by the column site of participants.tsv; 1 trains on all participants "
        "(default: the paper's, 5)",
    )
    parser.add_argument(
        "--fold",
        metavar="N",
        type=non_negative_int,
        nargs="+",
        action="extend",
        default=[],
        help="train only these folds, counted from 0 (default: all, one after the other)",
    )
    parser.add_argument("--epochs", metavar="N", type=positive_int, help="maximum epochs (default: the paper's)")
    parser.add_argument("--minutes", metavar="M", type=positive_float, help="time limit per fold (default: none)")
    parser.add_argument("--learning-rate", metavar="RATE", type=positive_float, help="default: the paper's")
    parser.add_argument(
        "--from", metavar="FOLDER", dest="start", help="initialize with these weights (default: random initialization)"
    )
    parser.add_argument(
        "--scans", metavar="N", type=positive_int, help="use only N training participants per fold (default: all)"
    )
    shared.add_holdout_option(parser, purpose="participants to leave out entirely")
    shared.add_label_options(parser)
    parser.add_argument(
        "--variant",
        metavar="NAME",
        default="paper",
        help="another training described in the paper: attunet25d has source (two classes on axial slices, for --from) "
        "and resnet50 (default: %(default)s)",
    )
    for option, what in (
        ("--arch", "arguments of the network, such as attention=false"),
        ("--recipe", "values of the recipe, such as sampling.step=[9,9,9] or loss.terms.overlap=0"),
    ):
        parser.add_argument(option, metavar="KEY=VALUE", nargs="+", action="extend", default=[], help=what)
    pseudo_labels = parser.add_mutually_exclusive_group()
    for option, what in (
        ("--pretrain-on", "train on them before the manual labels; several folders are fused by majority vote"),
        ("--distill", "train on them together with the manual labels; one folder per model"),
    ):
        pseudo_labels.add_argument(
            option,
            metavar="FOLDER",
            nargs="+",
            action="extend",
            default=[],
            type=absolute_path,
            help=f"output of bids_dgmseg for maps without manual labels: {what}",
        )
    shared.add_checkpoint_option(parser)
    shared.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train folds of a model."""
    model = shared.find_model(args.model, "train")
    shared.check_dataset(args.dataset)
    from bids_dgmseg.train.folds import train_folds

    training = make_training(model, args)
    folds = sorted(set(args.fold)) or list(range(training.recipe.folds))
    if wrong := [fold for fold in folds if fold >= training.recipe.folds]:
        raise InputError(f"--fold {wrong[0]}: choose from 0 to {training.recipe.folds - 1}, or change --folds")
    with StatusLine() as line:
        train_folds(training, folds, log=line)
    if tuple(training.recipe.classes) == model.classes:
        line.log(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    else:
        line.log(f"continue with dgmseg train {model.name} DATASET OUT --from {args.out}")
    return 0


def make_training(model: Model, args: argparse.Namespace) -> RecipeTraining:
    """Return the training that the options describe."""
    from bids_dgmseg.train.folds import RecipeTraining
    from bids_dgmseg.train.learner import RuntimeOptions
    from bids_dgmseg.train.recipe import override, read_setting
    from bids_dgmseg.train.recipes import get_recipe

    recipe = get_recipe(model.name, args.variant)
    pace = recipe.pace.shortened(args.epochs) if args.epochs else recipe.pace
    pace = replace(pace, minutes=args.minutes, learning_rate=args.learning_rate or pace.learning_rate)
    recipe = override(replace(recipe, pace=pace, folds=args.folds or recipe.folds), args.recipe)
    given = dict(read_setting(text, option="--arch") for text in args.arch)
    # The registry's arguments belong to the model's own network, not to that of another variant.
    arch: dict[str, Any] = given if recipe.network else {**model.arch, **given}
    return RecipeTraining(
        replace(model, arch=arch),
        recipe,
        args.dataset.absolute(),
        args.out.absolute(),
        RuntimeOptions(args.seed, args.device, args.workers, args.checkpoint_minutes),
        args.scans,
        _find_start(model, args.start),
        tuple(args.pretrain_on),
        tuple(args.distill),
        tuple(args.holdout),
        tuple(args.derivatives),
        tuple(args.choose),
    )


def _find_start(model: Model, name: str | None) -> Path | None:
    if name is None:
        return None
    path = absolute_path(name)
    if name == "default" or (name == model.name and not path.exists()):  # an OUT folder may have the model's name
        path = weights_folder(model)
    if not path.exists():
        raise InputError(
            f"--from {name}: no such folder or file; pass a model folder, default for the shipped weights, or weights "
            "of ResNet-50"
        )
    return path
