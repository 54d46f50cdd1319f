"""Table I and Figs. 3 and 4 of Guan et al. 2021 (DeepQSMSeg); see `tables`. --controls: groups of the age curves."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from tables import Candidate, Study, run, scores, show_agreement, write_tables

from bids_dgmseg.lab.evaluate.page import draw_age_curves


def make(study: Study) -> None:
    """Make all tables."""
    study.cross_validate_all()
    baseline = "multiatlasjoint" if find_spec("ants") else "multiatlas"
    if baseline == "multiatlas":
        study.lack("joint label fusion of Multi-Atlas: ANTsPy is not installed (pip install antspyx); locally weighted")
    with study.attempt("Multi-Atlas"):
        participants = [scan.participant for scan in study.labels.scans]
        candidate, atlases = Candidate(baseline, baseline, study.dataset), 2 if study.args.quick else 10
        study.rows["multiatlas"] = study.segment("multiatlas", candidate, participants, atlases=atlases)
    evaluation = study.compare(controls=tuple(study.args.controls))
    write_tables(study, evaluation)
    sides = [f"{name}_{side}" for name in study.paper["nuclei"] for side in "LR"]
    each = scores(evaluation, list(study.rows), sides="each").query(
        "nucleus in @sides and measure in @study.paper['measures']"
    )
    pooled = each.groupby(["method", "measure"], sort=False)["value"].agg(["count", "mean", "std"]).reset_index()
    study.section("table_i_all", "All structures and scans (text of the results)", pooled)
    if "deepqsmseg" not in study.rows:
        return
    show_agreement(study, "Fig 3", evaluation, "deepqsmseg", sides)
    if "ageing" not in evaluation.tables:
        study.lack("Fig. 4: no curves could be fitted; add ages to participants.tsv")
        return
    rater = evaluation.raters[1 + list(study.rows).index("deepqsmseg")]
    ageing, curves = (evaluation.tables[name].query("prediction == @rater") for name in ("ageing", "ageing_curves"))
    points = evaluation.age_points.query("prediction == @rater")
    png = draw_age_curves(points, curves, reference=evaluation.raters[0], prediction=rater)
    study.section("fig_4", "Fig. 4. χ = α (1 - exp(-β age)) + γ", ageing, png=png)


if __name__ == "__main__":
    sys.exit(run(__doc__, make, controls={"nargs": "+", "default": [], "help": "groups whose age curves are fitted"}))
