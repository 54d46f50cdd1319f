"""Image quality of a susceptibility map: noise, streaks, residual background field, strong sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import fft, ndimage, special

from bids_dgmseg.image.masks import ROUNDING_MM, is_valid, masked_gaussian
from bids_dgmseg.image.units import find_export
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import BLOB_COLUMNS
from bids_dgmseg.models.structures import Structure

SD_PER_MAD = 1.482602218505602
"""1 / Φ⁻¹(3/4): standard deviation of a Gaussian per median absolute deviation."""

CONE_WIDTH = 0.1
"""Frequencies with a smaller dipole kernel are on the cone; truncated division uses thresholds of 0.1 to 0.2."""

COARSEST_MM = 20.0
"""Streaks have shorter wavelengths; longer ones describe the shape of the head."""

TAPER_MM = 5.0
"""Approximate depth over which the map is faded in, so that the edge of the mask leaves no cross in k-space."""

N_SHELLS = 16
"""Shells of equal width; within a shell, anatomy has about the same power in every direction."""

RIM_DEPTH_MM = 5.0
"""Background fields, and the errors of their removal, are largest within about the radius of the smallest kernel of
spherical mean value (SMV) filtering."""

SMOOTH_MM = 3.0
"""Standard deviation of the Gaussian that retains background fields and suppresses cortex, veins and noise."""

MAP_QUALITY: Mapping[str, tuple[str, str]] = {
    "noise_sd_ppm": ("Noise SD", "ppm"),
    "streaking_index": ("Streaking index", ""),
    "rim_residual_ppm": ("Residual at the rim", "ppm"),
    "negative_fraction": ("Fraction of negative values", ""),
    "clipped_fraction": ("Fraction of clipped values", ""),
    "picture_levels": ("Values of an 8-bit picture", ""),
}
"""Measure → its name on pages, and its unit."""


def measure_map_quality(
    chi: NDArray[np.floating],
    *,
    inside: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
    b0_direction: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> dict[str, float]:
    """Compute the measures of `MAP_QUALITY`.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Susceptibility in ppm, the whole image, NaN where not valid.
    inside : ndarray of bool, shape (X, Y, Z)
        Field of view of the map.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    b0_direction : tuple of 3 float
        Direction of the main field along the axes of the grid, of any length.

    Returns
    -------
    dict
        NaN if the image is too small or has no edge inside.
    """
    finite, valid = inside & np.isfinite(chi), inside & is_valid(chi)
    export = find_export(chi[finite & (chi != 0)])
    return {
        "noise_sd_ppm": estimate_noise(chi, finite),
        "streaking_index": streaking_index(chi, finite, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction),
        "rim_residual_ppm": rim_residual(chi, finite, voxel_size_mm=voxel_size_mm),
        "negative_fraction": float((chi[valid] < 0).mean()) if valid.any() else np.nan,
        "clipped_fraction": sum(export.clipped.values()),
        "picture_levels": float(export.n_levels),
    }


def estimate_noise(chi: NDArray[np.floating], inside: NDArray[np.bool_]) -> float:
    r"""Estimate the standard deviation of the noise in ppm.

    NaN if no cube of 3 voxels is inside.

    Notes
    -----
    The second difference :math:`[1, -2, 1]` along all three axes removes everything that is linear along any axis, as
    Immerkær's mask does in a plane [1]_. It turns white noise of variance :math:`\sigma^2` into
    :math:`6^3 \sigma^2`; :math:`\sigma` follows from the median of the absolute values, which is robust against the
    few voxels on edges and veins [2]_. Smoothed or interpolated maps have less of this fine noise than of total noise.

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


