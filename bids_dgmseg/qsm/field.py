"""The magnetic field: dipole kernel, forward model, linear inverse, fit over the echoes and its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

GYROMAGNETIC_MHZ_PER_T = 42.577478518
"""Proton gyromagnetic ratio over 2 pi; a field of 1 ppm shifts the frequency by this many Hz per tesla of B0."""

_NOMINAL_TOLERANCE = 0.05

_SPACING_TOLERANCE = 0.01
"""Of evenly spaced echoes, relative to the mean spacing."""

FULL_TO = 0.5
"""Of the kernel of simulated fields, and of sources outside the brain, see `dipole_kernel`."""

_EMPTY = 30.0
"""Ratio of the power of acquired and empty parts of k-space; rounding leaves less than a thousandth in the latter."""

_CONE, _HIGH, _WINDOW_VOXELS, _MIN_SAMPLES, _STRONGEST = 0.02, (0.6, 1.0), 4.0, 50, 15.0
"""Of `noise_beyond_dipoles`: largest kernel, frequencies over that of Nyquist, width of the window's edge, and largest
deviation from the median over the median deviation."""

_R2PRIME_HZ_PER_PPM_T = 137.0 / 3.0
"""R2' per ppm of either sign and per tesla [Shin 2021: 137 Hz/ppm at 3 T]."""

R2STAR_HZ_PER_PPM_T = 274.0 / 3.0
"""R2* per ppm of either sign and per tesla [Dimov 2022: 274 Hz/ppm at 3 T]."""


def field_strength_t(nominal_t: float, frequency_mhz: Any = None) -> float:
    """Return B0 by the scanner's imaging frequency if it is within 5 % of the nominal field strength.

    Scanners called 3 T have 2.89 to 3.0 T.

    >>> round(field_strength_t(3, 123.255762), 3), field_strength_t(3, 297.2), field_strength_t(1.5)
    (2.895, 3, 1.5)
    """
    exact_t = frequency_mhz / GYROMAGNETIC_MHZ_PER_T if isinstance(frequency_mhz, int | float) else nominal_t
    return exact_t if abs(exact_t - nominal_t) <= _NOMINAL_TOLERANCE * nominal_t else nominal_t


