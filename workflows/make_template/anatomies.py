"""Other anatomies for simulated heads: the label template with nuclei of BigBrain or of 7TAMIBrain.

BigBrain is one brain, whose red nucleus, nigra, subthalamic nucleus and parts of the pallidum were drawn on stained
sections (Xiao et al. 2019, doi:10.1038/s41597-019-0217-0, osf.io/xkqb3, CC BY 4.0). 7TAMIBrain is the mean T1w image of
thirty people at 7 T, on which these nuclei and the accumbens were drawn (Brun et al. 2022, doi:10.1111/ejn.15575, MIT
licence); its version in MNI space is used, in which the accumbens ends laterally of the septum. Neither is part of this
project. BigBrain is registered to the template by the structures that both have, as people are, 7TAMIBrain by their
centres, and nuclei are carried over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from label_template import assign_second_parts, bounding_block, find_growth, write_labels
from numpy.typing import NDArray
from people import SharedImages, SharedStructure
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import read_tsv, sha256
from bids_dgmseg.lab.simulate.anatomy import LAST_NUCLEUS, merge_parts
from bids_dgmseg.lab.simulate.shapes import fill_from_neighbours
from bids_dgmseg.lab.simulate.template import OTHER_ANATOMIES, interpolate, read_template, with_extension
from bids_dgmseg.models.structures import STRUCTURES


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Labels of another anatomy."""

    names: Mapping[str, str]
    """Structure → regular expression of its names in the table of the labels, after ``Left-`` or ``Right-``."""
    average: bool = False
    """A mean of people in standard space: it is aligned by an affine alone and its accumbens is carried over, too."""


ANATOMIES = {
    "BigBrain": Anatomy(
        names={
            "RN": "red-nucleus",
            "SN": "substantia-nigra",
            "STN": "subthalamic-nucleus",
            "CN": "caudate",
            "PUT": "putamen",
            "GPe": "globus-pallidus-externa",
            "GPi": "globus-pallidus-interna",
            "THA": "thalamus",
            "hippocampus": "hippocampus",
            "NAC": "nucleus-accumbens",
            "amygdala": "amygdala",
        },
    ),
    "7TAMIBrain": Anatomy(
        names={
            "RN": "red-nucleus",
            "SN": "substancia-nigra",
            "STN": "sub-thalamic",
            "CN": "caudate",
            "PUT": "putamen",
            "GPe": "pallidum-external",
            "GPi": "pallidum-internal",
            "THA": "thalamus-(?!mtt).*",
            "NAC": "accumbens",
        },
        average=True,
    ),
}

_LEFT = {name: 2 * place + 1 for place, name in enumerate(ANATOMIES["BigBrain"].names)}
"""Structure → its label on the left once they are numbered in this order; one more on the right."""


_MIDBRAIN = (5, 6, 7, 8, 9, 10, 19, 20)
"""Labels of the template that are replaced."""

_ACCUMBENS, _FLUIDS = 36, (23, 24, 26)


def _shared(name: str, template: tuple[int, ...], *structures: str, weight: float = 1.0) -> SharedStructure:
    left = tuple(_LEFT[name] for name in structures)
    return SharedStructure(
        name=name, template=template, left=left, right=tuple(label + 1 for label in left), weight=weight
    )


_SHARED = (
    _shared("caudate", (11, 12), "CN"),
    _shared("putamen", (13, 14), "PUT"),
    _shared("pallidum", (15, 16, 17, 18), "GPe", "GPi"),
    _shared("accumbens", (_ACCUMBENS,), "NAC"),
    _shared("thalamus", (27,), "THA"),
    _shared("hippocampus and amygdala", (31,), "hippocampus", "amygdala", weight=0.5),
    _shared("midbrain nuclei", _MIDBRAIN, "RN", "SN", "STN", weight=0.0),
)

_CARRIED = ("RN", "SN", "STN")

_PALLIDA = (15, 16)

_MARGIN = 16
"""Voxels around the template's nuclei in which those of other anatomies lie."""

