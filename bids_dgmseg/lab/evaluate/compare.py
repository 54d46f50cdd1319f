"""Agreement of segmentations of the same scans: between raters, or of predictions with a reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import bids_dgmseg
from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.labelled_scans import find_nuclei, match_labels, read_settings
from bids_dgmseg.bids.masks_and_maps import find_images, find_label_table, match_scans, name_scan
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.io.files import write_json, write_tsv
from bids_dgmseg.lab.evaluate.summary_tables import (
    EVALUATION_DICTIONARIES,
    Pair,
    agreement_table,
    compare_age_curves,
    find_participants,
    methods_table,
    raters_table,
    summarize,
)
from bids_dgmseg.measurement.further_maps import read_chi
from bids_dgmseg.models.model_folder import TRAINED_ON_MAP
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure, join_sides
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS, overlap

_SUMMARIZED = tuple(
    name
    for name in OVERLAP_COLUMNS
    if not name.startswith(("index", "abbreviation", "n_", "volume_reference", "volume_prediction"))
)
"""Measures of overlap.tsv in overlap_summary.tsv."""

_RANKED = tuple(name for name in _SUMMARIZED if "difference" not in name)
"""Measures that predictions are compared by: they have a best value."""

_COUNTED = ("index", "abbreviation", "n_reference", "n_prediction", "volume_reference_mm3", "volume_prediction_mm3")
"""Columns of the overlap that have a value even if the reference lacks the nucleus."""

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


def find_test_set(dataset: Path, *, derivatives: Sequence[Path] = (), choose: Sequence[str] = ()) -> TestSet:
    """Find the labelled scans of a dataset; a bilateral label (``RN``) is accepted, too.

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
    nuclei, lines = find_nuclei(labels.values())
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
    scores = pd.concat(tables, ignore_index=True)
    compared = set(scores[["scan", "reference", "prediction"]].itertuples(index=False, name=None))
    values = _pivot_values(comparisons, names, nuclei=set(scores["abbreviation"]), compared=compared)
    scores = _complete_overlap(scores, values)
    results = {
        "overlap": scores,
        "overlap_summary": summarize(scores, measures=_SUMMARIZED),
        "agreement": agreement_table(values, raters=names, pairs=pairs, compared=compared),
    }
    if len(names) > 2:
        results["raters"] = raters_table(values, raters=names)
    if len(names) > 2 and not options.raters:
        long = scores.melt(["scan", "abbreviation", "prediction"], list(_RANKED), "quantity")
        order = long[["quantity", "scan", "abbreviation"]].drop_duplicates()
        methods = methods_table(_pivot(long, order, "prediction", names[1:]), raters=names[1:])
        results |= {"methods": methods} if len(methods) else {}
    n_scans = scores["scan"].nunique()
    root = find_participants(options.participants, (options.chi, options.reference, *options.predictions))
    ageing = compare_age_curves(values, pairs, root, controls=options.controls)
    if "mean_ppm" not in set(values["quantity"]):
        remedy = "no nucleus has them in both, or the maps could not be used" if options.chi else "pass maps with `chi`"
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
        notes += _list_caveats(name, matched.values())
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


def _list_caveats(name: str, paths: Iterable[Path]) -> list[str]:
    """List scans whose ``_qc.json`` says that networks were trained on the map, or labels were corrected by hand."""
    settings = {name_scan(path): read_settings(path) for path in paths}
    notes = []
    if trained := [scan for scan, values in settings.items() if values.get(TRAINED_ON_MAP)]:
        notes.append(f"{name}: trained on {list_some(trained)}, whose agreement is better than that of other scans")
    if edited := [scan for scan, values in settings.items() if values.get("correction")]:
        notes.append(f"{name}: corrected by hand: {list_some(edited)}; derivatives/automatic has the automatic labels")
    return notes


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


