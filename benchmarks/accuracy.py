"""Accuracy of a model on the demo, on unseen simulated maps and on labelled real maps.

    python benchmarks/accuracy.py [--model MODEL] [--weights FOLDER] [--maps N] [--each N] [--template FILE]
                                  [--seed S] [--simulated DATASET] [--real DATASET] [--out FILE.tsv]

``--maps`` draws heads under typical conditions, and once more with age and susceptibility varying as in training;
``--each`` draws heads under each of the other conditions (`conditions.py`). Heads come from a label template, or from
the phantom. A dataset is a BIDS dataset of chi maps with labels in ``derivatives/*/``, as written by `dgmseg demo` and
`dgmseg simulate`; labels are matched by the abbreviations in ``dseg.tsv``. Real references often end slices before the
nuclei do and do not distinguish subthalamic nucleus and nigra: a second table is limited to what they cover. To compare
models, run it with each of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from conditions import conditions
from reporting import dice_by_nucleus, markdown
from scipy import ndimage

from bids_dgmseg.bids.labelled_scans import manual_labels, read_labelled_maps
from bids_dgmseg.cli.verb_train import write_demo_dataset
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import phantom_head, read_training_head
from bids_dgmseg.lab.simulate.shapes import ShapedHead
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import join_parts, without_parts
from bids_dgmseg.segmentation.predict import ProbabilityBlock
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice, surface_distances

_FIRST_SEED = 2 * 10**13
"""Beyond the seeds of training and of `dgmseg simulate`."""

_BEYOND_MM = 2.0
"""Labels farther than this from the reference are not a matter of its border."""


def main(argv: Sequence[str] | None = None) -> int:
    """Score the demo, the datasets and the drawn maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
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
    model = get_model(args.model)
    head = read_training_head(args.template) if args.template else phantom_head()
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
        print(f"\n{table['dataset'].iloc[0]}: {table['scan'].nunique()} scan(s)\n\n{scans_table(table)}", flush=True)
    if args.real:
        covered = score_covered(args.real, model, args.weights)
        print(f"\nreal, within the slices of the reference\n\n{scans_table(covered)}", flush=True)
        print(f"\nlargest error of a side\n\n{errors_table(covered)}", flush=True)
        tables.append(covered.assign(dataset="real, covered"))
    if args.maps:
        counts = {"n_heads": args.maps, "n_each": args.each, "seed": args.seed}
        drawn = try_conditions(model, args.weights, head, **counts)
        for condition in conditions():
            if condition.frequent:
                print(f"\n{measures_table(drawn[drawn['condition'] == condition.name])}")
        print(f"\n{conditions_table(drawn)}")
        tables.append(drawn.assign(dataset="drawn"))
    if args.out:
        pd.concat(tables).to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def score(root: Path, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment every labelled map of a dataset and compute the Dice of whole nuclei; one row per scan and nucleus."""
    tables, whole = [], with_whole_nuclei(model)
    for scan in read_labelled_maps(root.absolute(), whole, warn=print):
        started = time.perf_counter()
        labels = join_parts(segment_map(scan.chi, model, weights=weights).labels)
        seconds = time.perf_counter() - started
        structures = [whole.structures[channel - 1] for channel in scan.channels]
        table = dice(manual_labels(scan, whole), labels, structures=structures)
        tables.append(table.assign(scan=scan.name, seconds=seconds))
    return pd.concat(tables)


def with_whole_nuclei(model: Model) -> Model:
    """Return the model with whole nuclei as labels, for reading references of a model that labels parts."""
    return replace(model, labels=tuple(structure.abbreviation for structure in without_parts(model.structures)))


def score_covered(root: Path, model: Model, weights: Path | None, *, participant: str = "") -> pd.DataFrame:
    """Score each nucleus in what its reference covers: the axial slices, and the caudate without the tail.

    Subthalamic nucleus and nigra are one if the reference has no subthalamic nucleus. ``beyond_ml`` is the volume of
    the label at more than 2 mm from the reference, ``other_ml`` that in the reference of other nuclei. With
    `participant` only its scans are scored.
    """
    rows: list[dict[str, str | float]] = []
    whole = with_whole_nuclei(model)
    for scan in read_labelled_maps(root, whole, warn=print):
        if participant and scan.participant != participant:
            continue
        reference = manual_labels(scan, whole)
        labels = join_parts(segment_map(scan.chi, model, weights=weights).labels)
        present, voxel_ml = set(np.unique(reference).tolist()), np.prod(scan.chi.voxel_size_mm) / 1000
        nigra = {structure.hemisphere: structure.index for structure in whole.structures if structure.nucleus == "SN"}
        for structure in whole.structures:
            if structure.nucleus == "STN" and structure.index not in present:
                labels = np.where(labels == structure.index, nigra[structure.hemisphere], labels)
        for structure in whole.structures:
            if structure.index not in present:
                continue
            true = reference == structure.index
            places = np.argwhere(true)
            covered = labels == structure.index
            covered[:, :, : places[:, 2].min()] = covered[:, :, places[:, 2].max() + 1 :] = False
            if structure.nucleus == "CN":
                covered[:, : places[:, 1].min()] = False
            dice = 2 * np.count_nonzero(true & covered) / (true.sum() + covered.sum())
            far = ndimage.distance_transform_edt(~true, sampling=scan.chi.voxel_size_mm) > _BEYOND_MM
            row = {"beyond_ml": covered & far, "other_ml": covered & (reference > 0) & ~true}
            volumes_ml = {name: float(np.count_nonzero(where) * voxel_ml) for name, where in row.items()}
            rows.append({"scan": scan.name, "abbreviation": structure.abbreviation, "dice": float(dice), **volumes_ml})
    return pd.DataFrame(rows)


def errors_table(covered: pd.DataFrame) -> str:
    """Format the largest volumes outside the reference by nucleus."""
    nucleus = covered["abbreviation"].str.partition("_")[0].rename("nucleus")
    largest = covered.groupby(nucleus, sort=False)[["beyond_ml", "other_ml"]].max()
    return markdown(largest.reset_index(), 2)


def try_conditions(
    model: Model, weights: Path | None, head: ShapedHead, *, n_heads: int, n_each: int, seed: int
) -> pd.DataFrame:
    """Draw and segment maps; one row per map and true nucleus."""
    tables = []
    for number, condition in enumerate(conditions()):
        for drawn in range(n_heads if condition.frequent else n_each):
            sample_seed = _FIRST_SEED + 1_000_000 * seed + drawn
            table = score_drawn(*condition.draw(head, sample_seed, model.structures), model, weights)
            tables.append(table.assign(condition=condition.name, scan=f"{number}-{drawn}", seed=sample_seed))
    return pd.concat(tables, ignore_index=True)


def score_drawn(chi: Volume, truth: np.ndarray, model: Model, weights: Path | None) -> pd.DataFrame:
    """Segment a map and score each nucleus it contains."""
    segmented = segment_map(chi, model, weights=weights)
    labels, block = segmented.labels, segmented.block
    reference = truth[block.slices]
    voxel_mm3, rows = float(np.prod(chi.voxel_size_mm)), []
    numbers = [structure.index for structure in model.structures]
    for channel, structure in enumerate(model.structures, start=1):
        true, predicted = truth == structure.index, labels == structure.index
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
                **_calibration(block, channel, reference == structure.index),
            }
        )
    return pd.DataFrame(rows)


def _calibration(block: ProbabilityBlock, channel: int, truth: np.ndarray) -> dict[str, float]:
    """Compute calibration excesses over voxels with a non-zero probability or of the nucleus."""
    probability = block.probabilities[channel]
    uncertain = (probability > 0.01) | truth
    excess = calibration_excess(probability[uncertain], truth[uncertain])
    return {"uncertain": np.count_nonzero(uncertain)} | {f"excess_{n}": value for n, value in enumerate(excess)}


def calibration_excess(probability: np.ndarray, truth: np.ndarray, *, n_bins: int = 15) -> np.ndarray:
    """Compute the sum of probabilities minus the number of voxels of the nucleus in each bin.

    Sums over several maps give the error of all their voxels, in which random deviations of single maps average out.
    """
    bins = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    return np.bincount(bins, weights=probability - truth, minlength=n_bins)


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
    return f"{table['condition'].iloc[0]}: {table['scan'].nunique()} map(s)\n\n{markdown(pd.DataFrame(rows))}"


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
    if "seconds" in table:
        wide["seconds"] = table.groupby("scan")["seconds"].first()
    return markdown(wide.rename_axis("Dice"), {"seconds": 1})


if __name__ == "__main__":
    raise SystemExit(main())
