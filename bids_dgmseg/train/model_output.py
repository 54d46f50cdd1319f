"""Complete a model folder: its description, and reference maps for an atlas localizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.io.files import atomic_write
from bids_dgmseg.models.model_folder import write_model_toml
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.regions import valid_box
from bids_dgmseg.train.data import LabelledMap, manual_labels
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.splits import choose_some

_REFERENCE_MM = 2.0
"""Voxel size of reference maps: registration uses 2.5 mm at the finest (`bids_dgmseg.segmentation.registration`)."""

_STEP_PPM = 1e-4
"""Resolution of stored values; as integers they compress to a third of the size."""


def finish_folder(model: Model, folder: Path, labelled: Sequence[LabelledMap], *, recipe: Recipe, seed: int) -> None:
    """Write the description of a model folder, and references for an atlas localizer.

    References of an earlier call that are not chosen any more are deleted.

    Parameters
    ----------
    model : Model
        With the arguments of its network.
    folder : path
        Model folder.
    labelled : sequence of LabelledMap
        Scans that some fold was trained on; some become references.
    recipe : Recipe
        Gives their number.
    seed : int
        Chooses them.
    """
    about: dict[str, str | int | float] = {"trained_on": f"{len(labelled)} labelled maps", "seed": seed}
    write_model_toml(_as_trained(model, recipe), folder, about=about)
    names = choose_some([one.name for one in labelled], recipe.references, seed=seed)
    for path in (folder / "references").glob("*.nii.gz"):
        if path.name.rpartition("_")[0] not in names:
            path.unlink()
    for one in labelled:
        if one.name in names:
            _write_reference(one, model, folder / "references")


def _as_trained(model: Model, recipe: Recipe) -> Model:
    """Replace network, heads and input of a model by those of a recipe."""
    network, sampling, classes = recipe.network or model.network, recipe.sampling, tuple(recipe.classes)
    as_registered = network == model.network and classes == model.classes and model.arch.get("independent", True)
    slices = 0 if sampling.stack_axis is None else sampling.size[sampling.stack_axis]
    shown = replace(
        model.input,
        spacing_mm=recipe.voxel_size_mm(model),
        patch_mm=recipe.patch_mm(model),
        normalization=sampling.normalization,
        slices=slices,
    )
    return replace(model, network=network, input=shown, heads=model.heads if as_registered else (classes,))


def _write_reference(one: LabelledMap, model: Model, folder: Path) -> None:
    """Write a coarse map and its labels, unless they exist."""
    final = folder / f"{one.name}_Chimap.nii.gz"
    if not final.is_file():
        grid = world_grid(valid_box(one.chi), (_REFERENCE_MM,) * 3)
        coarse = np.clip(resample(one.chi, grid, antialias=True).array, -1, 1)
        _write(np.round(coarse / _STEP_PPM).astype(np.int16), grid.affine, final, slope=_STEP_PPM)
    final = folder / f"{one.name}_dseg.nii.gz"
    if not final.is_file():
        _write(manual_labels(one, model), one.chi.affine, final)


def _write(array: NDArray[np.integer], affine: NDArray[np.float64], final: Path, *, slope: float = 1.0) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    with atomic_write(final) as temporary:
        image.to_filename(temporary)
