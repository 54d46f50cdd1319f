"""A second anatomy for simulated heads: the label template with nuclei of BigBrain.

BigBrain is one brain, whose red nucleus, nigra, subthalamic nucleus and parts of the pallidum were drawn on stained
sections (Xiao et al. 2019, doi:10.1038/s41597-019-0217-0, osf.io/xkqb3, CC BY 4.0); it is not part of this project. It
is registered to the template by the structures that both have, as people are, and these nuclei are carried over.
"""

from __future__ import annotations

from collections.abc import Callable
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
from bids_dgmseg.lab.simulate.anatomy import merge_parts
from bids_dgmseg.lab.simulate.shapes import fill_from_neighbours
from bids_dgmseg.lab.simulate.template import bigbrain_path, interpolate, read_template, with_extension
from bids_dgmseg.models.structures import STRUCTURES

NAMES = (
    "red-nucleus",
    "substantia-nigra",
    "subthalamic-nucleus",
    "caudate",
    "putamen",
    "globus-pallidus-externa",
    "globus-pallidus-interna",
    "thalamus",
    "hippocampus",
    "nucleus-accumbens",
    "amygdala",
)
"""Structures in the table of BigBrain's labels, after ``Left-`` or ``Right-``."""

_LEFT = {name: 2 * place + 1 for place, name in enumerate(NAMES)}
"""Structure → its label on the left once they are numbered in this order; one more on the right."""


_MIDBRAIN = (5, 6, 7, 8, 9, 10, 19, 20)
"""Labels of the template that are replaced."""


def _shared(name: str, template: tuple[int, ...], *structures: str, weight: float = 1.0) -> SharedStructure:
    left = tuple(_LEFT[name] for name in structures)
    return SharedStructure(
        name=name, template=template, left=left, right=tuple(label + 1 for label in left), weight=weight
    )


_SHARED = (
    _shared("caudate", (11, 12), "caudate"),
    _shared("putamen", (13, 14), "putamen"),
    _shared("pallidum", (15, 16, 17, 18), "globus-pallidus-externa", "globus-pallidus-interna"),
    _shared("accumbens", (36,), "nucleus-accumbens"),
    _shared("thalamus", (27,), "thalamus"),
    _shared("hippocampus and amygdala", (31,), "hippocampus", "amygdala", weight=0.5),
    _shared(
        "midbrain nuclei",
        _MIDBRAIN,
        *("red-nucleus", "substantia-nigra", "subthalamic-nucleus"),
        weight=0.0,
    ),
)

_CARRIED = {"RN": "red-nucleus", "SN": "substantia-nigra", "STN": "subthalamic-nucleus"}

_PALLIDA = (15, 16)

_MARGIN = 16
"""Voxels around the template's nuclei in which those of BigBrain lie."""

_INVERSIONS = 20
"""Iterations that invert a displacement."""


