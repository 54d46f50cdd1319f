"""Files of the label template, which workflows/make_template writes: labels, warps to people, other anatomies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.simulate.anatomy import SECOND_PARTS, TISSUES, is_made_from
from bids_dgmseg.lab.simulate.ranges import HeadRanges, chance, uniform
from bids_dgmseg.models.structures import STRUCTURES

WARPS_SUFFIX = "_warps.nii.gz"
"""Replaces ``.nii.gz`` in the name of a template."""

OTHER_ANATOMIES = {"BigBrain": "_bigbrain.nii.gz", "7TAMIBrain": "_7tami.nii.gz"}
"""Atlas whose nuclei replace those of the template → what replaces ``.nii.gz`` in the name of the template."""

_ADVICE = "create it with workflows/make_template"

NUCLEUS_NAMES = {
    **{row.index: row.name for row in STRUCTURES},
    **{part: f"second part of label {nucleus}" for nucleus, part in SECOND_PARTS.items()},
}

_REQUIRED = {*(row.index for row in STRUCTURES), *range(21, 31)}
"""Labels without which a file is no template; nuclei need not have parts, and small tissues may be missing."""


def read_template(path: Path) -> Volume:
    """Read a label template.

    Raises
    ------
    InputError
        If the file cannot be read, contains unknown labels, lacks a nucleus or a tissue that all heads have, or a
        nucleus lies where another is expected, as if labels or sides were exchanged.
    """
    labels = Volume.read(path, np.float32)
    names = {**NUCLEUS_NAMES, **TISSUES}
    numbers = set(np.unique(labels.array).tolist())
    if unknown := sorted(numbers - {0, *names}):
        raise InputError(f"{path.name}: {unknown[0]:g} is not a label of a template; {_ADVICE}")
    if missing := sorted(_REQUIRED - numbers):
        raise InputError(f"{path.name}: label {missing[0]} ({names[missing[0]]}) not found; {_ADVICE}")
    template = labels.with_array(labels.array.astype(np.uint8))
    numbers_of_nuclei = [structure.index for structure in STRUCTURES]
    centres_mm = ndimage.center_of_mass(template.array > 0, template.array, numbers_of_nuclei)
    expected_mm = [structure.mni_mm for structure in STRUCTURES]
    nearest = cdist(nib.affines.apply_affine(template.affine, centres_mm), expected_mm).argmin(axis=1)
    for structure, place in zip(STRUCTURES, nearest, strict=True):
        other = list(STRUCTURES)[place]
        if other is not structure:
            raise InputError(
                f"{path.name}: label {structure.index} ({structure.name}) lies where {other.index} ({other.name}) is "
                f"expected; {_ADVICE}"
            )
    return template


def read_other_templates(template: Path) -> dict[str, Volume]:
    """Read the templates with nuclei of `OTHER_ANATOMIES` that are next to a template.

    Raises
    ------
    InputError
        If a file is no template, or was made from another one.
    """
    templates = {}
    for name, suffix in OTHER_ANATOMIES.items():
        path = with_extension(template, suffix)
        if not path.is_file():
            continue
        if not is_made_from(load_image(path), template):
            raise InputError(f"{path.name}: was made from another {template.name}; run workflows/make_template again")
        templates[name] = read_template(path)
    return templates


def with_extension(path: Path, extension: str) -> Path:
    """Return the path of a file with the same name and another extension."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + extension)


@dataclass(frozen=True)
class Warps:
    """Displacements of the template for several people.

    Parameters
    ----------
    displacement_mm : Tensor of shape (N, 3, X, Y, Z), float16
        Added to the coordinates of a person, aligned to the template by an affine, it gives those of the template.
    world_to_index : Tensor of shape (4, 4)
        RAS+ mm to indices of the lattice.
    """

    displacement_mm: Tensor
    world_to_index: Tensor

    def to(self, device: str | torch.device) -> Warps:
        """Copy the warps to a device."""
        return Warps(self.displacement_mm.to(device), self.world_to_index.to(device))

    def draw(self, ranges: HeadRanges, generator: torch.Generator) -> Tensor:
        """Draw the displacement (3, X, Y, Z) of one person or of a mean of two; 0 for the template itself."""
        amount = uniform(generator, *ranges.person)
        share = uniform(generator, 0.0, 1.0) if chance(generator, ranges.mixed) else 1.0
        number = len(self.displacement_mm)
        first, second = (int(uniform(generator, 0, number + 1)) for _ in range(2))
        total = torch.zeros_like(self.displacement_mm[0], dtype=torch.float32)
        for person, part in ((first, share), (second, 1 - share)):
            if person < number and part > 0:
                total += amount * part * self.displacement_mm[person]
        return total


def interpolate(field: Tensor, world_to_index: Tensor, points_mm: Tensor) -> Tensor:
    """Interpolate a field (C, X, Y, Z) at points (..., 3) in mm: (..., C), 0 beyond its lattice."""
    size = torch.tensor(field.shape[1:], device=points_mm.device)
    indices = points_mm @ world_to_index[:3, :3].T + world_to_index[:3, 3]
    grid = (2 * indices / (size - 1) - 1).flip(-1).view(1, 1, 1, -1, 3)
    sampled = functional.grid_sample(field[None], grid, align_corners=True, padding_mode="zeros")
    return sampled.view(len(field), -1).T.view(*points_mm.shape[:-1], len(field))


def read_warps(template: Path) -> Warps | None:
    """Read the warps next to a template; None if there are none.

    Raises
    ------
    InputError
        If the file is not one of warps, or of the warps of another template.
    """
    path = warps_path(template)
    if not path.is_file():
        return None
    image = load_image(path)
    if len(image.shape) != 5 or image.shape[4] != 3:
        raise InputError(f"{path.name}: has shape {image.shape}, expected (X, Y, Z, people, 3); {_ADVICE}")
    if not is_made_from(image, template):
        raise InputError(
            f"{path.name}: was computed for another version of {template.name}; run workflows/make_template again"
        )
    array = torch.from_numpy(np.asarray(image.dataobj, np.float16)).permute(3, 4, 0, 1, 2).contiguous()
    return Warps(array, torch.tensor(np.linalg.inv(image.affine), dtype=torch.float32))


def warps_path(template: Path) -> Path:
    """Return the path of the warps of a template."""
    return with_extension(template, WARPS_SUFFIX)
