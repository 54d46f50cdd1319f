"""Read the chi maps of a BIDS dataset with their labels: manual labels, or pseudo-labels of models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.entities import split_entities, stem_of
from bids_dgmseg.bids.masks_and_maps import LabelTable, find_images, find_label_table, match_scans
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import Grid, check_grid
from bids_dgmseg.image.units import CHI, check_chi
from bids_dgmseg.image.volume import StoredVolume, Volume, read_labels
from bids_dgmseg.io.files import read_optional_json, sha256, sha256_of, store, value_of
from bids_dgmseg.models.model_folder import TRAINING_MAPS
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure


@dataclass(frozen=True)
class LabelledMap:
    """A chi map with labels of some nuclei."""

    name: str
    """Name of the scan."""
    chi: Volume
    """In ppm, as networks see maps: finite, within ±5 ppm, without small separate components."""
    channel_map: Volume
    """On the grid of `chi`: channels of the model (1, 2, … in the order of its labels), 0 for background."""
    participant: str = ""
    """Without ``sub-``."""
    dseg: Path = Path()
    file: Path = Path()
    """The map."""
    training_maps: frozenset[str] = frozenset()
    """Checksums of the maps that the networks which made pseudo-labels were trained on, where recorded."""

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Channels of the nuclei that are labelled; whether the others exist is unknown."""
        return tuple(int(channel) for channel in np.unique(self.channel_map.array) if channel)

    def stored(self, folder: Path | None) -> LabelledMap:
        """Return the same with its arrays in files of a folder, see `bids_dgmseg.io.files`; None keeps them."""
        if folder is None:
            return self
        chi, channel_map = (store(volume, StoredVolume, folder) for volume in (self.chi, self.channel_map))
        return replace(self, chi=chi, channel_map=channel_map)


def read_labelled_maps(
    dataset: Path,
    model: Model,
    *,
    derivatives: Sequence[Path] = (),
    choose: Sequence[str] = (),
    warn: Callable[[str], None],
    progress: Callable[[str], None] = lambda text: None,
    arrays: Path | None = None,
) -> list[LabelledMap]:
    """Read the chi maps of a dataset that have a segmentation, in the dataset or its derivatives.

    Nuclei are matched by the abbreviations (or names) in each segmentation's ``dseg.tsv``. A bilateral label
    (``RN``) is divided at the midplane of the head. Segmentations by a model of this package (``seg-dgm16``) are only
    used if `choose` names them.

    Parameters
    ----------
    dataset : path
        Root of a BIDS dataset.
    model : Model
        Which nuclei, in which channels.
    derivatives : sequence of path
        Derivative datasets; by default those in ``dataset/derivatives``.
    choose : sequence of str
        Entities that decide if a scan has several segmentations.
    warn : callable
        Gets a line per problem.
    progress : callable
        Gets the name of each map that is read.
    arrays : path or None
        Folder for the arrays, which else stay in memory.

    Raises
    ------
    InputError
        If there are no maps, no labels, no nucleus of the model among them, or labels on another grid than their map.
    """
    scans, segmentations = match_labels(dataset, derivatives=derivatives, choose=choose)
    if unlabelled := [scan.name for scan in scans if scan.chi not in segmentations]:
        warn(f"no labels for {list_some(unlabelled)}; left out")
    read, warnings = [], []
    matched = [scan for scan in scans if scan.chi in segmentations]
    for number, scan in enumerate(matched, start=1):
        progress(f"reading {scan.name}, {number} of {len(matched)}")
        labelled, lines = _read_labelled_map(scan, segmentations[scan.chi], model)
        read.append(labelled.stored(arrays))
        warnings += lines
    for line in dict.fromkeys(warnings):
        warn(line)
    if not any(labelled_map.channels for labelled_map in read):
        raise InputError(
            f"{dataset.name}: no label is a nucleus of {model.name} ({', '.join(model.labels)}); use these names in "
            "the column abbreviation of dseg.tsv"
        )
    if empty := [labelled_map.name for labelled_map in read if not labelled_map.channels]:
        warn(f"no nucleus of {model.name} in the labels of {list_some(empty)}; left out")
    return [labelled_map for labelled_map in read if labelled_map.channels]


def labelled_structures(labelled: Iterable[LabelledMap], model: Model) -> list[Structure]:
    """List the nuclei that are labelled in any of the maps, in the order of the model's channels."""
    channels = sorted({channel for labelled_map in labelled for channel in labelled_map.channels})
    return [model.structures[channel - 1] for channel in channels]


def manual_labels(labelled: LabelledMap, model: Model) -> NDArray[np.uint8]:
    """Return the labels of a map, the indices of structures.tsv, from its channels."""
    indices = np.array([0, *(structure.index for structure in model.structures)], np.uint8)
    labels: NDArray[np.uint8] = indices[labelled.channel_map.array]
    return labels


