from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.qsm import inversion
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, dipole_field, dipole_kernel
from bids_dgmseg.qsm.inversion import Acquisition, Methods, least_squares, noise_of_mean, regularization_weight
from bids_dgmseg.qsm.reconstruct import (
    describe_reconstruction,
    describe_steps,
    estimate_memory_gb,
    find_problems,
    list_warnings,
    measure_contrast,
    reconstruct_chi,
)

VOXEL_MM = (3.0, 3.0, 3.0)
TIMES_S = (0.006, 0.012, 0.018)
CONTRAST_PPM = 0.1


def ball(radius_mm, centre_mm=(0.0, 0.0, 0.0)):
    """Voxels inside a ball on a grid of 24 x 26 x 23 voxels, relative to its centre."""
    axes = [3 * (np.arange(n) - (n - 1) / 2) - c for n, c in zip((24, 26, 23), centre_mm, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 < radius_mm**2


def iron(nucleus):
    """Susceptibility of a nucleus, 0 around it."""
    return np.where(nucleus, np.float32(CONTRAST_PPM), np.float32(0))


def measure(chi_ppm, b0_direction, sign=1, dark=False):
    """Noisy phase and magnitude of a brain of 30 mm, from the forward model; no signal where dark."""
    field = dipole_field(torch.from_numpy(chi_ppm), voxel_size_mm=VOXEL_MM, b0_direction=b0_direction).numpy()
    turns = np.multiply.outer(TIMES_S, field * GYROMAGNETIC_MHZ_PER_T * 3.0)
    signal = np.where(ball(30) & ~np.asarray(dark), 1.0, 0.01) * np.exp(2j * math.pi * sign * turns)
    noise = np.random.default_rng(0).normal(scale=0.01, size=(2, *signal.shape))
    signal = signal + noise[0] + 1j * noise[1]
    return np.angle(signal).astype(np.float32), np.abs(signal).astype(np.float32)


BRAIN = ball(30)


def reconstruct(phase, magnitude, *, mask=BRAIN, b0_direction=(0, 0, 1), **methods):
    acquisition = Acquisition(TIMES_S, 3.0, VOXEL_MM, b0_direction)
    return reconstruct_chi(phase, magnitude, acquisition, mask=mask, methods=Methods(**methods))


def contrast_ppm(chi_ppm, nucleus):
    return float(chi_ppm[nucleus].mean() - chi_ppm[ball(18) & ~nucleus].mean())


def test_susceptibility_is_recovered_for_an_oblique_field():
    nucleus, b0_direction = ball(7, (4.0, 0.0, -6.0)), (0.6, 0, 0.8)
    phase, magnitude = measure(iron(nucleus), b0_direction)
    done = reconstruct(phase, magnitude, b0_direction=b0_direction)
    grid = Volume(done.chi_ppm, np.diag([*VOXEL_MM, 1.0]))  # whose third axis need not be that of the field
    record = describe_reconstruction(done, grid)
    assert record["B0Direction"] == list(b0_direction)
    assert done.phase_sign == 1
    assert contrast_ppm(done.chi_ppm, nucleus) == pytest.approx(CONTRAST_PPM, rel=0.2)
    assert done.mask[nucleus].all()
    assert not (done.chi_ppm[~done.mask] != 0).any()
    assert float(done.chi_ppm[done.mask].mean()) == pytest.approx(0, abs=1e-6)
    slab = replace(done, brain=np.ones((24, 26, 15), bool))  # 45 mm, cut by both faces
    assert ["cover less than 60 mm" in str(list_warnings(each)) for each in (done, slab)] == [False, True]


def test_phase_sign_is_estimated_or_stated():
    nucleus = ball(7)
    phase, magnitude = measure(iron(nucleus), (0, 0, 1), sign=-1)
    estimated, stated = (reconstruct(phase, magnitude, phase_sign=sign) for sign in ("auto", "positive"))
    assert estimated.phase_sign == -1
    assert contrast_ppm(estimated.chi_ppm, nucleus) > 0.7 * CONTRAST_PPM
    np.testing.assert_array_equal(stated.chi_ppm, -estimated.chi_ppm)


def test_voxels_without_phase_are_excluded():
    nucleus, hole = ball(7, (8.0, 0.0, 0.0)), ball(4, (-12.0, 0.0, 0.0))
    phase, magnitude = measure(iron(nucleus), (0, 0, 1))
    phase[1, hole] = np.nan
    magnitude[2, nucleus.nonzero()[0][0], nucleus.nonzero()[1][0], nucleus.nonzero()[2][0]] = np.nan
    done = reconstruct(phase, magnitude)
    assert not done.mask[hole].any()
    assert done.r2star_per_s is not None
    assert done.r2star_per_s[nucleus][0] == 0  # no decay is known where an echo has no magnitude
    assert np.isfinite(done.chi_ppm).all()
    assert contrast_ppm(done.chi_ppm, nucleus) == pytest.approx(CONTRAST_PPM, rel=0.25)


def test_fields_of_the_steps_are_returned():
    # From the forward model: all sources, and those of the brain alone, for phase that decreases with the field.
    nucleus, air = ball(7), ball(6, (0.0, 0.0, -32.0))
    inner, outer = iron(nucleus), np.where(air, np.float32(9.0), np.float32(0))
    local, total = (
        dipole_field(torch.from_numpy(chi), voxel_size_mm=VOXEL_MM, b0_direction=(0, 0, 1)).numpy()
        for chi in (inner, inner + outer)
    )
    done = reconstruct(*measure(inner + outer, (0, 0, 1), sign=-1), mask=ball(24), phase_sign="negative")
    assert contrast_ppm(done.chi_ppm, nucleus) == pytest.approx(CONTRAST_PPM, rel=0.25)
    far = done.mask & ball(16)
    error = (done.total_field_ppm - total)[far]  # the constant of the phase is unknown
    # SD of a field fitted to phase with an SD of 0.01 rad (noise over signal), by propagation of errors
    noise_ppm = 0.01 / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0 * math.hypot(*TIMES_S))
    assert float(error.std()) == pytest.approx(noise_ppm, rel=0.1)
    assert np.corrcoef(done.local_field_ppm[far], local[far])[0, 1] > 0.95
    assert not done.local_field_ppm[~done.mask].any()
    assert done.misfit_ppm < 0.4 * float(done.local_field_ppm[done.mask].std())
    np.testing.assert_array_equal(done.brain, ball(24))
    assert float(np.median(done.magnitude[nucleus])) == pytest.approx(math.sqrt(3), rel=0.02)  # three echoes of 1


def test_changes_are_those_of_other_choices():
    nucleus = ball(9, (4.0, 0.0, -3.0))
    phase, magnitude = measure(iron(nucleus), (0, 0, 1))
    done = reconstruct(phase, magnitude)
    others = [reconstruct(phase, magnitude, regularization=factor * done.regularization) for factor in (0.5, 2)]
    others += [
        reconstruct(phase, magnitude, mask=mask(BRAIN)) for mask in (ndimage.binary_erosion, ndimage.binary_dilation)
    ]
    expected = [other.chi_ppm - done.chi_ppm for other in others]
    for change, exact in zip(done.changes_ppm[:2], expected[:2], strict=True):
        np.testing.assert_allclose(change, exact, atol=1e-5)
    # With other masks the background is removed twice from the known sources, instead of three times from none.
    sizes = [[np.abs(change[nucleus].mean()) for change in changes[2:]] for changes in (done.changes_ppm, expected)]
    assert 0.3 < max(sizes[0]) / max(sizes[1]) < 3


def test_noise_of_means_is_that_of_drawn_fields():
    nucleus, strength, decay = ball(6), 2e-3, 20.0
    steps = {
        **{"EchoTime": TIMES_S, "MagneticFieldStrength": 3.0, "R2starMedian": decay, "B0Direction": [0, 0.6, 0.8]},
        **{"FieldNoise": 2e-3, "RegularizationWeight": strength},
    }
    stated = noise_of_mean(nucleus, decay, steps=steps, voxel_size_mm=VOXEL_MM)
    generator, means = torch.Generator().manual_seed(1), []
    kernel = dipole_kernel((40, 42, 38), VOXEL_MM, (0, 0.6, 0.8))
    for _ in range(300):
        noise = 2e-3 * torch.randn((40, 42, 38), generator=generator)
        chi = least_squares(noise, kernel, strength=strength, voxel_size_mm=VOXEL_MM, ridge=5e-4)
        means.append(chi[:24, :26, :23][torch.from_numpy(nucleus)].mean())
    assert stated == pytest.approx(float(torch.stack(means).std()), rel=0.12)  # three SDs of an SD of 300 values
    # The SD of the field is 1 over the root of the sum of (T exp(-T R2*))^2; interpolation by 2 along one axis joins
    # the noise of two voxels.
    weaker, typical = (math.hypot(*(t * math.exp(-rate * t) for t in TIMES_S)) for rate in (decay + 60, decay))
    other = noise_of_mean(nucleus, decay + 60, steps={**steps, "Interpolation": [1, 1, 2]}, voxel_size_mm=VOXEL_MM)
    assert other == pytest.approx(stated * typical / weaker * math.sqrt(2), rel=1e-4)


def test_errors_of_the_field_are_noise():
    """Errors that all echoes share do not show in the residual of the fit, but count as noise."""
    nucleus = ball(7)
    clean, magnitude = measure(iron(nucleus), (0, 0, 1))
    shared_ppm = np.random.default_rng(5).normal(scale=0.01, size=nucleus.shape)
    turns = np.multiply.outer(TIMES_S, shared_ppm * GYROMAGNETIC_MHZ_PER_T * 3.0)
    phase = np.angle(np.exp(1j * (clean + 2 * math.pi * turns))).astype(np.float32)
    done = reconstruct(phase, magnitude)
    # SD of the field of one echo by propagation of errors: 0.01 rad over the time, combined over three
    thermal_ppm = 0.01 / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0 * math.hypot(*TIMES_S))
    assert done.thermal_noise_ppm == pytest.approx(thermal_ppm, rel=0.1)
    # known to about a tenth from the samples of a small grid
    assert done.noise_ppm == pytest.approx(0.01, rel=0.15)
    assert done.misfit_ppm > 0.8 * done.noise_ppm


