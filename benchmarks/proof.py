"""Whether the proof on a map recovers what a true change would, and whether it shows outlines that are wrong.

    python benchmarks/proof.py [--heads N] [--seed S] [--template FILE] [--model MODEL] [--out FILE.tsv]

Draws heads as `ratings.py` does. *True* changes: each head is simulated again with 10 ppb more in half of its nuclei
and 10 % less volume of the others, in their true outlines and before the acquisition is simulated; what the model
measures of that is compared with what the proof on the unchanged map recovers. *Wrong* nuclei are those of
`ratings.py`; the measures of those of each kind of error are compared with all right ones of that kind and of unchanged
maps. Heads with even numbers choose the limits of the ratings, the others report. ``--out`` is resumed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conditions import Condition, conditions
from failures import FAILURES, Case, exchange_striatum
from numpy.typing import NDArray
from ratings import BAD_DICE, WRONG_PPM, area, as_markdown
from torch import Tensor, from_numpy

from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.masks import find_missing
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import (
    SEGMENTER_VIEW,
    View,
    phantom_head,
    read_training_head,
    structure_labels,
)
from bids_dgmseg.lab.simulate.simulated_dataset import whole_head_view
from bids_dgmseg.measurement.nuclei import measure_nuclei
from bids_dgmseg.measurement.proof import Planting, prove
from bids_dgmseg.measurement.rating import measure_confidence
from bids_dgmseg.measurement.segmented_scan import FieldOfView
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.agreement import dice

_FIRST_SEED = 4 * 10**13
CONDITIONS = ("mid-range, 1 mm", "SNR 20", "1 × 1 × 3 mm", "total variation")
LARGE = ("CN", "PUT", "GP", "DN")
KINDS = ("none", "low SNR", "striatum exchanged", "slices of 5 mm", "motion", "strong streaks", "cut field of view")
_FIRST_KINDS = 5
SHAPE_MM = (96, 120, 96)
"""Field of view, centred on the nuclei; whole heads take five times as long to simulate."""
MEASURES: Mapping[str, Callable[[pd.Series], pd.Series]] = {
    **{name: lambda values: (values - 10).abs() for name in ("recovered_ppb", "recovered_percent")},
    **{name: lambda values: values for name in ("repeat_volume_percent", "repeat_ppb")},
    **{name: lambda values: -values for name in ("repeat_dice", "expected_dice")},
}
"""Column → how bad its values are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prove simulated maps and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="number of heads (default: 24)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--minutes", type=float, help="start no map after this time")
    parser.add_argument("--out", type=Path, default=Path("proof.tsv"), help="table of all nuclei, which is resumed")
    args = parser.parse_args(argv)
    return run_command("proof", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model, started = get_model(args.model), time.monotonic()
    head = read_training_head(args.template) if args.template else phantom_head()
    every = {condition.name: condition for condition in conditions()}
    done = pd.read_csv(args.out, sep="\t", na_values="n/a") if args.out.is_file() else pd.DataFrame()
    jobs = [(number, name) for number in range(args.heads) for name in (*KINDS, *CONDITIONS)]
    for number, name in sorted(jobs, key=_order):
        if len(done) and ((done["head"] == number) & (done["map"] == name)).any():
            continue
        seed = _FIRST_SEED + 1_000_000 * args.seed + number
        if name in KINDS:
            rows = spoil_and_prove(name, partial(_draw_case, head, seed), model, (args.seed, number))
        else:
            rows = compare_with_truth(replace(every[name], view=_crop(every[name].view)), head, seed, model)
        done = pd.concat([done, rows.assign(head=number, map=name)], ignore_index=True)
        done.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
        if args.minutes and time.monotonic() > started + 60 * args.minutes:
            break
    for title, table in (
        ("Recovery of planted and of true changes (of 10)", summarize_truth(done)),
        ("Area under the ROC curve of wrong nuclei, heads that choose limits", by_kind(done[done["head"] % 2 == 0])),
        ("Area under the ROC curve of wrong nuclei, heads that report", by_kind(done[done["head"] % 2 == 1])),
    ):
        print(f"\n{title}\n\n{as_markdown(table)}", flush=True)
    return 0


def _order(job: tuple[int, str]) -> tuple[bool, int]:
    """Return the order of the maps: of every head the first kinds of error and one condition, then all others."""
    number, name = job
    is_first = name in (*KINDS[:_FIRST_KINDS], CONDITIONS[number % len(CONDITIONS)])
    return not is_first, number


def _crop(view: View) -> View:
    x, y, z = (round(size / view.spacing_mm / 3) * 3 for size in SHAPE_MM)
    return replace(view, shape=(x, y, z), centre_mm=SEGMENTER_VIEW.centre_mm)


def compare_with_truth(condition: Condition, head: Any, seed: int, model: Model) -> pd.DataFrame:
    """Prove a map, and measure true changes of its head."""

    def change(chi: Tensor, labels: Tensor, *, number: int) -> Tensor:
        """Change the true susceptibility of a head."""
        truth = Volume(structure_labels(labels, STRUCTURES).numpy(), np.diag([condition.view.spacing_mm] * 3 + [1]))
        planting = Planting.of(truth.with_array(chi.numpy() + 1), truth, STRUCTURES)  # a value of 0 would be missing
        planted = list(zip(planting.maps(), range(number + 1), strict=False))[number][0]
        effects.append(planted)
        return from_numpy(planted.chi.array - 1)

    effects: list[Any] = []
    chi, truth = condition.draw(head, seed, model.structures)
    case = Case(chi, truth)
    rows, before, segment = _prove(case, model)
    for number in (0, 1):
        changed, _ = condition.draw(head, seed, model.structures, change=partial(change, number=number))
        after = _measure(changed, segment(_masked(changed)), model)
        planted = effects[-1]
        for name in planted.ppb:
            rows.loc[name, "true_ppb"] = 1000 * float((after["mean_ppm"] - before["mean_ppm"])[name])
        for name, percent in planted.percent["recovered_percent"].items():
            ratio = float((after["volume_mm3"] / before["volume_mm3"])[name])
            rows.loc[name, "true_percent"] = 1000 * (ratio - 1) / percent
    return rows.reset_index()


def _draw_case(head: Any, seed: int) -> Case:
    chi, truth = Condition("", _crop(whole_head_view(1.25))).draw(head, seed)
    return Case(chi, truth)


def spoil_and_prove(kind: str, draw: Callable[[], Case], model: Model, seed: tuple[int, int]) -> pd.DataFrame:
    """Prove a map with an error; no row if it is rejected."""
    case = draw()
    true_ppm = {row.abbreviation: float(case.chi.array[case.truth == row.index].mean()) for row in model.structures}
    rng, spoil = np.random.default_rng((*seed, KINDS.index(kind))), None
    if kind in FAILURES:
        case = FAILURES[kind](case, rng)
    elif kind == "slices of 5 mm":
        array, truth = Condition("", whole_head_view(1.25), slice_factor=4).thicken(case.chi.array, case.truth)
        case = Case(Volume(array, case.chi.affine @ np.diag([1, 1, 4, 1])), truth)
    elif kind != "none":
        spoil = lambda dseg: exchange_striatum(dseg, np.random.default_rng(seed))  # noqa: E731
    try:
        rows, before, _ = _prove(case, model, spoil)
    except InputError:
        return pd.DataFrame({"rejected": [True]})
    off = (before["mean_ppm"] - pd.Series(true_ppm)).abs() > WRONG_PPM
    return rows.assign(wrong=(rows["dice"] < BAD_DICE) | off).reset_index()


def _prove(
    case: Case, model: Model, spoil: Callable[[Volume], NDArray[np.uint8]] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, Callable[[Volume], NDArray[np.uint8]]]:
    """Return a row per nucleus with its true Dice, its measures, and the function that segments."""
    chi = _masked(case.chi)
    first = segment_map(chi, model)

    def segment(planted: Volume) -> NDArray[np.uint8]:
        labels = segment_map(planted, model, location=first.location).labels
        return spoil(chi.with_array(labels)) if spoil else labels

    dseg = chi.with_array(spoil(chi.with_array(first.labels)) if spoil else first.labels)
    proof = prove(chi, dseg, model.structures, lambda planted: segment(planted.chi))
    rows = proof.table.assign(reason="; ".join(proof.warnings))
    block, voxel_size_mm = first.block.slices, chi.voxel_size_mm
    fov = FieldOfView.of(np.isfinite(chi.array), voxel_size_mm=voxel_size_mm).crop(block)
    options: dict[str, Any] = {"structures": model.structures, "voxel_size_mm": voxel_size_mm, "fov": fov}
    table = measure_confidence(chi.array[block], dseg.array[block], first.block.probabilities[1:], **options)
    overlap = dice(case.truth, dseg.array, structures=model.structures)
    for column, source in (("expected_dice", table), ("dice", overlap)):
        rows[column] = source.set_index("abbreviation")[column]
    return rows.rename_axis("abbreviation"), _measure(chi, dseg.array, model), segment


def _masked(chi: Volume) -> Volume:
    return chi.with_array(np.where(find_missing(chi.array), np.float32(np.nan), chi.array))


def _measure(chi: Volume, labels: NDArray[np.uint8], model: Model) -> pd.DataFrame:
    size_mm = chi.voxel_size_mm
    return measure_nuclei(chi.array, labels, structures=model.structures, voxel_size_mm=size_mm).set_index(
        "abbreviation"
    )


def summarize_truth(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare the means over heads, per condition and size; ``off`` is the largest mean difference of a nucleus."""
    rows = rows.dropna(subset=["true_ppb"]).assign(size=rows["abbreviation"].str.partition("_")[0].isin(LARGE))
    return pd.DataFrame(_summaries(rows.replace({"size": {True: "large", False: "small"}})))


def _summaries(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for (name, size), part in rows.groupby(["map", "size"], sort=False):
        summary: dict[str, Any] = {"map": name, "nuclei": size, "n": len(part)}
        for unit in ("ppb", "percent"):
            recovered, true = part[f"recovered_{unit}"], part[f"true_{unit}"]
            by_nucleus = (recovered - true).groupby(part["abbreviation"].str.partition("_")[0]).mean().abs() / 10
            summary |= {
                f"{unit}: planted": recovered.mean(),
                "true " + unit: true.mean(),
                "off " + unit: by_nucleus.max(),
            }
        yield summary


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the area under the curve of each measure per kind of error."""
    rows = rows.dropna(subset=["wrong"]).astype({"wrong": bool})
    table = []
    for kind in KINDS:
        part = rows[rows["map"].isin(["none", kind])]
        is_wrong = part["wrong"] & (part["map"] == kind)
        areas = {
            name: area(bad(part[name])[is_wrong], bad(part[name])[~part["wrong"]]) for name, bad in MEASURES.items()
        }
        table.append({"kind": kind, "wrong": int(is_wrong.sum()), "right": int((~part["wrong"]).sum()), **areas})
    return pd.DataFrame(table)


if __name__ == "__main__":
    raise SystemExit(main())
