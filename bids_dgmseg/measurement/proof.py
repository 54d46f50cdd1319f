"""Proof of a segmentation on its own map: known changes are planted, the map is segmented again, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.units import find_export
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.map_quality import estimate_noise
from bids_dgmseg.measurement.nuclei import PROOF_COLUMNS, find_regions, measure_nuclei
from bids_dgmseg.measurement.segmented_scan import FieldOfView
from bids_dgmseg.models.structures import Structure

PLANTED_PPB = 10.0
"""Susceptibility added to a nucleus, less in voxels at its rim."""

PLANTED_PERCENT: Mapping[str, float] = {
    "recovered_percent": -10.0,
    "recovered_growth_percent": 10.0,
    "recovered_small_percent": -5.0,
}
"""Column → change of the volume of a nucleus; all but the first are those of a full proof."""

_RIM_VOXELS = 0.5
"""Standard deviation of the Gaussian that gives a label the partial volume of an outline between voxel centres."""

_REACH_MM = 2.0
"""Standard deviation of the Gaussian whose slope moves the surroundings of a nucleus."""

_CONTACT_MM = 2.0
"""Nuclei that are closer are in different sets, as far as two sets allow."""

_EDGE_MM = 1.0
"""Distance from the edge of the field of view below which a nucleus may be cut."""

_MARGIN_MM = 10.0
"""Margin of the block that is moved; the map beyond stays as it is."""

_SHIFT_VOXELS, _N_REPEATS, _SEED = (0.2, 0.5), 2, 82

_MM_PER_PERCENT = 0.015
"""First guess of the displacement, which is then fitted to the volume."""

_FITTED, _MOST_FITS = 0.02, 5
"""Tolerance of the planted volume, relative to the change, and number of fits."""

_LEAST_MOVED_VOXELS = 1e-3

Block = tuple[slice, slice, slice]


@dataclass(frozen=True)
class PlantedMap:
    """A map with known changes."""

    chi: Volume
    planting: Planting
    places: NDArray[np.float64]
    """Where the value of each voxel of the changed block comes from (3, x, y, z), in voxels of the block."""
    ppb: Mapping[str, float]
    """Abbreviation of a nucleus → susceptibility that was added, on average within its label."""
    percent: Mapping[str, Mapping[str, float]]
    """Column of the recovered change → abbreviation → change of volume, as the partial volume of moved labels."""
    shift_voxels: tuple[float, ...] = (0.0, 0.0, 0.0)
    noise_ppm: float = 0.0
    """Standard deviation of the noise that was added."""

    def true_fractions(self, structures: Sequence[Structure]) -> NDArray[np.float32]:
        """Return the fraction (C, X, Y, Z) of each voxel inside each nucleus; 0 of those without any change."""
        fractions = np.zeros((len(structures), *self.chi.shape), np.float32)
        for fraction, row in zip(fractions, structures, strict=True):
            if rim := self.planting.rims.get(row.abbreviation):
                fraction[self.planting.block][rim.box] = rim.moved(self.places)
        return fractions


@dataclass(frozen=True)
class Proof:
    """Result of `prove`."""

    table: pd.DataFrame
    """Columns of ``_stats.tsv`` that a proof adds, by abbreviation."""
    warnings: tuple[str, ...]
    """Nuclei in which nothing could be planted, and why."""


def prove(
    chi: Volume,
    dseg: Volume,
    structures: Sequence[Structure],
    segment: Callable[[PlantedMap], NDArray[np.integer]],
    *,
    full: bool = False,
    edited: Collection[str] = (),
) -> Proof:
    r"""Plant known changes in a map, segment it again, and measure what is recovered.

    Parameters
    ----------
    chi : Volume
        Susceptibility in ppm, NaN where not valid.
    dseg : Volume
        Labels of the map on its grid, made by `segment`.
    structures : sequence of Structure
        Nuclei, each with labels of its own.
    segment : callable
        Returns the labels of a map, with the settings of `dseg` and on its grid; called for four maps, six if `full`.
        An `InputError` ends the proof.
    full : bool
        Plant growth by 10 % and a loss of 5 % as well.
    edited : collection of str
        Abbreviations of nuclei whose labels were then edited by hand, which no segmentation repeats.

    Returns
    -------
    Proof
        ``recovered_ppb`` of 10 ppb planted within the label; ``recovered_percent`` of a planted loss of 10 % of the
        volume; ``repeat_volume_percent``, ``repeat_ppb`` and ``repeat_dice``, how closely repetitions with noise agree.
        NaN for nuclei that are missing, lost in the planted map, or in which nothing can be planted.

    Notes
    -----
    The nuclei form two sets, in which neighbours are kept apart as far as possible. The first map has more
    susceptibility in one set, within the labels blurred by half a voxel, and less volume in the other; in the second
    map the sets are exchanged. Volumes change by a smooth deformation: voxel :math:`x` gets the value at
    :math:`x - a \nabla(G * p)`, with the label :math:`p` and a Gaussian :math:`G` of 2 mm; :math:`a` is such that the
    moved label has the volume that is wanted. With the measured susceptibility :math:`\chi` and volume :math:`V`,
    the recovered changes are :math:`\Delta\chi` and :math:`-\Delta V / V`, relative to what was planted, times 10; a
    label that is found again unchanged recovers 10 ppb. Repetitions are
    shifted by 0.2 to 0.5 voxels along each axis and get noise of the map's own level; ``repeat`` is the standard
    deviation (n - 1) of the three measures, and the mean Dice coefficient with the labels shifted back.
    """
    planting = Planting.of(chi, dseg, structures)
    before = _measure(chi, dseg.array, structures)
    names = [name for name in PROOF_COLUMNS if full or name not in [*PLANTED_PERCENT][1:]]
    table = pd.DataFrame(np.nan, index=before.index, columns=names, dtype=np.float64)
    repeats, overlaps = [before], list[pd.Series]()
    problems = {**planting.problems, **dict.fromkeys(edited, "edited by hand")}
    try:
        for planted in planting.maps(full=full):
            labels = segment(planted)
            after = _measure(planted.chi, labels, structures)
            if any(planted.shift_voxels):
                repeats.append(after)
                overlaps.append(_overlap(dseg.array, labels, structures, planted.shift_voxels))
            change_ppb = 1000 * (after["ppm"] - before["ppm"])
            percent = 100 * (after["mm3"].where(after["mm3"] > 0) / before["mm3"] - 1)
            share = PLANTED_PPB / pd.Series(planted.ppb, dtype=float)
            table["recovered_ppb"] = table["recovered_ppb"].fillna(share * change_ppb)
            for column, changes in planted.percent.items():
                share = abs(PLANTED_PERCENT[column]) / pd.Series(changes, dtype=float)
                table[column] = table[column].fillna(share * percent)
    except InputError as error:
        problems |= dict.fromkeys(before.index, str(error))
    if len(repeats) > _N_REPEATS:
        volumes, means = (pd.concat([each[column] for each in repeats], axis=1) for column in ("mm3", "ppm"))
        table["repeat_volume_percent"] = 100 * volumes.std(axis=1) / volumes.mean(axis=1)
        table["repeat_ppb"] = 1000 * means.std(axis=1, skipna=False)
        table["repeat_dice"] = pd.concat(overlaps, axis=1).mean(axis=1)
    table.loc[[name for name in problems if name in table.index]] = np.nan
    lines = [
        f"{', '.join(name for name, _ in nuclei)}: not tested, {reason}"
        for reason, nuclei in groupby(sorted(problems.items(), key=itemgetter(1)), key=itemgetter(1))
    ]
    return Proof(table, tuple(lines))


@dataclass(frozen=True)
class _Rim:
    """A nucleus with its surroundings."""

    box: Block
    """Part of the block."""
    label: NDArray[np.bool_]
    """Its voxels in the box."""
    fraction: NDArray[np.float64]
    """Fraction of each voxel of the box inside the nucleus."""

    def moved(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the fractions if each voxel of the block (3, x, y, z) comes from another place."""
        start = np.array([part.start for part in self.box])[:, None, None, None]
        fraction: NDArray[np.float64] = ndimage.map_coordinates(self.fraction, places[:, *self.box] - start, order=1)
        return fraction


