"""What the labels of an nnU-Net folder mean here: from its own names or a user's table to our nuclei."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model, weights_folder
from bids_dgmseg.models.structures import STRUCTURES

CEREBELLUM = "cerebellum"

STEPS = (CEREBELLUM, "dentate")
"""The two model folders of ``--weights DIR``, in the order in which they run."""


def nnunet_step_folder(folder: Path, step: str) -> Path | None:
    """Find the model folder of a step.

    Returns
    -------
    path or None
        None for the first step where `folder` itself is one model folder: it sees the whole map.
    """
    if (folder / "plans.json").is_file():
        return None if step == CEREBELLUM else folder
    return folder / step


def choose_labels(model: Model, weights: Path | None, label_map: Path | None) -> tuple[Model, list[str]]:
    """Give a model the nuclei that the folder of its weights segments.

    Parameters
    ----------
    model : Model
        Registry entry; one that is not nnU-Net's comes back as it is.
    weights : path or None
        Folder that takes the place of the model's own weights.
    label_map : path or None
        Table of foreign labels and our abbreviations.

    Returns
    -------
    Model
        ``labels`` in the order of structures.tsv; ``arch["numbers"]`` says which numbers of the folder each is, and
        ``arch["cerebellum"]`` which are the cerebellum.
    list of str
        What to tell the user: labels that match nothing.

    Raises
    ------
    InputError
        If the folder or the table cannot be read, or no label is one of our nuclei.
    """
    if model.localizer.kind != "nnunet":
        if label_map:
            raise InputError(f"--label-map: {model.name} has its own labels; leave it out or use --model nnunet2step")
        return model, []
    given = {} if label_map is None else read_label_map(label_map)
    folder = weights or weights_folder(model)
    if weights is None and not folder.is_dir():
        return model, []  # what says that weights are missing comes later, with the way out
    notes: list[str] = []
    cerebellum, dentate = nnunet_step_folder(folder, CEREBELLUM), nnunet_step_folder(folder, STEPS[1])
    arch: dict[str, Any] = {"numbers": _match_nuclei(read_labels(dentate or folder), given, folder.name, notes)}
    if cerebellum is not None:
        arch[CEREBELLUM] = _match_cerebellum(read_labels(cerebellum), given, folder.name)
    labels = tuple(row.abbreviation for row in STRUCTURES if row.abbreviation in arch["numbers"])
    return replace(model, labels=labels, arch=arch), notes


def read_labels(folder: Path) -> dict[str, int]:
    """Read the names and numbers that a model folder gives out, background and ``ignore`` left out.

    Raises
    ------
    InputError
        If its dataset.json is missing or damaged.
    """
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        regions = any(isinstance(value, list) and len(value) > 1 for value in content["labels"].values())
        names = {name: value for name, value in content["labels"].items() if name != "ignore" and value not in (0, [0])}
        numbers = content["regions_class_order"] if regions else list(names.values())
        return {name: int(number) for name, number in zip(names, numbers, strict=True)}
    except OSError as error:
        raise InputError(
            f"{folder}: no nnU-Net model folder (no dataset.json); give --weights the folder with plans.json and "
            "fold_0, or one with such folders named cerebellum and dentate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder.name}/dataset.json: its labels cannot be read; copy the folder again") from error


def read_label_map(path: Path) -> dict[str, str]:
    """Read which foreign label (name or number) is which of ours.

    Parameters
    ----------
    path : path
        TSV with the columns ``label`` and ``abbreviation``, or a JSON object ``{"label": "abbreviation"}``.

    Raises
    ------
    InputError
        If it cannot be read, or an abbreviation is not in structures.tsv.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _read_rows(text)
        pairs = {str(label): str(ours) for label, ours in content.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check --label-map") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name}: no label map; write a TSV with the columns label and abbreviation, or a JSON object"
        ) from error
    known = {row.abbreviation for row in STRUCTURES} | {CEREBELLUM}
    if wrong := [ours for ours in pairs.values() if ours not in known]:
        raise InputError(f"{path.name}: {wrong[0]} is no nucleus; use an abbreviation such as DN_L, or {CEREBELLUM}")
    return pairs


def _read_rows(text: str) -> dict[str, str]:
    return {row["label"]: row["abbreviation"] for row in csv.DictReader(text.splitlines(), delimiter="\t")}


def _match_nuclei(
    foreign: Mapping[str, int], given: Mapping[str, str], where: str, notes: list[str]
) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    unknown = []
    for name, number in foreign.items():
        ours = given.get(name) or given.get(str(number)) or _our_name(name)
        if ours is None or ours == CEREBELLUM:
            unknown.append(f"{number} ({name})")
        else:
            numbers.setdefault(ours, []).append(number)
    if not numbers:
        raise InputError(
            f"{where}: none of its labels ({', '.join(unknown)}) is a nucleus of this program; say which they are with "
            "--label-map"
        )
    if unknown:
        notes.append(f"{where}: label {', '.join(unknown)} matches no nucleus and becomes background; see --label-map")
    if unused := _without(given, [*foreign, *map(str, foreign.values())]):
        notes.append(f"--label-map: {', '.join(unused)} not among the labels of {where}; ignored")
    return numbers


def _match_cerebellum(foreign: Mapping[str, int], given: Mapping[str, str], where: str) -> list[int]:
    """Find the numbers of the cerebellum; a folder with one label has no other."""
    named = [
        number
        for name, number in foreign.items()
        if CEREBELLUM in (given.get(name), given.get(str(number))) or CEREBELLUM in name.lower()
    ]
    if named or len(foreign) == 1:
        return named or list(foreign.values())
    raise InputError(
        f"{where}/{CEREBELLUM}: none of its labels ({', '.join(foreign)}) is the cerebellum; say which with --label-map"
    )


def _our_name(name: str) -> str | None:
    """Match a name with an abbreviation or a full name, whatever its case and its joints.

    >>> _our_name("Left-Dentate-Nucleus"), _our_name("dn_r"), _our_name("lesion")
    ('DN_L', 'DN_R', None)
    """
    plain = _plain(name)
    return next((row.abbreviation for row in STRUCTURES if plain in (_plain(row.abbreviation), _plain(row.name))), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ")


def _without(given: Iterable[str], known: Iterable[str]) -> list[str]:
    there = set(known)
    return [name for name in given if name not in there]
