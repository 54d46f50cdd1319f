"""How well ratings and quality measures find bad segmentations, from simulated maps with simulated failures.

    python benchmarks/flags.py [--heads N] [--seed S] [--template FILE] [--model MODEL] [--out FILE.tsv]
                               [--again FILE.tsv]

Draws heads as training does, leaves each as it is and spoils it in every way of `failures.py`, segments all maps and
measures them as the app does. A nucleus is *bad* if its Dice with the whole true nucleus is below 0.7, and *wrong* if
it is bad, or its mean is more than 0.05 ppm from that of the untouched map inside the true outline: a wrong unit leaves
outlines good. A map is wrong if half of its nuclei are. Wrong nuclei of a failure are set against all right ones, of
the untouched maps and of that failure. Maps with left and right exchanged show nothing wrong: they are in the tables by
failure only. With ``--again`` the measures of an earlier ``--out`` are judged by the present rules. Prints Markdown; 20
heads are 200 maps, in six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from failures import FAILURES, Case
from scipy import stats

from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.rating import NUCLEUS_RULES, RATINGS, SCAN_RULES, Rating, Rule, rate_nuclei, rate_scan
from bids_dgmseg.measurement.scan import ScanMeasures, SegmentedScan, measure_scan
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.dataset import read_template, scanner_grid, whole_head_view
from bids_dgmseg.simulate.sample import draw_sample, nuclei_labels, phantom_head, template_head
from bids_dgmseg.stats.overlap import dice

BAD_DICE, WRONG_PPM = 0.7, 0.05
SPACING_MM = 1.25
_FIRST_SEED = 3 * 10**13
"""Away from the seeds of training, of `dgmseg simulate` and of `accuracy.py`."""
UNTOUCHED = "none"
UNSEEN = "left and right exchanged"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, spoil, segment, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=20, help="heads to draw; ten maps each (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", type=Path, help="label template to draw heads from (default: the phantom)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, help="all nuclei as TSV")
    parser.add_argument("--again", type=Path, help="TSV of an earlier run, to judge in place of new maps")
    args = parser.parse_args(argv)
    return run_command("flags", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if args.again:
        nuclei = judge_again(pd.read_csv(args.again, sep="\t", na_values="n/a"))
    else:
        nuclei = pd.DataFrame(try_all(get_model(args.model), args.template, args.heads, args.seed))
    if args.out:
        nuclei.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    for title, table in (
        (
            f"{nuclei['head'].nunique()} heads; bad: Dice below {BAD_DICE}; wrong: bad, or {WRONG_PPM} ppm off",
            summarize(nuclei),
        ),
        ("Rules: area under the curve, and the share of nuclei that they flag (amber or red)", by_rule(nuclei)),
        ("Area under the curve by failure", by_failure(nuclei)),
    ):
        print(f"\n{title}\n\n{as_markdown(table)}", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0


def try_all(model: Model, template: Path | None, n_heads: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row a nucleus of each map; one without nucleus where the map was refused."""
    head = template_head(read_template(template)) if template else phantom_head()
    view = whole_head_view(SPACING_MM)
    affine = scanner_grid(view).affine
    for number in range(n_heads):
        sample_seed = _FIRST_SEED + 1_000_000 * seed + number
        chi, labels = draw_sample([(head, 1.0)], view, sample_seed)
        case = Case(Volume(chi.numpy(), affine), nuclei_labels(labels).numpy())
        for place, failure in enumerate((UNTOUCHED, *FAILURES)):
            rng = np.random.default_rng((seed, number, place))
            spoilt = case if failure == UNTOUCHED else FAILURES[failure](case, rng)
            about = {"failure": failure, "head": number}
            try:
                yield from ({**about, **row} for row in judge_map(spoilt, model, untouched=case))
            except InputError:
                yield {**about, "refused": True}


def judge_map(case: Case, model: Model, *, untouched: Case) -> list[dict[str, Any]]:
    """Segment a map and measure it as the app does; truth, measures and ratings, a row a nucleus."""
    segmented = segment_map(case.chi, model)
    block, box = segmented.block, segmented.location.box
    dseg = case.chi.with_array(segmented.labels)
    probseg = block.probabilities[1:]
    scan = SegmentedScan(case.chi, dseg, probseg, block.slices, model.structures, labelled=block.seen)
    found = measure_scan(scan, box=box)
    overlap = dice(case.truth, dseg.array, structures=model.structures).dropna(subset="dice")
    true_ppm = [
        float(untouched.chi.array[untouched.truth == index].mean()) if index in untouched.truth else np.nan
        for index in overlap["index"]
    ]
    return _rows(found, overlap.assign(true_ppm=true_ppm))


