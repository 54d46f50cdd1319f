"""Labels that models gave to maps without manual ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from bids_dgmseg.bids.dataset import find_scans
from bids_dgmseg.bids.segmentations import find_images, match_scans
from bids_dgmseg.errors import InputError
from bids_dgmseg.models import Model
from bids_dgmseg.pipeline.labels import Labelled, read_labelled
from bids_dgmseg.settings import Settings
from bids_dgmseg.training.schemes import majority_vote


def read_pseudo_labels(
    dataset: Path, model: Model, folders: Sequence[Path], *, besides: Collection[str], option: str,
    say: Callable[[str], None], derivatives: Sequence[Path] = (), holdout: Collection[str] = (),
) -> list[Labelled]:  # fmt: skip
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
    found = find_scans(Settings(bids_dir=dataset, output_dir=dataset / "derivatives", derivatives=tuple(derivatives)))
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