@dataclass(frozen=True)
class Planting:
    """A map in which changes are planted."""

    chi: Volume
    block: Block
    """Part of the map that is changed."""
    values: NDArray[np.float64]
    """Its susceptibility, that of the nearest valid voxel where there is none."""
    rims: Mapping[str, _Rim]
    """Abbreviation of a nucleus in which changes are planted → its outline."""
    sets: tuple[tuple[str, ...], tuple[str, ...]]
    problems: Mapping[str, str]
    """Abbreviation of a nucleus in which nothing can be planted → why."""

    @classmethod
    def of(cls, chi: Volume, dseg: Volume, structures: Sequence[Structure]) -> Planting:
        """Find the nuclei in which changes can be planted, and divide them into two sets."""
        regions = zip(structures, find_regions(dseg.array, structures), strict=True)
        boxes = {row.abbreviation: box for row, (box, region) in regions if region.any()}
        problems = {row.abbreviation: "not found" for row in structures if row.abbreviation not in boxes}
        if not boxes:
            return cls(chi, (slice(0), slice(0), slice(0)), np.empty((0, 0, 0)), {}, ((), ()), problems)
        size_mm, valid = chi.voxel_size_mm, is_valid(chi.array)
        block = _widen(boxes.values(), _MARGIN_MM, chi)
        labels, values = dseg.array[block], chi.array[block]
        nearest = ndimage.distance_transform_edt(~valid[block], return_distances=False, return_indices=True)
        fov = FieldOfView.of(valid, voxel_size_mm=size_mm).crop(block)
        clipped = [limit for limit in find_export(chi.array[valid]).clipped if limit > 0]
        rims, masks = {}, {}
        for row in structures:
            if (name := row.abbreviation) not in boxes:
                continue
            mask = np.isin(labels, row.labels)
            if fov.distance_to_edge(mask) < _EDGE_MM:
                problems[name] = f"closer than {_EDGE_MM:g} mm to the edge of the field of view"
            elif clipped and np.nanmax(values[mask]) + PLANTED_PPB / 1000 > clipped[0]:
                problems[name] = f"the map is clipped at {clipped[0]:.3g} ppm, which planted values would exceed"
            else:
                wide = _widen([boxes[name]], _MARGIN_MM - 1, chi)
                x, y, z = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(wide, block, strict=True))
                label = mask[x, y, z]
                fraction = ndimage.gaussian_filter(label.astype(np.float64), _RIM_VOXELS)
                masks[name], rims[name] = mask, _Rim((x, y, z), label, fraction)
        filled = values[tuple(nearest)].astype(np.float64)
        return cls(chi, block, filled, rims, _divide(masks, size_mm), problems)

    def maps(self, *, full: bool = False) -> Iterator[PlantedMap]:
        """Yield maps with planted changes, then repetitions; always the same."""
        if not self.rims:
            return
        first, second = self.sets
        for one_set, other in ((first, second), (second, first)):
            yield self._plant(one_set, {"recovered_percent": other})
        for one_set, other in ((first, second), (second, first)) if full else ():
            yield self._plant((), {"recovered_growth_percent": one_set, "recovered_small_percent": other})
        rng, values = np.random.default_rng(_SEED), self.values
        noise_ppm = float(np.nan_to_num(estimate_noise(values, is_valid(self.chi.array[self.block]))))
        for _ in range(_N_REPEATS):
            shift = rng.uniform(*_SHIFT_VOXELS, 3) * rng.choice((-1, 1), 3)
            moved = ndimage.shift(values, shift, order=3, mode="nearest") + rng.normal(0, noise_ppm, values.shape)
            places = np.indices(values.shape) - shift[:, None, None, None]
            yield PlantedMap(self._with_values(moved), self, places, {}, {}, tuple(shift.tolist()), noise_ppm)

    def _plant(self, richer: Sequence[str], columns: Mapping[str, Sequence[str]]) -> PlantedMap:
        """Plant susceptibility in some nuclei, and the change of volume of each column in others."""
        wanted = {name: PLANTED_PERCENT[column] for column, names in columns.items() for name in names}
        places, achieved = self._deform(wanted)
        values = self.values.copy()
        changed = np.abs(places - np.indices(values.shape)).max(axis=0) > _LEAST_MOVED_VOXELS
        values[changed] = ndimage.map_coordinates(values, places[:, changed], order=3, mode="nearest")
        ppb = {}
        for name in richer:
            rim = self.rims[name]
            added = PLANTED_PPB * rim.moved(places)
            values[rim.box] += added / 1000
            ppb[name] = float(added[rim.label].mean())
        percent = {column: {name: achieved[name] for name in names} for column, names in columns.items()}
        return PlantedMap(self._with_values(values), self, places, ppb, percent)

    def _deform(self, wanted: Mapping[str, float]) -> tuple[NDArray[np.float64], dict[str, float]]:
        """Return where the value of each voxel comes from (3, x, y, z), and the changes of volume in percent."""
        size_mm = np.array(self.chi.voxel_size_mm)
        here = np.indices(self.values.shape).astype(np.float64)
        slopes, steps_mm, achieved = {}, {}, dict[str, float]()
        for name, percent in wanted.items():
            smooth = ndimage.gaussian_filter(self.rims[name].fraction, _REACH_MM / size_mm)
            slope = np.stack(np.gradient(smooth, *size_mm))
            slopes[name] = slope / np.linalg.norm(slope, axis=0).max() / size_mm[:, None, None, None]
            steps_mm[name] = _MM_PER_PERCENT * percent
        for _ in range(_MOST_FITS):
            places = here.copy()
            for name, slope in slopes.items():
                places[:, *self.rims[name].box] += steps_mm[name] * slope
            for name in wanted:
                rim = self.rims[name]
                achieved[name] = 100 * float(rim.moved(places).sum() / rim.fraction.sum() - 1)
            if all(abs(percent / achieved[name] - 1) < _FITTED for name, percent in wanted.items()):
                break
            for name, percent in wanted.items():  # limited, for nuclei that others move
                steps_mm[name] *= float(np.clip(percent / achieved[name], 0.3, 3))
        return places, achieved

    def _with_values(self, values: NDArray[np.float64]) -> Volume:
        """Return the map with other values in the block, where it is valid."""
        array = self.chi.array.copy()
        np.copyto(array[self.block], values, where=is_valid(array[self.block]), casting="same_kind")
        return self.chi.with_array(array)


