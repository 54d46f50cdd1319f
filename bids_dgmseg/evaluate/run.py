"""Compare segmentations of the same scans and write tables, plots and a page of their agreement."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bids_dgmseg
from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.segmentations import find_images, match_scans, name_scan
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.evaluate.columns import AGREEMENT_COLUMNS, METHODS_COLUMNS, RATERS_COLUMNS, SUMMARY_COLUMNS
from bids_dgmseg.evaluate.compare_scan import Comparison, Notes, Pair, Task, compare_scan
from bids_dgmseg.evaluate.tables import agreement_table, methods_table, raters_table, summarize
from bids_dgmseg.io.files import write_json, write_text
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

MEASURES = (
    "dice",
    "jaccard",
    "volume_similarity",
    "volume_difference_mm3",
    "volume_difference_percent",
    "hausdorff_mm",
    "hd95_mm",
    "mean_surface_distance_mm",
    "mean_surface_distance_area_mm",
    "centre_distance_mm",
)
"""Columns of overlap.tsv that are summarized."""

_COMPARED = (
    "dice",
    "jaccard",
    "volume_similarity",
    "hausdorff_mm",
    "hd95_mm",
    "mean_surface_distance_mm",
    "mean_surface_distance_area_mm",
    "centre_distance_mm",
)
"""Measures by which predictions are compared with one another: they have a best value."""

_FRONT = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session"},
    "scan": {"Description": "Entities of the scan that the segmentations share"},
    "reference": {"Description": "The reference, or the first of two raters"},
    "prediction": {"Description": "What is compared with it, or the second of two raters"},
}

_MEANS = {
    f"mean_{name}_ppm": {
        "Description": f"Mean susceptibility of the measured voxels of the nucleus in the {name}; n/a without a map",
        "Units": "ppm",
    }
    for name in ("reference", "prediction")
}

OVERLAP_TABLE = {**_FRONT, **{key: OVERLAP_COLUMNS[key] for key in OVERLAP_COLUMNS if key != "index"}, **_MEANS}

_ENOUGH = 3
"""Scans from which on agreement is more than n/a."""


@dataclass(frozen=True)
class Request:
    """What to compare, and where the results go."""

    reference: Path
    predictions: tuple[Path, ...]
    out: Path
    chi: Path | None = None
    """A map or a dataset of maps."""
    choose: tuple[str, ...] = ()
    """Entities that decide between several segmentations of a scan, such as ``seg-dgm16``."""
    raters: bool = False
    """Whether all are raters of equal rank, so that each pair is compared."""


@dataclass
class Evaluation:
    """Everything that is written."""

    raters: tuple[str, ...]
    pairs: tuple[Pair, ...]
    n_scans: int
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """By file name without ``.tsv``."""
    values: pd.DataFrame = field(default_factory=pd.DataFrame)
    """``quantity``, ``scan``, ``abbreviation`` and one column a rater."""


def run_evaluation(request: Request, *, say: Callable[[str], None]) -> int:
    """Compare, write, and say what there is to say, one line each.

    Returns
    -------
    int
        0: all scans compared. 1: some failed.

    Raises
    ------
    InputError
        If the input or the output folder does not allow any comparison.
    """
    evaluation = evaluate(request)
    write_evaluation(request, evaluation)
    for line in evaluation.notes:
        say(f"note: {line}")
    for line in evaluation.failures:
        say(f"failed: {line}")
    counted = f"{evaluation.n_scans} {'scan' if evaluation.n_scans == 1 else 'scans'}"
    say(f"{counted} compared; open {request.out / 'evaluate.html'}")
    return 1 if evaluation.failures else 0


def evaluate(request: Request) -> Evaluation:
    """Compare all scans; nothing is written.

    Raises
    ------
    InputError
        If no scan can be compared.
    """
    names = name_apart((request.reference, *request.predictions))
    pairs = tuple(combinations(names, 2)) if request.raters else tuple((names[0], name) for name in names[1:])
    tasks, notes = _find_tasks(request, names)
    labels = Notes()
    results = [compare_scan(task, pairs=pairs, notes=labels) for task in tasks]
    failures = [line for result in results for line in result.failures]
    tables = [table for result in results for table in result.overlap if len(table)]
    if not tables:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise InputError(f"{failures[0]}{others}" if failures else _nothing_shared(names, labels))
    compared = {tuple(table.iloc[0][["scan", "reference", "prediction"]]) for table in tables}
    values = _values(results, names, {name for table in tables for name in table["abbreviation"]}, compared)
    evaluation = Evaluation(
        names,
        pairs,
        n_scans=len({scan for table in tables for scan in table["scan"]}),
        notes=notes + labels.lines(),
        failures=failures,
        values=values,
    )
    evaluation.notes += _few(request, evaluation)
    overlap = _overlap_table(pd.concat(tables, ignore_index=True), values)
    evaluation.tables["overlap"] = overlap
    evaluation.tables["overlap_summary"] = summarize(overlap, measures=MEASURES)
    evaluation.tables["agreement"] = agreement_table(values, raters=names, pairs=pairs, compared=compared)
    if len(names) > 2:
        evaluation.tables["raters"] = raters_table(values, raters=names)
    if len(names) > 2 and not request.raters:
        methods = _methods(overlap, names[1:])
        evaluation.tables |= {"methods": methods} if len(methods) else {}
    return evaluation


def name_apart(paths: Sequence[Path]) -> tuple[str, ...]:
    """Name files or folders as shortly as tells them apart.

    >>> name_apart([Path("/a/first/seg"), Path("/a/second/seg")])
    ('first/seg', 'second/seg')
    >>> name_apart([Path("/a/x.nii.gz"), Path("/a/x.nii.gz")])
    ('x', 'x (2)')
    """
    plain = [path.with_name(path.name.removesuffix(".gz").removesuffix(".nii")) for path in paths]
    deepest = max(len(path.parts) for path in plain)
    for depth in range(1, deepest + 1):
        names = ["/".join(path.parts[-depth:]) for path in plain]
        if len(set(names)) == len(set(plain)):
            break
    seen: dict[str, int] = {}
    apart = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        apart.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(apart)


def _find_tasks(request: Request, names: Sequence[str]) -> tuple[list[Task], list[str]]:
    """Match the scans; notes name those without a partner."""
    paths = (request.reference, *request.predictions)
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
    if request.chi and not request.chi.exists():
        raise InputError(f"{request.chi}: no such file or folder; check --chi")
    if all(path.is_file() for path in paths):
        chi = _one_map(request)
        return [Task(name_scan(request.reference), dict(zip(names, paths, strict=True)), chi)], []
    if other := next((path for path in paths if not path.is_dir()), None):
        raise InputError(f"{other.name}: is a file beside folders; give files only, or datasets only")
    return _match_datasets(request, names)


def _one_map(request: Request) -> Path | None:
    if request.chi and request.chi.is_dir():
        maps = match_scans([request.reference], find_images(request.chi, "Chimap"), choose=request.choose)
        if not maps:
            scan = name_scan(request.reference)
            raise InputError(f"{request.chi.name}: no _Chimap of {scan}; give the file of the map to --chi")
        return maps[request.reference]
    return request.chi


def _match_datasets(request: Request, names: Sequence[str]) -> tuple[list[Task], list[str]]:
    reference = find_images(request.reference, "dseg")
    partners: dict[Path, dict[str, Path]] = {path: {names[0]: path} for path in reference}
    notes = []
    for name, root in zip(names[1:], request.predictions, strict=True):
        images = find_images(root, "dseg")
        matched = match_scans(reference, images, choose=request.choose)
        for path, partner in matched.items():
            partners[path][name] = partner
        notes += _partnerless(names[0], name, reference, matched.keys())
        notes += _partnerless(name, names[0], images, matched.values())
    found = {path: by_rater for path, by_rater in partners.items() if len(by_rater) > 1}
    if not found:
        raise InputError(f"{names[0]}: no scan that {list_some(names[1:])} has too; check the entities in the names")
    maps: Mapping[Path, Path] = {}
    if request.chi:
        if request.chi.is_file():
            raise InputError(f"{request.chi.name}: is a file beside folders; give the dataset of the maps to --chi")
        maps = match_scans(list(found), find_images(request.chi, "Chimap"), choose=request.choose)
        notes += _partnerless(names[0], request.chi.name, list(found), maps.keys(), lost="no susceptibility")
    return [Task(name_scan(path), by_rater, maps.get(path)) for path, by_rater in found.items()], notes


def _partnerless(name: str, other: str, paths: Sequence[Path], matched: Any, *, lost: str = "left out") -> list[str]:
    """Say which scans have no partner; another segmentation of a scan that has one counts as chosen against."""
    known = {name_scan(path) for path in matched}
    alone = {name_scan(path) for path in paths} - known
    return [f"{name}: no partner in {other} for {list_some(alone)}; {lost}"] if alone else []


def _nothing_shared(names: Sequence[str], labels: Notes) -> str:
    lines = labels.lines()
    return (
        f"{names[0]}: no nucleus that {list_some(names[1:])} has too ({lines[0] if lines else 'no labels'}); "
        "check the abbreviations in dseg.tsv"
    )


def _values(
    results: Sequence[Comparison], names: Sequence[str], shared: set[str], compared: Collection[tuple[str, ...]]
) -> pd.DataFrame:
    """Lay the raters' values of shared nuclei out in columns; a quantity that only one rater has is left out.

    Values of a scan are missing for raters that could be compared with no other in it.
    """
    long = pd.DataFrame([row for result in results for row in result.values if row["abbreviation"] in shared])
    usable = {(scan, rater) for scan, *pair in compared for rater in pair}
    alone = [place not in usable for place in zip(long["scan"], long["rater"], strict=True)]
    long["value"] = long["value"].mask(np.array(alone))
    keys = ["quantity", "scan", "abbreviation"]
    wide = long.set_index([*keys, "rater"])["value"].unstack("rater").reindex(columns=list(names))
    order = long[keys].drop_duplicates().sort_values("quantity", ascending=False, kind="stable")
    wide = wide.reindex(pd.MultiIndex.from_frame(order)).reset_index()
    several = wide.groupby("quantity")[list(names)].count().gt(0).sum(axis=1) > 1
    return wide[wide["quantity"].map(several)].reset_index(drop=True)


def _few(request: Request, evaluation: Evaluation) -> list[str]:
    lines = []
    if "mean_ppm" not in set(evaluation.values["quantity"]):
        lacking = "the maps could not be used" if request.chi else "give the maps with --chi"
        lines.append(f"no susceptibilities to compare; {lacking}")
    if evaluation.n_scans < _ENOUGH:
        lines.append(f"agreement over scans needs at least {_ENOUGH}, here {evaluation.n_scans}; see overlap.tsv")
    return lines


def _overlap_table(overlap: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Put the participant in front and the susceptibilities behind."""
    entities = [split_entities(scan) for scan in overlap["scan"]]
    table = overlap.drop(columns="index")
    table.insert(0, "participant_id", [f"sub-{named['sub']}" if "sub" in named else None for named in entities])
    table.insert(1, "session_id", [f"ses-{named['ses']}" if "ses" in named else None for named in entities])
    ppm = values[values["quantity"] == "mean_ppm"].set_index(["scan", "abbreviation"])
    for side in ("reference", "prediction"):
        places = zip(table["scan"], table["abbreviation"], table[side], strict=True)
        means = [ppm.at[(scan, name), rater] if (scan, name) in ppm.index else None for scan, name, rater in places]
        table[f"mean_{side}_ppm"] = pd.Series(means, index=table.index, dtype=float)
    return table[list(OVERLAP_TABLE)]


