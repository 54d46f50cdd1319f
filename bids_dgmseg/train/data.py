"""Read the labelled maps of a dataset for training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.bids.segmentations import LabelTable, find_images, match_scans, read_label_table
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.structures import STRUCTURES, Structure
from bids_dgmseg.train.labelled_patches import LabelledMap
from bids_dgmseg.train.schemes import majority_vote


@dataclass(frozen=True)
class Labelled:
    """One labelled map of a dataset."""

    participant: str
    """Without ``sub-``."""
    dseg: Path
    map: LabelledMap


def read_labelled_maps(
    dataset: Path,
    model: Model,
    *,
    derivatives: Sequence[Path] = (),
    choose: Sequence[str] = (),
    say: Callable[[str], None],
) -> list[Labelled]:
    """Read the chi maps of a dataset that have a segmentation in it or in its derivatives.

    Nuclei are matched by the abbreviations (or names) in each segmentation's ``dseg.tsv``. Segmentations that a model
    of this program made (``seg-dgm16``) count only where `choose` names them.

    Parameters
    ----------
    dataset : path
        Root of a BIDS dataset.
    model : Model
        Which nuclei, in which channels.
    derivatives : sequence of path
        Datasets to look in besides; by default those below ``dataset/derivatives``.
    choose : sequence of str
        Entities that decide where a scan has several segmentations.
    say : callable
        Gets a line on what does not match.

    Raises
    ------
    InputError
        If there are no maps, no labels, no nucleus of the model among them, or labels on another grid than their map.
    """
    scans, partners = match_labels(dataset, derivatives=derivatives, choose=choose)
    if bare := [scan.name for scan in scans if scan.chi not in partners]:
        say(f"no labels for {list_some(bare)}; left out")
    notes: dict[str, None] = {}
    read = [read_labelled(scan, partners[scan.chi], model, notes) for scan in scans if scan.chi in partners]
    for line in notes:
        say(line)
    if not any(one.map.channels for one in read):
        raise InputError(
            f"{dataset.name}: no label is a nucleus of {model.name} ({', '.join(model.labels)}); "
            "name them so in the column abbreviation of dseg.tsv"
        )
    if empty := [one.map.name for one in read if not one.map.channels]:
        say(f"no nucleus of {model.name} in the labels of {list_some(empty)}; left out")
    return [one for one in read if one.map.channels]


def drawn_structures(labelled: Iterable[Labelled], model: Model) -> list[Structure]:
    """List the nuclei that any of some maps has, in the order of the model's channels."""
    channels = sorted({channel for one in labelled for channel in one.map.channels})
    return [model.structures[channel - 1] for channel in channels]


def match_labels(
    dataset: Path, *, derivatives: Sequence[Path] = (), choose: Sequence[str] = ()
) -> tuple[list[Scan], dict[Path, Path]]:
    """Find the chi maps of a dataset, and the segmentation of each that has one; else as `read_labelled_maps`.

    Returns
    -------
    list of Scan
        All maps.
    dict of path to path
        Map → its segmentation.
    """
    scans = find_scans(open_inputs(dataset, Selection(derivatives=tuple(derivatives))))
    dsegs = _segmentations([dataset, *(derivatives or own_derivatives(dataset))], choose)
    if not dsegs:
        raise InputError(f"{dataset.name}: no _dseg.nii[.gz] of manual labels in it or its derivatives; add them")
    partners = match_scans([scan.chi for scan in scans], dsegs, choose=choose)
    if not partners:
        raise InputError(
            f"{dataset.name}: no _dseg is of the same scan as a _Chimap ({dsegs[0].name}, {scans[0].chi.name}); "
            "give both the same entities"
        )
    return scans, partners


def own_derivatives(dataset: Path) -> list[Path]:
    """List the derivative datasets inside a dataset."""
    return sorted(path for path in (dataset / "derivatives").glob("*") if any(path.glob("sub-*")))


