"""The measures against the phantom, whose volumes and susceptibilities are known on paper."""

import numpy as np
import pytest

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.resample import Grid, world_grid
from bids_dgmseg.measurement.nuclei import measure_regions
from bids_dgmseg.models.structures import STRUCTURES

NUCLEI = Box((-40, -75, -50), (40, 40, 32))


def surface_mm2(semi_axes_mm: tuple[float, float, float]) -> float:
    """Thomsen's formula, within 1.2 %."""
    a, b, c = np.power(semi_axes_mm, 1.6075)
    return float(4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6075))


def oblique_grid() -> Grid:
    """0.8 x 0.8 x 2 mm, turned about the x axis by atan(0.28 / 0.96), 16 degrees."""
    grid = world_grid(NUCLEI.grown(15), (0.8, 0.8, 2.0))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[0.96, -0.28], [0.28, 0.96]]
    return Grid(grid.shape, turn @ grid.affine)


@pytest.mark.parametrize("grid", [world_grid(NUCLEI, (1, 1, 1)), oblique_grid()], ids=["1 mm", "oblique, thick slices"])
def test_labels_give_the_volume_and_the_susceptibility_of_each_nucleus(phantom, grid):
    voxel_size_mm = tuple(np.linalg.norm(grid.affine[:3, :3], axis=0))
    dseg = phantom.dseg(grid).array
    probseg = np.stack([dseg == structure.index for structure in STRUCTURES]).astype(np.float32)
    chi = np.zeros(grid.shape)
    for structure in STRUCTURES:
        chi[dseg == structure.index] = phantom.chi_ppm[structure.abbreviation]
    table = measure_regions(chi, dseg, probseg, structures=STRUCTURES, voxel_size_mm=voxel_size_mm)
    bodies = {body.label: body for body in phantom.nuclei}
    for _, row in table.iterrows():
        name = row["abbreviation"]
        # Of the voxels that the surface cuts, each is wrong by a share that is uniform in ±1/2, SD 0.29 voxel.
        voxel_mm3 = np.prod(voxel_size_mm)
        cut = surface_mm2(bodies[row["index"]].semi_axes_mm) / voxel_mm3 ** (2 / 3)
        assert row["volume_mm3"] == pytest.approx(phantom.volumes_mm3[name], abs=3 * 0.29 * np.sqrt(cut) * voxel_mm3)
        assert row["mean_ppm"] == pytest.approx(phantom.chi_ppm[name])
        assert row["core_mean_ppm"] == pytest.approx(phantom.chi_ppm[name])


def test_fractions_give_the_volume_where_voxels_are_coarse(phantom):
    fine = world_grid(NUCLEI, (0.5, 0.5, 0.5))
    labels = phantom.dseg(fine).array
    x, y, z = (size // 5 for size in fine.shape)  # 2.5 mm voxels of 125 points
    blocks = labels[: 5 * x, : 5 * y, : 5 * z].reshape(x, 5, y, 5, z, 5)
    probseg = np.stack([(blocks == structure.index).mean(axis=(1, 3, 5)) for structure in STRUCTURES])
    dseg = np.where(probseg.sum(axis=0) > 0.5, probseg.argmax(axis=0) + 1, 0)
    table = measure_regions(np.zeros((x, y, z)), dseg, probseg, structures=STRUCTURES, voxel_size_mm=(2.5, 2.5, 2.5))
    for _, row in table.iterrows():
        # The error is that of counting points of 0.125 mm³: 1 % for the smallest nucleus, 80 mm³.
        assert row["volume_pv_mm3"] == pytest.approx(phantom.volumes_mm3[row["abbreviation"]], rel=0.02)
