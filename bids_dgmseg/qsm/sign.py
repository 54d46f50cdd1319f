"""Whether phase increases or decreases with the field: from the shape of the head, else from the map's extremes.

Arrays have shape (X, Y, Z); the sign is 1 if phase increases with the field and -1 if it decreases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch.nn import functional

from bids_dgmseg.image.masks import close_with_ball, faces_that_cut, large_components
from bids_dgmseg.qsm.field import apply_kernel, dipole_kernel, fast_size, zero_pad

MIN_HEAD_CORRELATION = 0.5
"""Absolute correlation from which the shape of the head decides; scans of brains without scalp reach 0.4 by chance."""

MIN_TAIL_RATIO = 1.3
"""Ratio of the map's extremes below which they are not evidence; five real maps have 1.6 to 2.1."""

_TISSUE_PPM, _AIR_PPM = -9.05, 0.36
"""Susceptibility of water and of air."""

_EDGE_MM = 4.0
"""Voxel size at which the field of the head is computed: it is smooth in the brain."""

_CLOSING_MM = 5.0
"""Fills the skull, which is dark but no air, and leaves the sinuses, whose field is large."""

_BEYOND_MM = 80.0
"""The head is continued beyond the field of view by this much, with its outline at the edge."""

_DEPTH_MM = 10.0
"""Near the border of the brain, sinuses, bone and errors of the mask outweigh the shape of the head."""

_ORDER = 2
"""Of the polynomial removed from both fields: the shim and the phase of the coils are of low order."""

_MIN_VOXELS = 100

_OTSU_FRACTION = 0.6
"""As in the search for the brain: tissue far from the coils is dark."""

_EPSILON_PPM = 1e-6

_DEEP = 0.4
"""Fraction of the largest depth below the mask's border from which the map is judged: residual fields are weaker."""

_BLUR_MM = 1.5
"""SD of the Gaussian applied to the map before its extremes are compared."""

_TAIL_PERCENT = 0.5
"""Of the voxels in either tail: nuclei and veins in the positive one, calcifications in the negative one."""


def correlate_with_head_field(
    field: NDArray[np.float32],
    mask: NDArray[np.bool_],
    magnitude: NDArray[np.float32],
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float],
) -> float:
    r"""Correlate a total field with the one that the shape of the head induces.

    Parameters
    ----------
    field : ndarray of shape (X, Y, Z)
        Measured total field in any unit, unwrapped.
    mask : ndarray of bool, shape (X, Y, Z)
        Brain, where the field is reliable.
    magnitude : ndarray of shape (X, Y, Z)
        Signal of the whole head in any unit.
    voxel_size_mm, b0_direction : sequence of 3 float
        Voxel size in mm, direction of B0 along the grid's axes.

    Returns
    -------
    float
        Pearson correlation: positive if phase increases with the field. NaN if too little of the mask is deep, or if
        the field of view contains too little of the head's outline.

    Notes
    -----
    The head H, without its large cavities, has a uniform susceptibility in air. With the dipole kernel D [1]_ its field
    is

    .. math:: f_H = (\chi_\mathrm{tissue} - \chi_\mathrm{air})\, D * 1_H, \qquad \chi_\mathrm{tissue} = -9.05,\;
       \chi_\mathrm{air} = 0.36\ \mathrm{ppm}.

    Both fields are averaged to voxels of about 4 mm and compared more than 10 mm inside the mask, after removing the
    polynomial of second order in x, y and z that fits each best: shims, coil phase and residual wraps are of low order.

    References
    ----------
    .. [1] Marques JP, Bowtell R. Concepts Magn Reson B 25 (2005) 65-78. doi:10.1002/cmr.b.20034
    """
    blocks = [
        min(size, max(1, int(_EDGE_MM / step + 1e-3))) for step, size in zip(voxel_size_mm, field.shape, strict=True)
    ]
    edges_mm = [step * size for step, size in zip(voxel_size_mm, blocks, strict=True)]
    share, sums, signal = (
        functional.avg_pool3d(torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None], blocks)[0, 0]
        for array in (mask, np.where(mask, field, 0), magnitude)
    )
    padded = np.pad(share.numpy() > 1 - 1e-3, 1)  # beyond the image is outside the brain
    depth_mm = ndimage.distance_transform_edt(padded, sampling=edges_mm)[1:-1, 1:-1, 1:-1]
    deep = depth_mm > _DEPTH_MM
    head = find_head(signal.numpy(), voxel_size_mm=edges_mm)
    is_inner_part = faces_that_cut(head).all(axis=1).sum() > 1  # slabs are cut at both faces of one axis only
    if deep.sum() < _MIN_VOXELS or not head.any() or is_inner_part:
        return math.nan
    margins = [math.ceil(_BEYOND_MM / edge) for edge in edges_mm]
    beyond = torch.from_numpy(np.pad(head, [(width, width) for width in margins], mode="edge")).float()
    shape = [fast_size(size) for size in beyond.shape]
    induced = apply_kernel(
        zero_pad((_TISSUE_PPM - _AIR_PPM) * beyond, shape), dipole_kernel(shape, edges_mm, b0_direction)
    )[tuple(slice(width, width + size) for width, size in zip(margins, head.shape, strict=True))]
    x, y, z = (2 * index / size - 1 for index, size in zip(np.nonzero(deep), deep.shape, strict=True))
    orders = range(_ORDER + 1)
    terms = [x**i * y**j * z**k for i in orders for j in orders for k in orders if i + j + k <= _ORDER]
    both = np.stack([(sums / share.clamp(min=1e-3)).numpy()[deep], induced.numpy()[deep]], axis=1, dtype=np.float64)
    basis, _ = np.linalg.qr(np.stack(terms, axis=1))
    measured, expected = (both - basis @ (basis.T @ both)).T
    power = float(np.linalg.norm(measured) * np.linalg.norm(expected))
    return float(measured @ expected) / power if power > 0 else math.nan


