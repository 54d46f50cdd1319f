"""Anatomical variation of people: warps from their labelled heads to the label template.

The heads are manual labels of the Harvard-Oxford Atlas 2.0 (Rushmore et al. 2022, doi:10.3389/fnana.2022.894606; public
as ``HOA-2/SubcorticalParcellations``), none of which is part of this project. A warp deforms the template so that its
ventricles, striatum, pallidum, thalamus, brainstem, hippocampus and cerebellum coincide with those of a person; what
the person's labels lack (red nucleus, nigra, dentate, cortex, vessels) is carried along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import atomic_write, sha256
from bids_dgmseg.lab.simulate.template import interpolate, warps_path


@dataclass(frozen=True, kw_only=True)
class SharedStructure:
    """A structure that template and people have in common."""

    name: str
    template: tuple[int, ...]
    left: tuple[int, ...]
    """Labels of a person; on both sides for structures of the midline."""
    right: tuple[int, ...] = ()
    weight: float = 1.0
    """Of the difference between its masks; 0 if only its centre is used."""
    landmark: bool = True
    """Its centre is compared in the affine alignment; not for ventricles, which vary most."""


PEOPLES = (
    SharedStructure(name="caudate", template=(11, 12), left=(9,), right=(10,)),
    SharedStructure(name="putamen", template=(13, 14), left=(11,), right=(12,)),
    SharedStructure(name="pallidum", template=(15, 16, 17, 18), left=(13,), right=(14,)),
    SharedStructure(name="accumbens", template=(36,), left=(7,), right=(8,)),
    SharedStructure(name="thalamus", template=(27,), left=(16,), right=(17,)),
    SharedStructure(name="lateral ventricle", template=(23,), left=(1, 18), right=(2, 19), landmark=False),
    SharedStructure(name="third ventricle", template=(24,), left=(4,), landmark=False),
    SharedStructure(name="fourth ventricle", template=(25,), left=(5,), landmark=False),
    SharedStructure(name="brainstem", template=(28, 5, 6, 7, 8, 9, 10, 19, 20), left=(15, 27, 28), weight=0.3),
    SharedStructure(name="hippocampus and amygdala", template=(31,), left=(20, 22), right=(21, 23), weight=0.5),
    SharedStructure(name="cerebellum", template=(29, 30, 1, 2, 3, 4, 34), left=(29, 31), right=(30, 32), weight=0.5),
    SharedStructure(name="cerebellar white matter", template=(30, 1, 2, 3, 4, 34), left=(31,), right=(32,), weight=0.3),
)
"""Structures that the Harvard-Oxford Atlas 2.0 has."""

_REQUIRED = {label for shared in PEOPLES for label in (*shared.left, *shared.right)}
"""Labels without which a head cannot be used."""

_LOW_MM, _HIGH_MM = (-69.0, -105.0, -72.0), (69.0, 57.0, 51.0)
"""Part of the template in which people's labels lie."""

_STEP_MM, _LATTICE_MM = 1.5, 4.0
"""Of the compared images and of the warp."""

_STAGES = ((2.0, 60, 0.25), (1.0, 80, 0.15), (0.6, 60, 0.08))
"""Smoothing of the labels in mm, iterations and learning rate in mm."""

_POINTS = 15_000
"""Compared in each iteration."""

_BENDING = 0.01
"""Weight of the squared second differences of the displacement in mm."""

_FADE_STEPS = 4
"""Steps of the lattice over which displacements fall to 0 at its faces."""


def write_warps(template: Path, heads: Sequence[Path], *, seed: int = 0) -> Iterator[str]:
    """Compute the warp of each labelled head to a template and write them next to it, all in one file.

    Parameters
    ----------
    template : path
        Label template, see `label_template.write_template`.
    heads : sequence of path
        Label images of the Harvard-Oxford Atlas 2.0, in any orientation.
    seed : int
        Of the points at which labels are compared.

    Yields
    ------
    str
        One line per head with the Dice of each shared structure.

    Raises
    ------
    InputError
        If a head lacks a structure, or its left and right, or other labels, are exchanged.
    """
    target = SharedImages(Volume.read(template, np.float32))
    for path in heads:  # before hours of computing
        target.check(read_head(path), path.name)
    fields = []
    for path in heads:
        field, overlap = target.register(read_head(path), generator=torch.Generator().manual_seed(seed))
        fields.append(field)
        yield f"{path.name}  " + "  ".join(f"{label} {value:.3f}" for label, value in overlap.items())
    stacked = np.moveaxis(np.stack([field.numpy() for field in fields]), (0, 1), (3, 4))
    image = nib.Nifti1Image(stacked.astype(np.float32), target.lattice.affine)
    image.set_data_dtype(np.int16)
    image.header.set_xyzt_units("mm")
    image.header.set_intent("vector")
    image.header["descrip"] = sha256(template)
    with atomic_write(warps_path(template)) as temporary:
        image.to_filename(temporary)


