"""Comparison of the label images of one scan: overlap, volumes and mean susceptibilities by several raters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.masks_and_maps import find_label_table
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.measurement.further_maps import read_chi
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure, join_sides
from bids_dgmseg.stats.agreement import overlap

Pair = tuple[str, str]
"""Reference and prediction, or two raters."""

_ABBREVIATIONS = [structure.abbreviation for structure in ALL_STRUCTURES]


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
    absent: Mapping[Pair, frozenset[str]] = field(default_factory=dict)
    """(rater without, rater with) → nuclei."""
    unnamed: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Rater → labels without a row in the label table."""
    without_table: frozenset[str] = frozenset()
    """Raters without a label table."""


_COUNTED = ("index", "abbreviation", "n_reference", "n_prediction", "volume_reference_mm3", "volume_prediction_mm3")
"""Columns of the overlap that have a value even if the reference lacks the nucleus."""


@dataclass(frozen=True)
class _LabelImage:
    path: Path
    volume: Volume
    names: Mapping[int, str]
    """Label → abbreviation."""
    has_table: bool
    labels: frozenset[int]
    """Labels that occur."""

    @property
    def nuclei(self) -> set[str]:
        """Nuclei that the rater segments: those of the label table, or those that occur if there is none."""
        if self.has_table:
            return set(self.names.values())
        return {self.names[label] for label in self.labels & self.names.keys()}


def compare_label_images(
    images: ScanImages, *, pairs: Sequence[Pair], raters: bool = False, bilateral: bool = False
) -> ScanComparison:
    """Compare the label images of one scan, pair by pair.

    A nucleus that the first of a pair did not label has no scores, since that says nothing about the prediction; with
    `raters`, who are of equal rank, it has those of a nucleus that only the first one has: a Dice of 0.
    With `bilateral`, there is a bilateral row per nucleus (``DN``), if a rater segments both sides. Images that
    cannot be read or have different grids are failures of the result, one line per file or pair.
    """
    read, failures = _read_images(images)
    tables, absent, mismatches = _overlap_pairs(images.scan, read, pairs, raters=raters)
    values, value_failures = _measure(images, read)
    if bilateral:
        joined = {rater: replace(image, names=_join_sides(image.names)) for rater, image in read.items()}
        both = {name for image in joined.values() for name in image.names.values()}
        tables = [table[~table["abbreviation"].isin(both)] for table in tables]  # bilateral labels come below
        values = values[~values["abbreviation"].isin(both)]
        tables += _overlap_pairs(images.scan, joined, pairs, raters=raters)[0]
        values = pd.concat([values, _measure(images, joined)[0]], ignore_index=True)
    return ScanComparison(
        overlap=pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(),
        values=values,
        failures=(*failures, *mismatches, *value_failures),
        absent=absent,
        unnamed={rater: image.labels - image.names.keys() for rater, image in read.items()},
        without_table=frozenset(rater for rater, image in read.items() if not image.has_table),
    )


def _join_sides(names: Mapping[int, str]) -> dict[int, str]:
    """Name the labels of both sides after their nucleus; a nucleus with one side is left out, one label of both not."""
    nuclei = {structure.nucleus: structure.nucleus for structure in ALL_STRUCTURES} | join_sides(names.values())
    return {label: nuclei[name] for label, name in names.items() if name in nuclei}


def _overlap_pairs(
    scan: str, read: Mapping[str, _LabelImage], pairs: Sequence[Pair], *, raters: bool
) -> tuple[list[pd.DataFrame], dict[Pair, frozenset[str]], list[str]]:
    """Return the overlap of each pair, the nuclei that only one rater has, and a line per pair with other grids."""
    structures = _common_structures(read)
    arrays = {rater: _renumber(image, structures) for rater, image in read.items()}
    tables, absent, failures = [], {}, []
    for reference, prediction in pairs:
        if not {reference, prediction} <= read.keys():
            continue
        first, second = read[reference], read[prediction]
        if mismatch := describe_grid_mismatch(first.volume, second.volume):
            failures.append(_grid_failure(scan, second, first.path.name, mismatch))
            continue
        absent[reference, prediction] = frozenset(second.nuclei - set(first.names.values()))
        absent[prediction, reference] = frozenset(first.nuclei - set(second.names.values()))
        common = set(first.names.values()) & set(second.names.values()) & (first.nuclei | second.nuclei)
        table = overlap(
            arrays[reference],
            arrays[prediction],
            structures=[one for name, one in structures.items() if name in common],
            voxel_size_mm=first.volume.voxel_size_mm,
        )
        scores = table.columns.difference(list(_COUNTED))
        table[scores] = table[scores].where((table["n_reference"] > 0) | raters)
        front = {"scan": scan, "reference": reference, "prediction": prediction}
        tables.append(table.assign(**front)[[*front, *table.columns]])
    return tables, absent, failures


