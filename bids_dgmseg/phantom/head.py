"""The analytic phantom: a head of ellipsoids with exactly known volumes.

As in the Shepp-Logan phantom, later ellipsoids replace earlier ones. Nuclei come last and do not touch each other, so
a nucleus has exactly the volume 4/3 π abc. Positions and sizes follow the MNI152 brain, scaled down to an average head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Box, Grid, covering_block
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES


@dataclass(frozen=True)
class Ellipsoid:
    """One structure of the phantom."""

    label: int
    """1-16 as in structures.tsv, above 20 as in `bids_dgmseg.lab.simulate.anatomy.TISSUES`."""
    centre_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    chi_ppm: float
    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """About x, then y, then z (extrinsic), in degrees."""

    @property
    def volume_mm3(self) -> float:
        """Volume 4/3 π abc."""
        return 4 / 3 * np.pi * float(np.prod(self.semi_axes_mm))

    @property
    def _directions(self) -> NDArray[np.float64]:
        """Unit vectors along the semi-axes, as columns."""
        return Rotation.from_euler("xyz", self.rotation_deg, degrees=True).as_matrix()

    def contains(self, points_mm: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Test which points (..., 3) lie inside."""
        local = (points_mm - np.asarray(self.centre_mm)) @ (self._directions / np.asarray(self.semi_axes_mm))
        return np.einsum("...i,...i->...", local, local) <= 1

    def extent_mm(self, directions: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute the lower and upper limits along unit vectors, the columns of `directions` (3, N)."""
        half = np.linalg.norm((self._directions * np.asarray(self.semi_axes_mm)).T @ directions, axis=0)
        centre = np.asarray(self.centre_mm) @ directions
        return centre - half, centre + half

    @property
    def box(self) -> Box:
        """Bounding box along the world axes."""
        (x0, y0, z0), (x1, y1, z1) = (end.tolist() for end in self.extent_mm(np.eye(3)))
        return Box((x0, y0, z0), (x1, y1, z1))


def _both_sides(
    nucleus: str,
    centre_mm: tuple[float, float, float],
    semi_axes_mm: tuple[float, float, float],
    chi_ppm: tuple[float, float],
    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Iterator[Ellipsoid]:
    """Mirror a nucleus of the right side; the sides differ in susceptibility, so that swapped sides are detected."""
    x, y, z = centre_mm
    pitch, roll, yaw = rotation_deg
    left, right = STRUCTURES.both_sides([nucleus])
    yield Ellipsoid(left.index, (-x, y, z), semi_axes_mm, chi_ppm[0], (pitch, -roll, -yaw))
    yield Ellipsoid(right.index, (x, y, z), semi_axes_mm, chi_ppm[1], (pitch, roll, yaw))


@dataclass(frozen=True)
class Phantom:
    """A head of ellipsoids in RAS+ mm; later ones replace earlier ones."""

    tissues: tuple[Ellipsoid, ...]
    nuclei: tuple[Ellipsoid, ...]

    @property
    def volumes_mm3(self) -> Mapping[str, float]:
        """Analytic volume per nucleus, by abbreviation."""
        return {STRUCTURES.numbered(ellipsoid.label).abbreviation: ellipsoid.volume_mm3 for ellipsoid in self.nuclei}

    @property
    def chi_ppm(self) -> Mapping[str, float]:
        """True susceptibility per nucleus, by abbreviation."""
        return {STRUCTURES.numbered(ellipsoid.label).abbreviation: ellipsoid.chi_ppm for ellipsoid in self.nuclei}

    def labels(self, points_mm: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return the label (uint8) at points (..., 3) in RAS+ mm: nuclei, tissues above 20, 0 outside the head."""
        top = self._uppermost_at(points_mm.reshape(-1, 3), np.zeros((1, 3)))[0]
        return self._labels_by_number[top.reshape(points_mm.shape[:-1])]

    def dseg(self, grid: Grid) -> Volume:
        """Return the nuclei at the voxel centres of a grid, as uint8 labels of structures.tsv."""
        return self._nucleus_labels(self._uppermost_on_grid(grid), grid)

    def chi(self, grid: Grid, *, seed: int | None = None, noise_ppm: float = 0.005, supersampling: int = 2) -> Volume:
        """Return a chi map in ppm, 0 outside the head; without a seed it is free of noise (see `scan`)."""
        return self.scan(grid, seed=seed, noise_ppm=noise_ppm, supersampling=supersampling)[0]

    def scan(
        self, grid: Grid, *, seed: int | None, noise_ppm: float = 0.005, supersampling: int = 2
    ) -> tuple[Volume, Volume]:
        """Return a chi map in ppm, 0 outside the head, and its `dseg`.

        Parameters
        ----------
        grid : Grid
            Voxel grid.
        seed : int, optional
            Adds Gaussian noise inside the head.
        noise_ppm : float
            SD of the noise.
        supersampling : int
            Number of samples averaged along each edge of a voxel.
        """
        top = self._uppermost_on_grid(grid)
        values = np.array([0, *(ellipsoid.chi_ppm for ellipsoid in self._ellipsoids)], np.float32)
        chi = values[top]
        # At edges, the mean of several points; only voxels with a different 26-neighbour contain two tissues.
        edge = ndimage.maximum_filter(top, 3) != ndimage.minimum_filter(top, 3)
        steps = (np.arange(supersampling) + 0.5) / supersampling - 0.5
        offsets_mm = np.array(np.meshgrid(steps, steps, steps)).reshape(3, -1).T @ grid.affine[:3, :3].T
        points = np.argwhere(edge) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        chi[edge] = values[self._uppermost_at(points, offsets_mm)].mean(axis=0)
        if seed is not None:
            noise = np.random.default_rng(seed).normal(0, noise_ppm, chi.shape)
            chi = chi + np.where(chi != 0, noise, 0).astype(np.float32)
        return Volume(chi, grid.affine), self._nucleus_labels(top, grid)

    @property
    def _ellipsoids(self) -> tuple[Ellipsoid, ...]:
        return (*self.tissues, *self.nuclei)

    @property
    def _labels_by_number(self) -> NDArray[np.uint8]:
        return np.array([0, *(ellipsoid.label for ellipsoid in self._ellipsoids)], np.uint8)

    def _uppermost_on_grid(self, grid: Grid) -> NDArray[np.uint8]:
        """Find the last ellipsoid, counted from 1, that contains each voxel centre; 0 outside."""
        points = grid.centres_mm()
        top = np.zeros(grid.shape, np.uint8)
        for number, ellipsoid in enumerate(self._ellipsoids, 1):
            block = covering_block(grid, ellipsoid.box)
            top[block][ellipsoid.contains(points[block])] = number
        return top

    def _uppermost_at(self, points_mm: NDArray[np.floating], offsets_mm: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Find the same numbers (K, N) for points (N, 3) shifted by each of the offsets (K, 3)."""
        top = np.zeros((len(offsets_mm), len(points_mm)), np.uint8)
        reach_mm = float(np.linalg.norm(offsets_mm, axis=1).max())
        for number, ellipsoid in enumerate(self._ellipsoids, 1):
            box, inside = ellipsoid.box.expanded(reach_mm), np.ones(len(points_mm), bool)
            for axis, (low, high) in enumerate(zip(box.low_mm, box.high_mm, strict=True)):
                inside &= (points_mm[:, axis] >= low) & (points_mm[:, axis] <= high)
            near = np.flatnonzero(inside)
            for shifted, offset in zip(top, offsets_mm, strict=True):
                shifted[near[ellipsoid.contains(points_mm[near] + offset)]] = number
        return top

    def _nucleus_labels(self, top: NDArray[np.uint8], grid: Grid) -> Volume:
        labels = self._labels_by_number[top]
        return Volume(np.where(labels <= len(STRUCTURES), labels, 0).astype(np.uint8), grid.affine)


PHANTOM = Phantom(
    tissues=(
        Ellipsoid(26, (0, -18, 8), (71, 87, 68), 0.010),  # cerebrospinal fluid around the brain
        Ellipsoid(21, (0, -18, 9), (68, 84, 64), 0.018),  # cortex
        Ellipsoid(22, (0, -18, 10), (63, 78, 58), -0.030),  # white matter
        Ellipsoid(26, (0, -62, -40), (52, 34, 29), 0.010),
        Ellipsoid(29, (0, -62, -39), (49, 31, 26), 0.010),  # cerebellar cortex
        Ellipsoid(30, (0, -59, -35), (33, 18, 15), -0.020),  # cerebellar white matter
        Ellipsoid(28, (0, -28, -36), (14, 12, 34), -0.020, (-12, 0, 0)),  # brainstem
        Ellipsoid(28, (0, -19, -12), (17, 11, 10), -0.010),  # midbrain
        Ellipsoid(33, (0, -6, 25), (16, 38, 5), -0.040),  # corpus callosum
        Ellipsoid(23, (-8, -4, 17), (4, 30, 7), 0.012, (-8, 0, -8)),  # lateral ventricles
        Ellipsoid(23, (8, -4, 17), (4, 30, 7), 0.012, (-8, 0, 8)),
        Ellipsoid(27, (-12, -20, 7), (8.5, 13, 8.5), 0.012, (0, 0, 25)),  # thalamus
        Ellipsoid(27, (12, -20, 7), (8.5, 13, 8.5), 0.012, (0, 0, -25)),
        Ellipsoid(24, (0, -14, 1), (1.8, 11, 8), 0.012),  # third ventricle
        Ellipsoid(25, (0, -46, -34), (5, 4, 10), 0.012),  # fourth ventricle
    ),
    nuclei=(
        *_both_sides("DN", (14.5, -57.0, -35.0), (4.6, 8.4, 4.4), (0.116, 0.108), (20, 15, 25)),
        *_both_sides("IN", (6.5, -53.5, -31.5), (2.0, 3.6, 2.7), (0.064, 0.058)),
        *_both_sides("RN", (5.2, -19.0, -9.0), (3.6, 4.0, 4.4), (0.102, 0.096)),
        *_both_sides("SN", (10.9, -16.5, -14.2), (2.4, 7.6, 5.4), (0.120, 0.112), (0, 30, -30)),
        *_both_sides("STN", (10.8, -11.5, -6.6), (2.2, 4.3, 3.1), (0.088, 0.082), (0, 35, 20)),
        *_both_sides("CN", (13.6, 12.0, 12.0), (5.6, 16.5, 9.0), (0.047, 0.043), (-12, 0, 10)),
        *_both_sides("PUT", (27.4, 2.0, 1.0), (4.6, 16.0, 13.0), (0.042, 0.038), (0, -8, 12)),
        *_both_sides("GP", (17.0, -3.0, -1.0), (3.8, 10.5, 8.5), (0.132, 0.124), (0, -12, 18)),
    ),
)
"""Volumes per side lie within the ranges of the literature:
DN 712, IN 81, RN 265, SN 413, STN 123, CN 3483, PUT 4008, GP 1421 mm³."""
