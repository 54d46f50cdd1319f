"""Read segmentations of the same scan by several raters and compare them, pair by pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.dataset import find_source
from bids_dgmseg.bids.segmentations import LabelTable, read_label_table
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.io.files import read_json
from bids_dgmseg.models.structures import STRUCTURES, Structure
from bids_dgmseg.stats.overlap import overlap
from bids_dgmseg.study.results import STATS, read_stats

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One scan, its segmentations by rater, and its map where there is one."""

    scan: str
    paths: Mapping[str, Path]
    chi: Path | None = None


@dataclass
class Notes:
    """What is said about labels once for all scans."""

    absent: dict[Pair, set[str]] = field(default_factory=lambda: defaultdict(set))
    """(who lacks it, who has it) → abbreviations."""
    unnamed: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Rater → numbers without a row in the label table."""
    untabled: set[str] = field(default_factory=set)
    """Raters without a label table."""

    def lines(self) -> list[str]:
        """Write one line a matter."""
        said = [
            f"{rater}: no dseg.tsv found; its numbers are read as those of this program (1 DN_L, 2 DN_R, …)"
            for rater in sorted(self.untabled)
        ]
        said += [
            f"{rater}: {'numbers' if len(numbers) > 1 else 'number'} {', '.join(map(str, sorted(numbers)))} without a "
            "row in the label table; ignored"
            for rater, numbers in sorted(self.unnamed.items())
        ]
        said += [
            f"{rater}: has no {_in_order(names)}, which {other} has; not compared"
            for (rater, other), names in sorted(self.absent.items())
            if names
        ]
        return said


@dataclass(frozen=True)
class _Segmentation:
    path: Path
    volume: Volume
    labels: Mapping[int, str]
    has_table: bool
    seen: frozenset[str]
    """Abbreviations that have voxels."""

    @property
    def claimed(self) -> set[str]:
        """Nuclei that it is known to speak of: those of its table, or those seen where there is none."""
        return set(self.labels.values()) if self.has_table else set(self.seen)


@dataclass(frozen=True)
class Comparison:
    """What one scan gave."""

    overlap: list[pd.DataFrame]
    values: list[dict[str, Any]]
    """``quantity``, ``scan``, ``abbreviation``, ``rater``, ``value``."""
    failures: list[str]


def compare_scan(task: Task, *, pairs: Sequence[Pair], notes: Notes) -> Comparison:
    """Compare the segmentations of one scan.

    Parameters
    ----------
    task : Task
        Where they lie.
    pairs : sequence of (str, str)
        Reference and prediction, or two raters.
    notes : Notes
        Filled with what is found about labels.

    Returns
    -------
    Comparison
        A file that cannot be read or lies on another grid is a failure, one line a pair or file.
    """
    segmentations, failures = _read_all(task)
    names = _ordered({name for one in segmentations.values() for name in one.labels.values()})
    structures = {name: _structure(name, number) for number, name in enumerate(names, start=1)}
    renumbered = {rater: _renumber(rater, one, structures, notes) for rater, one in segmentations.items()}
    tables = []
    for reference, prediction in pairs:
        if not {reference, prediction} <= segmentations.keys():
            continue
        one, other = segmentations[reference], segmentations[prediction]
        if problem := _other_grid(one, other):
            failures.append(f"{task.scan}: {problem}")
            continue
        _note_absent(notes, (reference, one), (prediction, other))
        known = set(one.labels.values()) & set(other.labels.values()) & (one.claimed | other.claimed)
        shared = [structures[name] for name in names if name in known]
        table = overlap(
            renumbered[reference], renumbered[prediction], structures=shared, voxel_size_mm=one.volume.voxel_size_mm
        )
        front = {"scan": task.scan, "reference": reference, "prediction": prediction}
        tables.append(table.assign(**front)[[*front, *table.columns]])
    values, wrong = _measure(task, segmentations, renumbered, structures)
    return Comparison(tables, values, failures + wrong)


def _read_all(task: Task) -> tuple[dict[str, _Segmentation], list[str]]:
    read, failures = {}, []
    for rater, path in task.paths.items():
        try:
            table = _read_table(path)
            volume, names = read_labels(path), table.abbreviations
            numbers = np.unique(volume.array[volume.array != 0]).tolist()
            seen = frozenset(names[number] for number in numbers if number in names)
            read[rater] = _Segmentation(path, volume, names, table.source is not None, seen)
        except InputError as error:
            failures.append(f"{task.scan}: {rater}: {error}")
    return read, failures


def _read_table(path: Path) -> LabelTable:
    try:
        return read_label_table(path)
    except ValueError as error:  # Python reads no number of thousands of digits
        raise InputError(f"{path.name}: a number in its label table is too long; correct the table") from error


def _structure(name: str, number: int) -> Structure:
    if name in [structure.abbreviation for structure in STRUCTURES]:
        return replace(STRUCTURES.named(name), index=number)
    return Structure(number, name, name, "R" if name.endswith("_R") else "L", "#888888", 0)


def _renumber(rater: str, one: _Segmentation, structures: Mapping[str, Structure], notes: Notes) -> NDArray[np.uint16]:
    """Give the labels of all raters the same numbers; those without a name become 0."""
    if not one.has_table:
        notes.untabled.add(rater)
    inside = one.volume.array != 0
    numbers, inverse = np.unique(one.volume.array[inside], return_inverse=True)
    if unnamed := {int(number) for number in numbers} - set(one.labels):
        notes.unnamed[rater] |= unnamed
    ours = [structures[one.labels[number]].index if number in one.labels else 0 for number in numbers.tolist()]
    renumbered = np.zeros(one.volume.shape, np.uint16)
    renumbered[inside] = np.array(ours, np.uint16)[inverse]
    return renumbered


def _note_absent(notes: Notes, one: tuple[str, _Segmentation], other: tuple[str, _Segmentation]) -> None:
    for (rater, mine), (partner, theirs) in ((one, other), (other, one)):
        notes.absent[rater, partner] |= theirs.claimed - set(mine.labels.values())


def _other_grid(reference: _Segmentation, prediction: _Segmentation) -> str | None:
    """Say how two grids differ, their axes brought to RAS+."""
    first, second = reference.volume, prediction.volume
    if apart := describe_grid_mismatch(first, second):
        return (
            f"{prediction.path.name} ({_describe(second)}) does not lie on the grid of {reference.path.name} "
            f"({_describe(first)}; {apart}); resample one of them first"
        )
    return None


def _describe(volume: Volume) -> str:
    shape, size = (" x ".join(f"{edge:.4g}" for edge in edges) for edges in (volume.shape, volume.voxel_size_mm))
    origin = ", ".join(f"{value:.4g}" for value in volume.affine[:3, 3])
    return f"{shape} voxels of {size} mm from ({origin}) mm in RAS+"


def _measure(
    task: Task,
    segmentations: Mapping[str, _Segmentation],
    renumbered: Mapping[str, NDArray[np.uint16]],
    structures: Mapping[str, Structure],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Volume and, where there is a map or a table, mean susceptibility of each nucleus by each rater."""
    values: list[dict[str, Any]] = []
    tables, failures = ({}, []) if task.chi else _read_tables(task, segmentations)
    chi = None
    try:
        if task.chi:
            chi = _read_chi(task.chi)
        elif not all(tables.values()):
            chi = _read_source(segmentations.values())
    except InputError as error:
        failures.append(f"{task.scan}: {error}")
    for rater, one in segmentations.items():
        problem = describe_grid_mismatch(one.volume, chi) if chi else None
        if chi and problem:
            failures.append(
                f"{task.scan}: {one.path.name} ({_describe(one.volume)}) does not lie on the grid of "
                f"{task.chi.name if task.chi else 'the map'} ({_describe(chi)}; {problem}); resample one of them first"
            )
        measured = _under_labels(chi.array, renumbered[rater]) if chi and not problem else {}
        voxel_mm3 = float(np.prod(one.volume.voxel_size_mm))
        counts = np.bincount(renumbered[rater].ravel(), minlength=len(structures) + 1)
        for name in (name for name in structures if name in one.labels.values()):
            number = structures[name].index
            row = {"scan": task.scan, "abbreviation": name, "rater": rater}
            volume = counts[number] * voxel_mm3 if counts[number] else np.nan
            values.append({"quantity": "volume_mm3", **row, "value": volume})
            mean = measured.get(number, tables.get(rater, {}).get(name, np.nan))
            values.append({"quantity": "mean_ppm", **row, "value": mean})
    return values, failures


