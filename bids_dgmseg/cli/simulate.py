"""``dgmseg simulate``: labelled datasets of simulated maps."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from bids_dgmseg.cli.options import absolute_path, seed
from bids_dgmseg.errors import InputError

HELP = "write a labelled BIDS dataset of simulated susceptibility maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("dir", metavar="DIR", type=absolute_path, help="folder to create; must be new or empty")
    parser.add_argument(
        "--scans", type=_n_scans, required=True, metavar="N", help="number of participants, one scan per participant"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="the same seed gives the same maps (default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="TEMPLATE",
        help="label template from `dgmseg template` (default: the anatomy of the phantom)",
    )
    parser.add_argument(
        "--spacing-mm",
        type=_spacing_mm,
        default=1.0,
        metavar="MM",
        help="voxel size in mm, 0.4 to 4 (default: %(default)s)",
    )
    parser.add_argument(
        "--echoes",
        action="store_true",
        help="write multi-echo GRE (magnitude and phase of four echoes) instead of chi maps",
    )


def run(args: argparse.Namespace) -> int:
    """Write the dataset."""
    if args.labels is not None and not args.labels.is_file():
        raise InputError(f"{args.labels}: no such label template; build one with `dgmseg template`")
    from bids_dgmseg.simulate.dataset import simulate_dataset

    scans = simulate_dataset(
        args.dir,
        n_scans=args.scans,
        seed=args.seed,
        template=args.labels,
        spacing_mm=args.spacing_mm,
        echoes=args.echoes,
    )
    for scan in scans:
        print(scan, flush=True)
    return 0


def _n_scans(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 99_999:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 99999")


def _spacing_mm(text: str) -> float:
    with suppress(ValueError):
        if 0.4 <= (value := float(text)) <= 4:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a voxel size from 0.4 to 4 mm")