def find_head(magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Find the head in a magnitude (X, Y, Z): tissue, and gaps of less than 10 mm between tissues such as bone.

    Tissue is what exceeds 0.6 times Otsu's threshold; larger cavities are air.
    """
    signal = magnitude[magnitude > 0]
    if not signal.size or np.ptp(signal) <= 1e-3 * signal.max():
        return large_components(magnitude > 0)
    threshold = _OTSU_FRACTION * float(threshold_otsu(np.minimum(signal, np.percentile(signal, 99))))
    return large_components(close_with_ball(magnitude > threshold, _CLOSING_MM, voxel_size_mm))


def compare_tails(
    chi_ppm: NDArray[np.float32], depth_mm: NDArray[np.float64], *, voxel_size_mm: Sequence[float]
) -> float:
    """Divide the distances of the highest and of the lowest values of the deep brain from its median.

    Nuclei and veins make it larger than 1 in a map of the right sign. `depth_mm` (X, Y, Z) is the distance from the
    outside of the mask.
    """
    smooth = ndimage.gaussian_filter(chi_ppm, [_BLUR_MM / step for step in voxel_size_mm])
    deep = smooth[depth_mm > _DEEP * depth_mm.max()]
    low, median, high = np.percentile(deep, (_TAIL_PERCENT, 50, 100 - _TAIL_PERCENT))
    return float(max(high - median, _EPSILON_PPM) / max(median - low, _EPSILON_PPM))


def decide_sign(head_correlation: float, tail_ratio: float) -> tuple[int, str]:
    """Return the sign of the phase and what it was judged from: the shape of the head, unless only the map is clear.

    `head_correlation` and `tail_ratio` are those of a map and field computed as if phase increased with the field.
    """
    clear_map = not 1 / MIN_TAIL_RATIO < tail_ratio < MIN_TAIL_RATIO
    recognized = abs(head_correlation) >= MIN_HEAD_CORRELATION  # false for NaN
    if recognized or not (clear_map or math.isnan(head_correlation)):
        return (1 if head_correlation > 0 else -1), "the shape of the head"
    return (1 if tail_ratio >= 1 else -1), "the map's extreme values"


def describe_doubt(head_correlation: float, tail_ratio: float, *, is_stated: bool) -> str:
    """Describe why a sign of the phase may be wrong; empty if the evidence supports it.

    `head_correlation` and `tail_ratio` are those with this sign. Where the shape of the head does not decide, the map's
    extremes suffice if they are clear and the correlation does not contradict them.
    """
    correlation = f"(correlation {head_correlation:.2f})"
    if is_stated:
        opposite = head_correlation <= -MIN_HEAD_CORRELATION
        return f"`phase_sign` disagrees with the field induced by the head {correlation}" if opposite else ""
    if head_correlation >= MIN_HEAD_CORRELATION:
        if tail_ratio > 1 / MIN_TAIL_RATIO:
            return ""
        return (
            f"the phase sign was set from the field induced by the head {correlation}, but the map's extreme values "
            "say the opposite"
        )
    if tail_ratio >= MIN_TAIL_RATIO and head_correlation >= 0:
        return ""
    why = f"the field induced by the head could not be identified {correlation}"
    if math.isnan(head_correlation):
        why = "the magnitude does not show the shape of the head"
    if tail_ratio >= MIN_TAIL_RATIO:
        return f"the phase sign is judged from the map's extreme values alone: {why}"
    return f"the phase sign is uncertain: {why}, and the map's positive and negative extremes are similar"
