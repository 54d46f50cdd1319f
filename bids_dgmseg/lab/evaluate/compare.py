"""Agreement of segmentations of the same scans: between raters, or of predictions with a reference."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bids_dgmseg
from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.labelled_scans import find_nuclei, match_labels, read_settings
from bids_dgmseg.bids.masks_and_maps import find_images, match_scans, name_scan
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import write_json, write_tsv
from bids_dgmseg.lab.evaluate.label_images import (
    Pair,
    ScanComparison,
    ScanImages,
    compare_label_images,
    describe_label_issues,
)
from bids_dgmseg.lab.evaluate.summary_tables import (
    EVALUATION_DICTIONARIES,
    agreement_table,
    compare_age_curves,
    find_participants,
    methods_table,
    raters_table,
    summarize,
)
from bids_dgmseg.models.model_folder import TRAINED_ON_MAP
from bids_dgmseg.stats.agreement import OVERLAP_COLUMNS

_SUMMARIZED = tuple(
    name
    for name in OVERLAP_COLUMNS
    if not name.startswith(("index", "abbreviation", "n_", "volume_reference", "volume_prediction"))
)
"""Measures of overlap.tsv in overlap_summary.tsv."""

_RANKED = tuple(name for name in _SUMMARIZED if "difference" not in name)
"""Measures that predictions are compared by: they have a best value."""

_MIN_SCANS = 3
"""Fewest scans for statistics of agreement."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Segmentations to compare, and the folder of the results."""

    reference: Path
    predictions: tuple[Path, ...]
    out: Path
    references: tuple[Path, ...] = ()
    """Label images of the reference dataset; empty: all in it."""
    chi: Path | None = None
    """A map or a dataset of maps."""
    choose: tuple[str, ...] = ()
    """Entities that decide between several segmentations of a scan, such as ``seg-dgm16``."""
    raters: bool = False
    """Compare each pair: all are raters of equal rank."""
    participants: Path | None = None
    """Dataset with the ages, in participants.tsv; by default that of the maps or of the segmentations."""
    controls: tuple[str, ...] = ()
    """Groups whose age curves are fitted together."""
    bilateral: bool = False
    """Add a bilateral row (left and right combined) per nucleus."""


