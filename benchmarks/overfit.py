"""Overfitting test: whether each network reaches a Dice above 0.95 on two scans used for training.

    python benchmarks/overfit.py OUT [--model dgm16 dcnnet attunet25d deepqsmseg nnunet2step] [--minutes M]
        [--dataset DATASET]

A failure points to a mismatch of network, loss and samples. Trains as in the paper, but without augmentation, early
stopping and decay of the learning rate, and tests on the same two scans. nnunet2step trains a small version of its
second step around the dentates with the augmentation and schedule of nnU-Net for all of the time, and is tested on
patches of the same scans. OUT gets one folder per model and overfit.tsv. The same command resumes; minutes are per
model, over all calls. DATASET is a labelled BIDS dataset; by default two simulated maps are written to OUT/data.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from reporting import markdown

from bids_dgmseg.arguments import positive_float
from bids_dgmseg.bids.labelled_scans import read_labelled_maps
from bids_dgmseg.errors import run_command
from bids_dgmseg.io.files import read_tsv, write_tsv
from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset
from bids_dgmseg.lab.train.augment import Augmentation
from bids_dgmseg.lab.train.core import State, use_all_cores
from bids_dgmseg.lab.train.learner import RuntimeOptions, build_trainable, train_network
from bids_dgmseg.lab.train.log import PlainLog
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.nnunet.step import NnunetCase, crop_to_cerebellum, train_step
from bids_dgmseg.lab.train.patches import prepare_case
from bids_dgmseg.lab.train.recipe import DiceCrossEntropyObjective, Recipe, Sampling, override
from bids_dgmseg.lab.train.recipes import RECIPES, get_recipe
from bids_dgmseg.lab.train.schedule import Pace
from bids_dgmseg.models.nnunet_folder import FULL_RESOLUTION
from bids_dgmseg.models.registry import MODELS, Model

GOAL = 0.95
NNUNET = "nnunet2step"


def main(argv: Sequence[str] | None = None) -> int:
    """Overfit the models; return 1 if one does not reach the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", nargs="+", default=["dgm16", *RECIPES], choices=["dgm16", *RECIPES, NNUNET])
    parser.add_argument("--minutes", type=positive_float, default=60.0, help="per model (default: %(default)s)")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--learning-rate", type=positive_float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="KEY=VALUE", help="as for `dgmseg train`")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    use_all_cores()
    dataset = (args.dataset or simulate_two(args.out / "data")).absolute()
    rows = []
    for name in args.model:
        model, folder = MODELS[name], args.out / name
        if name == NNUNET:
            rows.append(overfit_nnunet(model, dataset, folder.absolute(), minutes=args.minutes, device=args.device))
        else:
            recipe = override(overfitting(model, minutes=args.minutes, learning_rate=args.learning_rate), args.recipe)
            rows.append(overfit(model, recipe, dataset, folder, device=args.device))
    table = pd.DataFrame(rows)
    write_tsv(table, args.out / "overfit.tsv")
    print(markdown(table))
    return 0 if all(row["passed"] == "yes" for row in rows) else 1


def simulate_two(root: Path) -> Path:
    """Write two simulated maps, unless they exist."""
    if not (root / "participants.tsv").is_file():
        for _ in simulate_dataset(root, n_scans=2, seed=7):
            pass
    return root


def overfitting(model: Model, *, minutes: float, learning_rate: float) -> Recipe:
    """Return the recipe of a model without regularization."""
    recipe = get_recipe(model.name) if model.name in RECIPES else _own_recipe(model)
    pace = Pace(1_000_000, recipe.pace.batch, learning_rate, minutes=minutes)
    return replace(recipe, pace=pace, augmentation=Augmentation())


def _own_recipe(model: Model) -> Recipe:
    """Return a recipe for a model without a published one: complete patches, both scans per step."""
    x, y, z = (round(size / step) for size, step in zip(model.input.patch_mm, model.input.spacing_mm, strict=True))
    return Recipe(
        classes={name: (name,) for name in model.labels},
        sampling=Sampling((x, y, z), (0, 0, 0), "localizer", normalization=model.input.normalization),
        loss=DiceCrossEntropyObjective(),
        pace=Pace(epochs=1, batch=2, learning_rate=1e-3),
    )


def overfit(model: Model, recipe: Recipe, dataset: Path, out: Path, *, device: str = "auto") -> dict[str, object]:
    """Train until the mean Dice reaches the goal or time runs out."""
    maps = read_labelled_maps(dataset, model, warn=print)[:2]
    cases = [prepare_case(one, model, recipe) for one in maps]
    options = RuntimeOptions(device=device)
    network = build_trainable(model, recipe, seed=options.seed)

    def finish_epoch(state: State) -> bool:
        mean, loss = _dice(state, recipe)[0], state.rows[-1]["loss"]
        print(f"{model.name}: epoch {state.epoch}, loss {loss:.4f}, Dice {mean:.3f}", flush=True)
        return mean > GOAL

    state = train_network(network, recipe, cases, cases, out, options, finish_epoch=finish_epoch)
    mean, lowest = _dice(state, recipe)
    return {
        "model": model.name,
        "parameters": sum(value.numel() for value in network.parameters()),
        "epochs": state.epoch,
        "minutes": f"{state.seconds / 60:.1f}",
        "mean_dice": f"{mean:.3f}",
        "lowest_dice": f"{lowest:.3f}",
        "passed": "yes" if mean > GOAL else "no",
    }


def overfit_nnunet(model: Model, dataset: Path, out: Path, *, minutes: float, device: str) -> dict[str, object]:
    """Train the second step of nnunet2step on two scans, which also serve as validation."""

    def cases() -> Iterator[NnunetCase]:
        for one in read_labelled_maps(dataset, model, warn=print)[:2]:
            case = NnunetCase(one.name.replace("_", "-"), one.chi, one.channel_map.array, "train")
            yield crop_to_cerebellum(case, case.labels > 0, margin_mm=20.0)

    length = NnunetTraining(minutes=minutes, device=device, plan="small")
    outcome = train_step("dentate", cases, model.labels, out, length, log=PlainLog())
    from bids_dgmseg.lab.train.nnunet.planner import count_parameters

    plan = json.loads((outcome.folder / "plans.json").read_text(encoding="utf-8"))["configurations"][FULL_RESOLUTION]
    last = read_tsv(out / "dentate_curve.tsv").iloc[-1]
    dice = [float(last[name]) for name in model.labels]
    mean = sum(dice) / len(dice)
    return {
        "model": model.name,
        "parameters": count_parameters(plan["architecture"], classes=len(dice) + 1),
        "epochs": outcome.epochs,
        "minutes": f"{minutes:.1f}",
        "mean_dice": f"{mean:.3f}",
        "lowest_dice": f"{min(dice):.3f}",
        "passed": "yes" if mean > GOAL else "no",
    }


def _dice(state: State, recipe: Recipe) -> tuple[float, float]:
    """Return mean and lowest Dice of the classes after the last epoch."""
    last = [state.rows[-1][name] for name in recipe.classes] if state.rows else [0.0]
    found = [value for value in last if not math.isnan(value)]
    return sum(found) / len(found), min(found)


if __name__ == "__main__":
    raise SystemExit(run_command("overfit", main))