def _widen(boxes: Iterable[tuple[slice, ...]], margin_mm: float, grid: Volume) -> Block:
    """Return the part of a grid with a margin around boxes."""
    axes = zip(zip(*boxes, strict=True), grid.voxel_size_mm, grid.shape, strict=True)
    x, y, z = (
        slice(
            max(min(part.start for part in parts) - math.ceil(margin_mm / edge), 0),
            min(max(part.stop for part in parts) + math.ceil(margin_mm / edge), size),
        )
        for parts, edge, size in axes
    )
    return x, y, z


def _divide(
    masks: Mapping[str, NDArray[np.bool_]], voxel_size_mm: tuple[float, float, float]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide nuclei into two sets, from large to small, each into the set with fewer voxels close to it."""
    sets: tuple[list[str], list[str]] = ([], [])
    for name in sorted(masks, key=lambda name: (-np.count_nonzero(masks[name]), name)):
        near = ndimage.distance_transform_edt(~masks[name], sampling=voxel_size_mm) <= _CONTACT_MM
        contacts = [sum(np.count_nonzero(near & masks[other]) for other in part) for part in sets]
        sets[0 if (contacts[0], len(sets[0])) <= (contacts[1], len(sets[1])) else 1].append(name)
    return tuple(sets[0]), tuple(sets[1])


def _measure(chi: Volume, labels: NDArray[np.integer], structures: Sequence[Structure]) -> pd.DataFrame:
    """Measure the volume ``mm3`` and mean ``ppm`` of each nucleus, by abbreviation."""
    table = measure_nuclei(chi.array, labels, structures=structures, voxel_size_mm=chi.voxel_size_mm)
    return table.set_index("abbreviation")[["volume_mm3", "mean_ppm"]].set_axis(["mm3", "ppm"], axis=1)


def _overlap(
    labels: NDArray[np.integer], others: NDArray[np.integer], structures: Sequence[Structure], shift: Sequence[float]
) -> pd.Series:
    """Return the Dice coefficient of each nucleus with that of labels that are shifted by fractions of a voxel."""
    values = {}
    regions = zip(structures, find_regions(labels, structures), find_regions(others, structures), strict=True)
    for row, (_, whole), (box, region) in regions:
        wide = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        first, n_first = np.isin(labels[wide], row.labels), np.count_nonzero(whole)
        back = np.isin(others[wide], row.labels).astype(np.float64)
        back = ndimage.shift(back, np.negative(shift), order=1) >= 0.5 if region.any() else back
        total = n_first + np.count_nonzero(back)
        values[row.abbreviation] = 2 * np.count_nonzero(first & (back > 0)) / total if total else np.nan
    return pd.Series(values, dtype=np.float64)
