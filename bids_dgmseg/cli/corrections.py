"""``dgmseg corrections``: prepare labels for manual correction."""

from __future__ import annotations

import argparse

from bids_dgmseg.arguments import absolute_path
from bids_dgmseg.cli.options import Verb, option
from bids_dgmseg.errors import count
from bids_dgmseg.models.registry import get_model


def prepare(args: argparse.Namespace) -> int:
    """Copy the labels of scans into a dataset in which they can be corrected."""
    from bids_dgmseg.bids.corrections import prepare_corrections

    model = get_model(args.model)
    written, kept = prepare_corrections(args.output_dir, args.dir, model, scans=args.scans)
    for path in written:
        print(path)
    for path in kept:
        print(f"{path}: exists and is kept")
    if written:
        print(f"{count(len(written), 'scan')} ready; edit, then run bids_dgmseg … participant --corrections {args.dir}")
    return 0


VERBS = (
    Verb(
        "corrections",
        "prepare the labels of scans for manual correction; bids_dgmseg --corrections then measures them",
        prepare,
        [
            option(
                "ACTION",
                "init: copy the labels of the scans and their label tables to DIR; files that exist are kept",
                choices=("init",),
                metavar=None,
            ),
            option("OUTPUT_DIR", "output folder of bids_dgmseg", absolute_path),
            option("DIR", "dataset of corrections, created if it does not exist", absolute_path),
            option("--scans SCAN ...", "scans such as sub-01 or sub-01_ses-1_run-1 (default: all with results)"),
            option("--model NAME", "model whose labels are corrected (default: dgm16)", default="default"),
        ],
    ),
)
