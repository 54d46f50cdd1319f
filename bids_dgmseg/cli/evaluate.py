"""``dgmseg evaluate``: how well segmentations agree."""

from __future__ import annotations

import argparse

from bids_dgmseg.cli.options import absolute_path, entity

HELP = "compare segmentations: overlap, distances and agreement, as tables, plots and a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        type=absolute_path,
        help="label image, or a dataset with _dseg files in its sub-X folders",
    )
    parser.add_argument(
        "predictions",
        metavar="PREDICTION",
        type=absolute_path,
        nargs="+",
        help="what is compared with it, of the same kind; scans are matched by the entities in their "
        "names, nuclei by the abbreviations in each one's dseg.tsv",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=absolute_path,
        required=True,
        help="folder for overlap.tsv, agreement.tsv, evaluate.html and the others",
    )
    parser.add_argument(
        "--chi",
        metavar="PATH",
        type=absolute_path,
        help="susceptibility map, or a dataset with _Chimap files, to compare mean values under the "
        "labels (default: the _stats.tsv beside each dseg; where one has none, the maps that "
        "their Sources name)",
    )
    parser.add_argument(
        "--raters",
        action="store_true",
        help="take all as raters of equal rank, between raters or repeated by one: compare each pair",
    )
    parser.add_argument(
        "--choose",
        metavar="ENTITY",
        nargs="+",
        action="extend",
        default=[],
        type=entity,
        help="where a dataset has several images of a scan, take those with one of these entities, "
        "such as seg-dgm16 or desc-manual",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and write; the exit code is 1 where some scans failed."""
    from bids_dgmseg.evaluate.run import Request, run_evaluation

    request = Request(args.reference, tuple(args.predictions), args.out, args.chi, tuple(args.choose), args.raters)
    return run_evaluation(request, say=lambda line: print(line, flush=True))
