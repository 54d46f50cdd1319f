import pytest
import torch

from bids_dgmseg.qsm.invert import dipole_kernel

SHAPE = (8, 8, 8)


@pytest.mark.parametrize(("k", "value"), [
    pytest.param((0, 0, 2), -2 / 3, id="along the field: 1/3 - 1"),
    pytest.param((2, 0, 0), 1 / 3, id="across the field: 1/3 - 0"),
    pytest.param((0, -3, 0), 1 / 3, id="across the field, other axis and sign"),
    pytest.param((1, 1, 1), 0.0, id="magic angle: cos2 = 1/3"),
    pytest.param((1, 0, 1), -1 / 6, id="45 degrees: 1/3 - 1/2"),
    pytest.param((0, 0, 0), 0.0, id="the mean has no field"),
])
def test_kernel_by_hand(k, value):
    assert dipole_kernel(SHAPE, (1, 1, 1))[k].item() == pytest.approx(value, abs=1e-6)


def test_frequencies_are_per_mm():
    # Voxels of 1 x 1 x 2 mm: index (1, 0, 1) is k = (1/8, 0, 1/16), so cos2 = (1/256) / (1/64 + 1/256) = 1/5.
    assert dipole_kernel(SHAPE, (1, 1, 2))[1, 0, 1].item() == pytest.approx(1 / 3 - 1 / 5, abs=1e-6)


def test_the_field_may_lie_anywhere():
    kernel = dipole_kernel(SHAPE, (1, 1, 1), b0_direction=(3, 0, 0))
    assert kernel[2, 0, 0].item() == pytest.approx(-2 / 3, abs=1e-6)
    assert kernel[0, 0, 2].item() == pytest.approx(1 / 3, abs=1e-6)


def test_field_of_a_sphere():
    # Outside, chi/3 (a/r)^3 (3 cos2 - 1); inside 0. At r = 2a: 2/3/8 on the axis, -1/3/8 on the equator.
    size, radius = 64, 6
    axis = torch.arange(size) - size // 2
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    sphere = (x**2 + y**2 + z**2 <= radius**2).float()
    kernel = dipole_kernel(sphere.shape, (1, 1, 1))
    field = torch.fft.irfftn(torch.fft.rfftn(sphere) * kernel, s=sphere.shape)
    middle, out = size // 2, size // 2 + 2 * radius
    tolerance = 0.01  # stair-stepped surface, and neighbours at 64 voxels: (6 / 64)^3 = 0.0008
    assert field[middle, middle, middle].item() == pytest.approx(0, abs=tolerance)
    assert field[middle, middle, out].item() == pytest.approx(2 / 24, abs=tolerance)
    assert field[out, middle, middle].item() == pytest.approx(-1 / 24, abs=tolerance)
    assert field.mean().item() == pytest.approx(0, abs=1e-6)