def write_bigbrain(template: Path, bigbrain: Volume, *, name: str, seed: int = 0) -> str:
    """Carry the nuclei of BigBrain over to a label template and write the result next to it.

    Parameters
    ----------
    template : path
        Label template, see `label_template.write_template`.
    bigbrain : Volume
        Labels of BigBrain, from `read_bigbrain`.
    name : str
        Of their file, for messages.
    seed : int
        Of the points at which labels are compared.

    Returns
    -------
    str
        One line with the Dice of each shared structure.

    Raises
    ------
    InputError
        If labels or sides of BigBrain are exchanged.
    """
    whole = read_template(template)
    images = SharedImages(whole, _SHARED)
    images.check(bigbrain, name)
    field, overlap = images.register(bigbrain, generator=torch.Generator().manual_seed(seed))
    index = np.linalg.inv(images.align(bigbrain) @ bigbrain.affine)
    world_to_index = torch.tensor(np.linalg.inv(images.lattice.affine), dtype=torch.float32)

    def find(points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the indices in BigBrain of points of the template."""
        indices: NDArray[np.float64] = nib.affines.apply_affine(index, _invert(field, world_to_index, points_mm))
        return indices

    write_labels(carry_over(whole, bigbrain, find), bigbrain_path(template), description=sha256(template))
    return f"{name}  " + "  ".join(f"{structure} {value:.3f}" for structure, value in overlap.items())


def read_bigbrain(path: Path) -> Volume:
    """Read the labels of BigBrain, numbered in the order of `NAMES`, left before right.

    Parameters
    ----------
    path : path
        Label image, with a TSV file of the same name whose columns ``index`` and ``name`` have names such as
        ``Left-red-nucleus``.

    Raises
    ------
    InputError
        If a file is missing or unreadable, or a structure is missing in either.
    """
    table = read_tsv(with_extension(path, ".tsv"))
    if not {"index", "name"} <= set(table.columns):
        raise InputError(f"{with_extension(path, '.tsv').name}: has no columns index and name; list the labels")
    numbers = dict(zip(table["name"].astype(str).str.lower(), table["index"], strict=True))
    image = Volume.read(path, np.float32)
    labels = np.zeros(image.shape, np.uint8)
    for name, left in _LEFT.items():
        for label, side in ((left, "Left"), (left + 1, "Right")):
            mask = image.array == numbers.get(f"{side}-{name}".lower(), np.nan)
            if not mask.any():
                raise InputError(f"{path.name}: {side}-{name} not found in it or in its table; use BigBrain's labels")
            labels[mask] = label
    return image.with_array(labels)


def carry_over(
    template: Volume, bigbrain: Volume, find: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Volume:
    """Replace nuclei of a template by those of BigBrain.

    Red nucleus, nigra and subthalamic nucleus have BigBrain's shapes, are shifted together to their centre in the
    template, and grow to their volumes there, whose protocol the networks learn. The pallidum keeps its outline and is
    divided where BigBrain's is. The pars compacta, which BigBrain lacks, is the part of the nigra that is nearest to
    that of the template.

    Parameters
    ----------
    template : Volume
        Label template.
    bigbrain : Volume
        From `read_bigbrain`.
    find : function
        Returns the indices in `bigbrain` of points (N, 3) of the template in mm.

    Returns
    -------
    Volume
        Label template.
    """
    carried = [structure for nucleus in _CARRIED for structure in STRUCTURES.both_sides([nucleus])]
    merged = merge_parts(torch.from_numpy(template.array)).numpy()
    labels, former = fill_from_neighbours(merged, _MIDBRAIN), np.bincount(merged.ravel())
    where = bounding_block(np.isin(merged, [*_MIDBRAIN, *_PALLIDA]), margin=_MARGIN)
    assert where is not None  # a template has all nuclei
    points_mm = Grid(template.shape, template.affine).centres_mm()[where].reshape(-1, 3)
    places_mm = find(points_mm)

    def sample(label: int, places_mm: NDArray[np.float64]) -> NDArray[np.bool_]:
        mask = np.zeros(labels.shape, bool)
        share = ndimage.map_coordinates((bigbrain.array == label).astype(np.float32), places_mm.T, order=1)
        mask[where] = share.reshape(mask[where].shape) > 0.5
        return mask

    def sample_midbrain(places_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
        numbers = np.zeros(labels.shape, np.uint8)
        for structure in carried:
            numbers[sample(_LEFT[_CARRIED[structure.nucleus]] + (structure.hemisphere == "R"), places_mm)] = (
                structure.index
            )
        return numbers

    # The warp, which follows the structures around, would displace the midbrain.
    centres = (np.argwhere(mask).mean(axis=0) for mask in (sample_midbrain(places_mm), np.isin(merged, _MIDBRAIN)))
    beside_mm = np.subtract(*centres) * template.voxel_size_mm
    midbrain = sample_midbrain(find(points_mm + beside_mm))
    labels = np.where(midbrain > 0, midbrain, labels)
    step_mm3 = float(np.prod(template.voxel_size_mm))
    for structure in carried:
        growth = find_growth(template.with_array(labels), structure.index, former[structure.index] * step_mm3)
        labels = np.where(growth, structure.index, labels).astype(np.uint8)
    reticulata, compacta = (np.isin(template.array, part) for part in ((7, 8), (19, 20)))
    share = float(compacta.sum() / (reticulata | compacta).sum())
    labels = assign_second_parts(template.with_array(labels), "SN", reticulata, compacta, share=share)
    external, internal = (
        sample(_LEFT[f"globus-pallidus-{part}"], places_mm) | sample(_LEFT[f"globus-pallidus-{part}"] + 1, places_mm)
        for part in ("externa", "interna")
    )
    return template.with_array(assign_second_parts(template.with_array(labels), "GP", external, internal))


def _invert(field: Tensor, world_to_index: Tensor, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points that a displacement (3, X, Y, Z) on a lattice moves to given points (N, 3), by iteration."""
    goal = torch.from_numpy(points_mm).float()
    there = goal
    for _ in range(_INVERSIONS):
        there = goal - interpolate(field, world_to_index, there)
    inverse: NDArray[np.float64] = there.double().numpy()
    return inverse
