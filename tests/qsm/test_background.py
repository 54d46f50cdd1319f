from typing import Any

import pytest
import torch

from bids_dgmseg.qsm.background import remove_background
from bids_dgmseg.qsm.field import dipole_field

HEAD_SHAPE, HEAD_VOXEL_MM = (48, 48, 40), (1.5, 1.5, 1.5)


@pytest.fixture(scope="module")
def head():
    """Coordinates and distance from the centre in mm; the brain is a ball of 24 mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(HEAD_SHAPE, HEAD_VOXEL_MM, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return x, y, z, (x**2 + y**2 + z**2).sqrt()


def test_air_is_separated_from_a_nucleus(head):
    # The bound is the error of the local field over its SD.
    x, y, z, r = head
    nucleus = 0.1 * ((x - 6) ** 2 + y**2 + z**2 < 25).float()
    air = 9.0 * ((x**2 + (y + 34) ** 2 + (z + 10) ** 2) < 49).float()
    nucleus_ppm = dipole_field(nucleus, voxel_size_mm=HEAD_VOXEL_MM)
    total = dipole_field(nucleus + air, voxel_size_mm=HEAD_VOXEL_MM)
    local, eroded = remove_background(
        total, r < 24, voxel_size_mm=HEAD_VOXEL_MM, b0_direction=(0, 0, 1), weight=torch.ones(HEAD_SHAPE)
    )
    assert not (local[~eroded] != 0).any()
    deep = eroded & (r < 18)
    error = (local - nucleus_ppm)[deep]
    assert (total - nucleus_ppm)[deep].std() / nucleus_ppm[deep].std() > 2
    assert (error.std() / nucleus_ppm[deep].std()).item() < 0.15


@pytest.mark.parametrize("b0_direction", [(0, 0, 1), (1, 0, 0)])
def test_projection_depends_on_field_direction(head, b0_direction):
    # A dipole outside: the right direction explains its field, another one does not.
    x, y, z, r = head
    air = 9.0 * ((x**2 + (y + 34) ** 2 + (z + 10) ** 2) < 49).float()
    total = dipole_field(air, voxel_size_mm=HEAD_VOXEL_MM, b0_direction=b0_direction)
    options: dict[str, Any] = {"voxel_size_mm": HEAD_VOXEL_MM, "weight": torch.ones(HEAD_SHAPE)}
    local, eroded = remove_background(total, r < 24, b0_direction=b0_direction, **options)
    assert (local[eroded].std() / total[eroded].std()).item() < 0.03


@pytest.mark.parametrize("edges_mm", [(1.0, 1.0, 1.0), (3.0, 3.0, 3.0), (1.0, 1.0, 4.0)])
def test_outer_layer_of_voxels_never_has_values(edges_mm):
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[2:18, 2:18, 2:18] = True
    options: dict[str, Any] = {"b0_direction": (0, 0, 1), "weight": torch.ones(mask.shape)}
    _, eroded = remove_background(torch.ones(mask.shape), mask, voxel_size_mm=edges_mm, **options)
    inner = torch.zeros_like(mask)
    inner[3:17, 3:17, 3:17] = True
    assert torch.equal(eroded, inner)
    _, deep = remove_background(torch.ones(mask.shape), mask, voxel_size_mm=edges_mm, erosion_mm=7.0, **options)
    assert not deep[:, :, :3].any()
    assert not deep[:8].any() or edges_mm[0] > 1  # the first voxel deeper than 7 mm is the eighth
