"""Accuracy of a model on the demo, on unseen simulated maps and on labelled real maps.

    python benchmarks/accuracy.py [--model MODEL] [--weights FOLDER] [--ensemble] [--maps N] [--each N]
                                  [--template FILE] [--seed S] [--simulated DATASET] [--real DATASET] [--out FILE.tsv]

``--maps`` draws heads under typical conditions, and once more with age and susceptibility varying as in training;
``--each`` draws heads under each of the other conditions (`conditions.py`). Heads come from a label template, or from
the phantom. A dataset is a BIDS dataset of chi maps with labels in ``derivatives/*/``, as written by `dgmseg demo` and
`dgmseg simulate`; labels are matched by the abbreviations in ``dseg.tsv``. To compare models, run it with each of them.
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
from reporting import dice_by_nucleus, markdown

from bids_dgmseg.cli.simulate import write_demo_dataset
from bids_dgmseg.errors import InputError, count, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.segmentation.predict import ProbabilityBlock
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.label_template import read_template
from bids_dgmseg.simulate.sample import phantom_head, template_head
from bids_dgmseg.stats.overlap import calibration_excess, surface_distances
from bids_dgmseg.train.log import PlainLog
from bids_dgmseg.train.simulated import score_dataset

_FIRST_SEED = 2 * 10**13
"""Beyond the seeds of training and of `dgmseg simulate`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Score the demo, the datasets and the drawn maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--ensemble", action="store_true", help="average checkpoints as `bids_dgmseg --ensemble` does")
    parser.add_argument("--maps", type=int, default=0, help="number of heads, each drawn twice")
    parser.add_argument("--each", type=int, default=0, help="number of heads per other condition")
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the heads (default: 1)")
    parser.add_argument("--simulated", type=Path, help="dataset written by `dgmseg simulate`")
    parser.add_argument("--real", type=Path, help="dataset of labelled real maps")
    parser.add_argument("--out", type=Path, help="write all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("accuracy", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model = dataclasses.replace(get_model(args.model), ensemble=args.ensemble)
    template = read_template(args.template) if args.template else None
    datasets = {name: root for name in ("simulated", "real") if (root := getattr(args, name)) is not None}
    for name, root in datasets.items():
        if not root.is_dir():
            raise InputError(f"--{name} {root}: no such folder; pass a BIDS dataset of labelled maps")
    with tempfile.TemporaryDirectory() as folder:
        write_demo_dataset(argparse.Namespace(dir=Path(folder) / "demo"))
        tables = [score(Path(folder) / "demo", model, args.weights).assign(dataset="demo")]
    for name, root in datasets.items():
        tables.append(score(root, model, args.weights).assign(dataset=name))
    for table in tables:
        print(
            f"\n{table['dataset'].iloc[0]}: {count(table['scan'].nunique(), 'scan')}\n\n{scans_table(table)}",
            flush=True,
        )
    if args.maps:
        drawn = try_conditions(model, args.weights, template, n_heads=args.maps, n_each=args.each, seed=args.seed)
        for condition in conditions():
            if condition.frequent:
                print(f"\n{measures_table(drawn[drawn['condition'] == condition.name])}")
        print(f"\n{conditions_table(drawn)}")
        tables.append(drawn.assign(dataset="drawn"))
    if args.out:
        pd.concat(tables).to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def score(root: Path, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment every labelled map of a dataset; one row per scan and nucleus."""
    return score_dataset(root.absolute(), model, weights=weights, localizer=weights, device="cpu", log=PlainLog())


def try_conditions(
    model: Model, weights: Path | None, template: Volume | None, *, n_heads: int, n_each: int, seed: int
) -> pd.DataFrame:
    """Draw and segment maps; one row per map and true nucleus."""
    head = template_head(template) if template else phantom_head()
    tables = []
    for number, condition in enumerate(conditions()):
        for drawn in range(n_heads if condition.frequent else n_each):
            sample_seed = _FIRST_SEED + 1_000_000 * seed + drawn
            table = score_drawn(*condition.draw(head, sample_seed), model, weights)
            tables.append(table.assign(condition=condition.name, scan=f"{number}-{drawn}", seed=sample_seed))
    return pd.concat(tables, ignore_index=True)


def score_drawn(chi: Volume, truth: np.ndarray, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment a map and score each nucleus it contains."""
    segmented = segment_map(chi, model, weights=weights)
    found, block = segmented.labels, segmented.block
    known = truth[block.slices]
    voxel_mm3, rows = float(np.prod(chi.voxel_size_mm)), []
    numbers = [structure.index for structure in model.structures]
    for channel, structure in enumerate(model.structures, start=1):
        true, predicted = truth == structure.index, found == structure.index
        if not true.any():
            continue
        # Left and right of a nucleus are consecutive in structures.tsv.
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
    """Compute calibration excesses over voxels with a non-zero probability or of the nucleus."""
    probability = block.probabilities[channel]
    uncertain = (probability > 0.01) | truth
    excess = calibration_excess(probability[uncertain], truth[uncertain])
    return {"uncertain": np.count_nonzero(uncertain)} | {f"excess_{n}": value for n, value in enumerate(excess)}


def calibration_error(rows: pd.DataFrame) -> float:
    """Compute the expected calibration error over the voxels of several maps."""
    return float(rows.filter(regex="^excess_").sum().abs().sum() / rows["uncertain"].sum())


def measures_table(table: pd.DataFrame) -> str:
    """Format the scores of one condition: one row per nucleus, left and right together."""
    rows = []
    for nucleus, scores in table.groupby(table["abbreviation"].str.split("_").str[0], sort=False):
        bias, bias_pv = (
            f"{100 * (scores[f'found{kind}_mm3'].sum() / scores['true_mm3'].sum() - 1):+.1f}" for kind in ("", "_pv")
        )
        shift = scores["found_ppm"] - scores["true_ppm"]
        rows.append(
            {
                "nucleus": nucleus,
                "Dice": scores["dice"].mean(),
                "lowest": scores["dice"].min(),
                "HD95 mm": f"{scores['hd95_mm'].mean():.2f}",
                "volume bias %": bias,
                "from probabilities": bias_pv,
                "volume r": scores["found_mm3"].corr(scores["true_mm3"]),
                "χ bias ppm": f"{shift.mean():+.4f}",
                "χ largest": f"{shift.abs().max():.4f}",
                "ECE": calibration_error(scores),
                "missed": scores["missed"].sum(),
                "wrong side": scores["wrong_side"].sum(),
            }
        )
    return f"{table['condition'].iloc[0]}: {count(table['scan'].nunique(), 'map')}\n\n{markdown(pd.DataFrame(rows))}"


def conditions_table(table: pd.DataFrame) -> str:
    """Format the Dice of all conditions, with the lowest and the number of nuclei missed or on the wrong side."""
    wide, groups = dice_by_nucleus(table, "condition"), table.groupby("condition", sort=False)
    wide["lowest"], wide["missed"] = groups["dice"].min(), groups["missed"].sum()
    wide["wrong side"], wide["maps"] = groups["wrong_side"].sum(), groups["scan"].nunique()
    return markdown(wide.rename_axis("Dice"))


def scans_table(table: pd.DataFrame) -> str:
    """Format the Dice of all scans; the last rows are the mean and the lowest single nucleus."""
    wide = dice_by_nucleus(table, "scan")
    lowest = table["dice"].groupby(table["abbreviation"].str.split("_").str[0]).min()
    wide.loc["**mean**"] = wide.mean()
    wide.loc["lowest"] = lowest
    wide["seconds"] = table.groupby("scan")["seconds"].first()
    return markdown(wide.rename_axis("Dice"), {"seconds": 1})


if __name__ == "__main__":
    raise SystemExit(main())
