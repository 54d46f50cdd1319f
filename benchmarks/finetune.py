"""Benefit of fine-tuning on a few labelled scans: leave-one-participant-out cross-validation.

    python benchmarks/finetune.py DATASET [--minutes M | --steps N] [--folds K] [--from FOLDER] [--out FILE.tsv]

DATASET is a BIDS dataset of maps with manual labels, as for `dgmseg finetune`. Prints the Dice of the held-out scans
before and after fine-tuning, of all voxels and of what the reference covers. The weights are not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from accuracy import scans_table, score_covered

from bids_dgmseg.arguments import positive_float, positive_int
from bids_dgmseg.bids.labelled_scans import read_labelled_maps
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import run_command
from bids_dgmseg.lab.train.finetune import LEARNING_RATE, finetune, summarize
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.models.registry import get_model


def main(argv: Sequence[str] | None = None) -> int:
    """Leave out one participant after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument(
        "--minutes", type=positive_float, default=10.0, help="training time per fold (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, help="number of steps instead of minutes")
    parser.add_argument("--folds", type=positive_int, help="use only the first folds")
    parser.add_argument("--from", dest="start", type=Path, help="folder with the initial weights")
    parser.add_argument("--learning-rate", type=positive_float, default=LEARNING_RATE)
    parser.add_argument("--out", type=Path, help="write all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("finetune", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    dataset, model = args.dataset.absolute(), get_model("default")
    labelled = read_labelled_maps(dataset, model, warn=print)
    participants = sorted({scan.participant for scan in labelled})
    tables, covered = [], []
    for participant in participants[: args.folds]:
        with tempfile.TemporaryDirectory() as folder:
            request = TrainingRequest(
                model=model,
                dataset=dataset,
                out=Path(folder),
                start=args.start,
                minutes=None if args.steps else args.minutes,
                steps=args.steps,
                learning_rate=args.learning_rate,
                holdout=(participant,),
            )
            outcome, table = finetune(request, log=StatusLine())
            covered.append(score_covered(dataset, model, Path(folder), participant=participant))
        tables.append(table[table["part"] == "held-out"])
        print(f"\nwithout sub-{participant}, {outcome.state.step} step(s)\n{summarize(table)}\n", flush=True)
    scores = pd.concat(tables, ignore_index=True)
    print(f"{len(tables)} fold(s)\n{summarize(scores)}")
    after, before = pd.concat(covered), score_covered(dataset, model, args.start)
    for name, rows in {"before": before[before["scan"].isin(after["scan"])], "after": after}.items():
        print(f"\n{name}, within the slices of the reference\n\n{scans_table(rows)}")
    if args.out:
        scores.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


if __name__ == "__main__":
    sys.exit(main())