def _segmentations(roots: Sequence[Path], choose: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for root in roots:
        with suppress(InputError):  # a dataset without segmentations
            found += find_images(root, "dseg")
    made = {f"seg-{name}" for name in MODELS} - set(choose)
    return [path for path in found if f"seg-{split_entities(path.name.partition('.')[0]).get('seg')}" not in made]


def read_labelled(scan: Scan, dseg: Path, model: Model, notes: dict[str, None]) -> Labelled:
    """Read one map with its labels; `notes` gets a line on what does not match."""
    if scan.problem:
        raise InputError(scan.problem)
    checked = check_chi(scan.chi, scan.sidecar)
    notes.update(dict.fromkeys(checked.warnings))
    chi = checked.chi_ppm.with_array(np.nan_to_num(checked.chi_ppm.array))
    labels = read_labels(dseg)
    if apart := describe_grid_mismatch(chi, labels):
        raise InputError(
            f"{dseg.name}: does not lie on the grid of {scan.chi.name} ({apart}); resample the labels first"
        )
    labels = Volume(_to_channels(dseg, labels, model, notes), chi.affine)
    return Labelled(scan.participant, dseg, LabelledMap(scan.name, chi, labels))


def _to_channels(
    dseg: Path, labels: Volume, model: Model, notes: dict[str, None]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Turn a label image's own numbers into channels; what has no channel becomes 0 and a note."""
    table = read_label_table(dseg)
    if table.source is None:
        notes["no dseg.tsv found; numbers are read as those of this program (1 DN_L, 2 DN_R, …)"] = None
    channels = _channels(table.abbreviations, model)
    array = np.zeros(labels.shape, np.uint8)
    unknown = []
    for number in _numbers(labels):
        if number in channels:
            array[labels.array == number] = channels[number]
        else:
            unknown.append(number)
    if unknown:
        notes[_note_unknown(unknown, table, table.source or dseg, model.name)] = None
    return array


def find_nuclei(dsegs: Iterable[Path]) -> tuple[frozenset[str], list[str]]:
    """Find the nuclei of segmentations by the abbreviations of structures.tsv, which alone comparisons match.

    A segmentation that cannot be read is passed over.

    Returns
    -------
    frozenset of str
        Abbreviations of the nuclei that any of them has.
    list of str
        Which labels are none of them, one line a label table.
    """
    ours = {structure.abbreviation for structure in STRUCTURES}
    found: dict[Path, tuple[LabelTable, set[int]]] = {}
    for dseg in dsegs:
        with suppress(InputError):
            table, numbers = read_label_table(dseg), _numbers(read_labels(dseg))
            found.setdefault(table.source or dseg, (table, set()))[1].update(numbers)
    nuclei, notes = set(), []
    for path, (table, seen) in found.items():
        known = {number for number in seen if table.abbreviations.get(number) in ours}
        nuclei |= {table.abbreviations[number] for number in known}
        if seen - known:
            notes.append(_note_unknown(sorted(seen - known), table, path, "structures.tsv (DN_L, DN_R, …)"))
    return frozenset(nuclei), notes


def _note_unknown(numbers: Iterable[int], table: LabelTable, where: Path, whose: str) -> str:
    named = ", ".join(f"{number} ({table.abbreviations.get(number, 'without a row')})" for number in numbers)
    return f"{where.name}: {named} not among the nuclei of {whose}; ignored"


def _numbers(labels: Volume) -> list[int]:
    numbers: list[int] = np.unique(labels.array[labels.array != 0]).tolist()
    return numbers


def _channels(abbreviations: Mapping[int, str], model: Model) -> dict[int, int]:
    """Match numbers with channels, by abbreviation or by full name."""
    ours = {structure.name: structure.abbreviation for structure in STRUCTURES}
    named = {number: ours.get(name, name) for number, name in abbreviations.items()}
    return {number: model.labels.index(name) + 1 for number, name in named.items() if name in model.labels}


def read_pseudo_labels(
    dataset: Path,
    model: Model,
    folders: Sequence[Path],
    *,
    besides: Collection[str],
    option: str,
    say: Callable[[str], None],
    derivatives: Sequence[Path] = (),
    holdout: Collection[str] = (),
) -> list[Labelled]:
    """Read the maps of a dataset with the labels that models gave them, fused by majority where there are several.

    Parameters
    ----------
    dataset : path
        Root of the BIDS dataset of the maps.
    model : Model
        Which nuclei, in which channels.
    folders : sequence of path
        Results of ``bids_dgmseg``, one folder a model. A map counts if all of them have labels of it.
    besides : collection of str
        Names of scans to leave out: those with manual labels.
    option : str
        What the user called the folders, for messages.
    say : callable
        Gets a line on what does not match.
    derivatives : sequence of path
        Where else maps are; none for all below ``derivatives/`` of the dataset.
    holdout : collection of str
        Participants to leave out, without ``sub-``.

    Raises
    ------
    InputError
        If no map is left.
    """
    found = find_scans(open_inputs(dataset, Selection(derivatives=tuple(derivatives))))
    scans = [scan for scan in found if scan.name not in besides and scan.participant not in holdout]
    choose = (f"seg-{model.name}",)
    tables = [
        match_scans([scan.chi for scan in scans], find_images(folder, "dseg"), choose=choose) for folder in folders
    ]
    shared = [scan for scan in scans if all(scan.chi in table for table in tables)]
    if not shared:
        raise InputError(
            f"{option} {folders[0].name}: has no labels of a map of {dataset.name} without manual ones; run "
            "bids_dgmseg on it, with this folder for its results"
        )
    notes: dict[str, None] = {}
    labelled = []
    for scan in shared:
        votes = [read_labelled(scan, table[scan.chi], model, notes) for table in tables]
        fused = votes[0].map.labels.with_array(majority_vote([vote.map.labels.array for vote in votes]))
        labelled.append(replace(votes[0], map=replace(votes[0].map, labels=fused)))
    for line in notes:
        say(line)
    return [one for one in labelled if one.map.channels]