def _read_source(segmentations: Collection[_Segmentation]) -> Volume | None:
    """Read the map that one of the segmentations says it was made from, if it lies on the grid of all."""
    found = (find_source(one.path, "Chimap") for one in segmentations)
    for path in (path for path in found if path):
        try:
            chi = _read_chi(path)
        except InputError:  # nobody asked for this map: overlap and volumes stand without it
            continue
        if not any(describe_grid_mismatch(one.volume, chi) for one in segmentations):
            return chi
    return None


def _read_chi(path: Path) -> Volume:
    sidecar = path.with_name(f"{path.name.partition('.')[0]}.json")
    return check_chi(path, read_json(sidecar) if sidecar.is_file() else {}).chi_ppm


def _under_labels(chi: NDArray[np.floating], labels: NDArray[np.uint16]) -> dict[int, float]:
    """Mean of the measured voxels under each number."""
    inside = (labels > 0) & np.isfinite(chi)
    counts = np.bincount(labels[inside])
    sums = np.bincount(labels[inside], weights=chi[inside].astype(np.float64))
    return {int(number): float(sums[number] / counts[number]) for number in np.flatnonzero(counts)}


def _read_tables(
    task: Task, segmentations: Mapping[str, _Segmentation]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Read mean susceptibilities from each rater's ``_stats.tsv``, if there is one; a damaged one is a failure."""
    means: dict[str, dict[str, float]] = {}
    failures = []
    for rater, one in segmentations.items():
        path = one.path.with_name(f"{one.path.name.partition('.')[0].removesuffix('_dseg')}{STATS}")
        means[rater] = {}
        if not path.exists() and not path.is_symlink():
            continue
        stats, damaged = read_stats([path], numbers=("mean_ppm",), required=("mean_ppm",))
        failures += [
            f"{task.scan}: {rater}: {path.name}: {error.problem}; {error.remedy}" for error in damaged.values()
        ]
        if not damaged:
            known = stats[~stats["mean_ppm"].isin(["n/a", ""])]
            means[rater] = dict(zip(known["abbreviation"], known["mean_ppm"].map(float), strict=True))
    return means, failures


def _ordered(names: set[str]) -> list[str]:
    """Names in the order of structures.tsv, others behind."""
    ours = [structure.abbreviation for structure in STRUCTURES]
    return sorted(names, key=lambda name: (ours.index(name) if name in ours else len(ours), name))


def _in_order(names: set[str]) -> str:
    return ", ".join(_ordered(names)) if len(names) <= len(STRUCTURES) else list_some(names)
