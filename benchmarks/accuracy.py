"""How well a model finds the nuclei: on the demo, on simulated maps never trained on, and on real maps.

    python benchmarks/accuracy.py [--weights FOLDER] [--ensemble] [--maps N] [--each N] [--template FILE] [--seed S]
                                  [--simulated DATASET] [--real DATASET] [--out FILE.tsv]

With ``--maps`` it draws that many heads, each with all settings in the middle of their ranges and once more with ages
and susceptibilities as in training, and with ``--each`` so many of them in every other condition (`conditions.py`),
from a label template (the phantom without one). A dataset is a BIDS dataset of chi maps with labels in
``derivatives/*/`` (as `dgmseg demo` and `dgmseg simulate` write them); labels are matched by the abbreviations in
their ``dseg.tsv``. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from conditions import conditions

from bids_dgmseg.cli import demo
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.segmentation.results import ProbabilityBlock
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.dataset import read_template
from bids_dgmseg.simulate.sample import phantom_head, template_head
from bids_dgmseg.stats.overlap import calibration_excess, surface_distances
from bids_dgmseg.train.external_validation import score_labelled

_FIRST_SEED = 2 * 10**13
"""Away from the seeds of training and of `dgmseg simulate`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Score what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="folder in place of the model's own weights")
    parser.add_argument("--ensemble", action="store_true", help="average as `bids_dgmseg --ensemble` does")
    parser.add_argument("--maps", type=int, default=0, help="heads to draw, each of them twice")
    parser.add_argument("--each", type=int, default=0, help="heads to draw in every other condition")
    parser.add_argument("--template", type=Path, help="label template to draw them from (default: the phantom)")
    parser.add_argument("--seed", type=int, default=1, help="of those maps (default: 1)")
    parser.add_argument("--simulated", type=Path, help="dataset that `dgmseg simulate` wrote")
    parser.add_argument("--real", type=Path, help="dataset with silver labels")
    parser.add_argument("--out", type=Path, help="all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("accuracy", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model = dataclasses.replace(get_model(args.model), ensemble=args.ensemble)
    template = read_template(args.template) if args.template else None
    datasets = {name: root for name in ("simulated", "real") if (root := getattr(args, name)) is not None}
    for name, root in datasets.items():
        if not root.is_dir():
            raise InputError(f"--{name} {root}: no such folder; give a BIDS dataset of labelled maps")
    with tempfile.TemporaryDirectory() as folder:
        demo.run(argparse.Namespace(dir=Path(folder) / "demo"))
        tables = [score(Path(folder) / "demo", model, args.weights).assign(dataset="demo")]
    for name, root in datasets.items():
        tables.append(score(root, model, args.weights).assign(dataset=name))
    for table in tables:
        print(f"\n{table['dataset'].iloc[0]}: {table['scan'].nunique()} scans\n\n{as_markdown(table)}", flush=True)
    if args.maps:
        drawn = try_conditions(model, args.weights, template, n_heads=args.maps, n_each=args.each, seed=args.seed)
        for condition in conditions():
            if condition.many:
                print(f"\n{measures_table(drawn[drawn['condition'] == condition.name])}")
        print(f"\n{conditions_table(drawn)}")
        tables.append(drawn.assign(dataset="drawn"))
    if args.out:
        pd.concat(tables).to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def score(root: Path, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment every labelled map of a dataset; one row a scan and nucleus."""
    return score_labelled(root.absolute(), model, weights=weights, located_by=weights, device="cpu", say=print)


def try_conditions(
    model: Model, weights: Path | None, template: Volume | None, *, n_heads: int, n_each: int, seed: int
) -> pd.DataFrame:
    """Draw maps and segment them; one row a map and nucleus of the truth."""
    head = template_head(template) if template else phantom_head()
    tables = []
    for number, condition in enumerate(conditions()):
        for drawn in range(n_heads if condition.many else n_each):
            sample_seed = _FIRST_SEED + 1_000_000 * seed + drawn
            table = score_drawn(*condition.draw(head, sample_seed), model, weights)
            tables.append(table.assign(condition=condition.name, scan=f"{number}-{drawn}", seed=sample_seed))
    return pd.concat(tables, ignore_index=True)


def score_drawn(chi: Volume, truth: np.ndarray, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment one map and measure each of its true nuclei."""
    segmented = segment_map(chi, model, weights=weights)
    found, block = segmented.labels, segmented.block
    known = truth[block.slices]
    voxel_mm3, rows = float(np.prod(chi.voxel_size_mm)), []
    numbers = [structure.index for structure in model.structures]
    for channel, structure in enumerate(model.structures, start=1):
        true, predicted = truth == structure.index, found == structure.index
        if not true.any():
            continue
        # Left and right of a nucleus follow one another in structures.tsv.
        other_side = structure.index + (1 if structure.index % 2 else -1)
        rows.append(
            {
                "abbreviation": structure.abbreviation,
                "dice": 2 * np.count_nonzero(true & predicted) / (true.sum() + predicted.sum()),
                "hd95_mm": surface_distances(true, predicted, voxel_size_mm=chi.voxel_size_mm).hd95_mm,
                "true_mm3": true.sum() * voxel_mm3,
                "found_mm3": predicted.sum() * voxel_mm3,
                "found_pv_mm3": block.probabilities[channel].sum(dtype=np.float64) * voxel_mm3,
                "true_ppm": chi.array[true].mean(),
                "found_ppm": chi.array[predicted].mean() if predicted.any() else np.nan,
                "missed": not predicted.any(),
                "wrong_side": other_side in numbers and bool((predicted & (truth == other_side)).any()),
                **_calibration(block, channel, known == structure.index),
            }
        )
    return pd.DataFrame(rows)


def _calibration(block: ProbabilityBlock, channel: int, truth: np.ndarray) -> dict[str, float]:
    """Measure a nucleus' calibration where there is a doubt: neither surely it nor surely not."""
    probability = block.probabilities[channel]
    doubtful = (probability > 0.01) | truth
    too_much = calibration_excess(probability[doubtful], truth[doubtful])
    return {"doubtful": np.count_nonzero(doubtful)} | {f"too_much_{n}": value for n, value in enumerate(too_much)}


def calibration_error(rows: pd.DataFrame) -> float:
    """Compute the expected calibration error of the voxels of several maps."""
    return float(rows.filter(regex="^too_much_").sum().abs().sum() / rows["doubtful"].sum())


def measures_table(table: pd.DataFrame) -> str:
    """Lay the measures of one condition out, a row a nucleus, left and right together."""
    lines = [
        f"{table['condition'].iloc[0]}: {table['scan'].nunique()} maps\n",
        "| nucleus | Dice | worst | HD95 mm | volume bias % | by probability | volume r | χ bias ppm | χ worst | "
        "ECE | missed | wrong side |",
        "| --- " * 12 + "|",
    ]
    for nucleus, rows in table.groupby(table["abbreviation"].str.split("_").str[0], sort=False):
        bias, bias_pv = (100 * (rows[f"found{kind}_mm3"].sum() / rows["true_mm3"].sum() - 1) for kind in ("", "_pv"))
        shift = rows["found_ppm"] - rows["true_ppm"]
        lines.append(
            f"| {nucleus} | {rows['dice'].mean():.3f} | {rows['dice'].min():.3f} | {rows['hd95_mm'].mean():.2f} | "
            f"{bias:+.1f} | {bias_pv:+.1f} | {rows['found_mm3'].corr(rows['true_mm3']):.3f} | {shift.mean():+.4f} | "
            f"{shift.abs().max():.4f} | {calibration_error(rows):.3f} | {rows['missed'].sum()} | "
            f"{rows['wrong_side'].sum()} |"
        )
    return "\n".join(lines)


def conditions_table(table: pd.DataFrame) -> str:
    """Lay the Dice of all conditions out, a row each, with the worst and the number of nuclei missed or swapped."""
    nuclei = table.assign(nucleus=table["abbreviation"].str.split("_").str[0])
    wide = nuclei.pivot_table(index="condition", columns="nucleus", values="dice", aggfunc="mean", sort=False)
    groups = table.groupby("condition", sort=False)
    wide["mean"], wide["worst"] = wide.mean(axis=1), groups["dice"].min()
    wide["missed"], wide["wrong side"] = groups["missed"].sum(), groups["wrong_side"].sum()
    wide["maps"] = groups["scan"].nunique()
    lines = ["| Dice | " + " | ".join(wide.columns) + " |", "| --- " * (len(wide.columns) + 1) + "|"]
    for name, row in wide.iterrows():
        cells = [
            f"{value:.0f}" if column in ("missed", "wrong side", "maps") else f"{value:.3f}"
            for column, value in row.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    raise SystemExit(main())