def dipole_kernel(
    shape: Sequence[int],
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    *,
    full_to: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    r"""Compute the unit dipole kernel in Fourier space.

    .. math:: D(k) = 1/3 - (k \cdot b)^2 / |k|^2, \qquad D(0) = 0.

    If B0 is oblique to the grid, the products of different components of :math:`k` change their sign at the Nyquist
    frequency. The field of sharp edges therefore rings through the whole image, which a measured field does not; with
    `full_to` below 1 the products decrease to 0 there.

    Parameters
    ----------
    shape : sequence of 3 int
        Grid (X, Y, Z).
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    b0_direction : sequence of 3 float
        Direction of B0 along the grid's axes, of any length.
    full_to : float
        Fraction of the Nyquist frequency up to which the products have their full value.
    device : torch.device, optional
        Device of the kernel.

    Returns
    -------
    Tensor of shape (X, Y, Z // 2 + 1)
        Dimensionless, for `torch.fft.rfftn`.

    References
    ----------
    Marques JP, Bowtell R. Concepts Magn Reson B 25 (2005) 65-78. doi:10.1002/cmr.b.20034
    """
    frequencies = frequencies_per_mm(shape, voxel_size_mm, device=device)
    squared = along = rest = torch.zeros((), device=device)
    for k, component, size, step in zip(frequencies, b0_direction, shape, voxel_size_mm, strict=True):
        part = component / math.hypot(*b0_direction)
        # The Nyquist frequency of an even size stands for both signs, so its mixed products average to 0.
        beyond = ((2 * step * k.abs() - full_to) / max(1 - full_to, 1e-6)).clamp(0, 1)
        share = torch.where(k.abs() * step < 0.5 - 0.1 / size, (1 + torch.cos(math.pi * beyond)) / 2, 0.0)
        signed = k * share
        squared, along, rest = squared + k**2, along + signed * part, rest + (k**2 - signed**2) * part**2
    squared[0, 0, 0] = 1.0
    kernel: Tensor = 1 / 3 - (along**2 + rest) / squared
    kernel[0, 0, 0] = 0.0
    return kernel


def frequencies_per_mm(
    shape: Sequence[int], voxel_size_mm: Sequence[float], *, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the spatial frequencies along x, y and z, of shapes (X, 1, 1), (1, Y, 1) and (1, 1, Z // 2 + 1)."""
    x, y, z = (int(size) for size in shape)
    step_x, step_y, step_z = voxel_size_mm
    return (
        torch.fft.fftfreq(x, step_x, device=device).view(-1, 1, 1),
        torch.fft.fftfreq(y, step_y, device=device).view(1, -1, 1),
        torch.fft.rfftfreq(z, step_z, device=device).view(1, 1, -1),
    )


def apply_kernel(array: Tensor, kernel: Tensor) -> Tensor:
    """Convolve a periodic array (X, Y, Z) with a kernel given in Fourier space (X, Y, Z // 2 + 1)."""
    return torch.fft.irfftn(torch.fft.rfftn(array) * kernel, s=array.shape)


def conjugate_gradients(
    field: Tensor,
    kernel: Tensor,
    *,
    weight: Tensor,
    strength: float,
    iterations: int,
    support: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""Minimize :math:`|W(D\chi - f)|^2 + \lambda|\chi|^2` by conjugate gradients with early stopping.

    The weight W (X, Y, Z) is the reliability of the field: 0 outside the brain, about 1 inside. `strength` is λ; fewer
    iterations regularize more. χ is 0 where `support` is, and is sought from `start`, both (X, Y, Z).

    References
    ----------
    de Rochefort L, et al. Magn Reson Med 63 (2010) 194-206. doi:10.1002/mrm.22187
    """
    squared, inside = weight**2, 1.0 if support is None else support
    residual, chi = inside * apply_kernel(squared * field, kernel), torch.zeros_like(field)
    if start is not None:
        chi = inside * start
        residual = residual - inside * apply_kernel(squared * apply_kernel(chi, kernel), kernel) - strength * chi

    def normal(direction: Tensor) -> Tensor:
        return inside * apply_kernel(squared * apply_kernel(direction, kernel), kernel) + strength * direction

    return iterate_conjugate_gradients(normal, chi, residual, iterations=iterations)


def iterate_conjugate_gradients(
    operator: Callable[[Tensor], Tensor], solution: Tensor, residual: Tensor, *, iterations: int
) -> Tensor:
    """Improve the solution (X, Y, Z) of a linear system by conjugate gradients.

    The operator is symmetric and positive semidefinite; `residual` is the right side less the operator applied to the
    solution.
    """
    direction, power = residual, residual.square().sum()
    for _ in range(iterations):
        image = operator(direction)
        step = power / (direction * image).sum().clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        power, previous = residual.square().sum(), power
        direction = residual + power / previous.clamp(min=1e-30) * direction
    return solution


def dipole_field(
    chi: Tensor, *, voxel_size_mm: Sequence[float], b0_direction: Sequence[float] = (0, 0, 1), padding: float = 1.5
) -> Tensor:
    """Compute the field perturbation caused by a susceptibility distribution (forward model).

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    b0_direction : sequence of 3 float
        Direction of B0 along the grid's axes.
    padding : float
        Factor by which the grid is zero-padded against aliasing; 1 treats the array as periodic.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Field in ppm of B0.
    """
    shape = [fast_size(math.ceil(size * padding)) if padding > 1 else size for size in chi.shape]
    kernel = dipole_kernel(shape, voxel_size_mm, b0_direction, full_to=FULL_TO, device=chi.device)
    x, y, z = chi.shape
    return apply_kernel(zero_pad(chi, shape), kernel)[:x, :y, :z]


def zero_pad(array: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad an array (X, Y, Z) with zeros at the end of each axis."""
    padding = [n for size, old in zip(shape[::-1], array.shape[::-1], strict=True) for n in (0, size - old)]
    return functional.pad(array, padding)


def subtract_mean(array: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean in a mask, and return 0 outside.

    >>> subtract_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    return torch.where(mask, array - array[mask].mean(), 0.0)


def fast_size(size: int) -> int:
    """Return the smallest even size, at least `size`, whose prime factors are 2, 3 and 5 (for the FFT)."""
    size += size % 2
    while (30**20) % size:  # a divisor of a high power of 2·3·5 has no other prime factor
        size += 2
    return size


def r2star_per_s(chi: Tensor, *, b0_tesla: float, r2_per_s: float) -> Tensor:
    """Estimate R2* as R2 plus a static dephasing proportional to the absolute susceptibility.

    Parameters
    ----------
    chi : Tensor
        Susceptibility in ppm.
    b0_tesla : float
        Field strength in T.
    r2_per_s : float
        R2 in 1/s, the decay rate where the susceptibility is 0.

    Returns
    -------
    Tensor like `chi`
        R2* in 1/s.

    References
    ----------
    Shin HG, et al. chi-separation: magnetic susceptibility source separation toward iron and myelin mapping in the
    brain. NeuroImage 240 (2021) 118371. doi:10.1016/j.neuroimage.2021.118371
    """
    return r2_per_s + _R2PRIME_HZ_PER_PPM_T * b0_tesla * chi.abs()


def separate_sources(
    chi_ppm: NDArray[np.float32], r2star_per_s: NDArray[np.float32], *, b0_tesla: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r"""Separate susceptibility into its paramagnetic and its diamagnetic part (R2*-QSM).

    Parameters
    ----------
    chi_ppm : ndarray
        Susceptibility; its zero is taken for that of water.
    r2star_per_s : ndarray
        R2* of the same voxels.
    b0_tesla : float
        Field strength in T.

    Returns
    -------
    paramagnetic, diamagnetic : ndarray
        In ppm, neither negative; their difference is `chi_ppm`.

    Notes
    -----
    Sources of either sign dephase the signal alike:

    .. math:: \chi_+ - \chi_- = \chi, \qquad \chi_+ + \chi_- = R_2^* / (91.3\,\mathrm{Hz/ppm/T} \cdot B_0).

    If the sum is less than :math:`|\chi|`, one part is 0. The sum is also that of the decay that no source causes, R2:
    both parts are too large by about 0.02 ppm in tissue at 3 T. With measured R2 it would be R2', and half the constant
    [2]_.

    References
    ----------
    .. [1] Dimov AV, et al. Magnetic susceptibility source separation solely from gradient echo data: histological
       validation. Tomography 8 (2022) 1544-1551. doi:10.3390/tomography8030127
    .. [2] Shin HG, et al. NeuroImage 240 (2021) 118371. doi:10.1016/j.neuroimage.2021.118371

    Examples
    --------
    >>> separate_sources(np.array([0.1, -0.1]), np.array([41.1, 13.7]), b0_tesla=3.0)
    (array([0.125, 0.   ]), array([0.025, 0.1  ]))
    """
    total = r2star_per_s / (R2STAR_HZ_PER_PPM_T * b0_tesla)
    diamagnetic = np.maximum((total - np.abs(chi_ppm)) / 2, 0) + np.maximum(-chi_ppm, 0)
    return chi_ppm + diamagnetic, diamagnetic


def combine_echoes(phase: Tensor, magnitude: Tensor, *, echo_times_s: Sequence[float], b0_tesla: float) -> Tensor:
    r"""Fit the field to the phase of all echoes by weighted least squares.

    `phase` in rad, unwrapped and without offset at echo time 0, and `magnitude` have shape (E, ...). The field (...) is
    in ppm of B0, and 0 without signal. It is a line through the origin, weighted by the inverse variances
    :math:`M_j^2` of the phase:

    .. math:: \hat f = \frac{\sum_j M_j^2 T_j \varphi_j}{2\pi\gamma B_0 \sum_j M_j^2 T_j^2}.
    """
    times = torch.tensor(echo_times_s, device=phase.device).view(-1, *[1] * (phase.ndim - 1))
    weights = magnitude.to(phase.dtype) ** 2 * times  # convert first: squares of integers overflow
    total = (weights * times).sum(dim=0)
    rate = torch.where(total > 0, (weights * phase).sum(dim=0) / total, 0.0)
    return rate / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla)


def field_noise_sd(r2star: Tensor, *, snr: float | Tensor, echo_times_s: Sequence[float], b0_tesla: float) -> Tensor:
    r"""Compute the standard deviation of the field fitted by `combine_echoes`.

    Parameters
    ----------
    r2star : Tensor
        R2* in 1/s.
    snr : float or Tensor
        Signal at echo time 0 over the SD of the noise in the real part.
    echo_times_s : sequence of float
        Echo times in s.
    b0_tesla : float
        Field strength in T.

    Returns
    -------
    Tensor like `r2star`
        SD of the field in ppm.

    Notes
    -----
    As long as the signal :math:`M_j = M_0 e^{-T_j R_2^*}` of an echo is well above the noise, its phase has a Gaussian
    error of SD :math:`\sigma / M_j` [1]_. A weighted sum of Gaussian errors is Gaussian, so drawing the field error
    from

    .. math:: \sigma_f = \frac{1}{2\pi\gamma B_0\,\mathrm{SNR}\,\sqrt{\sum_j T_j^2 e^{-2 T_j R_2^*}}}

    is equivalent to simulating every echo.

    References
    ----------
    .. [1] Gudbjartsson H, Patz S. The Rician distribution of noisy MRI data. Magn Reson Med 34 (1995) 910-914.
       doi:10.1002/mrm.1910340618
    """
    information = torch.zeros_like(r2star)
    for time_s in echo_times_s:
        information += time_s**2 * torch.exp(-2 * time_s * r2star)
    return 1 / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * snr * information.sqrt())


def noise_beyond_dipoles(
    field: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    interpolation: Sequence[float] = (1.0, 1.0, 1.0),
) -> float:
    r"""Estimate the SD of the errors of a local field: of what no susceptibility explains.

    The dipole kernel vanishes on a cone at 54.7° to B0. A local field has no signal there, but its errors do: noise of
    the receiver, and those that all echoes share, such as physiological noise, flow and motion. Unlike differences of
    neighbouring voxels, it does not contain the texture of the tissue.

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
        Local field in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Where it is known.
    voxel_size_mm, b0_direction
        As for `dipole_kernel`.
    interpolation : sequence of 3 float
        Factors by which the image was interpolated (`interpolation_factors`): no noise is beyond the acquired k-space.

    Returns
    -------
    float
        0 if the mask is too small: fewer than 50 samples.

    Notes
    -----
    With a window :math:`w` that rises over four voxels from the border of the mask, without voxels that differ by more
    than 15 median deviations from the median (the errors of a haemorrhage are not those of the brain), and
    :math:`P(k) = |F(w(f - \bar f))|^2 / \sum w^2`, white noise has exponentially distributed powers of mean
    :math:`\sigma^2`;
    :math:`\hat\sigma^2` is their median over :math:`\ln 2`, where :math:`|D(k)| < 0.02` and the largest component of
    :math:`k` is 0.6 to 1 times the Nyquist frequency of the acquisition. In an image that was interpolated,
    :math:`\sigma^2` is divided by the product of the factors, as all noise is in that part of k-space.
    """
    shape = [fast_size(size) for size in field.shape]
    if not mask.any():
        return 0.0
    deviation = (field - field[mask].median()).abs()
    usual = mask & (deviation <= _STRONGEST * deviation[mask].median())
    depth = ndimage.distance_transform_edt(np.pad(usual.numpy(), 1))[1:-1, 1:-1, 1:-1]
    window = (1 - torch.cos(math.pi * torch.from_numpy((depth - 1) / _WINDOW_VOXELS).clamp(0, 1))).to(field.dtype) / 2
    if not window.any():
        return 0.0
    mean = (field * window).sum() / window.sum()
    power = torch.fft.rfftn(zero_pad((field - mean) * window, shape)).abs().square() / window.square().sum()
    parts = zip(frequencies_per_mm(shape, voxel_size_mm), voxel_size_mm, interpolation, strict=True)
    x, y, z = (2 * step * factor * k.abs() for k, step, factor in parts)
    highest = torch.maximum(torch.maximum(x, y), z)
    cone = dipole_kernel(shape, voxel_size_mm, b0_direction).abs() < _CONE
    samples = power[cone & (highest > _HIGH[0]) & (highest <= _HIGH[1])]
    if len(samples) < _MIN_SAMPLES:
        return 0.0
    # the noise of an interpolated image is in the acquired part of k-space only
    return float((samples.median() / (math.log(2) * math.prod(interpolation))).sqrt())


def interpolation_factors(phase: Tensor, magnitude: Tensor) -> tuple[float, float, float]:
    """Return by which factors zero-filling of k-space has interpolated an image along its axes; 1 where it has not.

    Parameters
    ----------
    phase, magnitude : Tensor of shape (X, Y, Z)
        Of one echo, in rad and in any unit, not masked: a mask fills k-space again.

    Returns
    -------
    tuple of 3 float
        1 to 4. An axis is interpolated if all power beyond a frequency is below 1/30 of that just within it.
    """
    signal = torch.polar(magnitude, phase)
    x, y, z = (_interpolation_factor(signal, axis) for axis in range(3))
    return x, y, z


def _interpolation_factor(signal: Tensor, axis: int) -> float:
    size = signal.shape[axis]
    others = [other for other in range(3) if other != axis]
    power = torch.fft.fft(signal, dim=axis).abs().square().mean(dim=others)
    half = torch.maximum(power, power.flip(0).roll(1))[: size // 2 + 1]  # either sign of the frequency
    for last in range(size // 2 - 2, max(size // 8, 3) - 1, -1):
        if half[last + 1 :].max() * _EMPTY < half[last - 2 : last + 1].min():
            return size / (2 * last)
    return 1.0


def is_evenly_spaced(echo_times_s: Sequence[float]) -> bool:
    """Return whether there are at least three echoes whose spacings differ by less than 1 %."""
    spacing_s = [after - before for before, after in pairwise(echo_times_s)]
    return len(spacing_s) > 1 and max(spacing_s) - min(spacing_s) < _SPACING_TOLERANCE * sum(spacing_s) / len(spacing_s)


def fit_r2star(magnitude: Tensor, *, echo_times_s: Sequence[float]) -> Tensor:
    r"""Fit R2* to the magnitude of several echoes.

    Parameters
    ----------
    magnitude : Tensor of shape (E, ...)
        Magnitude in any unit, of at least two echoes.
    echo_times_s : sequence of E float
        Echo times in s, in ascending order.

    Returns
    -------
    Tensor of shape (...)
        R2* in 1/s; 0 where the magnitude does not decay, or is 0 in an echo.

    Notes
    -----
    With three or more evenly spaced echoes, ARLO [1]_ [2]_: by Simpson's rule the integral of a decay over two spacings
    is :math:`S_i = (M_i + 4 M_{i+1} + M_{i+2}) / 3`, and proportional to :math:`D_i = M_i - M_{i+2}`; the factor is

    .. math:: y = \frac{\sum_i S_i^2 + S_i D_i / 3}{\sum_i D_i^2 / 3 + S_i D_i}
              \approx \frac{1}{R_2^* \Delta T}.

    Simpson's rule is not exact: at :math:`R_2^* \Delta T = 1` its error is 0.5 %. Exponentials that satisfy the
    auto-regression :math:`S = y D` fall by :math:`q = (\sqrt{9 y^2 + 3} - 2) / (3 y + 1)` per spacing, so that
    :math:`R_2^* = -\ln q / \Delta T` has no such error.

    Otherwise the slope of the logarithm, weighted by the inverse variances :math:`M_j^2` of the logarithm. Both neglect
    that noise raises the magnitude (the noise floor): R2* is too low where late echoes are not well above it.

    References
    ----------
    .. [1] Pei M, et al. Magn Reson Med 73 (2015) 843-850. doi:10.1002/mrm.25137
    .. [2] Erratum to [1]_. doi:10.1002/mrm.27807
    """
    # Both fits are independent of scale; squares of large magnitudes over the least denominator would overflow.
    magnitude = magnitude / magnitude.amax(dim=0).clamp(min=1e-30)
    if is_evenly_spaced(echo_times_s):
        middle, fallen = 4 * magnitude[1:-1] + magnitude[2:], magnitude[:-2] - magnitude[2:]
        integral = (magnitude[:-2] + middle) / 3
        numerator = (integral * (integral + fallen / 3)).sum(dim=0)
        y = numerator / (fallen * (integral + fallen / 3)).sum(dim=0).clamp(min=1e-30)
        q = ((9 * y.square() + 3).sqrt() - 2) / (3 * y + 1)
        spacing_s = (echo_times_s[-1] - echo_times_s[0]) / (len(echo_times_s) - 1)
        rate = -q.clamp(min=1e-6).log() / spacing_s
    else:
        times = torch.tensor(echo_times_s, device=magnitude.device).view(-1, *[1] * (magnitude.ndim - 1))
        weights, logs = magnitude.square(), magnitude.clamp(min=1e-30).log()
        total = weights.sum(dim=0).clamp(min=1e-30)
        centred = times - (weights * times).sum(dim=0) / total
        rate = -(weights * centred * logs).sum(dim=0) / (weights * centred.square()).sum(dim=0).clamp(min=1e-30)
    return torch.where((magnitude > 0).all(dim=0), rate.clamp(min=0.0), 0.0)
