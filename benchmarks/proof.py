"""Whether the proof on a map recovers what a true change would, and whether it shows outlines that are wrong.

    python benchmarks/proof.py [--heads N] [--seed S] [--template FILE] [--model MODEL] [--out FILE.tsv]

*True* changes: each head is simulated again with 10 ppb more in half of its nuclei and 10 % less volume of the others,
in their true outlines and before the acquisition; what the model measures of that is compared with what the proof on
the unchanged map recovers. The true recovery of ppb is relative to ``map_ppb``, what the reconstruction leaves of it in
the true outline, which a proof on the map cannot see. *Wrong* nuclei are those of `ratings.py`; those of each kind of
error, in the first half of the heads, are compared with all right ones of that kind and of unchanged maps; heads with
even numbers choose limits of ratings. ``--out`` is resumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conditions import Condition, conditions
from failures import FAILURES, LABEL_FAILURES, Case
from ratings import PROVED, UNCHANGED, as_markdown, by_failure, rate_map
from torch import Tensor, from_numpy

from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW, phantom_head, read_training_head, structure_labels
from bids_dgmseg.lab.simulate.simulated_dataset import whole_head_view
from bids_dgmseg.measurement.proof import PLANTED_PPB, PlantedMap, Planting
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import STRUCTURES

_FIRST_SEED = 4 * 10**13
CONDITIONS = ("mid-range, 1 mm", "SNR 20", "1 × 1 × 3 mm", "total variation")
LARGE = ("CN", "PUT", "GP", "DN")
KINDS = (UNCHANGED, "low SNR", *list(LABEL_FAILURES)[:1], "slices of 5 mm", "motion")
SHAPE_MM = (96, 120, 96)
"""Field of view, centred on the nuclei; whole heads take five times as long to simulate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prove simulated maps and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="heads, the first half also with errors (default: 24)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=Path("proof.tsv"), help="table of all nuclei, which is resumed")
    args = parser.parse_args(argv)
    return run_command("proof", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model, every = get_model(args.model), {condition.name: condition for condition in conditions()}
    head = read_training_head(args.template) if args.template else phantom_head()
    every |= {kind: Condition(kind, whole_head_view(1.25)) for kind in KINDS}
    done = pd.read_csv(args.out, sep="\t", na_values="n/a") if args.out.is_file() else pd.DataFrame()
    with_errors = (args.heads + 1) // 2
    for number, name in (*product(range(with_errors), KINDS), *product(range(args.heads), CONDITIONS)):
        if len(done) and ((done["head"] == number) & (done["failure"] == name)).any():
            continue
        view, seed = every[name].view, _FIRST_SEED + 1_000_000 * args.seed + number
        x, y, z = (round(size / view.spacing_mm / 3) * 3 for size in SHAPE_MM)
        view = replace(view, shape=(x, y, z), centre_mm=SEGMENTER_VIEW.centre_mm)
        rows = prove_map(replace(every[name], view=view), head, seed, model)
        done = pd.concat([done, rows.assign(head=number, failure=name)], ignore_index=True)
        done.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    print(f"\nRecovered of 10 and what true changes give\n\n{as_markdown(summarize_truth(done))}")
    wrong = done[done["failure"].isin(KINDS)].assign(**{name: (done[name] - 10).abs() for name in PROVED[:2]})
    for part, name in enumerate(("choose limits", "report")):
        print(f"\nArea under the ROC curve, heads that {name}\n")
        print(as_markdown(by_failure(wrong[wrong["head"] % 2 == part])))
    return 0


def prove_map(condition: Condition, head: Any, seed: int, model: Model) -> pd.DataFrame:
    """Prove a map with an error, or one without together with true changes of its head; no nucleus if rejected."""
    case = Case(*condition.draw(head, seed, model.structures))
    rng, name = np.random.default_rng(seed), condition.name
    options: dict[str, Any] = {"unchanged": case, "spoil": LABEL_FAILURES.get(name), "rng": rng}
    try:
        failed = FAILURES[name](case, rng) if name in FAILURES else case
        rows = pd.DataFrame(rate_map(failed, model, prove_too=True, **options)).set_index("abbreviation")
    except InputError:
        return pd.DataFrame({"rejected": [True]})
    for number in (0, 1) if name in CONDITIONS else ():
        planted: list[PlantedMap] = []

        def change(chi: Tensor, labels: Tensor, number: int = number, planted: list[PlantedMap] = planted) -> Tensor:
            """Change the true susceptibility of the head."""
            truth = Volume(
                structure_labels(labels, model.structures).numpy(), np.diag([condition.view.spacing_mm] * 3 + [1])
            )
            maps = Planting.of(truth.with_array(chi.numpy() + 1), truth, model.structures).maps()  # 0 would be missing
            planted.extend(each for each, _ in zip(maps, range(number + 1), strict=False))
            return from_numpy(planted[-1].chi.array - 1)

        changed = Case(*condition.draw(head, seed, model.structures, change=change))
        after = pd.DataFrame(rate_map(changed, model, **options)).set_index("abbreviation")
        for nucleus in planted[-1].ppb:
            rows.loc[nucleus, "true_ppb"] = 1000 * float((after["mean_ppm"] - rows["mean_ppm"])[nucleus])
            inside = (case.truth == STRUCTURES.named(nucleus).index) & (changed.truth == case.truth)
            rows.loc[nucleus, "map_ppb"] = 1000 * float((changed.chi.array - case.chi.array)[inside].mean())
        for nucleus, percent in planted[-1].percent["recovered_percent"].items():
            rows.loc[nucleus, "true_percent"] = (
                1000 * float((after["volume_mm3"] / rows["volume_mm3"])[nucleus] - 1) / percent
            )
    return rows.reset_index()


def summarize_truth(rows: pd.DataFrame) -> pd.DataFrame:
    """Return means per condition and size of the nuclei.

    True ppb are relative to ``map_ppb``; ``off`` is the largest mean difference of a nucleus.
    """
    rows = rows.dropna(subset=["true_ppb"])
    rows = rows.assign(nucleus=rows["abbreviation"].str.partition("_")[0]).assign(
        size=lambda table: np.where(table["nucleus"].isin(LARGE), "large", "small")
    )
    rows["true_ppb"] *= PLANTED_PPB / rows.groupby(["failure", "nucleus"])["map_ppb"].transform("mean")
    table = []
    for (name, size), part in rows.groupby(["failure", "size"], sort=False):
        row: dict[str, Any] = {"condition": name, "nuclei": size, "n": len(part)}
        for unit in ("ppb", "percent"):
            pair = part[[f"recovered_{unit}", f"true_{unit}"]]
            off = pair.groupby(part["nucleus"]).mean().diff(axis=1).iloc[:, 1].abs().max()
            row |= {str(key): value for key, value in pair.mean().items()} | {f"off {unit}": off}
        row["map_ppb"] = part["map_ppb"].mean()
        table.append(row)
    return pd.DataFrame(table)


if __name__ == "__main__":
    raise SystemExit(main())