def label_checksums(labelled: Iterable[LabelledMap]) -> dict[str, dict[str, str]]:
    """Return the checksums of label images and of the nuclei that their values stand for, by the name of the image."""
    paths = {labelled_map.dseg.name: labelled_map.dseg for labelled_map in labelled}
    return {
        "labels": {name: sha256(path) for name, path in paths.items()},
        "label_tables": {
            name: sha256_of({"nuclei": find_label_table(path).abbreviations}) for name, path in paths.items()
        },
    }


def describe_leakage(scans: Collection[str]) -> str:
    """Describe that initial weights may have seen these scans of a test set; empty if there are none."""
    if not scans:
        return ""
    return (
        f"warning: the starting weights were trained on {list_some(scans)} of the test set, or on other scans of "
        "participants with these labels, so its Dice does not show the performance on new scans; hold out other "
        "participants, or start from other weights"
    )


def match_labels(
    dataset: Path, *, derivatives: Sequence[Path] = (), choose: Sequence[str] = ()
) -> tuple[list[Scan], dict[Path, Path]]:
    """Find the chi maps of a dataset and their segmentations; arguments and errors as `read_labelled_maps`.

    Returns
    -------
    list of Scan
        All maps.
    dict of path to path
        Map → segmentation, for maps that have one.
    """
    scans = find_scans(open_inputs(dataset, Selection(derivatives=tuple(derivatives))))
    dsegs: list[Path] = []
    for root in (dataset, *(derivatives or list_derivatives(dataset))):
        with suppress(InputError):  # a dataset without segmentations
            dsegs += find_images(root, "dseg")
    predicted = {f"seg-{name}" for name in MODELS} - set(choose)
    models = {path: split_entities(path.name.partition(".")[0]).get("seg") for path in dsegs}
    dsegs = [path for path in dsegs if f"seg-{models[path]}" not in predicted]
    if not dsegs:
        raise InputError(f"{dataset.name}: no manual labels (_dseg.nii[.gz]) in it or its derivatives; add them")
    segmentations = match_scans([scan.chi for scan in scans], dsegs, choose=choose)
    if not segmentations:
        raise InputError(
            f"{dataset.name}: no _dseg belongs to the scan of a _Chimap ({dsegs[0].name}, {scans[0].chi.name}); "
            "give both the same entities"
        )
    return scans, segmentations


def list_derivatives(dataset: Path) -> list[Path]:
    """List the derivative datasets inside a dataset."""
    return sorted(path for path in (dataset / "derivatives").glob("*") if any(path.glob("sub-*")))


def _read_labelled_map(scan: Scan, dseg: Path, model: Model) -> tuple[LabelledMap, list[str]]:
    """Read a map with its labels, and return it with warnings; values without a channel become 0, with a warning."""
    from bids_dgmseg.segmentation.segment import clean  # imports torch

    if scan.problem:
        raise InputError(scan.problem)
    checked = check_chi(scan.chi, scan.sidecar, contrast=model.input.contrast)
    warnings = list(checked.warnings)
    chi = clean(checked.chi_ppm)
    labels = read_labels(dseg)
    check_grid(dseg, labels, chi, other=scan.chi.name)
    table = find_label_table(dseg)
    if table.source is None:
        warnings.append("no dseg.tsv found; labels are read as the indices of this package (1 DN_L, 2 DN_R, …)")
    channels = np.zeros(labels.shape, np.uint8)
    unknown, bilateral = [], {}
    for value in _values(labels):
        name = table.abbreviations.get(value, "")
        if name in model.labels:
            channels[labels.array == value] = model.labels.index(name) + 1
        elif f"{name}_L" in model.labels:
            bilateral[value] = name
        else:
            unknown.append(value)
    if bilateral:
        from bids_dgmseg.registration.midplane import find_midplane
        from bids_dgmseg.segmentation.localize import find_regions  # imports torch

        right = find_midplane(chi, find_regions(chi) if model.input.contrast == CHI else None).is_right(
            Grid(chi.shape, chi.affine)
        )
        for (value, name), (side, half) in product(bilateral.items(), (("L", ~right), ("R", right))):
            channels[(labels.array == value) & half] = model.labels.index(f"{name}_{side}") + 1
        where, names = (table.source or dseg).name, list_some(bilateral.values())
        warnings.append(f"{where}: bilateral labels ({names}) divided at the midplane of the head")
    if unknown:
        warnings.append(_describe_unknown(unknown, table, table.source or dseg, model.name))
    channel_map = Volume(channels, chi.affine)
    return LabelledMap(scan.name, chi, channel_map, participant=scan.participant, dseg=dseg, file=scan.chi), warnings


