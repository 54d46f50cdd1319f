"""``dgmseg evaluate``: agreement of segmentations."""

from __future__ import annotations

import argparse

from bids_dgmseg.cli.options import absolute_path, entity

HELP = "compare segmentations: overlap, surface distances and agreement, as tables, plots and a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        type=absolute_path,
        help="label image, or a dataset with _dseg files",
    )
    parser.add_argument(
        "predictions",
        metavar="PREDICTION",
        type=absolute_path,
        nargs="+",
        help="label images or datasets to compare with it; scans are matched by the entities in their names, nuclei by "
        "the abbreviations in each dseg.tsv",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=absolute_path,
        required=True,
        help="output folder (overlap.tsv, agreement.tsv, evaluate.html, …)",
    )
    parser.add_argument(
        "--chi",
        metavar="PATH",
        type=absolute_path,
        help="susceptibility map, or a dataset with _Chimap files, to compare mean susceptibilities "
        "(default: the _stats.tsv next to each dseg, otherwise the maps named by their Sources)",
    )
    parser.add_argument(
        "--raters",
        action="store_true",
        help="treat all as raters of equal rank and compare each pair (inter-rater or intra-rater agreement)",
    )
    parser.add_argument(
        "--choose",
        metavar="ENTITY",
        nargs="+",
        action="extend",
        default=[],
        type=entity,
        help="if a dataset has several images of a scan, use those with one of these entities, such as seg-dgm16 or "
        "desc-manual",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and write; the exit code is 1 if some scans failed."""
    from bids_dgmseg.evaluate.compare import EvaluationOptions, evaluate, write_evaluation

    options = EvaluationOptions(
        args.reference, tuple(args.predictions), args.out, args.chi, tuple(args.choose), args.raters
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    lines = [f"note: {line}" for line in evaluation.notes] + [f"failed: {line}" for line in evaluation.failures]
    scans = f"{evaluation.n_scans} {'scan' if evaluation.n_scans == 1 else 'scans'}"
    print("\n".join([*lines, f"{scans} compared; open {args.out / 'evaluate.html'}"]), flush=True)
    return 1 if evaluation.failures else 0
