"""``dgmseg demo``: a small dataset to try the program on."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

HELP = "write a small valid BIDS dataset of phantom maps, with their true labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to write; must be new or empty")


def run(args: argparse.Namespace) -> int:
    """Write the demo dataset."""
    from bids_dgmseg.simulate.demo import write_demo

    for scan in write_demo(args.dir.absolute()):
        print(scan, flush=True)
    folders = shlex.join([str(args.dir), f"{args.dir}-out"])
    print(f"{args.dir} is ready; now: bids_dgmseg {folders} participant")
    return 0
