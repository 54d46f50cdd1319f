"""``dgmseg demo``: a small example dataset."""

from __future__ import annotations

import argparse
import shlex

from bids_dgmseg.cli.options import absolute_path

HELP = "write a small valid BIDS dataset of phantom maps with their true labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("dir", metavar="DIR", type=absolute_path, help="folder to create; must be new or empty")


def run(args: argparse.Namespace) -> int:
    """Write the dataset."""
    from bids_dgmseg.simulate.demo import write_demo

    for scan in write_demo(args.dir):
        print(scan, flush=True)
    print(f"next: bids_dgmseg {shlex.join([str(args.dir), f'{args.dir}-out'])} participant")
    return 0
