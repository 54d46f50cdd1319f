"""``dgmseg evaluate``: agreement of segmentations."""

from __future__ import annotations

import argparse

from bids_dgmseg.arguments import absolute_path, entity
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.errors import for_terminal


def compare_segmentations(args: argparse.Namespace) -> int:
    """Compare and write; the exit code is 1 if some scans failed."""
    from bids_dgmseg.bids.dataset import check_outside_raw_data
    from bids_dgmseg.lab.evaluate.compare import EvaluationOptions, evaluate, write_evaluation

    check_outside_raw_data(args.out)
    options = EvaluationOptions(
        reference=args.reference,
        predictions=tuple(args.prediction),
        out=args.out,
        chi=args.chi,
        choose=tuple(args.choose),
        raters=args.raters,
        participants=args.participants,
        controls=tuple(args.controls),
        bilateral=args.bilateral,
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    lines = [f"note: {for_terminal(line)}" for line in evaluation.notes]
    lines += [f"failed: {for_terminal(line)}" for line in evaluation.failures]
    lines.append(f"{evaluation.n_scans} scan(s) compared; open {args.out / 'evaluate.html'}")
    print("\n".join(lines), flush=True)
    return 1 if evaluation.failures else 0


VERBS = (
    Verb(
        "evaluate",
        "compare segmentations: overlap, surface distances and agreement, as tables, plots and a page",
        compare_segmentations,
        [
            option("REFERENCE", "label image, or a dataset with _dseg files", absolute_path),
            option(
                "PREDICTION ...",
                "label images or datasets to compare with it; scans are matched by the entities in their names, nuclei "
                "by the abbreviations in each dseg.tsv",
                absolute_path,
            ),
            option(
                "--out DIR",
                "output folder (overlap.tsv, agreement.tsv, evaluate.html, …)",
                absolute_path,
                required=True,
            ),
            option(
                "--chi PATH",
                "susceptibility map, or a dataset with _Chimap files, to compare mean susceptibilities",
                absolute_path,
            ),
            option(
                "--raters",
                "treat all as raters of equal rank and compare each pair (inter-rater or intra-rater agreement)",
            ),
            option(
                "--participants DATASET",
                "dataset with the ages in its participants.tsv, for age curves of reference and prediction (default: "
                "that of the maps or of the segmentations)",
                absolute_path,
            ),
            option(
                "--controls GROUP ...",
                "fit age curves to the participants of these groups together, such as HC (default: to each group)",
            ),
            option("--bilateral", "add a bilateral row (left and right combined) per nucleus, such as DN"),
            option(
                "--choose ENTITY ...",
                "if a dataset has several images of a scan, use those with one of these entities, such as seg-dgm16 or "
                "desc-manual",
                entity,
            ),
        ],
    ),
)