def find_nuclei(dsegs: Iterable[Path]) -> tuple[frozenset[str], list[str]]:
    """Find the nuclei of segmentations by the abbreviations of structures.tsv; unreadable segmentations are skipped.

    A bilateral label (``RN``) is a nucleus, too.

    Returns
    -------
    frozenset of str
        Abbreviations of the nuclei in any of them.
    list of str
        Labels that are not nuclei, one line per label table.
    """
    known_names = {name for structure in ALL_STRUCTURES for name in (structure.abbreviation, structure.nucleus)}
    tables: dict[Path, tuple[LabelTable, set[int]]] = {}
    for dseg in dsegs:
        with suppress(InputError):
            table, values = find_label_table(dseg), _values(read_labels(dseg))
            tables.setdefault(table.source or dseg, (table, set()))[1].update(values)
    nuclei, unknown = set(), []
    for path, (table, seen) in tables.items():
        recognized = {value for value in seen if table.abbreviations.get(value) in known_names}
        nuclei |= {table.abbreviations[value] for value in recognized}
        if seen - recognized:
            unknown.append(_describe_unknown(sorted(seen - recognized), table, path, "structures.tsv (DN_L, DN_R, …)"))
    return frozenset(nuclei), unknown


def _describe_unknown(values: Iterable[int], table: LabelTable, path: Path, source: str) -> str:
    named = ", ".join(f"{value} ({table.abbreviations.get(value, 'without a row')})" for value in values)
    return f"{path.name}: {named} not among the nuclei of {source}; ignored"


def _values(labels: Volume) -> list[int]:
    values: list[int] = np.unique(labels.array[labels.array != 0]).tolist()
    return values


def read_pseudo_labels(
    dataset: Path,
    model: Model,
    folders: Sequence[Path],
    *,
    exclude: Collection[str],
    parameter: str,
    warn: Callable[[str], None],
    derivatives: Sequence[Path] = (),
    holdout: Collection[str] = (),
    arrays: Path | None = None,
) -> list[LabelledMap]:
    """Read the maps of a dataset with labels that models predicted, fused by majority vote if there are several.

    `folders` are outputs of ``bids_dgmseg``, one per model; a map is used if all of them have its labels. Scans in
    `exclude` (those with manual labels) and participants in `holdout` are left out. Messages name the folders
    `parameter`. The other arguments are those of `read_labelled_maps`. InputError if no map is left.
    """
    scans = [
        scan
        for scan in find_scans(open_inputs(dataset, Selection(derivatives=tuple(derivatives))))
        if scan.name not in exclude and scan.participant not in holdout
    ]
    choose = (f"seg-{model.name}",)
    predictions = [
        match_scans([scan.chi for scan in scans], find_images(folder, "dseg"), choose=choose) for folder in folders
    ]
    shared = [scan for scan in scans if all(scan.chi in paths for paths in predictions)]
    if not shared:
        raise InputError(
            f"`{parameter}` {folders[0].name}: no labels for a map of {dataset.name} without manual labels; run "
            "bids_dgmseg on the dataset with this output folder"
        )
    labelled, warnings = [], []
    for scan in shared:
        votes = []
        for paths in predictions:
            vote, lines = _read_labelled_map(scan, paths[scan.chi], model)
            votes.append(vote)
            warnings += lines
        fused = majority_vote([vote.channel_map.array for vote in votes])
        training_maps = frozenset[str]().union(*(read_settings(vote.dseg).get(TRAINING_MAPS, ()) for vote in votes))
        labelled_map = replace(
            votes[0], channel_map=votes[0].channel_map.with_array(fused), training_maps=training_maps
        )
        labelled.append(labelled_map.stored(arrays))
    for line in dict.fromkeys(warnings):
        warn(line)
    if empty := [labelled_map.name for labelled_map in labelled if not labelled_map.channels]:
        warn(f"no nucleus in the pseudo-labels of {list_some(empty)}; left out")
    if len(empty) == len(labelled):
        raise InputError(f"`{parameter}` {folders[0].name}: no nucleus in any map; train the first model longer")
    return [labelled_map for labelled_map in labelled if labelled_map.channels]


def read_settings(dseg: Path) -> Mapping[str, Any]:
    """Read the settings of a segmentation by this package from the ``_qc.json`` beside it; empty if there is none."""
    record = read_optional_json(dseg.with_name(f"{stem_of(dseg).removesuffix('dseg')}qc.json"))
    return value_of(record, "settings", dict)


def majority_vote(labels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Fuse segmentations by majority vote per voxel (Kim et al. 2020, II.D).

    Parameters
    ----------
    labels : sequence of ndarray
        Of the same shape. If two labels have as many votes, the lower number wins, background first.
    """
    highest = max(int(segmentation.max(initial=0)) for segmentation in labels)
    votes = [sum((segmentation == number).astype(np.uint8) for segmentation in labels) for number in range(highest + 1)]
    winner: NDArray[np.uint8] = np.argmax(votes, axis=0).astype(np.uint8)
    return winner
