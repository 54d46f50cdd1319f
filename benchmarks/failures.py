"""Simulated failures of acquisition, reconstruction and data handling, for `ratings.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.qsm.field import dipole_kernel

UNIT_FACTORS = (0.1, 1 / (2 * np.pi), 2 * np.pi, 10.0)
"""Factors that leave a map plausible; ppb and Hz are recognized by their values."""


@dataclass(frozen=True)
class Case:
    """A map with its true labels."""

    chi: Volume
    """In ppm, 0 outside its coverage."""
    truth: NDArray[np.uint8]
    """Labels of structures.tsv on its grid, complete also beyond the coverage of the map."""


def scale_units(case: Case, rng: np.random.Generator) -> Case:
    """Scale the values by a wrong unit."""
    return _with(case, case.chi.array * np.float32(rng.choice(UNIT_FACTORS)))


def add_motion(case: Case, rng: np.random.Generator) -> Case:
    """Simulate motion: bands of k-space from other poses, 3 to 12 degrees and 2 to 8 mm away."""
    spectrum = np.fft.fft(case.chi.array, axis=1)
    poses = rng.integers(1, 4)
    bounds = np.sort(rng.choice(spectrum.shape[1], 2 * poses, replace=False)).reshape(poses, 2)
    for low, high in bounds:
        moved = np.fft.fft(_rotate(case.chi, rng), axis=1)
        spectrum[:, low:high] = moved[:, low:high]
    return _with(case, np.where(case.chi.array != 0, np.fft.ifft(spectrum, axis=1).real, 0))


def _rotate(chi: Volume, rng: np.random.Generator) -> NDArray[np.float32]:
    angles, shift_mm = (rng.choice((-1, 1), 3) * rng.uniform(low, high, 3) for low, high in ((3, 12), (2, 8)))
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    middle = (np.array(chi.shape) - 1) / 2
    offset = middle - matrix @ middle + shift_mm / chi.voxel_size_mm
    turned: NDArray[np.float32] = ndimage.affine_transform(chi.array, matrix, offset, order=1)
    return turned


def cut_field_of_view(case: Case, rng: np.random.Generator) -> Case:
    """Cut the field of view through the nuclei, from below or above."""
    levels = np.flatnonzero(case.truth.any(axis=(0, 1)))
    last = levels[0] + round(rng.uniform(0.1, 0.7) * len(levels))
    missing = slice(None, last) if rng.random() < 0.5 else slice(levels[-1] - (last - levels[0]), None)
    chi = case.chi.array.copy()
    chi[:, :, missing] = 0
    return _with(case, chi)


def add_streaks(case: Case, rng: np.random.Generator) -> Case:
    """Invert a noisy field with little regularization: division truncated at 0.01 to 0.05."""
    chi = torch.from_numpy(np.ascontiguousarray(case.chi.array, np.float32))
    kernel = dipole_kernel(chi.shape, case.chi.voxel_size_mm)
    field = torch.fft.rfftn(chi) * kernel
    noise = torch.from_numpy(rng.normal(0, np.exp(rng.uniform(*np.log((0.002, 0.02)))), chi.shape).astype(np.float32))
    threshold = rng.uniform(0.01, 0.05)
    floor = torch.where(kernel < 0, -1.0, 1.0) * kernel.abs().clamp(min=threshold)
    inverted = torch.fft.irfftn((field + torch.fft.rfftn(noise)) / floor, s=chi.shape).numpy()
    return _with(case, np.where(case.chi.array != 0, inverted, 0))


def add_noise(case: Case, rng: np.random.Generator) -> Case:
    """Add white noise of 0.03 to 0.3 ppm."""
    noise = rng.normal(0, np.exp(rng.uniform(*np.log((0.03, 0.3)))), case.chi.shape)
    return _with(case, np.where(case.chi.array != 0, case.chi.array + noise, 0))


def flip(case: Case, rng: np.random.Generator) -> Case:
    """Flip image and truth along y or z without changing the header."""
    axis = int(rng.integers(1, 3))
    return Case(_as(case.chi, np.flip(case.chi.array, axis)), np.flip(case.truth, axis))


def exchange_sides(case: Case, rng: np.random.Generator) -> Case:
    """Mirror image and truth left to right without changing the header."""
    del rng
    return Case(_as(case.chi, np.flip(case.chi.array, 0)), np.flip(case.truth, 0))


def shift_mask(case: Case, rng: np.random.Generator) -> Case:
    """Apply a brain mask shifted by 12 to 40 mm."""
    shift_mm = rng.normal(size=3)
    shift_mm *= rng.uniform(12, 40) / np.linalg.norm(shift_mm)
    mask = ndimage.shift((case.chi.array != 0).astype(np.float32), shift_mm / case.chi.voxel_size_mm, order=1) > 0.5
    return _with(case, np.where(mask, case.chi.array, 0))


def show_legs(case: Case, rng: np.random.Generator) -> Case:
    """Replace the head by two legs with muscle, fat and bone."""
    shape, size_mm = case.chi.shape, np.array(case.chi.voxel_size_mm)
    x, y, _ = (
        (np.arange(n) - (n - 1) / 2).reshape([-1 if a == b else 1 for b in range(3)]) * size_mm[a]
        for a, n in enumerate(shape)
    )
    radius = rng.uniform(45, 75)
    chi = np.zeros(shape, np.float32)
    for side in (-1, 1):
        depth = radius - np.hypot(x - side * radius * 1.05, y) + np.zeros(shape)
        muscle = ndimage.gaussian_filter(rng.normal(size=shape), 4 / size_mm) * 0.2
        leg = np.where(depth < 10, rng.uniform(0.2, 0.6), muscle)
        leg = np.where(depth > radius - 14, -rng.uniform(0.5, 2.0), leg)
        chi = np.where(depth > 0, leg, chi)
    noisy = chi + rng.normal(0, 0.01, shape)
    return Case(_as(case.chi, np.where(chi != 0, noisy, 0)), np.zeros_like(case.truth))


def drop_slices(case: Case, rng: np.random.Generator) -> Case:
    """Set one or two adjacent slices through a nucleus to 0, along any axis of the array."""
    places = np.argwhere(case.truth == rng.choice(np.unique(case.truth[case.truth > 0])))
    axis, middle = int(rng.integers(3)), rng.choice(places)
    chi = case.chi.array.copy()
    np.moveaxis(chi, axis, 0)[middle[axis] : middle[axis] + int(rng.integers(1, 3))] = 0
    return _with(case, chi)


def cut_holes(case: Case, rng: np.random.Generator) -> Case:
    """Set a hole of 2 to 4 mm radius in each of four nuclei to 0, as in masks of reliable voxels."""
    chi = case.chi.array.copy()
    for index in rng.choice(np.unique(case.truth[case.truth > 0]), 4, replace=False):
        centre = rng.choice(np.argwhere(case.truth == index))
        offsets_mm = (np.indices(chi.shape).T - centre).T * np.reshape(case.chi.voxel_size_mm, (3, 1, 1, 1))
        chi[np.linalg.norm(offsets_mm, axis=0) < rng.uniform(2, 4)] = 0
    return _with(case, chi)


def thicken_slices(case: Case, rng: np.random.Generator) -> Case:
    """Average four slices; the truth is that of the third."""
    del rng
    depth = case.chi.shape[2] // 4 * 4
    chi = case.chi.array[:, :, :depth].reshape(*case.chi.shape[:2], -1, 4).mean(axis=-1, dtype=np.float32)
    return Case(Volume(chi, case.chi.affine @ np.diag([1, 1, 4, 1])), case.truth[:, :, 2:depth:4])


def shift_zero(case: Case, rng: np.random.Generator) -> Case:
    """Add a constant of 0.1 ppm, or subtract it."""
    return _with(case, np.where(case.chi.array != 0, case.chi.array + rng.choice((-0.1, 0.1)), 0))


def show_r2star(case: Case, rng: np.random.Generator) -> Case:
    """Replace chi by R2* of 0 to 100 per second, scaled to at most 0.2: 18/s plus 120/s per ppm."""
    del rng
    return _with(case, np.where(case.chi.array != 0, np.clip(18 + 120 * case.chi.array, 0.1, 100) * 0.002, 0))


def _with(case: Case, chi: NDArray[np.floating]) -> Case:
    return replace(case, chi=_as(case.chi, chi))


def _as(like: Volume, chi: NDArray[np.floating]) -> Volume:
    return like.with_array(np.ascontiguousarray(chi, np.float32))


FAILURES: Mapping[str, Callable[[Case, np.random.Generator], Case]] = {
    "wrong units": scale_units,
    "motion": add_motion,
    "cut field of view": cut_field_of_view,
    "strong streaks": add_streaks,
    "low SNR": add_noise,
    "upside down or back to front": flip,
    "left and right exchanged": exchange_sides,
    "wrong mask": shift_mask,
    "another body part": show_legs,
    "missing slices": drop_slices,
    "holes of the mask": cut_holes,
    "slices of 5 mm": thicken_slices,
    "zero shifted by 0.1 ppm": shift_zero,
    "R2* instead of chi": show_r2star,
}
"""Name → function that applies it."""


def exchange_striatum(dseg: Volume, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Label the anterior 15 to 50 % of a caudate as putamen."""
    labels, side = dseg.array.copy(), rng.choice(("L", "R"))
    places = np.argwhere(labels == _INDEX[f"CN_{side}"])
    if len(places):
        limit = np.quantile(places[:, 1], 1 - rng.uniform(0.15, 0.5))
        labels[tuple(places[places[:, 1] >= limit].T)] = _INDEX[f"PUT_{side}"]
    return labels


