"""``dgmseg review`` and ``dgmseg corrections``: rate results and correct labels."""

from __future__ import annotations

import argparse

from bids_dgmseg.arguments import absolute_path
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError, for_terminal
from bids_dgmseg.models.registry import get_model

OUTPUT_DIR = option("OUTPUT_DIR", "output folder of bids_dgmseg", absolute_path)


def review(args: argparse.Namespace) -> int:
    """Write the page on which raters pass or fail scans and nuclei."""
    from bids_dgmseg.report.review_page import find_review_scans, write_review_page

    if not args.output_dir.is_dir():
        raise InputError(f"{args.output_dir}: no such folder; pass an output folder of bids_dgmseg")
    scans = find_review_scans(args.output_dir, bids_dir=args.bids_dir, model=args.model)
    with StatusLine() as status:
        page, warnings = write_review_page(args.output_dir, scans, report=status.update)
    for line in warnings:
        print(f"warning: {for_terminal(line)}")
    print(f"{len(scans)} scan(s) on {page}")
    return 0


def prepare_corrections(args: argparse.Namespace) -> int:
    """Copy the labels of scans into a dataset in which they can be corrected."""
    from bids_dgmseg.bids import corrections

    model = get_model(args.model)
    written, kept = corrections.prepare_corrections(args.output_dir, args.dir, model, scans=args.scans)
    print("\n".join([*map(str, written), *(f"{path}: exists and is kept" for path in kept)]))
    if written:
        print(f"{len(written)} scan(s) ready; edit, then run bids_dgmseg … participant --corrections {args.dir}")
    return 0


VERBS = (
    Verb(
        "review",
        "write review.html: a montage per nucleus over all scans, on which raters pass or fail them; the page saves "
        "their decisions as qc_decisions.tsv, for bids_dgmseg group --qc",
        review,
        [
            OUTPUT_DIR,
            option("--bids-dir FOLDER", "dataset with the maps, if OUTPUT_DIR does not link to it", absolute_path),
            option("--model NAME", "model whose results are shown, if there are several"),
        ],
    ),
    Verb(
        "corrections",
        "prepare the labels of scans for manual correction; then pass the folder to bids_dgmseg --corrections",
        prepare_corrections,
        [
            option(
                "ACTION",
                "init: copy the labels of the scans and their label tables to DIR; files that exist are kept",
                choices=("init",),
                metavar=None,
            ),
            OUTPUT_DIR,
            option("DIR", "dataset of corrections, created if it does not exist", absolute_path),
            option("--scans SCAN ...", "scans such as sub-01 or sub-01_ses-1_run-1 (default: all with results)"),
            option("--model NAME", "model whose labels are corrected (default: dgm16)", default="default"),
        ],
    ),
)
