"""How good a map is as a whole: noise, streaks, what background fields left, room around the nuclei."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, special

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.masks import sum_nearby
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.field_of_view import View

SD_PER_MAD = 1.482602218505602
"""1 / Φ⁻¹(3/4): turns the median absolute deviation of Gaussian values into their standard deviation."""

CONE_WIDTH = 0.1
"""Streaks come from where the dipole kernel is smaller than this; truncated division works with 0.1 to 0.2."""

COARSEST_MM = 20.0
"""Streaks are finer than this; coarser patterns are the head's own shape."""

TAPER_MM = 5.0
"""Over about this depth the map fades in, so that the edge of the mask leaves no cross in k-space."""

N_SHELLS = 16
"""Of equal width; within one, anatomy has about the same power in every direction."""

RIM_DEPTH_MM = 5.0
"""Background fields are largest, and their removal worst, within about the smallest radius of spherical means."""

SMOOTH_MM = 3.0
"""SD of the Gaussian that leaves background fields and takes cortex, veins and noise away."""

SCAN_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "noise_sd_ppm": {
        "Description": "Standard deviation of the noise, from second differences along all three axes",
        "Units": "ppm",
    },
    "streaking_index": {"Description": "Power near the magic-angle cone in k-space over that elsewhere; 1 is none"},
    "rim_residual_ppm": {
        "Description": "Typical deviation of the smoothed map within 5 mm of the mask's edge from the map's median",
        "Units": "ppm",
    },
}
"""Name → data dictionary entry."""


