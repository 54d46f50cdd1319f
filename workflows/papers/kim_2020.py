"""Tables I to V and S-I to S-V, Figs. 5 to 7, 11 and S-1 of Kim et al. 2020 (DCN-Net); see `tables`.

Rows of other programs: --labels-of suit=… deeplab=… cenet=… deepmedic=… livianet=…
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from tables import Candidate, Study, run, write_tables

from bids_dgmseg.lab.train.recipe import read_recipe
from bids_dgmseg.models.model_folder import load_object
from bids_dgmseg.models.registry import MODELS


def make(study: Study) -> None:
    """Make all tables."""
    study.cross_validate_all()
    if not study.unlabelled:
        study.lack("self-training: no maps without labels")
    for name in ("dcn", "unet") if study.unlabelled else ():
        train_on_pseudo_labels(study, name)
    sizes, model = [], MODELS["dcnnet"]
    for name in ("unet", "attention-unet", "fc-densenet", "dcn"):
        recipe = read_recipe(model, *study.paper["trainings"][name])
        network = load_object(recipe.network or model.network)(1, 3, **recipe.arch_of(model))
        sizes.append({"network": name, "parameters": sum(weights.numel() for weights in network.parameters())})
    study.lack("Table I: DeepLab v3+ and CE-Net are no networks of this program")
    study.section("table_i", "Table I (without DeepLab v3+ and CE-Net)", pd.DataFrame(sizes))
    write_tables(study, study.compare())
    for name, loss in (("hybrid", []), ("dice", ["dcnnet-dice"])):
        with study.attempt(f"Fig. S-1, {name} loss"):
            options = ["--folds", study.folds, "--fold", 0]
            curve = (
                study.train(f"loss-{name}", "dcnnet", "dcnnet-joint", *loss, options=options) / "fold_0" / "curve.tsv"
            )
            table, png = pd.read_csv(curve, sep="\t"), curve.with_suffix(".png").read_bytes()
            study.section(f"fig_s_1_{name}", f"Fig. S-1. FC-Dense ContextNet, {name} loss", table, png=png)


def train_on_pseudo_labels(study: Study, name: str) -> None:
    """Train with both strategies on the labels that the networks of the same fold make for maps without labels."""
    recipes, seeds = study.paper["trainings"][name], range(1, 1 + (2 if study.args.quick else study.paper["teachers"]))

    def teach(fold: int, seed: int = 1) -> Path:
        options = ["--folds", study.folds, "--fold", fold, "--seed", seed]
        teacher = f"{name}-{fold}" if seed == 1 else f"{name}-seed{seed}-{fold}"
        weights = study.train(teacher, "dcnnet", *recipes, options=options)
        return study.segment(f"pseudo-{teacher}", Candidate("dcnnet", "dcnnet", weights), None)

    for key, options in {
        "pre": lambda fold: ["--folds", 1, "--derivatives", teach(fold), "--choose", "seg-dcnnet"],
        "tuned": lambda fold: ["--folds", study.folds, "--fold", fold, "--pretrain-on", teach(fold)],
        "distilled": lambda fold: [
            "--folds",
            study.folds,
            "--fold",
            fold,
            "--distill",
            *(teach(fold, n) for n in seeds),
        ],
    }.items():
        study.cross_validate(f"{name}-{key}", "dcnnet", *recipes, options=options)


if __name__ == "__main__":
    sys.exit(run(__doc__, make))
