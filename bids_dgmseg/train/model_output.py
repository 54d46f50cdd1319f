"""The folder that a training leaves and another one may begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.io.files import atomic_write, read_json
from bids_dgmseg.models.model_folder import write_model_toml
from bids_dgmseg.models.registry import Model, weights_folder
from bids_dgmseg.segmentation.regions import valid_box
from bids_dgmseg.train.data import Labelled
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.run_finetuning import given_labels
from bids_dgmseg.train.schemes import choose_some

_REFERENCE_MM = 2.0
"""Voxels of reference maps: registration looks at 2.5 mm at the finest (`bids_dgmseg.segmentation.registration`)."""

_STEP_PPM = 1e-4
"""Of stored values; whole numbers are packed into a third of the space."""


def finish_folder(model: Model, folder: Path, labelled: Sequence[Labelled], *, recipe: Recipe, seed: int) -> None:
    """Write what a model folder holds beside weights: its description, and references for an atlas localizer.

    References that a former call chose among other scans are removed.

    Parameters
    ----------
    model : Model
        With the arguments of its network.
    folder : path
        Model folder.
    labelled : sequence of Labelled
        Scans that some fold learned from; some become references.
    recipe : Recipe
        Says how many.
    seed : int
        Chooses them.
    """
    about: dict[str, str | int | float] = {"trained_on": f"{len(labelled)} labelled maps", "seed": seed}
    write_model_toml(_as_learned(model, recipe), folder, about=about)
    names = choose_some([one.map.name for one in labelled], recipe.references, seed=seed)
    for path in (folder / "references").glob("*.nii.gz"):
        if path.name.rpartition("_")[0] not in names:
            path.unlink()
    for one in labelled:
        if one.map.name in names:
            _write_reference(one, model, folder / "references")


def _as_learned(model: Model, recipe: Recipe) -> Model:
    """Give a model the network, the heads and the input that a recipe trained."""
    network, sampling, learned = recipe.network or model.network, recipe.sampling, tuple(recipe.classes)
    as_registered = network == model.network and learned == model.classes and model.arch.get("independent", True)
    slices = 0 if sampling.stack_axis is None else sampling.size[sampling.stack_axis]
    return replace(
        model,
        network=network,
        input=replace(
            model.input,
            spacing_mm=recipe.voxel_size_mm(model),
            patch_mm=recipe.patch_mm(model),
            normalization=sampling.normalization,
            slices=slices,
        ),
        heads=model.heads if as_registered else (learned,),
    )


def _write_reference(one: Labelled, model: Model, folder: Path) -> None:
    """Write a map, as finely as registration looks at it, and its labels, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{one.map.name}_Chimap.nii.gz"
    if not final.is_file():
        grid = world_grid(valid_box(one.map.chi), (_REFERENCE_MM,) * 3)
        coarse = np.clip(resample(one.map.chi, grid, antialias=True).array, -1, 1)
        _write(np.round(coarse / _STEP_PPM).astype(np.int16), grid.affine, final, slope=_STEP_PPM)
    final = folder / f"{one.map.name}_dseg.nii.gz"
    if not final.is_file():
        _write(given_labels(one.map, model), one.map.chi.affine, final)


def _write(array: NDArray[np.integer], affine: NDArray[np.float64], final: Path, *, slope: float = 1.0) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    with atomic_write(final) as temporary:
        image.to_filename(temporary)


def find_start(path: Path, fold: int, model: Model) -> tuple[Path, list[str]]:
    """Find weights to begin with.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file, or a model folder: its ``fold_N``, else its first, else ``segmenter``.
    fold : int
        N.
    model : Model
        Whose folder in the package has no record of its training.

    Returns
    -------
    file : path
        With the weights.
    classes : list of str
        What the folder's training told apart; empty where it does not say.

    Raises
    ------
    InputError
        If there are no weights.
    """
    parts = (f"fold_{fold}", "fold_0", "segmenter")
    files = [path] if path.is_file() else [path / f"{part}.safetensors" for part in parts]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise InputError(f"--from {path.name}: has no fold_0 or segmenter.safetensors; give a model folder")
    record = found.parent / "training.json"
    if record.is_file():
        return found, list(read_json(record).get("recipe", {}).get("classes", {}))
    return found, list(model.classes) if found.parent == weights_folder(model) else []
