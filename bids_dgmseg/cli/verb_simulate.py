"""``dgmseg demo`` and ``dgmseg simulate``: simulated datasets."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from bids_dgmseg.arguments import absolute_path, number, seed
from bids_dgmseg.cli.options import Verb, option
from bids_dgmseg.errors import InputError

NEW_FOLDER = option(
    "DIR",
    "folder to create; new or empty (a command that was interrupted is continued by repeating it)",
    absolute_path,
)


def write_demo_dataset(args: argparse.Namespace) -> int:
    """Write a small dataset and print how to process it."""
    from bids_dgmseg.phantom.demo import write_demo

    for scan in write_demo(args.dir):
        print(scan, flush=True)
    print(f"next: bids_dgmseg {shlex.join([str(args.dir), f'{args.dir}-out'])} participant")
    return 0


def write_simulated_dataset(args: argparse.Namespace) -> int:
    """Write a dataset of simulated maps."""
    if args.labels is not None and not args.labels.is_file():
        raise InputError(f"{args.labels}: no such label template; build one with workflows/make_template")
    from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset

    scans = simulate_dataset(
        args.dir,
        n_scans=args.scans,
        seed=args.seed,
        template=args.labels,
        spacing_mm=args.spacing_mm,
        echoes=args.echoes,
        typical=args.typical,
    )
    for scan in scans:
        print(scan, flush=True)
    return 0


VERBS = (
    Verb(
        "demo",
        "write a small BIDS study of phantoms with their true labels and values",
        write_demo_dataset,
        [NEW_FOLDER],
    ),
    Verb(
        "simulate",
        "write a labelled BIDS dataset of simulated susceptibility maps",
        write_simulated_dataset,
        [
            NEW_FOLDER,
            option(
                "--scans N",
                "number of participants, one scan per participant",
                partial(number, low=1, high=99_999, expected="an integer from 1 to 99999"),
                required=True,
            ),
            option("--seed S", "the same seed gives the same maps (default: %(default)s)", seed, default=0),
            option(
                "--labels TEMPLATE",
                "label template from workflows/make_template (default: the anatomy of the phantom)",
                Path,
            ),
            option(
                "--spacing-mm MM",
                "voxel size in mm, 0.4 to 4 (default: %(default)g)",
                partial(number, convert=float, low=0.4, high=4, expected="a voxel size from 0.4 to 4 mm"),
                default=1.0,
            ),
            option("--echoes", "write multi-echo GRE (magnitude and phase of four echoes) instead of chi maps"),
            option(
                "--typical",
                "typical 3 T scans of healthy subjects only: the middle half of the ranges of age, artefacts and "
                "reconstruction, half the rotations, no slices thicker than the voxels",
            ),
        ],
    ),
)
