"""The samples of an epoch: patches, stacks of slices or whole crops, each moved anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from bids_dgmseg.image.resample import sample_points
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.simulate.ranges import chance, uniform
from bids_dgmseg.train.cases import Case
from bids_dgmseg.train.recipe import Augmentation, Recipe, Sampling


@dataclass(frozen=True)
class Window:
    """Where one sample lies."""

    case: int
    start: tuple[int, int, int]


def list_windows(cases: Sequence[Case], sampling: Sampling, *, seed: int) -> list[Window]:
    """List the samples of an epoch, in the order of the cases.

    Parameters
    ----------
    cases : sequence of Case
        Maps.
    sampling : Sampling
        Size, step and which to keep.
    seed : int
        Chooses the samples without labels that are kept.
    """
    windows = []
    for number, case in enumerate(cases):
        starts = product(*(_starts(case.region[axis], axis, sampling) for axis in range(3)))
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        windows += [
            Window(number, (x, y, z))
            for x, y, z in starts
            if _has_labels(case, (x, y, z), sampling) or chance(generator, sampling.empty)
        ]
    return windows


def _starts(extent: slice, axis: int, sampling: Sampling) -> list[int]:
    """First voxels of the samples along an axis: equally far apart, and one more at the end where some are left."""
    size, step = sampling.size[axis], sampling.step[axis]
    if axis == sampling.stack_axis and step:
        return [middle - size // 2 for middle in range(extent.start, extent.stop, step)]
    room = extent.stop - extent.start - size
    if step == 0 or room <= 0:
        return [extent.start + room // 2]
    starts = list(range(0, room + 1, step))
    return [extent.start + start for start in [*starts, *([room] if starts[-1] < room else [])]]


def _has_labels(case: Case, start: tuple[int, int, int], sampling: Sampling) -> bool:
    block = [slice(first, first + size) for first, size in zip(start, sampling.size, strict=True)]
    if (axis := sampling.stack_axis) is not None:
        middle = start[axis] + sampling.size[axis] // 2
        block[axis] = slice(middle, middle + 1)
    return bool(case.labels[tuple(block)].any())


class WindowSamples(Dataset[tuple[Tensor, Tensor]]):
    """Samples of all epochs: number e · n + i is sample i of epoch e, the same whenever it is asked for.

    Parameters
    ----------
    cases : sequence of Case
        Maps.
    recipe : Recipe
        What samples are.
    seed : int
        Two seeds move samples differently.
    moved : bool
        Apply the recipe's augmentation.

    Raises
    ------
    ValueError
        If there is no sample.
    """

    def __init__(self, cases: Sequence[Case], recipe: Recipe, *, seed: int, moved: bool) -> None:
        self.cases, self.recipe, self.seed = tuple(cases), recipe, seed
        self.windows = list_windows(self.cases, recipe.sampling, seed=seed)
        self.moved = moved and recipe.augmentation.moves
        if not self.windows:
            raise ValueError("no sample to learn from")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw a sample: input (channels, ...) and classes (...), without the stack's axis in 2.5D."""
        if get_worker_info() is not None:
            torch.set_num_threads(1)
        epoch, number = divmod(index, len(self.windows))
        window, sampling = self.windows[number], self.recipe.sampling
        case = self.cases[window.case]
        if self.moved:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, number))
            points = move(window.start, sampling.size, case.spacing_mm, self.recipe.augmentation, generator)
            chi = sample_points(case.chi[None], points)[0]
            labels = sample_points(case.labels[None].float(), points, nearest=True)[0].to(torch.uint8)
        else:
            chi, labels = (_cut(values, window.start, sampling.size) for values in (case.chi, case.labels))
        if sampling.normalized == "sample":
            chi = torch.from_numpy(NORMALIZATIONS[sampling.normalization](chi.numpy()))
        if (axis := sampling.stack_axis) is None:
            return chi[None], labels
        return chi.movedim(axis, 0), labels.select(axis, sampling.size[axis] // 2)


def mix(*numbers: int) -> int:
    """Make one seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def _cut(values: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    x, y, z = (slice(first, first + width) for first, width in zip(start, size, strict=True))
    return values[x, y, z].contiguous()


def move(
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Tensor:
    """Rotate, scale and shift a window about its middle.

    Parameters
    ----------
    start, size : tuple of 3 int
        First voxel and number of voxels.
    spacing_mm : tuple of 3 float
        Of the voxels: rotations are those of the head, not of the array.
    augmentation : Augmentation
        How far.
    generator : torch.Generator
        Draws the angles, factors and shifts.

    Returns
    -------
    Tensor of shape (*size, 3)
        Indices, with fractions, to read the map at.
    """
    angles, factors, shifts = torch.zeros(3), torch.ones(3), torch.zeros(3)
    for axis in augmentation.axes:
        factors[axis] = uniform(generator, *augmentation.scale)
        shifts[axis] = uniform(generator, -augmentation.shift, augmentation.shift)
    for axis in range(3):
        if {0, 1, 2} - {axis} <= set(augmentation.axes):
            angles[axis] = np.deg2rad(uniform(generator, -augmentation.rotation_deg, augmentation.rotation_deg))
    middle = torch.tensor(start) + (torch.tensor(size) - 1) / 2
    grids = torch.meshgrid(
        *(torch.arange(first, first + width, dtype=torch.float32) for first, width in zip(start, size, strict=True)),
        indexing="ij",
    )
    spacing = torch.tensor(spacing_mm)
    # What is read closer to the middle appears larger: hence the division.
    matrix = _rotation(angles) * (spacing / factors) / spacing[:, None]
    return (torch.stack(grids, dim=-1) - middle) @ matrix.T + middle - shifts


def _rotation(angles: Tensor) -> Tensor:
    """Rotate about x, then y, then z."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles.tolist()):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
