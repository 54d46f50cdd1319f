"""Options and checks that the training verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from bids_dgmseg.cli.options import absolute_path, entity, non_negative_float, non_negative_int, participant_label, seed
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import ALIASES, MODELS, Model, get_model

AFTER_INTERRUPT = "; run the same command again to resume"

PAPER_MODELS = ("dcnnet", "attunet25d", "deepqsmseg")
"""The keys of `bids_dgmseg.train.recipes.RECIPES`; importing that package loads torch."""

NNUNET = "nnunet2step"


def add_positionals(parser: argparse.ArgumentParser, *, models: str, source: str, metavar: str = "DATASET") -> None:
    """Declare MODEL, DATASET (or TEMPLATE) and OUT."""
    parser.add_argument("model", metavar="MODEL", help=models)
    parser.add_argument("dataset", metavar=metavar, type=Path, help=source)
    parser.add_argument("out", metavar="OUT", type=Path, help="model folder; an unfinished training in it is resumed")


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Declare seed, device and worker processes."""
    parser.add_argument(
        "--seed", metavar="S", type=seed, default=1, help="seed of initial weights and samples (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device for the network (default: %(default)s, a GPU if there is one)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=non_negative_int,
        default=1,
        help="sampling processes (default: %(default)s)",
    )


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Declare where labels lie and which to use."""
    parser.add_argument(
        "--derivatives",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        help="derivative datasets with maps or labels (default: all in DATASET/derivatives)",
    )
    parser.add_argument(
        "--choose",
        metavar="ENTITY",
        nargs="+",
        action="extend",
        default=[],
        type=entity,
        help="if a scan has several segmentations, use the one with this entity, such as desc-manual",
    )


def add_holdout_option(parser: argparse.ArgumentParser, *, purpose: str) -> None:
    """Declare ``--holdout``."""
    parser.add_argument(
        "--holdout",
        metavar="LABEL",
        nargs="+",
        action="extend",
        default=[],
        type=participant_label,
        help=purpose,
    )


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--checkpoint-minutes``."""
    parser.add_argument(
        "--checkpoint-minutes",
        metavar="M",
        type=non_negative_float,
        default=2.0,
        help="time between checkpoints (default: %(default)s)",
    )


def find_model(name: str, verb: str) -> Model:
    """Look up a model and check that this verb trains it.

    Raises
    ------
    InputError
        If the model is unknown or trained by another verb.
    """
    model = get_model(name, option="")
    if model.name in PAPER_MODELS:
        verbs = ["train"]
    elif model.name == NNUNET:
        verbs = ["train-nnunet"]
    elif model.network and model.localizer.network:
        verbs = ["finetune", "train-simulated"]
    else:
        raise InputError(f"{model.name}: this model cannot be trained; choose another one")
    if verb not in verbs:
        raise InputError(f"{model.name}: not trained by dgmseg {verb}; use dgmseg {' or dgmseg '.join(verbs)}")
    return model


def check_dataset(path: Path) -> Path:
    """Return the absolute path of an existing dataset folder."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; pass the root directory of a labelled BIDS dataset")
    return path.absolute()


def find_start(model: Model, name: str | None) -> Path | None:
    """Return the folder of the starting weights; None for the weights that ship with the model."""
    if name is None or ALIASES.get(name, name) == model.name:
        return None
    if name in MODELS:
        raise InputError(f"--from {name}: its network differs from that of {model.name}; pass {model.name} or a folder")
    folder = absolute_path(name)
    if not folder.is_dir():
        raise InputError(f"--from {name}: no such folder or model; pass {model.name} or a folder with its weights")
    return folder
