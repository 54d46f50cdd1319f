"""``dgmseg train-nnunet``: train the two nnU-Nets of nnunet2step on labelled maps."""

from __future__ import annotations

import argparse

from bids_dgmseg.cli import training_options as shared
from bids_dgmseg.cli.options import positive_float, positive_int
from bids_dgmseg.cli.training_options import AFTER_INTERRUPT as AFTER_INTERRUPT
from bids_dgmseg.console import StatusLine
from bids_dgmseg.models.nnunet_folder import STEPS

HELP = "train the two nnU-Nets of nnunet2step on labelled maps; OUT is a folder for --weights"

PLANS = ("paper", "small")
"""Those of `bids_dgmseg.train.nnunet.data.PlanName`; importing it takes time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    shared.add_positionals(
        parser,
        models=shared.NNUNET,
        source="BIDS dataset of maps with labels of the dentate nuclei (_dseg) and, if available, masks of the "
        "cerebellum (label-cerebellum_mask)",
    )
    parser.add_argument("--step", choices=STEPS, help="train only one of the two nnU-Nets (default: both)")
    parser.add_argument(
        "--plan",
        choices=PLANS,
        default="paper",
        help="paper: 0.86 mm voxels and nnU-Net's own filters and patches, for a GPU; small: weights below 10 MB in "
        "total, for a CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=positive_int,
        default=5000,
        help="epochs of 50 steps per net (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", metavar="M", type=positive_float, help="time limit, for both nets together (default: none)"
    )
    shared.add_label_options(parser)
    shared.add_checkpoint_option(parser)
    shared.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train one net or both, and print the mean Dice on the test set."""
    model = shared.find_model(args.model, "train-nnunet")
    dataset = shared.check_dataset(args.dataset)
    from bids_dgmseg.train.nnunet.data import NnunetTraining
    from bids_dgmseg.train.nnunet.run import NnunetRequest, run_nnunet_training

    steps = (args.step,) if args.step else STEPS
    training = NnunetTraining(
        epochs=args.epochs,
        minutes=args.minutes and args.minutes / len(steps),
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        checkpoint_minutes=args.checkpoint_minutes,
        plan=args.plan,
    )
    request = NnunetRequest(
        model, dataset, args.out.absolute(), steps, training, tuple(args.derivatives), tuple(args.choose)
    )
    with StatusLine() as line:
        outcomes, table = run_nnunet_training(request, log=line)
    for outcome in outcomes:
        print(f"{outcome.folder.name}: {outcome.epochs} epochs, sha256 {outcome.sha256}")
    for name, dice in table.groupby("abbreviation", sort=False)["dice"].mean().items():
        print(f"{name}: mean Dice {dice:.3f} on {table['scan'].nunique()} test scans")
    print(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    return 0