def _common_structures(read: Mapping[str, _LabelImage]) -> dict[str, Structure]:
    """Return the nuclei of all raters, with common indices."""
    names = _sort_nuclei({name for image in read.values() for name in image.names.values()})
    return {name: Structure(index, name, name, "L", "", 0) for index, name in enumerate(names, start=1)}


def describe_label_issues(comparisons: Iterable[ScanComparison]) -> list[str]:
    """Return one line per issue with the labels of all scans: no label table, labels without a name, other nuclei."""
    absent: dict[Pair, set[str]] = defaultdict(set)
    unnamed: dict[str, set[int]] = defaultdict(set)
    without_table: set[str] = set()
    for comparison in comparisons:
        without_table |= comparison.without_table
        for rater, labels in comparison.unnamed.items():
            unnamed[rater] |= labels
        for pair, nuclei in comparison.absent.items():
            absent[pair] |= nuclei
    lines = [
        f"{rater}: no dseg.tsv found; assuming the labels of this program (1 DN_L, 2 DN_R, …)"
        for rater in sorted(without_table)
    ]
    lines += [
        f"{rater}: label(s) {', '.join(map(str, sorted(labels)))} without a row in the label table; ignored"
        for rater, labels in sorted(unnamed.items())
        if labels
    ]
    for (rater, other), names in sorted(absent.items()):
        if names:
            lines.append(f"{rater}: lacks {', '.join(_sort_nuclei(names))}, which {other} has; not compared")
    return lines


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


def _renumber(image: _LabelImage, structures: Mapping[str, Structure]) -> NDArray[np.uint16]:
    """Replace the labels of a rater by common indices; labels without a name become 0."""
    inside = image.volume.array != 0
    labels, inverse = np.unique(image.volume.array[inside], return_inverse=True)
    indices = [structures[image.names[label]].index if label in image.names else 0 for label in labels.tolist()]
    renumbered = np.zeros(image.volume.shape, np.uint16)
    renumbered[inside] = np.array(indices, np.uint16)[inverse]
    return renumbered


def _grid_failure(scan: str, image: _LabelImage, other: str, mismatch: str) -> str:
    return f"{scan}: {image.path.name} is not on the grid of {other} ({mismatch}); resample one of them first"


def _measure(images: ScanImages, read: Mapping[str, _LabelImage]) -> tuple[pd.DataFrame, list[str]]:
    """Return volume and mean susceptibility of each nucleus by rater, and what keeps the map from being used."""
    rows: list[dict[str, Any]] = []
    structures = _common_structures(read)
    chi, failures = None, []
    try:
        chi = read_chi(images.chi) if images.chi else None
    except InputError as error:
        failures.append(f"{images.scan}: {error}")
    for rater, image in read.items():
        labels = _renumber(image, structures)
        counts = np.bincount(labels.ravel(), minlength=len(structures) + 1)
        sums, n_valid = np.zeros(len(counts)), np.zeros(len(counts))
        if images.chi and chi:
            if mismatch := describe_grid_mismatch(image.volume, chi):
                failures.append(_grid_failure(images.scan, image, images.chi.name, mismatch))
            else:
                valid = (labels > 0) & np.isfinite(chi.array)
                n_valid += np.bincount(labels[valid], minlength=len(counts))
                sums += np.bincount(labels[valid], weights=chi.array[valid].astype(np.float64), minlength=len(counts))
        voxel_mm3 = float(np.prod(image.volume.voxel_size_mm))
        for name in (name for name in structures if name in image.names.values()):
            index = structures[name].index
            row = {"scan": images.scan, "abbreviation": name, "rater": rater}
            volume = counts[index] * voxel_mm3 if counts[index] else np.nan
            mean = sums[index] / n_valid[index] if n_valid[index] else np.nan
            rows.append({"quantity": "volume_mm3", **row, "value": volume})
            rows.append({"quantity": "mean_ppm", **row, "value": mean})
    return pd.DataFrame(rows, columns=["quantity", "scan", "abbreviation", "rater", "value"]), failures


def _sort_nuclei(names: Iterable[str]) -> list[str]:
    """Sort names in the order of structures.tsv, others last."""
    order = {name: place for place, name in enumerate(_ABBREVIATIONS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))
