"""Read nnU-Net v2 model folders; nothing in them is executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CEREBELLUM, DENTATE = STEPS = ("cerebellum", "dentate")
"""The two model folders of ``--weights DIR``, in the order in which they are run."""

FULL_RESOLUTION = "3d_fullres"
"""Configuration that `bids_dgmseg.lab.train.nnunet_commands` trains."""

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")

_ORIENTATIONS = {"".join(axes) for pairs in permutations(("LR", "AP", "IS")) for axes in product(*pairs)}

_LAYERS = {
    "conv": "Conv1d Conv2d Conv3d",
    "instancenorm": "InstanceNorm1d InstanceNorm2d InstanceNorm3d",
    "batchnorm": "BatchNorm1d BatchNorm2d BatchNorm3d",
    "normalization": "GroupNorm LayerNorm",
    "dropout": "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout",
    "activation": "ReLU LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Hardswish Softplus Tanh Sigmoid",
}
"""Modules of torch.nn.modules and their classes; plans.json names them with their module or as ``torch.nn.X``."""

_CLASSES = {
    *(
        f"torch.nn.{module}{name}"
        for layer, names in _LAYERS.items()
        for name in names.split()
        for module in ("", f"modules.{layer}.")
    ),
    *(f"dynamic_network_architectures.building_blocks.residual.{name}" for name in ("BasicBlockD", "BottleneckD")),
    *(
        f"dynamic_network_architectures.architectures.{name}"
        for name in (
            "unet.PlainConvUNet",
            "unet.ResidualEncoderUNet",
            "unet.ResidualUNet",
            "residual_unet.ResidualEncoderUNet",
        )
    ),
}
"""Classes that the architecture in plans.json may consist of. nnU-Net imports and calls whatever is named there, also
what a module like torch.nn has itself imported, so that only whole names are compared."""

_RESAMPLING = {f"resample_{name}" for name in ("data_or_seg_to_shape", "torch_fornnunet", "torch_simple")}

_FUNCTIONS = {
    "preprocessor_name": {"DefaultPreprocessor"},
    **{f"resampling_fn_{name}": {*_RESAMPLING, "no_resampling_hack"} for name in ("data", "seg", "probabilities")},
    "normalization_schemes": {f"{name}Normalization" for name in ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01")},
}
"""Other keys of a configuration that nnU-Net looks up in its modules, which import much else, and calls."""


@dataclass(frozen=True)
class NnunetModel:
    """Content of a model folder."""

    folder: Path
    plans: Mapping[str, Any]
    """With one configuration, the one to be run, which inherits nothing."""
    dataset: Mapping[str, Any]
    configuration: str
    parameters: Sequence[Mapping[str, Tensor]]
    """One state per fold; their logits are averaged."""
    trainer: str
    mirror_axes: tuple[int, ...]

    @property
    def orientation(self) -> str | None:
        """Orientation of the training images, such as ``RAS``; None if the folder does not state it."""
        reorients = self.plans.get("image_reader_writer") == "NibabelIOWithReorient"
        return "RAS" if reorients else self.dataset.get("orientation")


def nnunet_step_folder(folder: Path, step: str) -> Path | None:
    """Return the model folder of a step; None if there is no network for the first step.

    If `folder` itself is a model folder, it is that of the second step.
    """
    if is_single_model(folder):
        return None if step == CEREBELLUM else folder
    return None if step == CEREBELLUM and not (folder / step).is_dir() else folder / step


def is_single_model(folder: Path) -> bool:
    """Return whether a folder itself is a model folder, whose network sees the whole map."""
    return (folder / "plans.json").is_file()


def read_labels(folder: Path) -> dict[str, int]:
    """Read the names and numbers of the labels of a model folder, without background and ``ignore``.

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
            f"{folder}: not an nnU-Net model folder (no dataset.json); pass the folder with plans.json and fold_0 as "
            "`weights`, or a folder with such folders named dentate and, unless dgm16 is to find it, cerebellum"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder.name}/dataset.json: its labels cannot be read; copy the folder again") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net: tensors, NumPy scalars and plain values, nothing that could run.

    Raises
    ------
    InputError
        If it is damaged or contains anything else.
    """
    # Here, because --help and dry runs read labels at most.
    import numpy as np
    import torch

    # A pickled NumPy scalar consists of these, under the names of NumPy 1 and 2.
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    allowed: list[Any] = [*((scalar, name) for name in names), np.dtype, *dtypes]
    where = f"{path.parent.name}/{path.name}"
    try:
        with torch.serialization.safe_globals(allowed):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except pickle.UnpicklingError as error:
        unsafe = any(word in str(error) for word in ("Unsupported", "Unsafe", "GLOBAL"))
        reason = "contains more than numbers and could run code" if unsafe else "damaged"
        raise InputError(f"{where}: {reason}; not loaded, get it from its source again") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{where}: damaged or truncated; copy it again") from error


def read_folder(folder: Path, *, folds: Collection[int] = ()) -> NnunetModel:
    """Read a model folder: dataset.json, plans.json and the checkpoint of every fold, or of some `folds`.

    Raises
    ------
    InputError
        If something is missing or damaged, or the network needs more than one map.
    """
    read_labels(folder)  # for its error messages
    dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    try:
        plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder.name}/plans.json: missing or damaged; copy the whole nnU-Net model folder"
        ) from error
    if not isinstance(plans, dict):
        raise InputError(f"{folder.name}/plans.json: not a JSON object; copy the whole nnU-Net model folder")
    checkpoints = [read_checkpoint(path) for path in _find_checkpoints(folder, folds)]
    first = checkpoints[0]
    try:
        configuration = str(first["init_args"]["configuration"])
        settings = _inherit(plans["configurations"], configuration)
        model = NnunetModel(
            folder,
            {**plans, "configurations": {configuration: settings}},
            dataset,
            configuration,
            [checkpoint["network_weights"] for checkpoint in checkpoints],
            str(first.get("trainer_name", "")),
            tuple(first.get("inference_allowed_mirroring_axes") or ()),
        )
        channels = len(dataset["channel_names"] if "channel_names" in dataset else dataset["modality"])
        check_names(plans, settings, where=f"{folder.name}/plans.json")
        for weights in model.parameters:
            check_finite(weights)
    except ValueError as error:
        raise InputError(f"{folder.name}: {error}; get the model folder from its source again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder.name}: plans, labels and checkpoint do not match ({error}); copy the whole model folder"
        ) from error
    if channels != 1:
        raise InputError(
            f"{folder.name}: its network needs {channels} images per scan, but there is only the chi map; use a folder "
            "trained on chi maps only"
        )
    if "previous_stage" in settings:
        raise InputError(
            f"{folder.name}: {configuration} is the second stage of a cascade; use a folder of 3d_fullres, 3d_lowres "
            "or 2d"
        )
    axes = model.orientation
    if axes is not None and axes not in _ORIENTATIONS:
        raise InputError(f"{folder.name}/dataset.json: orientation {axes!r} is invalid; write one such as RAS")
    return model


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that weights are numbers; ValueError if not: such a network's answer would be empty or meaningless."""
    for name, values in weights.items():
        if not values.isfinite().all():
            raise ValueError(f"its weights {name} are not finite numbers")


