"""Results of DentateSeg: internal and external test, reliability of raters, volume and susceptibility; see `tables`.

--external DATASET: other sites, with manual labels; --labels-of mricloud=FOLDER: of that dataset; --raters FOLDER ...:
labels of the same scans; --controls: groups whose slope adjusts susceptibilities for volume (default: all).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import linregress
from tables import Candidate, Study, absolute_path, read_json, run, show_agreement, simulate, write_tables

from bids_dgmseg.bids.masks_and_maps import find_label_table
from bids_dgmseg.image.grids import Grid, covering_block
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import read_labels
from bids_dgmseg.models.registry import MODELS, weights_folder
from bids_dgmseg.segmentation.engines import choose_labels
from bids_dgmseg.segmentation.segment import localize
from bids_dgmseg.stats.agreement import pearson

SIDES = ("DN_L", "DN_R")


def make(study: Study) -> None:
    """Make all tables."""
    args, others, study.rows = study.args, study.rows, {}
    with study.attempt("DentateSeg"):
        weights = study.train("nnunet2step", "nnunet2step", options=["--folds", study.folds, "--fold", 0])
        test = read_json(weights / "training.json")["folds"][0]["test"]
        weights = weights_folder(MODELS["nnunet2step"]) if args.quick else weights  # seconds find no cerebellum
        evaluate_tool(study, "Internal test", weights, test)
        locate_alone(study, weights, test)
        if args.quick and not args.external:
            args.external = study.out / "external"
            if not args.external.exists():
                simulate(args.external, study.paper["external_heads"])
        if args.external:
            external = replace(study, dataset=args.external, rows=others)
            evaluate_tool(external, "External test", weights, [scan.participant for scan in external.labels.scans])
        else:
            study.lack("External test: no --external DATASET")
    if len(args.raters) < 2:
        study.lack("Reliability: no labels of two or more raters; pass --raters FOLDER FOLDER")
        return
    evaluation = study.compare(args.raters[1:], args.raters[0], raters=True, choose=tuple(args.choose))
    for table, columns in (
        ("agreement", "quantity n icc21 icc21_low icc21_high"),
        ("overlap_summary", "measure n mean sd"),
    ):
        shown = evaluation.tables[table].query("abbreviation in @SIDES")
        shown = shown[["reference", "prediction", "abbreviation", *columns.split()]]
        study.section(f"reliability_{table}", f"Reliability of raters, {table}", shown)


def evaluate_tool(study: Study, name: str, weights: Path, participants: list[str]) -> None:
    """Compare the tool, and others, with the labels of participants."""
    candidate = Candidate("dentateseg", "nnunet2step", weights)
    study.rows["dentateseg"] = study.segment(name.replace(" ", ""), candidate, participants)
    evaluation = study.compare()
    write_tables(study, evaluation, sides="each", only=[name])
    for method in study.rows:
        show_agreement(study, f"{name} {method}", evaluation, method, SIDES)
    rater = evaluation.raters[1 + list(study.rows).index("dentateseg")]
    table = evaluation.values.pivot(index=["scan", "abbreviation"], columns="quantity", values=rater).reset_index()
    people = study.dataset / "participants.tsv"
    groups = pd.read_csv(people, sep="\t").set_index("participant_id").get("group") if people.is_file() else None
    has_controls = groups is not None and bool(study.args.controls)
    if not has_controls:
        study.lack(f"{name}: slope of χ on volume in controls (--controls GROUP, column group); that of all is used")
    rows = []
    for _, part in table.query("abbreviation in @SIDES").dropna().groupby("abbreviation"):
        controls = part
        if has_controls:
            controls = part[part["scan"].str.split("_").str[0].map(groups).isin(study.args.controls)]
        if len(controls) > 2:
            volume, chi = controls["volume_mm3"], controls["mean_ppm"]
            slope, r = linregress(volume, chi).slope, pearson(volume.to_numpy(), chi.to_numpy())
            adjusted = part["mean_ppm"] - slope * (part["volume_mm3"] - volume.mean())
            rows.append(part.assign(r=r.value, p=r.p, slope_ppm_per_mm3=slope, adjusted_ppm=adjusted))
    if rows:
        study.section(f"{name.lower().replace(' ', '_')}_adjusted", f"{name}, χ and volume", pd.concat(rows))


def locate_alone(study: Study, weights: Path, test: list[str]) -> None:
    """Evaluate step one alone: how much of the nuclei is inside its box."""
    model, rows = choose_labels(MODELS["nnunet2step"], weights)[0], []
    for scan, image in zip(study.labels.scans, study.labels.images, strict=True):
        if scan.participant in test:
            chi, labels = check_chi(scan.chi, scan.sidecar).chi_ppm, read_labels(image).array
            box = localize(chi, model, weights=weights, device=study.args.device).box
            names = find_label_table(image).abbreviations
            nuclei = np.isin(labels, [value for value, name in names.items() if name in SIDES])
            inside = nuclei[covering_block(Grid(chi.shape, chi.affine), box)].sum() / nuclei.sum()
            rows.append({"scan": scan.name, "fraction_inside": inside})
    study.section("step_one", "Step one alone: fraction of the dentate nuclei in its box", pd.DataFrame(rows))


if __name__ == "__main__":
    several = {"nargs": "+", "default": []}
    more = {"external": {"type": absolute_path}, "raters": {"type": absolute_path, **several}, "controls": several}
    sys.exit(run(__doc__, make, **more))