@dataclass(frozen=True)
class Evaluation:
    """Results of a comparison."""

    raters: tuple[str, ...]
    pairs: tuple[Pair, ...]
    n_scans: int
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    tables: Mapping[str, pd.DataFrame]
    """By file name without ``.tsv``."""
    values: pd.DataFrame
    """``quantity``, ``scan``, ``abbreviation`` and one column per rater."""
    age_points: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Values that age curves are fitted to."""


@dataclass(frozen=True)
class TestSet:
    """Labelled scans of a dataset."""

    __test__ = False  # not a class of tests

    scans: tuple[Scan, ...]
    reference: Path
    """Dataset of the labels."""
    images: tuple[Path, ...]
    """Its label images: the dataset may have others, such as those of a model."""
    notes: tuple[str, ...]
    """Lines about labels that are not nuclei."""


def find_test_set(
    dataset: Path, *, derivatives: Sequence[Path] = (), choose: Sequence[str] = (), bilateral: bool = False
) -> TestSet:
    """Find the labelled scans of a dataset; with `bilateral`, a bilateral label (``RN``) is accepted, too.

    Raises
    ------
    InputError
        If there are none, no label is a nucleus, or the labels are in several datasets.
    """
    scans, labels = match_labels(dataset, derivatives=derivatives, choose=choose)
    # the dataset of an image is above its highest folder of a participant
    roots = {
        [folder for folder in path.parents if folder.name.startswith("sub-")][-1].parent for path in labels.values()
    }
    if len(roots) > 1:
        some = ", ".join(sorted(root.name for root in roots))
        raise InputError(f"{dataset.name}: labels in several datasets ({some}); move them into one")
    nuclei, lines = find_nuclei(labels.values(), bilateral=bilateral)
    if not nuclei:
        raise InputError(
            f"{dataset.name}: none of the labels that can be read is a nucleus (DN_L, DN_R, …); name them in the "
            "column abbreviation of dseg.tsv"
        )
    labelled = tuple(scan for scan in scans if scan.chi in labels)
    return TestSet(labelled, roots.pop(), tuple(labels[scan.chi] for scan in labelled), tuple(lines))


def evaluate(options: EvaluationOptions) -> Evaluation:
    """Compare all scans; nothing is written.

    Raises
    ------
    InputError
        If no scan can be compared.
    """
    names = distinct_names((options.reference, *options.predictions))
    pairs = tuple(combinations(names, 2)) if options.raters else tuple((names[0], name) for name in names[1:])
    scans, notes = _match_images(options, names)
    comparisons = [
        compare_label_images(images, pairs=pairs, raters=options.raters, bilateral=options.bilateral)
        for images in scans
    ]
    failures = [line for comparison in comparisons for line in comparison.failures]
    issues = describe_label_issues(comparisons)
    tables = [comparison.overlap for comparison in comparisons if len(comparison.overlap)]
    if not tables:
        if failures:
            raise InputError(failures[0] + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""))
        raise InputError(
            f"{names[0]}: no nucleus in common with {list_some(names[1:])} ({issues[0] if issues else 'no labels'}); "
            "check the abbreviations in dseg.tsv"
        )
    overlap = pd.concat(tables, ignore_index=True)
    compared = set(overlap[["scan", "reference", "prediction"]].itertuples(index=False, name=None))
    values = _pivot_values(comparisons, names, nuclei=set(overlap["abbreviation"]), compared=compared)
    overlap = _complete_overlap(overlap, values)
    results = {
        "overlap": overlap,
        "overlap_summary": summarize(overlap, measures=_SUMMARIZED),
        "agreement": agreement_table(values, raters=names, pairs=pairs, compared=compared),
    }
    if len(names) > 2:
        results["raters"] = raters_table(values, raters=names)
    if len(names) > 2 and not options.raters:
        long = overlap.melt(["scan", "abbreviation", "prediction"], list(_RANKED), "quantity")
        order = long[["quantity", "scan", "abbreviation"]].drop_duplicates()
        methods = methods_table(_pivot(long, order, "prediction", names[1:]), raters=names[1:])
        results |= {"methods": methods} if len(methods) else {}
    n_scans = overlap["scan"].nunique()
    root = find_participants(options.participants, (options.chi, options.reference, *options.predictions))
    ageing = compare_age_curves(values, pairs, root, controls=options.controls)
    if "mean_ppm" not in set(values["quantity"]):
        remedy = "the maps could not be used" if options.chi else "pass susceptibility maps"
        issues.append(f"no susceptibilities to compare; {remedy}")
    if n_scans < _MIN_SCANS:
        issues.append(f"agreement across scans needs at least {_MIN_SCANS} scans, found {n_scans}; see overlap.tsv")
    notes, results = [*notes, *issues, *ageing.notes], {**results, **ageing.tables}
    return Evaluation(names, pairs, n_scans, tuple(notes), tuple(failures), results, values, ageing.points)


def write_evaluation(options: EvaluationOptions, evaluation: Evaluation) -> None:
    """Write tables, data dictionaries and the page; tables of an earlier run that this one lacks are removed.

    Raises
    ------
    InputError
        If the output folder cannot be written.
    """
    from bids_dgmseg.lab.evaluate.page import PAGE, write_evaluation_page

    out = options.out
    paths = (options.reference, *options.predictions)
    facts: dict[str, Any] = {
        "raters": dict(zip(evaluation.raters, map(str, paths), strict=True)),
        "reference": None if options.raters else evaluation.raters[0],
        "pairs": [list(pair) for pair in evaluation.pairs],
        "chi": str(options.chi) if options.chi else None,
        "choose": list(options.choose),
        "controls": list(options.controls),
        "bilateral": options.bilateral,
        "n_scans": evaluation.n_scans,
        "notes": list(evaluation.notes),
        "failures": list(evaluation.failures),
        "version": bids_dgmseg.__version__,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).unlink(missing_ok=True)  # an interrupted run must not leave a page of other tables
        for name, columns in EVALUATION_DICTIONARIES.items():
            table, dictionary = out / f"{name}.tsv", out / f"{name}.json"
            if name in evaluation.tables:
                write_tsv(evaluation.tables[name], table, float_format="%.7g")
                write_json(columns, dictionary)
            else:
                table.unlink(missing_ok=True)
                dictionary.unlink(missing_ok=True)
        write_json(facts, out / "evaluation.json")
        values, points = evaluation.values, evaluation.age_points
        write_evaluation_page(out, tables=evaluation.tables, values=values, age_points=points, facts=facts)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another `out`") from error


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the shortest names that distinguish files or folders.

    >>> distinct_names([Path("/a/first/seg"), Path("/a/second/seg")])
    ('first/seg', 'second/seg')
    >>> distinct_names([Path("/a/x.nii.gz"), Path("/a/x.nii.gz")])
    ('x', 'x (2)')
    """
    stems = [path.with_name(path.name.removesuffix(".gz").removesuffix(".nii")) for path in paths]
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in stems) + 1):
        names = ["/".join(path.parts[-depth:]) for path in stems]
        if len(set(names)) == len(set(stems)):
            break
    counts = [names[:place].count(name) for place, name in enumerate(names)]
    return tuple(f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True))


def _match_images(options: EvaluationOptions, names: Sequence[str]) -> tuple[list[ScanImages], list[str]]:
    """Match the images of each scan; notes list scans without a partner."""
    paths = (options.reference, *options.predictions)
    for path in (*paths, options.chi):
        if path and not path.exists():
            raise InputError(f"{path}: no such file or folder; check {'`chi`' if path == options.chi else 'the path'}")
    if all(path.is_file() for path in paths):
        chi = options.chi
        if chi and chi.is_dir():
            maps = match_scans([options.reference], find_images(chi, "Chimap"), choose=options.choose)
            if not maps:
                scan = name_scan(options.reference)
                raise InputError(f"{chi.name}: no _Chimap of {scan}; pass the file of the map as `chi`")
            chi = maps[options.reference]
        return [ScanImages(name_scan(options.reference), dict(zip(names, paths, strict=True)), chi)], []
    if file := next((path for path in paths if path.is_file()), None):
        raise InputError(f"{file.name}: a file cannot be compared with folders; pass only files, or only datasets")
    return _match_datasets(options, names)