def test_map_that_fits_noise_is_regularized_more(monkeypatch):
    phase, magnitude = measure(iron(ball(7)), (0, 0, 1))
    monkeypatch.setattr(inversion, "_STRENGTH", 1e-3)
    done = reconstruct(phase, magnitude)
    first = regularization_weight(noise_ppm=done.noise_ppm, voxel_size_mm=VOXEL_MM)
    assert done.n_adjustments == 4
    assert done.regularization == pytest.approx(1.5**4 * first)
    fixed = reconstruct(phase, magnitude, regularization=1e-5)
    assert (fixed.regularization, fixed.n_adjustments) == (1e-5, 0)
    assert fixed.misfit_ppm < 0.8 * fixed.noise_ppm


def test_mask_smaller_than_smallest_sphere_is_rejected():
    phase, magnitude = measure(np.zeros((24, 26, 23), np.float32), (0, 0, 1))
    with pytest.raises(ValueError, match="no voxel is far enough from the border of the mask"):
        reconstruct(phase, magnitude, mask=ball(3.5))


def test_mask_without_signal_is_rejected():
    phase, magnitude = measure(iron(ball(7)), (0, 0, 1))
    with pytest.raises(ValueError, match="the mask contains no reliable voxel"):
        reconstruct(phase, np.where(ball(30), magnitude, np.float32(0)), mask=~ball(32))


