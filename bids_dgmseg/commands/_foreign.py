"""Which options of ``dgmseg train`` are for which trainings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from bids_dgmseg.errors import InputError

PAPER_MODELS = ("dcnnet", "attunet25d", "deepqsmseg")
"""Those that `training.recipes` has; importing them loads torch."""
NNUNET = "nnunet2step"
SIMULATED, LABELLED, RECIPES = "default on simulated maps", "default on labelled maps", ", ".join(PAPER_MODELS)
"""The kinds of training beside `NNUNET`, as messages name them."""

_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("watch", "validation_maps", "loss"), (SIMULATED,)),
    **dict.fromkeys(("part", "steps"), (SIMULATED, LABELLED)),
    **dict.fromkeys(("start", "learning_rate"), (SIMULATED, LABELLED, RECIPES)),
    "holdout": (LABELLED, RECIPES),
    **dict.fromkeys(("derivatives", "choose"), (LABELLED, RECIPES, NNUNET)),
    **dict.fromkeys(("fold", "folds", "scans", "variant", "arch", "recipe", "pretrain_on", "distill"), (RECIPES,)),
    **dict.fromkeys(("epochs", "checkpoint_minutes"), (RECIPES, NNUNET)),
    **dict.fromkeys(("step", "plan"), (NNUNET,)),
}
"""Options that not all kinds have, by their names in the parsed arguments."""


def refuse_foreign(args: argparse.Namespace, kind: str, parser: argparse.ArgumentParser) -> None:
    """Refuse options of other kinds of training.

    Parameters
    ----------
    args : Namespace
        As given.
    kind : str
        Of the training that is asked for.
    parser : ArgumentParser
        Knows what options are when they are not given.

    Raises
    ------
    InputError
        Naming the first one.
    """
    for name, kinds in _KINDS.items():
        if kind not in kinds and getattr(args, name) != parser.get_default(name):
            option = "from" if name == "start" else name.replace("_", "-")
            raise InputError(f"--{option}: is for {'; '.join(kinds)}; not for {kind}, so leave it out")
