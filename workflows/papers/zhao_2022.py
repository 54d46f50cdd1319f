"""Table 1 and Figs. 6 to 8 of Zhao et al. 2022 (attention U-Net with transfer learning); see `tables`.

--source DATASET: labels RN and SN (with STN); --holdout: test cohort (default: a fifth); --labels-of rater2=FOLDER;
--imagenet FILE: ResNet-50 as .safetensors.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tables import Candidate, Study, absolute_path, compare_methods, run, scores, show_agreement, write_tables

from bids_dgmseg.lab.train.recipe import choose_some


def make(study: Study) -> None:
    """Make all tables."""
    args, start = study.args, dict[str, list[Any]]()
    if source := args.source or (study.dataset if args.quick else None):
        with study.attempt("source model"):
            first = replace(study, dataset=source, rows={})
            start["tl"] = ["--from", train(first, "source", ["attunet25d-source"], [])]
            write_tables(first, first.compare(), sides="union", only=["Source model"])
            start["no-gates"] = [
                "--from",
                train(first, "source-no-gates", ["attunet25d-source", "attunet25d-no-gates"], []),
            ]
    else:
        study.lack("TL-model, no attention gates: no --source DATASET")
    if not args.imagenet:
        study.lack("ResNet-50: no --imagenet FILE; its encoder starts at random")
    start |= {"ntl": [], "resnet50": ["--from", args.imagenet] if args.imagenet else []}
    for name, recipes in study.paper["trainings"].items():
        if name in start:
            with study.attempt(name):
                train(study, name, recipes, start[name])
    evaluation, automatic = study.compare(), "tl" if "tl" in study.rows else "ntl"
    write_tables(study, evaluation, sides="union", only=["Fig 6"])
    show_agreement(study, "Table 1 Fig 8", evaluation, automatic, study.paper["nuclei"])
    if not (rater2 := study.rows.get("rater2")):
        study.lack("Fig. 7: no labels of a second rater; pass --labels-of rater2=FOLDER")
        return
    other = study.compare([study.labels.reference, study.rows[automatic]], rater2, choose=tuple(args.choose))
    first_rater = scores(evaluation, list(study.rows), sides="union").query("method == @automatic")
    both = scores(other, ["raters", "second"], sides="union").query("scan in @first_rater.scan")
    values = pd.concat([first_rater.assign(method="automatic"), both])
    compare_methods(study, "Fig 7", values)


def train(study: Study, name: str, recipes: list[str], start: list[Any]) -> Path:
    """Train all folds, and segment the test cohort with their mean: a row. By default a fifth, at least three."""
    names = sorted({scan.participant for scan in study.labels.scans})
    chosen = [] if name.startswith("source") else study.args.holdout
    test = chosen or choose_some(names, max(round(len(names) / 5), 3), seed=1)
    weights = study.train(name, "attunet25d", *recipes, options=["--holdout", *test, "--folds", study.folds, *start])
    study.rows[name] = study.segment(name, Candidate(name, "attunet25d", weights), test)
    return weights


if __name__ == "__main__":
    files = {name: {"type": absolute_path, "metavar": "PATH"} for name in ("source", "imagenet")}
    sys.exit(run(__doc__, make, **files, holdout={"nargs": "+", "default": [], "metavar": "LABEL"}))
