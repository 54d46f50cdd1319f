"""How well ratings and quality measures detect segmentation failures, on simulated maps with simulated failures.

    python benchmarks/ratings.py [--heads N] [--seed S] [--template FILE] [--model MODEL] [--out FILE.tsv]
                                 [--rerate FILE.tsv]

Draws heads as in training; each map is segmented and measured unchanged and with every failure of `failures.py`, of
the map or of its labels, of which the network is then taken to be certain. A
nucleus is *bad* if its Dice with the complete true nucleus is below 0.7, and *wrong* if it is bad or its mean differs
by more than 0.05 ppm from that of the unchanged map within the true outline (with a wrong unit, outlines stay good). A
map is wrong if half of its nuclei are. Wrong nuclei of a failure are compared with all right nuclei of unchanged maps
and of that failure. Exchanged sides leave no trace in the map, so they are listed by failure only. ``--rerate`` applies
the current rules to the measures of an earlier ``--out``. 20 heads are 380 maps: half an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from failures import FAILURES, LABEL_FAILURES, Case
from numpy.typing import NDArray
from reporting import markdown
from scipy import stats

from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.masks import find_missing
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import draw_sample, phantom_head, read_training_head, structure_labels
from bids_dgmseg.lab.simulate.simulated_dataset import scanner_grid, whole_head_view
from bids_dgmseg.measurement.proof import PlantedMap, prove
from bids_dgmseg.measurement.rating import (
    NUCLEUS_RULES,
    RATINGS,
    SCAN_RULES,
    Rating,
    Rule,
    missing_fraction,
    rate_nuclei,
    rate_scan,
    summarize_nuclei,
)
from bids_dgmseg.measurement.scan_measures import ScanMeasures, measure_scan
from bids_dgmseg.measurement.segmented_scan import SegmentedScan
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

BAD_DICE, WRONG_PPM = 0.7, 0.05
SPACING_MM = 1.25
_FIRST_SEED = 3 * 10**13
"""Beyond the seeds of training, of `dgmseg simulate` and of `accuracy.py`."""

UNCHANGED = "none"
PROVED = ("recovered_ppb", "recovered_percent", "repeat_volume_percent", "repeat_ppb")
"""Measures of a proof that are not rated."""
UNDETECTABLE = "left and right exchanged"


def main(argv: Sequence[str] | None = None) -> int:
    """Rate simulated failures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=20, help="number of heads, 19 maps each (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, help="write all nuclei as TSV")
    parser.add_argument("--rerate", type=Path, help="rate the TSV of an earlier run instead of new maps")
    args = parser.parse_args(argv)
    return run_command("ratings", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if args.rerate:
        nuclei = rerate(pd.read_csv(args.rerate, sep="\t", na_values="n/a"))
    else:
        nuclei = pd.DataFrame(rate_failures(get_model(args.model), args.template, args.heads, args.seed))
    if args.out:
        nuclei.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    for title, table in (
        (
            f"{nuclei['head'].nunique()} heads; bad: Dice below {BAD_DICE}; wrong: bad, or {WRONG_PPM} ppm off",
            summarize(nuclei),
        ),
        ("Rules: area under the ROC curve, and percentage of nuclei rated amber or red", by_rule(nuclei)),
        ("Area under the ROC curve by failure", by_failure(nuclei)),
    ):
        print(f"\n{title}\n\n{as_markdown(table)}", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0


def rate_failures(model: Model, template: Path | None, n_heads: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one row per nucleus of each map, or one row without nucleus if the map was rejected."""
    head = read_training_head(template) if template else phantom_head()
    view = whole_head_view(SPACING_MM)
    affine = scanner_grid(view).affine
    for number in range(n_heads):
        sample_seed = _FIRST_SEED + 1_000_000 * seed + number
        chi, labels, _ = draw_sample([(head, 1.0)], view, sample_seed)
        case = Case(Volume(chi.numpy(), affine), structure_labels(labels, model.structures).numpy())
        for place, failure in enumerate((UNCHANGED, *FAILURES, *LABEL_FAILURES)):
            rng = np.random.default_rng((seed, number, place))
            failed = FAILURES[failure](case, rng) if failure in FAILURES else case
            spoil = LABEL_FAILURES.get(failure)
            about = {"failure": failure, "head": number}
            try:
                rows = rate_map(failed, model, unchanged=case, spoil=spoil, rng=rng)
                yield from ({**about, **row} for row in rows)
            except InputError:
                yield {**about, "rejected": True}


def rate_map(
    case: Case,
    model: Model,
    *,
    unchanged: Case,
    spoil: Callable[..., NDArray[np.uint8]] | None,
    rng: np.random.Generator,
    prove_too: bool = False,
) -> list[dict[str, Any]]:
    """Segment, measure and rate a map as the app does; one row per nucleus with truth, measures and ratings.

    `spoil` changes the labels before they are measured, and the probabilities of changed voxels to 0 and 1, and in the
    same way those of each map that a proof plants.
    """
    chi = case.chi.with_array(np.where(find_missing(case.chi.array), np.float32(np.nan), case.chi.array))
    segmented = segment_map(chi, model)
    block = segmented.block
    dseg = chi.with_array(segmented.labels)
    probseg, state = block.probabilities[1:], copy.deepcopy(rng)

    def segment(planted: PlantedMap) -> NDArray[np.uint8]:
        labels = segment_map(planted.chi, model, location=segmented.location).labels
        return spoil(chi.with_array(labels), copy.deepcopy(state)) if spoil else labels

    if spoil is not None:
        spoiled = dseg.with_array(spoil(dseg, rng))
        changed = (spoiled.array != dseg.array)[block.slices]
        dseg = spoiled
        probseg = np.where(changed, np.float32(0), probseg)
        for channel, structure in enumerate(model.structures):
            probseg[channel][changed & (dseg.array[block.slices] == structure.index)] = 1
    scan = SegmentedScan(
        chi=chi, dseg=dseg, probseg=probseg, block=block.slices, structures=model.structures, labelled=block.seen
    )
    if prove_too:
        scan = replace(scan, proof=prove(chi, dseg, model.structures, segment).table)
    rated = measure_scan(scan, model.structures)
    overlap = dice(case.truth, dseg.array, structures=model.structures).dropna(subset="dice")
    true_ppm = [
        float(unchanged.chi.array[unchanged.truth == index].mean()) if index in unchanged.truth else np.nan
        for index in overlap["index"]
    ]
    return _rows(rated, overlap.assign(true_ppm=true_ppm))


def _rows(rated: ScanMeasures, truth: pd.DataFrame) -> list[dict[str, Any]]:
    """Join measures and truth."""
    table = rated.stats.merge(truth[["abbreviation", "dice", "true_ppm"]], on="abbreviation")
    table["bad"] = table["dice"] < BAD_DICE
    table["wrong"] = table["bad"] | ((table["mean_ppm"] - table["true_ppm"]).abs() > WRONG_PPM)
    table = _with_ratings(table.assign(**rated.quality, rejected=False), table["rating"], rated.rating)
    table["absent"] = table["n_voxels"].fillna(0).eq(0)
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def rerate(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Rate nuclei and maps of an earlier run by the current rules."""
    parts = [nuclei[nuclei["rejected"]]]
    for _, rows in nuclei[~nuclei["rejected"]].groupby(["failure", "head"], sort=False):
        absent = rows["absent"].astype(bool)
        table = rows.assign(n_components=rows["n_components"].mask(absent, 0)).reset_index(drop=True)
        ratings = rate_nuclei(table)["rating"]
        table = table.assign(**summarize_nuclei(table.assign(rating=ratings)))
        scan, _ = rate_scan({str(key): value for key, value in table.iloc[0].items()})
        parts.append(_with_ratings(table, ratings, scan))
    return pd.concat(parts, ignore_index=True)


def _with_ratings(table: pd.DataFrame, ratings: pd.Series, scan: Rating) -> pd.DataFrame:
    """Add numeric ratings: 0 green, 1 amber, 2 red."""
    nucleus = ratings.map(RATINGS.index)
    level = RATINGS.index(scan)
    return table.assign(nucleus_rating=nucleus, scan_rating=level, worse_rating=nucleus.clip(lower=level))


def summarize(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Count maps and nuclei per failure, and how often their ratings are not green."""
    rows = []
    for failure, every in nuclei.groupby("failure", sort=False):
        rated = every[every["dice"].notna()].astype({"bad": bool, "wrong": bool, "absent": bool})
        wrong, rating = rated["wrong"], rated["nucleus_rating"]
        maps = rated.groupby("head").agg(wrong=("wrong", "mean"), rating=("scan_rating", "first"))
        half = maps["wrong"] >= 0.5
        rows.append(
            {
                "failure": failure,
                "rejected": every["rejected"].sum(),
                "nuclei": len(rated),
                "bad": rated["bad"].sum(),
                "wrong": wrong.sum(),
                "absent": rated["absent"].sum(),
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


def _measures() -> Iterator[tuple[str, str, Rule | None]]:
    """Yield name, column and rule of everything that is judged; a rule is named by its measure and its worse side."""
    for rule in (*NUCLEUS_RULES, *SCAN_RULES):
        yield " ".join((rule.column, rule.side, *rule.nuclei)), rule.column, rule
    for other in ("nucleus_rating", "scan_rating", "worse_rating", *PROVED):
        yield other, other, None


def _concerned(nuclei: pd.DataFrame, rule: Rule | None) -> pd.Series:
    """Return the rows of the nuclei that a rule is for."""
    return nuclei["abbreviation"].map(lambda name: rule is None or rule.concerns(name.partition("_")[0]))


def _badness(values: pd.Series, rule: Rule | None) -> pd.Series:
    """Transform values so that larger is worse."""
    values = values.astype(float)
    return {"below": -values, "away": values.abs()}.get(rule.side if rule else "", values)


def by_rule(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Compare wrong with right nuclei of all maps; nuclei not found are excluded, since they are always red."""
    every = _found(nuclei[nuclei["failure"] != UNDETECTABLE])
    rows = []
    for name, column, rule in _measures():
        rated = every[_concerned(every, rule)]
        bad, wrong = rated["bad"], rated["wrong"]
        values, badness = rated[column].astype(float), _badness(rated[column], rule)
        raised = values.map(rule.rate) != "green" if rule else values > 0
        rows.append(
            {
                "measure": name,
                "AUC bad": area(badness[bad], badness[~bad]),
                "AUC wrong": area(badness[wrong], badness[~wrong]),
                "wrong raised %": _percent(raised[wrong]),
                "right raised %": _percent(raised[~wrong]),
                "not judged %": _percent(values.isna()),
            }
        )
    return pd.DataFrame(rows)


def by_failure(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Compare wrong nuclei of each failure with right ones of it and of the unchanged maps."""
    rated = _found(nuclei)
    columns: dict[str, list[Any]] = {"measure": [name for name, *_ in _measures()]}
    for failure in nuclei["failure"].unique():
        columns[str(failure)] = areas = []
        for _, column, rule in _measures():
            ours = rated[rated["failure"].isin([failure, UNCHANGED]) & _concerned(rated, rule)]
            badness = _badness(ours[column], rule)
            areas.append(area(badness[ours["wrong"] & (ours["failure"] == failure)], badness[~ours["wrong"]]))
    return pd.DataFrame(columns)


def _found(nuclei: pd.DataFrame) -> pd.DataFrame:
    """Select the nuclei that were found; measures that no map has, such as excluded fractions, are missing."""
    nuclei = nuclei.assign(missing_fraction=missing_fraction(nuclei))
    nuclei = nuclei.reindex(columns=list(dict.fromkeys([*nuclei, *(column for _, column, _ in _measures())])))
    return nuclei[nuclei["dice"].notna() & nuclei["absent"].eq(False)].astype({"bad": bool, "wrong": bool})


def area(bad: pd.Series, good: pd.Series) -> float:
    """Compute the area under the ROC curve, ties counting half; missing values are excluded."""
    bad, good = bad.dropna(), good.dropna()
    if not (len(bad) and len(good)):
        return np.nan
    return float(stats.mannwhitneyu(bad, good).statistic / (len(bad) * len(good)))


def as_markdown(table: pd.DataFrame) -> str:
    """Format a table with areas to two digits and percentages without decimals."""
    return markdown(table, {str(column): 0 if str(column).endswith("%") else 2 for column in table.columns})


if __name__ == "__main__":
    raise SystemExit(main())
