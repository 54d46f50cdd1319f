"""The part of ``dgmseg train`` that trains nnunet2step."""

from __future__ import annotations

import argparse

from bids_dgmseg.cli.options import NNUNET
from bids_dgmseg.console import StatusLine
from bids_dgmseg.models.label_map import STEPS
from bids_dgmseg.models.registry import Model

EPOCHS = 5000

PLANS = ("paper", "small")
"""Those of `training.nnunet_data.PlanName`; importing it takes time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this training alone."""
    own = parser.add_argument_group(NNUNET)
    own.add_argument(
        "--step",
        choices=STEPS,
        help="train one of the two nnU-Nets (default: both, which share --minutes; --epochs are those of "
        f"each, of 50 steps, by default {EPOCHS})",
    )
    own.add_argument(
        "--plan",
        choices=PLANS,
        default="paper",
        help="size of both: paper has 0.86 mm voxels and nnU-Net's own filters and patches, for a GPU; "
        "small has weights below 10 MB together, for a CPU (default: %(default)s)",
    )


def run(model: Model, args: argparse.Namespace) -> int:
    """Train one step or both, and say how the scans that were kept aside come out."""
    from bids_dgmseg.train.nnunet.data import NnunetTraining
    from bids_dgmseg.train.nnunet.run import NnunetRequest, run_nnunet_training

    steps = (args.step,) if args.step else STEPS
    training = NnunetTraining(
        epochs=args.epochs or EPOCHS,
        minutes=args.minutes and args.minutes / len(steps),
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        checkpoint_minutes=args.checkpoint_minutes,
        plan=args.plan,
    )
    request = NnunetRequest(
        model,
        args.dataset.absolute(),
        args.out.absolute(),
        steps,
        training,
        tuple(args.derivatives),
        tuple(args.choose),
    )
    with StatusLine() as line:
        outcomes, table = run_nnunet_training(request, say=line.log, show=line.update)
    for outcome in outcomes:
        print(f"{outcome.folder.name}: {outcome.epochs} epochs, sha256 {outcome.sha256}")
    for name, dice in table.groupby("abbreviation", sort=False)["dice"].mean().items():
        print(f"{name}: mean Dice {dice:.3f} on {table['scan'].nunique()} scans kept aside")
    print(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    return 0
