import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_dgmseg.measurement.map_quality import estimate_noise, rim_residual, streaking_index

UNIT = (1.0, 1.0, 1.0)
Triple = tuple[float, float, float]


def everywhere(array: np.ndarray) -> np.ndarray:
    return np.ones(array.shape, bool)


def kernel(shape: tuple[int, int, int], size_mm: Triple = UNIT, b0: Triple = (0.0, 0.0, 1.0)) -> np.ndarray:
    """Dipole kernel in k-space, from its formula."""
    axes = (np.fft.fftfreq(size, step) for size, step in zip(shape, size_mm, strict=True))
    k = np.stack(np.meshgrid(*axes, indexing="ij"))
    squared = (k**2).sum(axis=0)
    squared[0, 0, 0] = 1
    direction = np.asarray(b0) / np.linalg.norm(b0)
    values: np.ndarray = 1 / 3 - np.tensordot(direction, k, 1) ** 2 / squared
    return values


def divide(field: np.ndarray, threshold: float, size_mm: Triple = UNIT, b0: Triple = (0.0, 0.0, 1.0)) -> np.ndarray:
    """Truncated k-space division."""
    dipole = kernel((field.shape[0], field.shape[1], field.shape[2]), size_mm, b0)
    safe = np.where(np.abs(dipole) < threshold, np.where(dipole < 0, -threshold, threshold), dipole)
    return np.fft.ifftn(np.fft.fftn(field) / safe).real


def test_noise_estimate_ignores_veins_and_holes():
    rng = np.random.default_rng(1)
    chi = rng.normal(0, 0.02, (24, 24, 24))
    chi[5, 5, :] = 1.0
    inside = everywhere(chi)
    inside[12:, :, 12:] = False
    chi[~inside] = 0
    assert estimate_noise(chi, inside) == pytest.approx(0.02, rel=0.08)  # the vein affects the median slightly


def test_streaking_grows_with_less_truncation():
    field = np.random.default_rng(3).normal(size=(32, 32, 32))
    indices = [streaking_index(divide(field, t), everywhere(field), voxel_size_mm=UNIT) for t in (0.3, 0.15, 0.05)]
    # Truncation at 0.3 of a kernel between -2/3 and 1/3 leaves little to divide by.
    assert 1 < indices[0] < 1.5 < indices[1] < 3 < indices[2]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_map_quality_does_not_depend_on_orientation(seed):
    rng = np.random.default_rng(seed)
    chi, size_mm, b0 = rng.normal(size=(14, 16, 18)), (1.0, 1.2, 2.0), rng.normal(size=3)
    order = tuple(rng.permutation(3).tolist())
    flips = tuple(np.flatnonzero(rng.random(3) < 0.5).tolist())
    reoriented = np.flip(chi.transpose(order), flips)
    signs = np.where(np.isin(np.arange(3), flips), -1, 1)
    x, y, z = (size_mm[axis] for axis in order)
    bx, by, bz = (b0[list(order)] * signs).tolist()
    first = streaking_index(chi, everywhere(chi), voxel_size_mm=size_mm, b0_direction=(b0[0], b0[1], b0[2]))
    second = streaking_index(reoriented, everywhere(reoriented), voxel_size_mm=(x, y, z), b0_direction=(bx, by, bz))
    assert second == pytest.approx(first, rel=1e-4)  # float32
    assert estimate_noise(reoriented, everywhere(reoriented)) == pytest.approx(estimate_noise(chi, everywhere(chi)))


def test_slices_as_thick_as_streaks_are_wide_have_no_streaking_index():
    # Their Nyquist frequency, 1 / (2 · 10 mm), is that of the longest streaks: no shell lies in between.
    chi = np.random.default_rng(1).normal(size=(40, 40, 14)).astype(np.float32)
    assert np.isnan(streaking_index(chi, everywhere(chi), voxel_size_mm=(1.0, 1.0, 10.0)))


def test_rim_residual_of_a_shifted_layer():
    # 50 mm inside, 0.1 ppm in the last 4 of them: the median is 0. The five voxels of the rim lie 0.5 to 4.5 mm deep;
    # smoothing by 3 mm over the inside leaves (Φ(1.5 / 3) - Φ(-2.5 / 3)) / Φ(2.5 / 3) = 0.613 at the middle one.
    inside, chi = np.zeros((60, 8, 8), bool), np.zeros((60, 8, 8))
    inside[:50] = True
    chi[46:50] = 0.1
    residual = rim_residual(chi, inside, voxel_size_mm=UNIT)
    assert residual == pytest.approx(0.0613 * 1.4826, rel=0.02)  # a sum over voxels instead of an integral