def _rows(found: ScanMeasures, truth: pd.DataFrame) -> list[dict[str, Any]]:
    """Join what was measured with what is true of it."""
    table = found.stats.merge(truth[["abbreviation", "dice", "true_ppm"]], on="abbreviation")
    table["bad"] = table["dice"] < BAD_DICE
    table["wrong"] = table["bad"] | ((table["mean_ppm"] - table["true_ppm"]).abs() > WRONG_PPM)
    table = _with_ratings(table.assign(**found.quality, refused=False), table["rating"], found.rating)
    table["absent"] = table["n_voxels"].fillna(0).eq(0)
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def judge_again(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Give nuclei and maps of an earlier run their ratings by the rules as they are now."""
    parts = [nuclei[nuclei["refused"]]]
    for _, rows in nuclei[~nuclei["refused"]].groupby(["failure", "head"], sort=False):
        absent = rows["absent"].astype(bool)
        table = rows.assign(n_components=rows["n_components"].mask(absent, 0)).reset_index(drop=True)
        ratings = rate_nuclei(table)["rating"]
        scan, _ = rate_scan({str(key): value for key, value in table.iloc[0].items()}, ratings.tolist())
        table["red_nuclei_fraction"] = (ratings == "red").mean()
        parts.append(_with_ratings(table, ratings, scan))
    return pd.concat(parts, ignore_index=True)


def _with_ratings(table: pd.DataFrame, ratings: pd.Series, scan: Rating) -> pd.DataFrame:
    """Add ratings as numbers: 0 green, 1 amber, 2 red."""
    nucleus = ratings.map(RATINGS.index)
    level = RATINGS.index(scan)
    return table.assign(nucleus_rating=nucleus, scan_rating=level, worse_rating=nucleus.clip(lower=level))


def summarize(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Count, a row a failure, what became of its maps, and how often ratings were not green."""
    rows = []
    for failure, every in nuclei.groupby("failure", sort=False):
        found = every[every["dice"].notna()].astype({"bad": bool, "wrong": bool, "absent": bool})
        wrong, rating = found["wrong"], found["nucleus_rating"]
        maps = found.groupby("head").agg(wrong=("wrong", "mean"), rating=("scan_rating", "first"))
        half = maps["wrong"] >= 0.5
        rows.append(
            {
                "failure": failure,
                "refused": every["refused"].sum(),
                "nuclei": len(found),
                "bad": found["bad"].sum(),
                "wrong": wrong.sum(),
                "absent": found["absent"].sum(),
                "wrong: red %": _percent(rating[wrong] > 1),
                "wrong: not green %": _percent(rating[wrong] > 0),
                "right: red %": _percent(rating[~wrong] > 1),
                "right: not green %": _percent(rating[~wrong] > 0),
                "maps wrong": half.sum(),
                "of these not green %": _percent(maps["rating"][half] > 0),
                "right maps not green %": _percent(maps["rating"][~half] > 0),
            }
        )
    return pd.DataFrame(rows)


def _percent(share: pd.Series) -> float:
    return float(100 * share.mean()) if len(share) else np.nan


def _flags() -> Iterator[tuple[str, str, Rule | None]]:
    """Name all that is judged: a rule by its measure and the side that is worse."""
    for rule in (*NUCLEUS_RULES, *SCAN_RULES):
        yield f"{rule.column} {rule.side}", rule.column, rule
    for rating in ("nucleus_rating", "scan_rating", "worse_rating"):
        yield rating, rating, None


def _suspicion(values: pd.Series, rule: Rule | None) -> pd.Series:
    """Order values so that more is worse."""
    values = values.astype(float)
    return {"below": -values, "away": values.abs()}.get(rule.side if rule else "", values)


def by_rule(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Set wrong nuclei of all maps against right ones; those not found are left out, for they are red."""
    found = _found(nuclei[nuclei["failure"] != UNSEEN])
    bad, wrong = found["bad"], found["wrong"]
    rows = []
    for name, column, rule in _flags():
        values, suspicion = found[column].astype(float), _suspicion(found[column], rule)
        flagged = values.map(rule.rate) != "green" if rule else values > 0
        rows.append(
            {
                "flag": name,
                "AUC bad": area(suspicion[bad], suspicion[~bad]),
                "AUC wrong": area(suspicion[wrong], suspicion[~wrong]),
                "wrong flagged %": _percent(flagged[wrong]),
                "right flagged %": _percent(flagged[~wrong]),
                "not judged %": _percent(values.isna()),
            }
        )
    return pd.DataFrame(rows)


def by_failure(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Set the wrong nuclei of each failure against the right ones of it and of the untouched maps."""
    found = _found(nuclei)
    columns: dict[str, list[Any]] = {"flag": [name for name, *_ in _flags()]}
    for failure in nuclei["failure"].unique():
        ours = found[found["failure"].isin([failure, UNTOUCHED])]
        wrong = ours["wrong"] & (ours["failure"] == failure)
        columns[str(failure)] = [
            area(suspicion[wrong], suspicion[~ours["wrong"]])
            for suspicion in (_suspicion(ours[column], rule) for _, column, rule in _flags())
        ]
    return pd.DataFrame(columns)


def _found(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Keep the nuclei that were found."""
    return nuclei[nuclei["dice"].notna() & nuclei["absent"].eq(False)].astype({"bad": bool, "wrong": bool})


def area(bad: pd.Series, good: pd.Series) -> float:
    """Compute the chance that a bad value is above a good one, ties by half; what is missing does not count."""
    bad, good = bad.dropna(), good.dropna()
    if not (len(bad) and len(good)):
        return np.nan
    return float(stats.mannwhitneyu(bad, good).statistic / (len(bad) * len(good)))


def as_markdown(table: pd.DataFrame) -> str:
    """Lay a table out: areas with two digits, percentages with none."""
    lines = ["| " + " | ".join(table.columns) + " |", "| --- " * len(table.columns) + "|"]
    for _, row in table.iterrows():
        lines.append("| " + " | ".join(_cell(str(column), value) for column, value in row.items()) + " |")
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) and not column.endswith("%") else f"{value:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
