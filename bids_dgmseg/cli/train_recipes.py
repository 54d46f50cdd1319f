"""The part of ``dgmseg train`` that follows the papers' recipes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from bids_dgmseg.cli.options import PAPER_MODELS, absolute_path, non_negative_float, non_negative_int, positive_int
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model, weights_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of trainings by a recipe."""
    recipe = parser.add_argument_group(f"by a paper's recipe ({', '.join(PAPER_MODELS)}), on labelled maps")
    recipe.add_argument(
        "--fold",
        metavar="N",
        type=non_negative_int,
        nargs="+",
        action="extend",
        default=[],
        help="folds to train, counted from 0 (default: all, one after the other)",
    )
    recipe.add_argument(
        "--folds",
        metavar="K",
        type=positive_int,
        help="how many folds the participants are dealt out to, stratified by the column site of "
        "participants.tsv; 1 for none (default: the paper's, 5)",
    )
    recipe.add_argument("--epochs", metavar="N", type=positive_int, help="at most so many (default: the paper's)")
    recipe.add_argument(
        "--scans",
        metavar="N",
        type=positive_int,
        help="learn from so many participants of each fold only (default: all)",
    )
    recipe.add_argument(
        "--variant",
        metavar="NAME",
        default="paper",
        help="another training of the paper: attunet25d has source (two classes on transverse slices, "
        "for --from) and resnet50 (default: %(default)s)",
    )
    recipe.add_argument(
        "--arch",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="arguments of the network, such as attention=false",
    )
    recipe.add_argument(
        "--recipe",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="values of the recipe, such as sampling.step=[9,9,9] or loss.terms.overlap=0",
    )
    recipe.add_argument(
        "--pretrain-on",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        help="results of bids_dgmseg on maps without manual labels: learned before the manual ones; of "
        "several folders the majority counts",
    )
    recipe.add_argument(
        "--distill",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        help="the same, one folder a model, learned together with the manual labels",
    )
    recipe.add_argument(
        "--checkpoint-minutes",
        metavar="M",
        type=non_negative_float,
        default=2.0,
        help="time between checkpoints (default: %(default)s)",
    )


def run(model: Model, args: argparse.Namespace) -> int:
    """Train folds of a model."""
    from bids_dgmseg.train.folds import train_folds

    plan = make_plan(model, args)
    folds = sorted(set(args.fold)) or list(range(plan.recipe.folds))
    if wrong := [fold for fold in folds if fold >= plan.recipe.folds]:
        raise InputError(f"--fold {wrong[0]}: there are folds 0 to {plan.recipe.folds - 1}; see --folds")
    with StatusLine() as line:
        train_folds(plan, folds, say=line.log, show=line.update)
    if tuple(plan.recipe.classes) == model.classes:
        line.log(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    else:
        line.log(f"train on from it with dgmseg train {model.name} DATASET OUT --from {args.out}")
    return 0


def make_plan(model: Model, args: argparse.Namespace) -> Any:
    """Turn the options into a ``pipeline.training.Plan``."""
    from bids_dgmseg.train.folds import Plan
    from bids_dgmseg.train.recipe import changed, read_setting
    from bids_dgmseg.train.recipes import get_recipe

    recipe = get_recipe(model.name, args.variant)
    pace = recipe.pace.shortened(args.epochs) if args.epochs else recipe.pace
    pace = replace(pace, minutes=args.minutes, learning_rate=args.learning_rate or pace.learning_rate)
    recipe = changed(replace(recipe, pace=pace, folds=args.folds or recipe.folds), args.recipe)
    if args.pretrain_on and args.distill:
        raise InputError("--distill: --pretrain-on is given too; choose one of them")
    arch = {**model.arch, **dict(read_setting(text, option="--arch") for text in args.arch)}
    return Plan(
        replace(model, arch=_of_network(arch, recipe.network, args.arch)),
        recipe,
        args.dataset.absolute(),
        args.out.absolute(),
        args.seed,
        args.device,
        args.workers,
        args.scans,
        _start(model, args.start),
        tuple(args.pretrain_on),
        tuple(args.distill),
        tuple(args.holdout),
        tuple(args.derivatives),
        tuple(args.choose),
        args.checkpoint_minutes,
    )


def _of_network(arch: dict[str, Any], network: str, given: list[str]) -> dict[str, Any]:
    """Leave the registry's arguments out for a variant's network that is another one."""
    names = {text.partition("=")[0] for text in given}
    return {name: value for name, value in arch.items() if not network or name in names}


def _start(model: Model, name: str | None) -> Path | None:
    if name is None:
        return None
    path = absolute_path(name)
    if name == "default" or (name == model.name and not path.exists()):  # OUT of an own training may be called so
        path = weights_folder(model)
    if not path.exists():
        raise InputError(
            f"--from {name}: no such folder or file; give a model folder, default for the model's own, or weights of "
            "ResNet-50"
        )
    return path