def _find_checkpoints(folder: Path, folds: Collection[int]) -> list[Path]:
    """Find one checkpoint per fold (of `folds`, if any), preferably the final one; otherwise that of ``fold_all``."""
    checkpoints, names = {}, {f"fold_{fold}" for fold in folds}
    for fold in sorted(path for path in folder.glob("fold_*") if path.is_dir() and (not names or path.name in names)):
        checkpoints[fold.name] = next((fold / name for name in _CHECKPOINTS if (fold / name).is_file()), None)
    all_data = checkpoints.pop("fold_all", None)
    paths = [path for path in checkpoints.values() if path] or ([all_data] if all_data else [])
    if not paths:
        expected = " or ".join(f"fold_N/{name}" for name in _CHECKPOINTS)
        raise InputError(f"{folder}: {expected} not found; copy the whole folder")
    return paths


def list_empty_folds(folder: Path) -> list[str]:
    """List the folds of a model folder without a checkpoint, which are not averaged."""
    folds = (path for path in folder.glob("fold_*") if path.is_dir())
    return sorted(fold.name for fold in folds if not any((fold / name).is_file() for name in _CHECKPOINTS))


def _inherit(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration of plans.json with all that it inherits from others."""
    merged: dict[str, Any] = {}
    seen = set()
    while name not in seen:
        seen.add(name)
        merged = {**configurations[name], **merged}
        if "inherits_from" not in merged:
            return merged
        name = merged.pop("inherits_from")
    raise KeyError(f"{name} inherits from itself")


def check_names(plans: Mapping[str, Any], settings: Mapping[str, Any], *, where: str) -> None:
    """Check that nnU-Net will find and call nothing but its own classes and functions.

    Parameters
    ----------
    plans : mapping
        Content of plans.json.
    settings : mapping
        The configuration that is run, with what it inherits.
    where : str
        Name for messages.

    Raises
    ------
    InputError
        If a name is not in the lists of this module.
    """
    for key, value, allowed in _find_names(plans, settings):
        if not (isinstance(value, str) and value in allowed):
            raise InputError(
                f"{where}: {key} is {value!r:.80}, which is not part of nnU-Net and is not run; use a folder with one "
                "of nnU-Net's own networks"
            )


def _find_names(plans: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Collection[str]]]:
    """Yield key, value and allowed values of all that nnU-Net looks up by name and calls."""
    yield "label_manager", plans.get("label_manager", "LabelManager"), {"LabelManager"}
    for key, allowed in _FUNCTIONS.items():
        values = settings[key] if isinstance(settings[key], list) else [settings[key]]
        yield from ((key, value, allowed) for value in values)
    if "architecture" not in settings:  # plans of nnU-Net 2.0 to 2.3
        yield "UNet_class_name", settings["UNet_class_name"], {"PlainConvUNet", "ResidualEncoderUNet"}
        return
    architecture = settings["architecture"]
    yield "network_class_name", architecture["network_class_name"], _CLASSES
    imported = architecture["_kw_requires_import"]
    for key, value in architecture["arch_kwargs"].items():
        if isinstance(value, str) or (key in imported and value is not None):
            yield f"arch_kwargs.{key}", value, _CLASSES


def mirror_axes(model: NnunetModel, axes: str, *, sided: bool) -> tuple[int, ...]:
    """Return the axes of a network's patches along which predictions may be mirrored.

    Parameters
    ----------
    model : NnunetModel
        Its trainer allows some.
    axes : str
        Orientation of the map as the network sees it, such as ``RAS``.
    sided : bool
        Whether left and right must not be exchanged.
    """
    allowed = set(model.mirror_axes)
    if sided:
        left_right = next(axis for axis, code in enumerate(reversed(axes)) if code in "LR")
        missing = 3 - len(
            model.plans["configurations"][model.configuration]["patch_size"]
        )  # a 2D network sees the last two axes
        allowed.discard(model.plans["transpose_forward"].index(left_right) - missing)
    return tuple(sorted(allowed))
