"""Read nnU-Net v2 model folders; nothing in them is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.label_map import read_labels

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")

_ORIENTATIONS = {"".join(axes) for pairs in permutations(("LR", "AP", "IS")) for axes in product(*pairs)}

_TRUSTED = ("dynamic_network_architectures.", "torch.nn.")
"""Where the classes that plans.json names may come from: they are imported and called."""


@dataclass(frozen=True)
class NnunetModel:
    """A model folder as read from disk."""

    folder: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str
    parameters: Sequence[Mapping[str, Tensor]]
    """One set a fold; their logits are averaged."""
    trainer: str
    mirror_axes: tuple[int, ...]

    @property
    def orientation(self) -> str | None:
        """Axes in which training saw its images, such as ``RAS``; None where the folder does not say."""
        reorients = self.plans.get("image_reader_writer") == "NibabelIOWithReorient"
        return "RAS" if reorients else self.dataset.get("orientation")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net: tensors, NumPy scalars and plain values, nothing that could run.

    Raises
    ------
    InputError
        If it is damaged or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except pickle.UnpicklingError as error:
        unsafe = "Unsupported" in str(error) or "Unsafe" in str(error) or "GLOBAL" in str(error)
        reason = "holds more than numbers, which could run as a program" if unsafe else "is damaged"
        raise InputError(f"{path.parent.name}/{path.name}: {reason}; not loaded; get it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path.parent.name}/{path.name}: is damaged or cut short; copy it again") from error


def _numpy_scalars() -> list[Any]:
    """List what a pickled NumPy scalar consists of, under the names of NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def read_folder(folder: Path) -> NnunetModel:
    """Read a model folder: dataset.json, plans.json and the checkpoint of every fold.

    Raises
    ------
    InputError
        If something is missing or damaged, or the network needs more than one map.
    """
    read_labels(folder)  # says what is wrong with dataset.json
    dataset, plans = (_read_json(folder / name) for name in ("dataset.json", "plans.json"))
    checkpoints = [read_checkpoint(path) for path in _checkpoints(folder)]
    first = checkpoints[0]
    try:
        configuration = str(first["init_args"]["configuration"])
        trained = NnunetModel(
            folder,
            plans,
            dataset,
            configuration,
            [one["network_weights"] for one in checkpoints],
            str(first.get("trainer_name", "")),
            tuple(first.get("inference_allowed_mirroring_axes") or ()),
        )
        channels = len(dataset["channel_names"] if "channel_names" in dataset else dataset["modality"])
        known = plans["configurations"][configuration]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder.name}: plans, labels and checkpoint do not belong together ({error}); copy the whole model folder"
        ) from error
    if channels != 1:
        raise InputError(
            f"{folder.name}: its network needs {channels} images a scan, and there is one map; "
            "give a folder trained on susceptibility maps alone"
        )
    if "previous_stage" in known:
        raise InputError(
            f"{folder.name}: {configuration} is the second stage of a cascade; give a folder of "
            "3d_fullres, 3d_lowres or 2d"
        )
    axes = trained.orientation
    if axes is not None and axes not in _ORIENTATIONS:
        raise InputError(f"{folder.name}/dataset.json: orientation {axes!r} is no order of axes; write one such as RAS")
    foreign = [name for name in _class_names(plans["configurations"]) if not name.startswith(_TRUSTED)]
    if foreign:
        raise InputError(
            f"{folder.name}/plans.json: names {foreign[0]}, which is no part of nnU-Net; it is not run; "
            "give a folder with one of nnU-Net's own networks"
        )
    return trained


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path.parent.name}/{path.name}: missing or damaged; copy the whole nnU-Net model folder"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.parent.name}/{path.name}: is no JSON object; copy the whole nnU-Net model folder")
    return content


def _checkpoints(folder: Path) -> list[Path]:
    """Find a checkpoint a fold, the final one where it has one; ``fold_all`` counts where it is alone."""
    folds = sorted(path for path in folder.glob("fold_*") if path.is_dir())
    checkpoints = {
        fold.name: next((fold / name for name in _CHECKPOINTS if (fold / name).is_file()), None) for fold in folds
    }
    whole = checkpoints.pop("fold_all", None)
    found = [path for path in checkpoints.values() if path] or ([whole] if whole else [])
    if not found:
        raise InputError(f"{folder}: no {' or '.join(f'fold_N/{name}' for name in _CHECKPOINTS)}; copy it whole")
    return found


def _class_names(node: Any) -> Iterator[str]:
    """Yield the dotted names among the values of plans.json's architectures."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "architecture":
                yield str(value["network_class_name"])
                yield from (
                    str(value["arch_kwargs"][name])
                    for name in value["_kw_requires_import"]
                    if value["arch_kwargs"].get(name)
                )
            else:
                yield from _class_names(value)


def mirror_axes(trained: NnunetModel, axes: str, *, sided: bool) -> tuple[int, ...]:
    """Axes of a network's patches along which it may look at mirrored maps.

    Parameters
    ----------
    trained : NnunetModel
        Allows some.
    axes : str
        Of the map as the network sees it, such as ``RAS``.
    sided : bool
        Whether left and right must not be exchanged.
    """
    allowed = set(trained.mirror_axes)
    if sided:
        across = next(axis for axis, code in enumerate(reversed(axes)) if code in "LR")
        flat = 3 - len(_setting(trained, "patch_size"))  # a 2D network sees the last two axes
        allowed.discard(trained.plans["transpose_forward"].index(across) - flat)
    return tuple(sorted(allowed))


def _setting(trained: NnunetModel, name: str) -> Any:
    """Look a setting of the configuration up, in the one that it inherits from where it has none of its own."""
    known = trained.plans["configurations"][trained.configuration]
    while name not in known:
        known = trained.plans["configurations"][known["inherits_from"]]
    return known[name]