def leak_into_ventricle(
    dseg: Volume, rng: np.random.Generator, *, sides: Collection[str] | None = None
) -> NDArray[np.uint8]:
    """Extend one caudate, or those of `sides`, by 1 to 4 mm towards the midline and up to 3 mm upwards.

    So do labels that leak into the lateral ventricle.
    """
    labels, sides = dseg.array.copy(), sides or [rng.choice(("L", "R"))]
    middle = (np.argwhere(labels > 0)[:, 0].mean()) if (labels > 0).any() else 0
    reach_mm = (rng.uniform(1, 4), rng.uniform(0, 3))
    for side in sides:
        leak = labels == _INDEX[f"CN_{side}"]
        for axis, mm, direction in ((0, reach_mm[0], 1 if side == "L" else -1), (2, reach_mm[1], 1)):
            for _ in range(round(mm / dseg.voxel_size_mm[axis])):
                leak |= np.roll(leak, direction, axis)
        own_half = np.indices(labels.shape)[0] < middle if side == "L" else np.indices(labels.shape)[0] > middle
        labels[leak & own_half & (labels == 0)] = _INDEX[f"CN_{side}"]
    return labels


def add_island(dseg: Volume, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Add an island of 300 to 900 mm³ to a caudate, in frontal white matter 10 to 18 mm in front of and beside it."""
    labels, side = dseg.array.copy(), rng.choice(("L", "R"))
    places = np.argwhere(labels == _INDEX[f"CN_{side}"])
    if len(places):
        size_mm = np.array(dseg.voxel_size_mm)
        head = places[places[:, 1] >= np.quantile(places[:, 1], 0.9)].mean(axis=0)
        outwards = -1 if side == "L" else 1
        centre = head + np.array([outwards * rng.uniform(6, 12), rng.uniform(10, 18), rng.uniform(0, 10)]) / size_mm
        radius_mm = (rng.uniform(300, 900) * 3 / (4 * np.pi)) ** (1 / 3)
        offsets_mm = (np.indices(labels.shape).T - centre) * size_mm
        labels[(np.linalg.norm(offsets_mm, axis=-1).T < radius_mm) & (labels == 0)] = _INDEX[f"CN_{side}"]
    return labels


_INDEX = {structure.abbreviation: structure.index for structure in STRUCTURES}

LABEL_FAILURES: Mapping[str, Callable[[Volume, np.random.Generator], NDArray[np.uint8]]] = {
    "caudate's head labelled putamen": exchange_striatum,
    "caudate in the ventricle": leak_into_ventricle,
    "caudate's island in white matter": add_island,
    "both caudates in the ventricles": partial(leak_into_ventricle, sides=("L", "R")),
}
"""Name → function that spoils the labels of one side or both (RAS+); the network is taken to be certain of them."""
