"""``dgmseg simulate``: labelled datasets of simulated maps."""

from __future__ import annotations

import argparse
from pathlib import Path

from bids_dgmseg.cli.options import seed
from bids_dgmseg.errors import InputError

HELP = "write a labelled BIDS dataset of simulated susceptibility maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to write; must be new or empty")
    parser.add_argument(
        "--scans", type=_positive_count, required=True, metavar="N", help="number of participants, one scan each"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="the same seed gives the same maps (default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="TEMPLATE",
        help="label template, as `dgmseg template` writes it (default: the phantom's anatomy)",
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
        help="write magnitude and phase of four gradient echoes in the place of each map",
    )


def run(args: argparse.Namespace) -> int:
    """Write the dataset."""
    if args.labels is not None and not args.labels.is_file():
        raise InputError(f"{args.labels}: no such label template; make one with `dgmseg template`")
    from bids_dgmseg.simulate.dataset import simulate_dataset

    scans = simulate_dataset(
        args.dir.absolute(),
        n_scans=args.scans,
        seed=args.seed,
        template=args.labels,
        spacing_mm=args.spacing_mm,
        echoes=args.echoes,
    )
    for scan in scans:
        print(scan, flush=True)
    return 0


def _positive_count(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 99_999:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of scans from 1 to 99999")


def _spacing_mm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0.4 <= value <= 4:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a voxel size in mm from 0.4 to 4")
