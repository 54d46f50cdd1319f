"""Match the labels of nnU-Net model folders with our nuclei: by name, or by the user's table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.nnunet_folder import CEREBELLUM, DENTATE, is_single_model, nnunet_step_folder, read_labels
from bids_dgmseg.models.registry import Model, Postprocessing, weights_folder
from bids_dgmseg.models.structures import ALL_STRUCTURES

_FREESURFER = {
    f"{side} {theirs}": f"{side} {ours}"
    for side in ("left", "right")
    for theirs, ours in (
        ("caudate", "caudate nucleus"),
        ("pallidum", "globus pallidus"),
        ("substancia nigra", "substantia nigra"),
        ("cerebellum dentate", "dentate nucleus"),
        ("accumbens area", "nucleus accumbens"),
        ("thalamus proper", "thalamus"),
    )
}
"""Names in FreeSurferColorLUT.txt, also of older versions → ours."""


def match_labels(model: Model, weights: Path | None) -> tuple[Model, list[str]]:
    """Return a model that runs nnU-Net folders with the nuclei that the folder of its weights segments.

    Parameters
    ----------
    model : Model
        Registry entry.
    weights : path or None
        Model folder to use instead of the weights in the package.

    Returns
    -------
    Model
        ``labels`` in the order of structures.tsv; ``label_numbers`` maps each, and the cerebellum, to numbers of the
        folder. Labels of a single model folder are not postprocessed.
    list of str
        Warnings about labels without a match.

    Raises
    ------
    InputError
        If the folder cannot be read, or no label matches a nucleus.
    """
    folder = weights or weights_folder(model)
    if weights is None and not folder.is_dir():
        return model, []  # the error about missing weights comes with loading them
    cerebellum, dentate = nnunet_step_folder(folder, CEREBELLUM), nnunet_step_folder(folder, DENTATE)
    numbers, warnings = _match_nuclei(read_labels(dentate or folder), folder.name)
    labels = tuple(structure.abbreviation for structure in ALL_STRUCTURES if structure.abbreviation in numbers)
    if cerebellum is not None:
        numbers[CEREBELLUM] = _match_cerebellum(read_labels(cerebellum), folder.name)
    chosen = replace(model, labels=labels, label_numbers={name: tuple(found) for name, found in numbers.items()})
    if is_single_model(folder):  # its labels are those of nnUNetv2_predict
        return replace(chosen, postprocessing=Postprocessing(min_component_fraction=0)), warnings
    return chosen, warnings


def read_label_map(path: Path) -> dict[str, str]:
    """Read labels (name or number) and our abbreviations: a TSV with these columns, or a JSON object.

    Raises
    ------
    InputError
        If it cannot be read, or an abbreviation is not in structures.tsv.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            rows = [(row["label"], row["abbreviation"]) for row in csv.DictReader(text.splitlines(), delimiter="\t")]
            content = dict(rows)
            if len(content) < len(rows):
                raise InputError(f"{path.name}: a label is listed twice; keep one row per label")
        pairs = {str(label).strip(): str(abbreviation or "").strip() for label, abbreviation in content.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check `label_map`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name}: not a label map; write a TSV with the columns label and abbreviation, or a JSON object"
        ) from error
    known = {structure.abbreviation for structure in ALL_STRUCTURES} | {CEREBELLUM}
    if unknown := [abbreviation for abbreviation in pairs.values() if abbreviation not in known]:
        what = f"unknown nucleus {unknown[0]}" if unknown[0] else "a label without abbreviation"
        raise InputError(f"{path.name}: {what}; use e.g. DN_L, or {CEREBELLUM}")
    return pairs


def _match_nuclei(labels: Mapping[str, int], where: str) -> tuple[dict[str, list[int]], list[str]]:
    """Return the numbers of each nucleus, and warnings."""
    numbers: dict[str, list[int]] = {}
    unknown = []
    for name, number in labels.items():
        abbreviation = match_name(name)
        if abbreviation is None:
            unknown.append(f"{number} ({name})")
        else:
            numbers.setdefault(abbreviation, []).append(number)
    if not numbers:
        raise InputError(
            f"{where}: none of its labels ({', '.join(unknown)}) is a known nucleus; name one DN_L in dataset.json"
        )
    warnings = []
    if unknown:
        warnings.append(f"{where}: label {', '.join(unknown)} matches no nucleus and becomes background")
    return numbers, warnings


def _match_cerebellum(labels: Mapping[str, int], where: str) -> list[int]:
    """Find the numbers of the cerebellum: by name, or the only label there is."""
    named = [number for name, number in labels.items() if CEREBELLUM in name.lower()]
    if named or len(labels) == 1:
        return named or list(labels.values())
    raise InputError(
        f"{where}/{CEREBELLUM}: none of its labels ({', '.join(labels)}) is the cerebellum; name it so in dataset.json"
    )


def match_name(name: str) -> str | None:
    """Match an abbreviation or full name, ignoring case, hyphens and underscores.

    >>> match_name("Left-Dentate-Nucleus"), match_name("dn_r"), match_name("lesion")
    ('DN_L', 'DN_R', None)
    """
    spaces = str.maketrans("-_", "  ")
    name = _FREESURFER.get(name.lower().translate(spaces), name)
    for structure in ALL_STRUCTURES:
        known = (structure.abbreviation.lower().translate(spaces), structure.name.lower().translate(spaces))
        if name.lower().translate(spaces) in known:
            return structure.abbreviation
    return None