def test_magnitude_without_brain_is_rejected():
    phase, magnitude = measure(np.zeros((24, 26, 23), np.float32), (0, 0, 1))
    with pytest.raises(ValueError, match="no brain found in the magnitude"):
        reconstruct(phase, np.zeros_like(magnitude), mask=None)


def test_steps_depend_on_number_of_echoes():
    phase, magnitude = measure(iron(ball(7)), (0, 0, 1))
    several = describe_steps(reconstruct(phase, magnitude))
    acquisition = Acquisition(TIMES_S[2:], 3.0, VOXEL_MM)
    single = describe_steps(reconstruct_chi(phase[2:], magnitude[2:], acquisition, mask=BRAIN))
    assert several.keys() - single.keys() == {"R2starFit"}
    assert several["R2starFit"] == "ARLO"
    assert "offset not removed" in single["Unwrapping"]
    assert "offset removed" in several["Unwrapping"]
    assert "residual" not in single["FieldFit"]


@pytest.mark.parametrize(("range_ppm", "n_problems"), [(0.5, 0), (0.52, 1), (math.nan, 1)])
def test_spread_of_map_is_checked(range_ppm, n_problems):
    # The central 98 % of evenly spaced values span 98 % of their range.
    inside = np.zeros((22, 22, 1013), np.bool_)
    inside[1:-1, 1:-1, 1:-1] = True  # the outer 5 mm do not count: the values are those of the 1001 slices between
    chi_ppm = np.full(inside.shape, 10, np.float32)
    chi_ppm[6:-6, 6:-6, 6:-6] = np.linspace(0, range_ppm, 1001, dtype=np.float32)
    depth_mm = ndimage.distance_transform_edt(inside)
    assert len(list(find_problems(chi_ppm, depth_mm, local_share=0.1, misfit=2))) == n_problems
    assert len(list(find_problems(chi_ppm, depth_mm, local_share=0.4, misfit=2))) == n_problems + 1  # filtered phase


@pytest.mark.parametrize(("contrast", "expected"), [(0.0, 0.0), (0.2, 0.1)])
def test_contrast_is_free_of_noise_and_shading(contrast, expected):
    # Slabs of 8 mm, of two tissues: SD half their difference; neighbours of different tissue lower it by a quarter,
    # the average over 8 mm by little.
    x, y, z = np.meshgrid(*[np.arange(-40, 40)] * 3, indexing="ij")
    inside = x**2 + y**2 + z**2 < 35**2
    tissue = 1 + contrast * (x // 8 % 2)
    noise = np.random.default_rng(2).normal(scale=0.1, size=x.shape)
    magnitude = (inside * (tissue * np.exp(-x / 100) + noise)).astype(np.float32)
    assert measure_contrast(magnitude, inside, voxel_size_mm=(1, 1, 1)) == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize(("n_echoes", "gb"), [(2, 1.066912), (20, 1.078312)])
def test_memory_is_estimated_from_grid_and_echoes(n_echoes, gb):
    # 0.9 GB, 20 bytes per echo of 60³ voxels and 85 bytes per voxel with 20 mm more on each side: 100³; or 160 bytes
    # for these 100³ without the echoes, if that is more; and 32 bytes per voxel for changes of the map.
    assert estimate_memory_gb((60, 60, 60), (1, 1, 1), n_echoes=n_echoes) == pytest.approx(gb)