def _match_datasets(options: EvaluationOptions, names: Sequence[str]) -> tuple[list[ScanImages], list[str]]:
    reference = list(options.references) or find_images(options.reference, "dseg")
    partners: dict[Path, dict[str, Path]] = {path: {names[0]: path} for path in reference}
    notes = []
    for name, root in zip(names[1:], options.predictions, strict=True):
        images = find_images(root, "dseg")
        matched = match_scans(reference, images, choose=options.choose)
        for path, partner in matched.items():
            partners[path][name] = partner
        notes += _list_unmatched(names[0], name, reference, matched.keys())
        notes += _list_unmatched(name, names[0], images, matched.values())
        notes += _list_trained(name, matched.values())
    matches = {path: by_rater for path, by_rater in partners.items() if len(by_rater) > 1}
    if not matches:
        raise InputError(f"{names[0]}: no scan in common with {list_some(names[1:])}; check the entities in the names")
    maps: Mapping[Path, Path] = {}
    if options.chi:
        if options.chi.is_file():
            raise InputError(f"{options.chi.name}: a single map for datasets; pass the dataset of the maps as `chi`")
        maps = match_scans(list(matches), find_images(options.chi, "Chimap"), choose=options.choose)
        notes += _list_unmatched(names[0], options.chi.name, list(matches), maps.keys(), effect="no susceptibility")
    return [ScanImages(name_scan(path), by_rater, maps.get(path)) for path, by_rater in matches.items()], notes


def _list_unmatched(
    name: str, other: str, paths: Iterable[Path], matched: Iterable[Path], *, effect: str = "left out"
) -> list[str]:
    """List scans without a partner; further segmentations of a matched scan were excluded by `choose`."""
    unmatched = set(map(name_scan, paths)) - set(map(name_scan, matched))
    return [f"{name}: no partner in {other} for {list_some(unmatched)}; {effect}"] if unmatched else []


def _list_trained(name: str, paths: Iterable[Path]) -> list[str]:
    """List scans whose segmentation says, in its ``_qc.json``, that its networks were trained on the map."""
    trained = [name_scan(path) for path in paths if read_settings(path).get(TRAINED_ON_MAP)]
    if not trained:
        return []
    return [f"{name}: trained on {list_some(trained)}, whose agreement is better than that of other scans"]


def _pivot_values(
    comparisons: Sequence[ScanComparison],
    names: Sequence[str],
    *,
    nuclei: Collection[str],
    compared: Collection[tuple[str, ...]],
) -> pd.DataFrame:
    """Return one column of values per rater; a quantity that only one rater has is left out.

    Values of a scan are missing for raters that could not be compared with any other in it.
    """
    long = pd.concat([comparison.values for comparison in comparisons], ignore_index=True)
    long = long[long["abbreviation"].isin(nuclei)].reset_index(drop=True)
    usable = {(scan, rater) for scan, *pair in compared for rater in pair}
    unusable = [key not in usable for key in zip(long["scan"], long["rater"], strict=True)]
    long["value"] = long["value"].mask(np.array(unusable))
    keys = ["quantity", "scan", "abbreviation"]
    order = long[keys].drop_duplicates().sort_values("quantity", ascending=False, kind="stable")
    wide = _pivot(long, order, "rater", names)
    several = wide.groupby("quantity")[list(names)].count().gt(0).sum(axis=1) > 1
    return wide[wide["quantity"].map(several)].reset_index(drop=True)


def _pivot(long: pd.DataFrame, order: pd.DataFrame, column: str, names: Sequence[str]) -> pd.DataFrame:
    """Spread ``value`` over one column per name, with rows in the given order of keys."""
    wide = long.set_index([*order.columns, column])["value"].unstack(column).reindex(columns=list(names))
    return wide.reindex(pd.MultiIndex.from_frame(order)).reset_index()


def _complete_overlap(overlap: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Add the participant in front and the mean susceptibilities at the end."""
    entities = [split_entities(scan) for scan in overlap["scan"]]
    table = overlap.drop(columns="index")
    table.insert(0, "participant_id", [f"sub-{named['sub']}" if "sub" in named else None for named in entities])
    table.insert(1, "session_id", [f"ses-{named['ses']}" if "ses" in named else None for named in entities])
    ppm = values[values["quantity"] == "mean_ppm"].set_index(["scan", "abbreviation"])
    for side in ("reference", "prediction"):
        keys = zip(table["scan"], table["abbreviation"], table[side], strict=True)
        means = [ppm.at[(scan, name), rater] if (scan, name) in ppm.index else None for scan, name, rater in keys]
        table[f"mean_{side}_ppm"] = pd.Series(means, index=table.index, dtype=float)
    return table[list(EVALUATION_DICTIONARIES["overlap"])]