def _methods(overlap: pd.DataFrame, predictions: Sequence[str]) -> pd.DataFrame:
    """Compare the predictions by each measure of overlap."""
    long = overlap.melt(["scan", "abbreviation", "prediction"], list(_COMPARED), "quantity")
    keys = ["quantity", "scan", "abbreviation"]
    wide = long.set_index([*keys, "prediction"])["value"].unstack("prediction").reindex(columns=list(predictions))
    return methods_table(
        wide.reindex(pd.MultiIndex.from_frame(long[keys].drop_duplicates())).reset_index(), raters=predictions
    )


_DICTIONARIES = {
    "overlap": OVERLAP_TABLE,
    "overlap_summary": SUMMARY_COLUMNS,
    "agreement": AGREEMENT_COLUMNS,
    "raters": RATERS_COLUMNS,
    "methods": METHODS_COLUMNS,
}


def write_evaluation(request: Request, evaluation: Evaluation) -> None:
    """Write every file under a temporary name and rename; an earlier run's tables that this one lacks are removed.

    Raises
    ------
    InputError
        If the output folder cannot be written.
    """
    from bids_dgmseg.report.evaluation import write_evaluation_page

    try:
        request.out.mkdir(parents=True, exist_ok=True)
        for name, table in evaluation.tables.items():
            text = table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.7g")
            write_text(text, request.out / f"{name}.tsv")
            write_json(_DICTIONARIES[name], request.out / f"{name}.json")
        for name in _DICTIONARIES.keys() - evaluation.tables.keys():
            for extension in (".tsv", ".json"):
                (request.out / f"{name}{extension}").unlink(missing_ok=True)
        facts = _facts(request, evaluation)
        write_json(facts, request.out / "evaluation.json")
        write_evaluation_page(request.out, tables=evaluation.tables, values=evaluation.values, facts=facts)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{request.out}: cannot be written ({reason}); choose another folder with --out") from error


def _facts(request: Request, evaluation: Evaluation) -> dict[str, Any]:
    """Say what was compared, for evaluation.json and the page."""
    paths = (request.reference, *request.predictions)
    return {
        "raters": dict(zip(evaluation.raters, map(str, paths), strict=True)),
        "reference": None if request.raters else evaluation.raters[0],
        "pairs": [list(pair) for pair in evaluation.pairs],
        "chi": str(request.chi) if request.chi else None,
        "choose": list(request.choose),
        "n_scans": evaluation.n_scans,
        "notes": evaluation.notes,
        "failures": evaluation.failures,
        "version": bids_dgmseg.__version__,
    }