def _complete_overlap(scores: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Add the participant in front and the mean susceptibilities at the end."""
    entities = [split_entities(scan) for scan in scores["scan"]]
    table = scores.drop(columns="index")
    table.insert(0, "participant_id", [f"sub-{named['sub']}" if "sub" in named else None for named in entities])
    table.insert(1, "session_id", [f"ses-{named['ses']}" if "ses" in named else None for named in entities])
    ppm = values[values["quantity"] == "mean_ppm"].set_index(["scan", "abbreviation"])
    for side in ("reference", "prediction"):
        keys = zip(table["scan"], table["abbreviation"], table[side], strict=True)
        means = [ppm.at[(scan, name), rater] if (scan, name) in ppm.index else None for scan, name, rater in keys]
        table[f"mean_{side}_ppm"] = pd.Series(means, index=table.index, dtype=float)
    return table[list(EVALUATION_DICTIONARIES["overlap"])]


@dataclass(frozen=True)
class ScanImages:
    """Label images of one scan by rater, and its map if there is one."""

    scan: str
    paths: Mapping[str, Path]
    chi: Path | None = None


@dataclass(frozen=True)
class ScanComparison:
    """Results of one scan."""

    overlap: pd.DataFrame
    """One row per pair of raters and nucleus."""
    values: pd.DataFrame
    """``quantity``, ``scan``, ``abbreviation``, ``rater``, ``value``."""
    failures: tuple[str, ...]
    issues: frozenset[tuple[str, str, str]]
    """Rater, what is odd about its labels, with {} for the label or nucleus, and this."""


@dataclass(frozen=True)
class _LabelImage:
    path: Path
    volume: Volume
    names: Mapping[int, str]
    """Label → abbreviation; with both sides joined, two labels have the same."""
    has_table: bool
    labels: frozenset[int]
    """Labels that occur."""

    @property
    def nuclei(self) -> set[str]:
        """Nuclei that the rater segments: those of the label table, or those that occur if there is none."""
        if self.has_table:
            return set(self.names.values())
        return {self.names[label] for label in self.labels & self.names.keys()}

    def renumber(self, nuclei: Sequence[str]) -> NDArray[np.uint16]:
        """Replace labels by the place of their nucleus, from 1; labels without a name become 0."""
        inside = self.volume.array != 0
        labels, inverse = np.unique(self.volume.array[inside], return_inverse=True)
        indices = [nuclei.index(self.names[label]) + 1 if label in self.names else 0 for label in labels.tolist()]
        renumbered = np.zeros(self.volume.shape, np.uint16)
        renumbered[inside] = np.array(indices, np.uint16)[inverse]
        return renumbered


def compare_label_images(
    images: ScanImages, *, pairs: Sequence[Pair], raters: bool = False, bilateral: bool = False
) -> ScanComparison:
    """Compare the label images of one scan, pair by pair: overlap, volumes and mean susceptibilities.

    A nucleus that the first of a pair did not label has no scores, since that says nothing about the prediction; with
    `raters`, who are of equal rank, it has those of a nucleus that only the first one has: a Dice of 0.
    With `bilateral`, there is a bilateral row per nucleus (``DN``), if a rater segments both sides. Images that
    cannot be read or have different grids are failures of the result, one line per file or pair.
    """
    read, failures = _read_images(images)
    comparable = []
    for pair in pairs:
        if set(pair) <= read.keys():
            first, second = (read[rater] for rater in pair)
            if mismatch := describe_grid_mismatch(first.volume, second.volume):
                failures.append(_grid_failure(images.scan, second, first.path.name, mismatch))
            else:
                comparable.append(pair)
    chi, lines = _read_map(images, read)
    namings = [read]
    if bilateral:
        namings.append({rater: replace(image, names=_join_sides(image.names)) for rater, image in read.items()})
    joined = {name for image in namings[-1].values() for name in image.names.values()} if bilateral else set()
    overlaps, values = [], []
    for number, naming in enumerate(namings):
        nuclei = _sort_nuclei({name for image in naming.values() for name in image.names.values()})
        arrays = {rater: image.renumber(nuclei) for rater, image in naming.items()}
        tables = [_overlap(images.scan, pair, naming, arrays, nuclei, raters=raters) for pair in comparable]
        measured = _measure(images.scan, naming, arrays, nuclei, chi)
        if number == 0:  # a label of both sides is that of a bilateral row
            tables = [table[~table["abbreviation"].isin(joined)] for table in tables]
            measured = measured[~measured["abbreviation"].isin(joined)]
        overlaps += tables
        values.append(measured)
    return ScanComparison(
        overlap=pd.concat(overlaps, ignore_index=True) if overlaps else pd.DataFrame(),
        values=pd.concat(values, ignore_index=True),
        failures=(*failures, *lines),
        issues=_find_issues(read, comparable),
    )


def _find_issues(read: Mapping[str, _LabelImage], pairs: Sequence[Pair]) -> frozenset[tuple[str, str, str]]:
    issues = set()
    for rater, image in read.items():
        if not image.has_table:
            issues.add((rater, "no dseg.tsv found; assuming the labels of this program (1 DN_L, 2 DN_R, …)", ""))
        for label in image.labels - image.names.keys():
            issues.add((rater, "label(s) {} without a row in the label table; ignored", str(label)))
    for pair in pairs:
        for rater, other in (pair, pair[::-1]):
            for name in read[other].nuclei - set(read[rater].names.values()):
                issues.add((rater, f"lacks {{}}, which {other} has; not compared", name))
    return frozenset(issues)


def _join_sides(names: Mapping[int, str]) -> dict[int, str]:
    """Name the labels of both sides after their nucleus; a nucleus with one side is left out, one label of both not."""
    nuclei = {structure.nucleus: structure.nucleus for structure in ALL_STRUCTURES} | join_sides(names.values())
    return {label: nuclei[name] for label, name in names.items() if name in nuclei}


def _overlap(
    scan: str,
    pair: Pair,
    read: Mapping[str, _LabelImage],
    arrays: Mapping[str, NDArray[np.uint16]],
    nuclei: Sequence[str],
    *,
    raters: bool,
) -> pd.DataFrame:
    """Return the overlap of a pair, of the nuclei that both segment and one shows."""
    first, second = (read[rater] for rater in pair)
    common = set(first.names.values()) & set(second.names.values()) & (first.nuclei | second.nuclei)
    structures = [
        Structure(index, name, name, "", "", 0) for index, name in enumerate(nuclei, start=1) if name in common
    ]
    voxel_size_mm = first.volume.voxel_size_mm
    table = overlap(arrays[pair[0]], arrays[pair[1]], structures=structures, voxel_size_mm=voxel_size_mm)
    scores = table.columns.difference(list(_COUNTED))
    table[scores] = table[scores].where((table["n_reference"] > 0) | raters)
    front = {"scan": scan, "reference": pair[0], "prediction": pair[1]}
    return table.assign(**front)[[*front, *table.columns]]


def _measure(
    scan: str,
    read: Mapping[str, _LabelImage],
    arrays: Mapping[str, NDArray[np.uint16]],
    nuclei: Sequence[str],
    chi: Mapping[str, NDArray[np.float32]],
) -> pd.DataFrame:
    """Return volume and mean susceptibility of each nucleus by rater; `chi` has the map of raters on its grid."""
    rows: list[dict[str, Any]] = []
    for rater, image in read.items():
        labels = arrays[rater]
        counts = np.bincount(labels.ravel(), minlength=len(nuclei) + 1)
        sums, n_valid = np.zeros(len(counts)), np.zeros(len(counts))
        if rater in chi:
            valid = (labels > 0) & np.isfinite(chi[rater])
            n_valid += np.bincount(labels[valid], minlength=len(counts))
            sums += np.bincount(labels[valid], weights=chi[rater][valid].astype(np.float64), minlength=len(counts))
        voxel_mm3 = float(np.prod(image.volume.voxel_size_mm))
        for index, name in enumerate(nuclei, start=1):
            if name in image.names.values():
                row = {"scan": scan, "abbreviation": name, "rater": rater}
                volume = counts[index] * voxel_mm3 if counts[index] else np.nan
                mean = sums[index] / n_valid[index] if n_valid[index] else np.nan
                rows.append({"quantity": "volume_mm3", **row, "value": volume})
                rows.append({"quantity": "mean_ppm", **row, "value": mean})
    return pd.DataFrame(rows, columns=["quantity", "scan", "abbreviation", "rater", "value"])


def describe_label_issues(comparisons: Iterable[ScanComparison]) -> list[str]:
    """Return one line per issue with the labels of all scans."""
    items: dict[tuple[str, str], set[str]] = defaultdict(set)
    for comparison in comparisons:
        for rater, issue, item in comparison.issues:
            items[rater, issue].add(item)
    texts = {key: key[1].replace("{}", ", ".join(_sort_nuclei(names))) for key, names in sorted(items.items())}
    return [f"{rater}: {text}" for (rater, _), text in texts.items()]


def _read_images(images: ScanImages) -> tuple[dict[str, _LabelImage], list[str]]:
    read, failures = {}, []
    for rater, path in images.paths.items():
        try:
            table, volume = find_label_table(path), read_labels(path)
        except InputError as error:
            failures.append(f"{images.scan}: {rater}: {error}")
            continue
        labels = frozenset(np.unique(volume.array[volume.array != 0]).tolist())
        read[rater] = _LabelImage(path, volume, table.abbreviations, table.source is not None, labels)
    return read, failures


def _read_map(images: ScanImages, read: Mapping[str, _LabelImage]) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Return the map for each rater on its grid, and what keeps it from being used."""
    if not images.chi:
        return {}, []
    try:
        chi = read_chi(images.chi)
    except InputError as error:
        return {}, [f"{images.scan}: {error}"]
    maps, failures = {}, []
    for rater, image in read.items():
        if mismatch := describe_grid_mismatch(image.volume, chi):
            failures.append(_grid_failure(images.scan, image, images.chi.name, mismatch))
        else:
            maps[rater] = chi.array
    return maps, failures


def _grid_failure(scan: str, image: _LabelImage, other: str, mismatch: str) -> str:
    return f"{scan}: {image.path.name} is not on the same grid as {other} ({mismatch}); resample one of them first"


def _sort_nuclei(names: Iterable[str]) -> list[str]:
    """Sort names in the order of structures.tsv, others last."""
    order = {structure.abbreviation: place for place, structure in enumerate(ALL_STRUCTURES)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), len(name), name))