def find_heads(folder: Path) -> list[Path]:
    """Return the label images in a folder, sorted by name; InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the folder of the labelled heads")
    if heads := sorted(path for path in folder.iterdir() if path.name.endswith((".nii", ".nii.gz"))):
        return heads
    raise InputError(f"{folder}: contains no NIfTI files; pass the folder of the labelled heads")


def read_head(path: Path) -> Volume:
    """Read a labelled head; InputError if structures are missing or its sides are exchanged."""
    head = Volume.read(path, np.float32)
    if missing := sorted(_REQUIRED - set(np.unique(head.array).astype(int).tolist())):
        raise InputError(f"{path.name}: label {missing[0]} not found; use heads of the Harvard-Oxford Atlas 2.0")
    left, right = (_centre_mm(head.array == label, head.affine)[0] for label in (11, 12))
    if left > right:
        raise InputError(
            f"{path.name}: its left putamen (11) lies to the right of its right one (12); check the header"
        )
    return head


class SharedImages:
    """The template's shared structures, to which heads are registered."""

    def __init__(self, template: Volume, shared: Sequence[SharedStructure] = PEOPLES) -> None:
        self.grid = _grid(_STEP_MM)
        self.lattice = _grid(_LATTICE_MM)
        self._shared = [structure for structure in shared if np.isin(template.array, structure.template).any()]
        self._masks = [
            Volume(np.isin(template.array, shared.template).astype(np.float32), template.affine)
            for shared in self._shared
        ]
        left = _x_mm(template)[:, None, None] < 0
        self._sides = [
            (labels, shared.landmark) for shared in self._shared for labels in (shared.left, shared.right) if labels
        ]
        self._landmarks = np.array([landmark for _, landmark in self._sides])
        self._centres = np.array(
            [
                _centre_mm((mask.array > 0) & side, template.affine)
                for mask, shared in zip(self._masks, self._shared, strict=True)
                for side in ((left, ~left) if shared.right else (True,))
            ]
        )
        self._images = self._blur(self._masks)

    def check(self, head: Volume, name: str) -> None:
        """Raise InputError if a structure of a head, aligned to the template, is nearest to the place of another.

        Ventricles are compared with ventricles only: the centres of wide ones are as near to those of other structures.
        """
        centres = self._find_centres(head)
        aligned = centres @ self._align(centres)[:3].T
        comparable = self._landmarks[:, None] == self._landmarks
        nearest = np.where(comparable, cdist(aligned, self._centres), np.inf).argmin(axis=1)
        for number, place in enumerate(nearest):
            if number != place:
                label, expected = (self._sides[index][0][0] for index in (number, place))
                raise InputError(
                    f"{name}: label {label} lies where {expected} is expected; use heads of the Harvard-Oxford "
                    "Atlas 2.0"
                )

    def register(self, head: Volume, *, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return the displacement in mm (3, X, Y, Z) of a head on the lattice, and the Dice of each structure."""
        affine = self.align(head) @ head.affine
        masks = [np.isin(head.array, (*shared.left, *shared.right)).astype(np.float32) for shared in self._shared]
        images = self._blur([Volume(mask, affine) for mask in masks])
        points = torch.from_numpy(self.grid.centres_mm()).float().view(-1, 3)
        weights = torch.tensor([shared.weight for shared in self._shared])
        variable = torch.zeros((3, *self.lattice.shape), requires_grad=True)
        window = _fade_out(self.lattice.shape)
        to_lattice = torch.tensor(np.linalg.inv(self.lattice.affine), dtype=torch.float32)
        to_grid = torch.tensor(np.linalg.inv(self.grid.affine), dtype=torch.float32)
        for (_, iterations, rate), fixed, moving in zip(_STAGES, images, self._images, strict=True):
            near = _near_borders(fixed, moving)
            optimizer = torch.optim.Adam([variable], lr=rate)
            for _ in range(iterations):
                chosen = near[torch.randint(len(near), (_POINTS,), generator=generator)]
                here, displacement = points[chosen], variable * window
                there = here + interpolate(displacement, to_lattice, here)
                difference = interpolate(moving, to_grid, there) - fixed.view(len(fixed), -1)[:, chosen].T
                loss = (difference.square() * weights).sum(dim=1).mean() + _BENDING * _bending(displacement)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            field = variable * window
            warped = interpolate(self._images[-1], to_grid, points + interpolate(field, to_lattice, points))
        fixed = images[-1].view(len(self._shared), -1).T
        both, total = ((warped > 0.5) & (fixed > 0.5)).sum(0), (warped > 0.5).sum(0) + (fixed > 0.5).sum(0)
        compared = zip(self._shared, both, total, strict=True)
        return field, {shared.name: float(2 * b / t) for shared, b, t in compared if shared.weight > 0}

    def align(self, head: Volume) -> NDArray[np.float64]:
        """Return the affine (4, 4) that maps the centres of a person's landmarks to those of the template."""
        return self._align(self._find_centres(head))

    def _align(self, centres: NDArray[np.float64]) -> NDArray[np.float64]:
        solution, *_ = np.linalg.lstsq(centres[self._landmarks], self._centres[self._landmarks], rcond=None)
        return np.vstack([solution.T, [0, 0, 0, 1]])

    def _find_centres(self, head: Volume) -> NDArray[np.float64]:
        """Return the centres of a person's structures, each side by itself, in mm as rows (x, y, z, 1)."""
        return np.array([[*_centre_mm(np.isin(head.array, labels), head.affine), 1.0] for labels, _ in self._sides])

    def _blur(self, masks: Sequence[Volume]) -> list[Tensor]:
        """Resample masks to the common grid and smooth them for each stage: (C, X, Y, Z)."""
        sampled = [resample(mask, self.grid, antialias=True).array for mask in masks]
        return [
            torch.from_numpy(np.stack([ndimage.gaussian_filter(image, sigma / _STEP_MM) for image in sampled]))
            for sigma, _, _ in _STAGES
        ]


def _bending(displacement: Tensor) -> Tensor:
    """Mean squared second difference of a displacement (3, X, Y, Z)."""
    total = torch.zeros(())
    for axis in (1, 2, 3):
        total = total + torch.diff(displacement, n=2, dim=axis).square().mean()
    return total


def _fade_out(shape: tuple[int, int, int]) -> Tensor:
    """Return factors (X, Y, Z) that fall to 0 at the faces of the lattice, beyond which nothing is displaced."""
    factors = torch.ones(shape)
    for axis, size in enumerate(shape):
        from_face = torch.minimum(torch.arange(size), torch.arange(size).flip(0))
        view = [1, 1, 1]
        view[axis] = size
        factors = factors * (from_face / _FADE_STEPS).clamp(max=1).view(view)
    return factors


def _near_borders(*images: Tensor) -> Tensor:
    """Return the flat indices of the voxels that are partly inside a structure in any of the images (C, X, Y, Z)."""
    partly = torch.stack([((image > 0.02) & (image < 0.98)).any(dim=0) for image in images]).any(dim=0)
    return partly.view(-1).nonzero()[:, 0]


def _grid(step_mm: float) -> Grid:
    shape = [round((high - low) / step_mm) + 1 for low, high in zip(_LOW_MM, _HIGH_MM, strict=True)]
    affine = np.diag([step_mm, step_mm, step_mm, 1.0])
    affine[:3, 3] = _LOW_MM
    return Grid((shape[0], shape[1], shape[2]), affine)


def _x_mm(volume: Volume) -> NDArray[np.float64]:
    x: NDArray[np.float64] = volume.affine[0, 0] * np.arange(volume.shape[0]) + volume.affine[0, 3]
    return x


def _centre_mm(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    centre: NDArray[np.float64] = affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]
    return centre
