"""How well a model finds the nuclei: Dice on the demo, on simulated maps never trained on, and on real maps.

    python benchmarks/accuracy.py [--weights FOLDER] [--simulated DATASET] [--real DATASET] [--out FILE.tsv]

A dataset is a BIDS dataset of chi maps with labels in ``derivatives/*/`` (as `dgmseg demo` and `dgmseg simulate` write
them); labels are matched by the abbreviations in their ``dseg.tsv``. Prints Markdown, one table a dataset.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.commands import demo
from bids_dgmseg.measure.overlap import dice
from bids_dgmseg.models import Model, get_model
from bids_dgmseg.pipeline.finetune import given_labels, segment
from bids_dgmseg.pipeline.labels import read_labelled_maps
from bids_dgmseg.segment.localize import localize


def main() -> None:
    """Score what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="folder in place of the model's own weights")
    parser.add_argument("--simulated", type=Path, help="dataset that `dgmseg simulate` wrote")
    parser.add_argument("--real", type=Path, help="dataset with silver labels")
    parser.add_argument("--out", type=Path, help="all scores as TSV")
    args = parser.parse_args()
    model = get_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        demo.run(argparse.Namespace(dir=Path(folder) / "demo"))
        tables = [score(Path(folder) / "demo", model, args.weights).assign(dataset="demo")]
    for name in ("simulated", "real"):
        root = getattr(args, name)
        if root is not None and root.is_dir():
            tables.append(score(root, model, args.weights).assign(dataset=name))
    for table in tables:
        print(f"\n{table['dataset'].iloc[0]}: {table['scan'].nunique()} scans\n\n{as_markdown(table)}")
    if args.out:
        pd.concat(tables).to_csv(args.out, sep="\t", index=False, na_rep="n/a")


def score(root: Path, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment every labelled map of a dataset; one row a scan and nucleus."""
    tables = []
    for one in read_labelled_maps(root.absolute(), model, say=print):
        started = time.perf_counter()
        box = localize(one.map.chi, model, weights=weights).box
        dseg = segment(one.map, box, model, weights=weights, device="cpu")
        seconds = time.perf_counter() - started
        known = [model.structures[channel - 1] for channel in one.map.channels]
        table = dice(given_labels(one.map, model), dseg, structures=known)
        tables.append(table.assign(scan=one.map.name, seconds=seconds))
    return pd.concat(tables)


def as_markdown(table: pd.DataFrame) -> str:
    """Lay scans out in rows and nuclei in columns, mean of left and right; the last rows are mean and worst."""
    nuclei = table.assign(nucleus=table["abbreviation"].str.split("_").str[0])
    wide = nuclei.pivot_table(index="scan", columns="nucleus", values="dice", aggfunc="mean", sort=False)
    worst = nuclei.groupby("nucleus", sort=False)["dice"].min()
    wide.loc["**mean**"] = wide.mean()
    wide["mean"] = wide.mean(axis=1)
    wide.loc["worst side"] = worst
    wide["seconds"] = table.groupby("scan")["seconds"].first()
    lines = ["| Dice | " + " | ".join(wide.columns) + " |", "| --- " * (len(wide.columns) + 1) + "|"]
    for name, row in wide.iterrows():
        digits = {"seconds": 1}
        cells = ["" if np.isnan(value) else f"{value:.{digits.get(str(column), 3)}f}" for column, value in row.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