_SMOOTH_VOXELS = 1.0
"""SD of the Gaussian that smooths rough labels."""

_GAP_VOXELS = 2
"""Around other nuclei, which nuclei of an average keep as they grow: they were drawn small."""

_INVERSIONS = 20
"""Iterations that invert a displacement."""


def write_anatomy(template: Path, other: Volume, name: str, *, seed: int = 0) -> str:
    """Carry nuclei of another anatomy over to a label template and write the result next to it.

    Parameters
    ----------
    template : path
        Label template, see `label_template.write_template`.
    other : Volume
        Labels of the other anatomy, from `read_anatomy`.
    name : str
        One of `ANATOMIES`.
    seed : int
        Of the points at which labels are compared.

    Returns
    -------
    str
        One line, after a warp with the Dice of each shared structure.

    Raises
    ------
    InputError
        If labels or sides of the other anatomy are exchanged.
    """
    whole, anatomy = read_template(template), ANATOMIES[name]
    labels = {_LEFT[structure] for structure in anatomy.names} - {_LEFT["NAC"] if anatomy.average else 0}
    images = SharedImages(whole, [shared for shared in _SHARED if labels.issuperset(shared.left)])
    images.check(other, name)
    warp, line = None, f"{name}  aligned by an affine"
    index = np.linalg.inv(images.align(other) @ other.affine)
    if not anatomy.average:
        warp, overlap = images.register(other, generator=torch.Generator().manual_seed(seed))
        line = f"{name}  " + "  ".join(f"{structure} {value:.3f}" for structure, value in overlap.items())
    world_to_index = torch.tensor(np.linalg.inv(images.lattice.affine), dtype=torch.float32)

    def find(points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the indices in the other anatomy of points of the template."""
        points_mm = points_mm if warp is None else _invert(warp, world_to_index, points_mm)
        indices: NDArray[np.float64] = nib.affines.apply_affine(index, points_mm)
        return indices

    result = carry_over(whole, other, find, average=anatomy.average)
    write_labels(result, with_extension(template, OTHER_ANATOMIES[name]), description=sha256(template))
    return line


def read_anatomy(path: Path, name: str) -> Volume:
    """Read the labels of another anatomy, numbered in the same order for all, left before right.

    Parameters
    ----------
    path : path
        Label image, with a TSV file of the same name whose columns ``index`` and ``name`` have names such as
        ``Left-red-nucleus``.
    name : str
        One of `ANATOMIES`.

    Raises
    ------
    InputError
        If a file is missing or unreadable, or a structure is missing in either.
    """
    table = read_tsv(with_extension(path, ".tsv"))
    if not {"index", "name"} <= set(table.columns):
        raise InputError(f"{with_extension(path, '.tsv').name}: has no columns index and name; list the labels")
    image, rows = Volume.read(path, np.float32), table["name"].astype(str)
    labels = np.zeros(image.shape, np.uint8)
    for structure, pattern in ANATOMIES[name].names.items():
        for right, side in enumerate(("Left", "Right")):
            numbers = table.loc[rows.str.fullmatch(f"{side}-{pattern}", flags=re.IGNORECASE), "index"]
            mask = np.isin(image.array, numbers)
            if not mask.any():
                raise InputError(f"{path.name}: {side}-{pattern} not found in it or in its table; use {name}'s labels")
            labels[mask] = _LEFT[structure] + right
    return image.with_array(labels)


def carry_over(
    template: Volume,
    other: Volume,
    find: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    average: bool = False,
) -> Volume:
    """Replace nuclei of a template by those of another anatomy.

    Red nucleus, nigra and subthalamic nucleus have the other anatomy's shapes, are shifted together to their centre in
    the template, and grow to their volumes there, whose protocol the networks learn. The pallidum keeps its outline and
    is divided where the other one is. The pars compacta, which the others lack, is the part of the nigra that is
    nearest to that of the template.

    Parameters
    ----------
    template : Volume
        Label template.
    other : Volume
        From `read_anatomy`.
    find : function
        Returns the indices in `other` of points (N, 3) of the template in mm.
    average : bool
        Smooth the labels of `other`, keep gaps between nuclei as they grow, and replace the accumbens, too, as far as
        the other one lies outside striatum, pallidum and ventricles; what it leaves becomes the tissue around it.

    Returns
    -------
    Volume
        Label template.
    """
    carried = [structure for nucleus in _CARRIED for structure in STRUCTURES.both_sides([nucleus])]
    merged = merge_parts(torch.from_numpy(template.array)).numpy()
    labels, former = fill_from_neighbours(merged, _MIDBRAIN), np.bincount(merged.ravel())
    where = bounding_block(np.isin(merged, [*_MIDBRAIN, *_PALLIDA, _ACCUMBENS]), margin=_MARGIN)
    assert where is not None  # a template has all nuclei
    points_mm = Grid(template.shape, template.affine).centres_mm()[where].reshape(-1, 3)
    places_mm = find(points_mm)

    def sample(structure: str, places_mm: NDArray[np.float64], sides: Sequence[int] = (0, 1)) -> NDArray[np.bool_]:
        mask = np.zeros(labels.shape, bool)
        inside = np.isin(other.array, [_LEFT[structure] + side for side in sides]).astype(np.float32)
        inside = ndimage.gaussian_filter(inside, _SMOOTH_VOXELS) if average else inside
        share = ndimage.map_coordinates(inside, places_mm.T, order=1)
        mask[where] = share.reshape(mask[where].shape) > 0.5
        return mask

    def sample_midbrain(places_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
        numbers = np.zeros(labels.shape, np.uint8)
        for structure in carried:
            numbers[sample(structure.nucleus, places_mm, [structure.hemisphere == "R"])] = structure.index
        return numbers

    # The warp, which follows the structures around, would displace the midbrain.
    centres = (np.argwhere(mask).mean(axis=0) for mask in (sample_midbrain(places_mm), np.isin(merged, _MIDBRAIN)))
    beside_mm = np.subtract(*centres) * template.voxel_size_mm
    midbrain = sample_midbrain(find(points_mm + beside_mm))
    labels = np.where(midbrain > 0, midbrain, labels)
    step_mm3 = float(np.prod(template.voxel_size_mm))
    for structure in carried:
        growth = find_growth(template.with_array(labels), structure.index, former[structure.index] * step_mm3)
        if average:
            others = (labels[where] <= LAST_NUCLEUS) & ~np.isin(labels[where], [0, structure.index])
            growth[where] &= ~ndimage.binary_dilation(others, iterations=_GAP_VOXELS)
        labels = np.where(growth, structure.index, labels).astype(np.uint8)
    if average:
        tissue = fill_from_neighbours(np.where(np.isin(labels, _FLUIDS), 0, labels).astype(np.uint8), [_ACCUMBENS])
        labels = np.where(labels == _ACCUMBENS, tissue, labels)
        free = ~np.isin(merged, [*range(1, LAST_NUCLEUS + 1), *_FLUIDS])
        labels = np.where(sample("NAC", places_mm) & free, _ACCUMBENS, labels).astype(np.uint8)
    reticulata, compacta = (np.isin(template.array, part) for part in ((7, 8), (19, 20)))
    share = float(compacta.sum() / (reticulata | compacta).sum())
    labels = assign_second_parts(template.with_array(labels), "SN", reticulata, compacta, share=share)
    external, internal = (sample(part, places_mm) for part in ("GPe", "GPi"))
    return template.with_array(assign_second_parts(template.with_array(labels), "GP", external, internal))


def _invert(field: Tensor, world_to_index: Tensor, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points that a displacement (3, X, Y, Z) on a lattice moves to given points (N, 3), by iteration."""
    goal = torch.from_numpy(points_mm).float()
    there = goal
    for _ in range(_INVERSIONS):
        there = goal - interpolate(field, world_to_index, there)
    inverse: NDArray[np.float64] = there.double().numpy()
    return inverse