def measure_scan(
    chi: NDArray[np.floating],
    *,
    view: View,
    voxel_size_mm: tuple[float, float, float],
    b0_direction: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> dict[str, float]:
    """Measure the quality of a map.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Magnetic susceptibility in ppm, the whole image; NaN means not measured.
    view : View
        What was measured.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    b0_direction : tuple of 3 float
        Direction of the main field along the grid's axes; need not have length 1.

    Returns
    -------
    dict
        The entries of `SCAN_COLUMNS`; NaN where the image is too small or has no edge to judge.
    """
    inside = view.inside & np.isfinite(chi)
    return {
        "noise_sd_ppm": estimate_noise(chi, inside),
        "streaking_index": measure_streaks(chi, inside, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction),
        "rim_residual_ppm": measure_rim(chi, inside, voxel_size_mm=voxel_size_mm),
    }


def estimate_noise(chi: NDArray[np.floating], inside: NDArray[np.bool_]) -> float:
    r"""Estimate the standard deviation of the noise in ppm.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Map in ppm.
    inside : ndarray of bool, shape (X, Y, Z)
        Voxels to use.

    Returns
    -------
    float
        NaN where no cube of 3 voxels is inside.

    Notes
    -----
    The second difference :math:`[1, -2, 1]` along all three axes takes away everything that is linear along any axis,
    as Immerkær's mask does in a plane [1]_. White noise of variance :math:`\sigma^2` comes out with
    :math:`6^3 \sigma^2`; :math:`\sigma` is read from the median of the absolute values, which the few voxels on edges
    and veins do not move [2]_. Maps that were smoothed or interpolated have less of this fine noise than of all noise.

    References
    ----------
    .. [1] Immerkær J. Fast noise variance estimation. Comput Vis Image Underst 64 (1996) 300-302.
       doi:10.1006/cviu.1996.0060
    .. [2] Donoho DL, Johnstone IM. Ideal spatial adaptation by wavelet shrinkage. Biometrika 81 (1994) 425-455.
       doi:10.1093/biomet/81.3.425
    """
    filtered = np.where(inside, chi, np.nan)
    for axis in range(3):
        filtered = np.diff(filtered, n=2, axis=axis)
    sizes = np.abs(filtered[np.isfinite(filtered)])
    return float(np.median(sizes)) * SD_PER_MAD / 6**1.5 if len(sizes) else np.nan


def measure_streaks(
    chi: NDArray[np.floating],
    inside: NDArray[np.bool_],
    *,
    voxel_size_mm: tuple[float, float, float],
    b0_direction: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> float:
    r"""Compare the power near the magic-angle cone with the power elsewhere.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Map in ppm.
    inside : ndarray of bool, shape (X, Y, Z)
        Voxels to use.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    b0_direction : tuple of 3 float
        Direction of the main field along the grid's axes.

    Returns
    -------
    float
        1 for a map without preferred directions, more where streaks add power near the cone, less where
        regularization took power away there. NaN where the image is too small to tell.

    Notes
    -----
    The dipole kernel :math:`D(k) = 1/3 - (k \cdot b)^2 / k^2` is 0 on a cone at the magic angle; dividing by it
    amplifies noise and errors near the cone, which are seen as streaks [1]_ [2]_. Power :math:`P = |F[\chi]|^2` of the
    map (minus its mean, faded in over 5 mm from the mask's edge) is averaged where :math:`|D| < 0.1` and where not, in
    shells of :math:`|k|` from 1/20 per mm to the smallest Nyquist frequency; the index is the exponential of the mean
    over shells of :math:`\log (\bar P_\text{cone} / \bar P_\text{rest})`, each weighted by its samples on the cone.

    References
    ----------
    .. [1] Li W, et al. A method for estimating and removing streaking artifacts in quantitative susceptibility
       mapping. NeuroImage 108 (2015) 111-122. doi:10.1016/j.neuroimage.2014.12.043
    .. [2] Shmueli K, et al. Magnetic susceptibility mapping of brain tissue in vivo using MRI phase data. Magn Reson
       Med 62 (2009) 1510-1522. doi:10.1002/mrm.22135
    """
    found = ndimage.find_objects(inside.astype(np.uint8))
    if not found or found[0] is None:
        return np.nan
    box = found[0]
    middle = chi[inside].mean(dtype=np.float64)
    faded = np.where(inside[box], chi[box] - middle, 0).astype(np.float32) * _taper(inside[box], voxel_size_mm)
    power = np.abs(fft.rfftn(faded)) ** 2
    shell, cone = _shells(faded.shape, voxel_size_mm, b0_direction)
    times = _count_mirrored(faded.shape)
    on_cone, n_on_cone = _sum_shells(power, times, shell, cone)
    elsewhere, n_elsewhere = _sum_shells(power, times, shell, ~cone)
    usable = (on_cone > 0) & (elsewhere > 0)
    if not usable.any():
        return np.nan
    ratios = np.log(on_cone[usable] / n_on_cone[usable]) - np.log(elsewhere[usable] / n_elsewhere[usable])
    return float(np.exp(np.average(ratios, weights=n_on_cone[usable])))


def _taper(inside: NDArray[np.bool_], voxel_size_mm: tuple[float, float, float]) -> NDArray[np.float32]:
    """Rise from 0 at a flat edge to 1 at `TAPER_MM`, by the share of a box about each voxel that is inside."""
    reach = [2 * max(1, round(TAPER_MM / edge)) + 1 for edge in voxel_size_mm]
    share = ndimage.uniform_filter(inside.astype(np.float32), reach, mode="constant")
    weight: NDArray[np.float32] = np.clip(2 * share - 1, 0, 1)
    return weight


def _sum_shells(
    power: NDArray[np.floating], times: NDArray[np.floating], shell: NDArray[np.int16], part: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum the power over a part of each shell, and count its samples; each stands for so many `times`."""
    chosen = part & (shell >= 0)
    numbers, weights = shell[chosen], times[chosen]
    sums = np.bincount(numbers, power[chosen] * weights, N_SHELLS).astype(np.float64)
    return sums, np.bincount(numbers, weights, N_SHELLS).astype(np.float64)


def _count_mirrored(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Tell how many frequencies each of `rfftn` stands for: 2, but 1 where the half meets its mirror."""
    times = np.full(shape[2] // 2 + 1, 2, np.float32)
    times[0] = 1
    if shape[2] % 2 == 0:
        times[-1] = 1
    return np.broadcast_to(times, (*shape[:2], len(times)))


def _shells(
    shape: tuple[int, ...], voxel_size_mm: tuple[float, float, float], b0_direction: tuple[float, float, float]
) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Assign each frequency to its shell, -1 for those not used, and tell which lie near the cone."""
    *across, last = zip(shape, voxel_size_mm, strict=True)
    axes = [*(fft.fftfreq(size, step) for size, step in across), fft.rfftfreq(*last)]
    kx, ky, kz = (axis.astype(np.float32) for axis in np.meshgrid(*axes, indexing="ij", sparse=True))
    bx, by, bz = (np.asarray(b0_direction) / np.linalg.norm(b0_direction)).astype(np.float32)
    squared = kx**2 + ky**2 + kz**2
    low, high = 1 / COARSEST_MM, 0.5 / max(voxel_size_mm)
    shell = np.floor((np.sqrt(squared) - low) / max(high - low, 1e-9) * N_SHELLS).astype(np.int16)
    shell[(shell < 0) | (shell >= N_SHELLS)] = -1
    squared[0, 0, 0] = 1.0
    cone = np.abs(1 / 3 - (kx * bx + ky * by + kz * bz) ** 2 / squared) < CONE_WIDTH
    return shell, cone


def measure_rim(
    chi: NDArray[np.floating], inside: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]
) -> float:
    r"""Measure what background fields left near the mask's edge, in ppm.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Map in ppm.
    inside : ndarray of bool, shape (X, Y, Z)
        Voxels to use.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    float
        NaN where the whole image is inside, or nothing is. Where the image ends, there is no rim.

    Notes
    -----
    The map is smoothed by a Gaussian of 3 mm (standard deviation) over the voxels inside. The result is
    :math:`1.4826 \operatorname{median}_\text{rim} |\tilde\chi - \operatorname{median}_\text{inside} \chi|` over the
    voxels about which the Gaussian has less inside than 5 mm below a flat edge, so that the image's own end is no rim.
    Cortex and fluid differ from the median too: without any background
    field the phantom has 0.05 ppm.
    """
    if inside.all() or not inside.any():
        return np.nan
    sigma = [SMOOTH_MM / edge for edge in voxel_size_mm]
    sums, share = sum_nearby(chi, inside, sigma)
    rim = inside & (share < special.ndtr(RIM_DEPTH_MM / SMOOTH_MM))  # so much of the kernel is inside at that depth
    middle = np.median(chi[inside])
    return float(np.median(np.abs(sums[rim] / share[rim] - middle)) * SD_PER_MAD)


def measure_box_margin(dseg: Volume, box: Box) -> float:
    """Measure the room between the nuclei and the box that was segmented, in mm.

    Parameters
    ----------
    dseg : Volume
        Numbers of ``structures.tsv``.
    box : Box
        What the localizer found.

    Returns
    -------
    float
        Smallest distance from a face of the box to the voxels of the nuclei, corners included; below 0 where they
        reach beyond. NaN where there is no nucleus.
    """
    indices = np.argwhere(dseg.array)
    if not len(indices):
        return np.nan
    size_mm, axes = box.frame
    centres_mm = (indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3] - box.centre_mm) @ axes
    half_mm = np.abs(axes.T @ dseg.affine[:3, :3]).sum(axis=1) / 2
    return float((np.asarray(size_mm) / 2 - np.abs(centres_mm).max(axis=0) - half_mm).min())