def streaking_index(
    chi: NDArray[np.floating],
    inside: NDArray[np.bool_],
    *,
    voxel_size_mm: tuple[float, float, float],
    b0_direction: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> float:
    r"""Compute the power near the magic-angle cone relative to that elsewhere.

    1 for a map without preferred directions, more if streaks add power near the cone, less if regularization removed
    power there. NaN if the image is too small or its voxels are 10 mm or larger.

    Notes
    -----
    The dipole kernel :math:`D(k) = 1/3 - (k \cdot b)^2 / k^2` is 0 on a cone at the magic angle; dividing by it
    amplifies noise and errors near the cone, which appear as streaks [1]_ [2]_. The power :math:`P = |F[\chi]|^2` of
    the map (minus its mean, faded in over 5 mm from the edge of the mask) is averaged where :math:`|D| < 0.1` and
    elsewhere, in shells of :math:`|k|` from 1/20 per mm to the smallest Nyquist frequency; the index is the
    exponential of the mean over shells of :math:`\log (\bar P_\text{cone} / \bar P_\text{rest})`, weighted by the
    samples on the cone.

    References
    ----------
    .. [1] Li W, et al. A method for estimating and removing streaking artifacts in quantitative susceptibility
       mapping. NeuroImage 108 (2015) 111-122. doi:10.1016/j.neuroimage.2014.12.043
    .. [2] Shmueli K, et al. Magnetic susceptibility mapping of brain tissue in vivo using MRI phase data. Magn Reson
       Med 62 (2009) 1510-1522. doi:10.1002/mrm.22135
    """
    boxes = ndimage.find_objects(inside.astype(np.uint8))
    if not boxes or 2 * max(voxel_size_mm) >= COARSEST_MM:
        return np.nan
    box = boxes[0]
    mean = chi[inside].mean(dtype=np.float64)
    # Fade in from 0 at a flat edge to 1 at TAPER_MM by the fraction inside of a box around each voxel, rescaled.
    reach = [2 * max(1, round(TAPER_MM / edge)) + 1 for edge in voxel_size_mm]
    fraction = ndimage.uniform_filter(inside[box].astype(np.float32), reach, mode="constant")
    faded = np.where(inside[box], chi[box] - mean, 0).astype(np.float32) * np.clip(2 * fraction - 1, 0, 1)
    power = np.abs(fft.rfftn(faded)) ** 2
    shell, cone = _shells(faded.shape, voxel_size_mm, b0_direction)
    # Each sample of rfftn represents 2 frequencies, but 1 in planes that are their own mirror image.
    multiplicity = np.full(power.shape, 2, np.float32)
    multiplicity[..., 0] = 1
    if faded.shape[2] % 2 == 0:
        multiplicity[..., -1] = 1
    on_cone, n_on_cone = _sum_shells(power, multiplicity, shell, cone)
    elsewhere, n_elsewhere = _sum_shells(power, multiplicity, shell, ~cone)
    usable = (on_cone > 0) & (elsewhere > 0)
    if not usable.any():
        return np.nan
    ratios = np.log(on_cone[usable] / n_on_cone[usable]) - np.log(elsewhere[usable] / n_elsewhere[usable])
    return float(np.exp(np.average(ratios, weights=n_on_cone[usable])))


def _sum_shells(
    power: NDArray[np.floating], multiplicity: NDArray[np.floating], shell: NDArray[np.int16], part: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum the power over a part of each shell, and count its samples, each weighted by its multiplicity."""
    chosen = part & (shell >= 0)
    numbers, weights = shell[chosen], multiplicity[chosen]
    sums = np.bincount(numbers, power[chosen] * weights, N_SHELLS).astype(np.float64)
    return sums, np.bincount(numbers, weights, N_SHELLS).astype(np.float64)


def _shells(
    shape: tuple[int, ...], voxel_size_mm: tuple[float, float, float], b0_direction: tuple[float, float, float]
) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Shell of each frequency, -1 for those not used, and whether it lies near the cone."""
    *across, last = zip(shape, voxel_size_mm, strict=True)
    axes = [*(fft.fftfreq(size, step) for size, step in across), fft.rfftfreq(*last)]
    kx, ky, kz = (axis.astype(np.float32) for axis in np.meshgrid(*axes, indexing="ij", sparse=True))
    bx, by, bz = (np.asarray(b0_direction) / np.linalg.norm(b0_direction)).astype(np.float32)
    squared = kx**2 + ky**2 + kz**2
    low, high = 1 / COARSEST_MM, 0.5 / max(voxel_size_mm)
    position = (np.sqrt(squared) - low) / (high - low) * N_SHELLS  # beyond the range of int16 with thick slices
    shell = np.where((position >= 0) & (position < N_SHELLS), position, -1).astype(np.int16)
    squared[0, 0, 0] = 1.0
    cone = np.abs(1 / 3 - (kx * bx + ky * by + kz * bz) ** 2 / squared) < CONE_WIDTH
    return shell, cone


def rim_residual(
    chi: NDArray[np.floating], inside: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]
) -> float:
    r"""Estimate the residual background field near the edge of the mask, in ppm.

    NaN if the whole image is inside, or nothing is. The edge of the image itself is not a rim.

    Notes
    -----
    The map is smoothed by a Gaussian of 3 mm (standard deviation) over the voxels inside. The result is
    :math:`1.4826 \operatorname{median}_\text{rim} |\tilde\chi - \operatorname{median}_\text{inside} \chi|` over the
    voxels around which less of the Gaussian is inside than 5 mm below a flat edge. Cortex and CSF differ from the
    median too: the phantom has 0.05 ppm without any background field.
    """
    if inside.all() or not inside.any():
        return np.nan
    sigma = [SMOOTH_MM / edge for edge in voxel_size_mm]
    sums, weights = masked_gaussian(chi, inside, sigma)
    rim = inside & (weights < special.ndtr(RIM_DEPTH_MM / SMOOTH_MM))  # weight inside at that depth of a flat edge
    median = np.median(chi[inside])
    return float(np.median(np.abs(sums[rim] / weights[rim] - median)) * SD_PER_MAD)


PARAMAGNETIC_PPM, DIAMAGNETIC_PPM = 0.3, -0.15
"""In five real maps, at most 20 mm³ of a nucleus are above, and 5 mm³ within 5 mm of one below."""

SMALLEST_MM3 = 50.0

THICKNESS_MM = 2.0
"""Some voxel is this far from the surface; those of veins near the nuclei are not."""

BESIDE_MM = 8.0


@dataclass(frozen=True)
class Blob:
    """A region."""

    mask: NDArray[np.bool_]
    """On the grid of the map."""
    nuclei: tuple[str, ...]
    """Abbreviations of the nuclei that it overlaps or, if there is none, of the closest one."""
    inside: bool
    """Whether it overlaps them."""
    volume_mm3: float
    peak_ppm: float
    """Highest value, or lowest if it is diamagnetic."""
    centre_mm: tuple[float, float, float]

    def describe(self) -> str:
        """Describe it in one line."""
        kind, cause = ("paramagnetic", "haemorrhage, vein") if self.peak_ppm > 0 else ("diamagnetic", "calcification")
        x, y, z = (round(value) for value in self.centre_mm)
        return (
            f"strongly {kind} region of {self.volume_mm3:.0f} mm3 (to {self.peak_ppm:.2f} ppm) "
            f"{'in' if self.inside else 'beside'} {', '.join(self.nuclei)} at x, y, z = {x}, {y}, {z} mm ({cause} or "
            "artefact); check it, and leave it out with `lesion_masks`"
        )


def find_blobs(
    chi: Volume, dseg: Volume, *, structures: Sequence[Structure], lesions: NDArray[np.bool_] | None = None
) -> list[Blob]:
    """Find strongly paramagnetic and diamagnetic regions in or beside nuclei.

    Regions are 26-connected voxels above 0.3 ppm or below -0.15 ppm, of 50 mm³ or more, with a voxel whose centre is
    2 mm or more from those outside, within 8 mm of a nucleus.

    Parameters
    ----------
    chi : Volume
        Map in ppm.
    dseg : Volume
        Labels on the same grid.
    structures : sequence of Structure
    lesions : ndarray of bool, optional
        Voxels that are not measured anyway.
    """
    names = {structure.index: structure.abbreviation for structure in structures}
    labelled = np.isin(dseg.array, list(names))
    boxes = ndimage.find_objects(labelled.astype(np.uint8))
    if not boxes:
        return []
    size_mm = chi.voxel_size_mm
    margins = [int(np.ceil(4 * BESIDE_MM / edge)) for edge in size_mm]  # so that the size of most is known
    pieces = zip(boxes[0], margins, chi.shape, strict=True)
    block = tuple(slice(max(piece.start - margin, 0), min(piece.stop + margin, n)) for piece, margin, n in pieces)
    values, labels = chi.array[block], dseg.array[block]
    usable = np.isfinite(values) if lesions is None else np.isfinite(values) & ~lesions[block]
    distance_mm, nearest = ndimage.distance_transform_edt(~labelled[block], sampling=size_mm, return_indices=True)
    voxel_mm3 = float(np.prod(size_mm))
    start = [piece.start for piece in block]
    blobs = []
    for strong in (usable & (values > PARAMAGNETIC_PPM), usable & (values < DIAMAGNETIC_PPM)):
        groups, n_groups = ndimage.label(strong, np.ones((3, 3, 3)))
        sizes = np.bincount(groups.ravel(), minlength=n_groups + 1)
        for number in np.flatnonzero(sizes * voxel_mm3 >= SMALLEST_MM3):
            region = groups == number
            if number == 0 or distance_mm[region].min() > BESIDE_MM + ROUNDING_MM:
                continue
            if _thickness_mm(region, size_mm) < THICKNESS_MM - ROUNDING_MM:
                continue
            overlapping = np.unique(labels[region & labelled[block]])
            closest = np.argwhere(region)[distance_mm[region].argmin()]
            place = tuple(axis[tuple(closest)] for axis in nearest)
            centre = (np.argwhere(region).mean(axis=0) + start) @ chi.affine[:3, :3].T + chi.affine[:3, 3]
            mask = np.zeros(chi.shape, bool)
            mask[block] = region
            peak = values[region].max() if values[region].min() > 0 else values[region].min()
            x, y, z = centre.tolist()
            nuclei = [names[int(index)] for index in overlapping] or [names[int(labels[place])]]
            blobs.append(
                Blob(
                    mask,
                    tuple(nuclei),
                    bool(len(overlapping)),
                    float(sizes[number] * voxel_mm3),
                    float(peak),
                    (x, y, z),
                )
            )
    return sorted(blobs, key=lambda blob: -blob.volume_mm3)


def _thickness_mm(region: NDArray[np.bool_], size_mm: tuple[float, float, float]) -> float:
    box = ndimage.find_objects(region.astype(np.uint8))[0]
    return float(ndimage.distance_transform_edt(np.pad(region[box], 1), sampling=size_mm).max())


def measure_blobs(blobs: Sequence[Blob], *, structures: Sequence[Structure]) -> pd.DataFrame:
    """Return ``abbreviation`` and the columns of `BLOB_COLUMNS` per structure, 0 if it has no such region."""
    rows = []
    for structure in structures:
        names = {member.abbreviation for member in structure.members or (structure,)}
        touching = [blob for blob in blobs if names & {*blob.nuclei}]
        volumes = (sum(blob.volume_mm3 for blob in touching if (blob.peak_ppm > 0) == sign) for sign in (True, False))
        rows.append((structure.abbreviation, *map(float, volumes)))
    return pd.DataFrame(rows, columns=["abbreviation", *BLOB_COLUMNS])
