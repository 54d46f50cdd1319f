"""Echoes made from the measured local field of a real head, and scores of maps reconstructed from them.

The folder is that of the QSM reconstruction challenge of 2016 [1]_ as NIfTI files in ppm: ``local_field_ppm``,
``magnitude``, ``brain_mask``, the maps ``cosmos_ppm`` (of several orientations) and ``sti33_ppm`` (the component of the
susceptibility tensor along B0), and ``roi_dseg`` with six nuclei (1 to 6) and white matter (above 6).

References
----------
.. [1] Langkammer C, et al. Quantitative susceptibility mapping: report from the 2016 reconstruction challenge. Magn
   Reson Med 79 (2018) 1661-1673. doi:10.1002/mrm.26830
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.acquisition import Echoes
from bids_dgmseg.lab.simulate.artefacts import truncated_division
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.qsm.field import (
    GYROMAGNETIC_MHZ_PER_T,
    apply_kernel,
    conjugate_gradients,
    dipole_field,
    dipole_kernel,
    iterate_conjugate_gradients,
    zero_pad,
)
from bids_dgmseg.qsm.inversion import (
    find_flat,
    forward_differences,
    least_squares,
    negative_divergence,
    padded_shape,
    total_variation,
)
from bids_dgmseg.segmentation.segment import segment_map

TIMES_S, B0_TESLA, R2STAR_HZ = (0.006, 0.012, 0.018, 0.024), 3.0, 20.0

_NUCLEI = range(1, 7)

_SOURCE_SIGMA_VOXELS, _GAP_VOXELS = 6.0, 3
"""Smoothness of the sources of the background, and their least distance from the brain."""

_CONE = 0.1
"""Size of the kernel below which its inverse is ill-conditioned."""


@dataclass(frozen=True)
class RealHead:
    """A head with a measured field; images are on one grid, in RAS+ orientation."""

    field: Volume
    magnitude: NDArray[np.float32]
    brain: NDArray[np.bool_]
    maps: dict[str, NDArray[np.float32]]
    """Reference → susceptibility in ppm."""
    regions: NDArray[np.intp]


def read_head(folder: Path) -> RealHead:
    """Read the images of the folder; `InputError` if one is missing."""
    names = ("local_field_ppm", "magnitude", "brain_mask", "cosmos_ppm", "sti33_ppm", "roi_dseg")
    paths = [folder / f"{name}.nii.gz" for name in names]
    if missing := [path.name for path in paths if not path.exists()]:
        raise InputError(f"{folder}: {', '.join(missing)} not found; pass the folder of the real head")
    field, magnitude, brain, cosmos, sti33, regions = (Volume.read(path) for path in paths)
    maps = {"COSMOS": cosmos.array, "chi33": sti33.array}
    return RealHead(field, magnitude.array, brain.array > 0, maps, np.rint(regions.array).astype(np.intp))


def draw_real_echoes(head: RealHead, *, snr: float, background_ppm: float, seed: int) -> Echoes:
    """Make echoes of the measured field, with noise and, optionally, a background of given SD in the brain."""
    random = np.random.default_rng(seed)
    field, size_mm = head.field.array.astype(np.float64), head.field.voxel_size_mm
    if background_ppm:
        sources = ndimage.gaussian_filter(random.normal(size=field.shape), _SOURCE_SIGMA_VOXELS)
        sources *= ~ndimage.binary_dilation(head.brain, iterations=_GAP_VOXELS)
        outside = dipole_field(torch.from_numpy(sources), voxel_size_mm=size_mm, padding=2.0).numpy()
        field = field + outside * (background_ppm / outside[head.brain].std())
    signal = head.magnitude / np.median(head.magnitude[head.brain])
    phase, magnitude = torch.empty((2, len(TIMES_S), *field.shape))
    for echo, time_s in enumerate(TIMES_S):
        turns = GYROMAGNETIC_MHZ_PER_T * B0_TESLA * time_s * field
        noise = random.normal(scale=1 / snr, size=(2, *field.shape))
        echoes = signal * math.exp(-time_s * R2STAR_HZ) * np.exp(2j * np.pi * turns) + noise[0] + 1j * noise[1]
        phase[echo], magnitude[echo] = torch.from_numpy(np.angle(echoes)), torch.from_numpy(np.abs(echoes))
    truth = torch.from_numpy(np.where(head.brain, head.maps["COSMOS"], np.float32(0)))
    return Echoes(phase, magnitude, TIMES_S, B0_TESLA, truth)


def score_real_map(chi_ppm: NDArray[np.float32], mask: NDArray[np.bool_], head: RealHead) -> dict[str, float]:
    """Compare a map with both references: r and NRMSE in the mask, error and slope of contrasts with white matter."""
    inside = mask & head.brain

    def contrasts(chi: NDArray[np.float32]) -> NDArray[np.float64]:
        white = chi[head.regions > max(_NUCLEI)].mean()
        return np.array([chi[head.regions == label].mean() - white for label in _NUCLEI])

    scores: dict[str, float] = {}
    for name, reference in head.maps.items():
        centred, other = (chi[inside] - chi[inside].mean() for chi in (chi_ppm, reference))
        contrast, true = contrasts(chi_ppm), contrasts(reference)
        scores |= {
            f"{name}: r": float(np.corrcoef(centred, other)[0, 1]),
            f"{name}: NRMSE, %": float(100 * np.linalg.norm(centred - other) / np.linalg.norm(other)),
            f"{name}: slope": float(np.polyfit(true, contrast, 1)[0]),
            f"{name}: error, ppb": float(1000 * np.abs(contrast - true).mean()),
        }
    return {**scores, "brain kept": float(inside.sum() / head.brain.sum())}


def invert_measured_field(head: RealHead) -> dict[str, NDArray[np.float32]]:
    """Invert the field, which is that of one orientation, by methods of others; name → susceptibility in ppm.

    MEDI has a linear misfit and does not penalize the gradient at the edges of the magnitude [1]_.

    References
    ----------
    .. [1] Liu J, et al. NeuroImage 59 (2012) 2560-2568. doi:10.1016/j.neuroimage.2011.08.082
    """
    size_mm = head.field.voxel_size_mm
    shape = padded_shape(head.brain.shape, size_mm)
    images = (head.field.array * head.brain, head.magnitude * head.brain, head.brain)
    field, magnitude, brain = (zero_pad(torch.from_numpy(image.astype(np.float32)), shape) for image in images)
    kernel = dipole_kernel(shape, size_mm, (0, 0, 1))
    weight = (magnitude / magnitude[brain > 0].quantile(0.95)).clamp(max=1)
    options: dict[str, Any] = {"voxel_size_mm": size_mm}
    flat = find_flat(magnitude, brain > 0, **options).to(field.dtype)
    maps = {
        "TKD": truncated_division(field, kernel, threshold=0.15),
        "least squares": least_squares(field, kernel, strength=0.01, ridge=0.005, **options),
        "MEDI": total_variation(field, kernel, strength=3e-4, iterations=30, edges=flat, weight=weight, **options),
        "iLSQR": ilsqr(field, kernel, weight=weight, **options),
    }
    inner = tuple(slice(size) for size in head.brain.shape)
    return {name: (chi * brain)[inner].numpy() for name, chi in maps.items()}


def ilsqr(field: Tensor, kernel: Tensor, *, voxel_size_mm: Sequence[float], weight: Tensor) -> Tensor:
    r"""Least squares from which streaks are subtracted, after iLSQR.

    Streaks :math:`\chi_s` contain only frequencies near the cone where the kernel is 0, |D| < 0.1, and explain the
    gradients of the weighted least-squares map :math:`\chi_0` where tissue has none (G = 0 at edges):

    .. math:: \chi = \chi_0 - \chi_s, \qquad \chi_s = \arg\min |G\nabla(\chi_0 - \chi_s)|^2.

    The edges are those of a smooth map: G falls from 1 at the 60th to 0 at the 99.9th percentile of its gradient.

    References
    ----------
    Li W, et al. A method for estimating and removing streaking artifacts in quantitative susceptibility mapping.
    NeuroImage 108 (2015) 111-122. doi:10.1016/j.neuroimage.2014.12.043
    """
    first = conjugate_gradients(field, kernel, weight=weight, strength=1e-3, iterations=20)
    smooth = least_squares(field, kernel, strength=0.01, voxel_size_mm=voxel_size_mm, ridge=0.01)
    cone = (kernel.abs() < _CONE).to(field.dtype)
    sizes = forward_differences(smooth, voxel_size_mm).abs()
    low, high = np.percentile(sizes.numpy()[:, (weight > 0).numpy()], (60, 99.9))
    flat = ((high - sizes) / max(high - low, 1e-12)).clamp(0, 1) ** 2

    def project(chi: Tensor) -> Tensor:
        """Return the gradient of the cost, limited to the cone."""
        return apply_kernel(negative_divergence(flat * forward_differences(chi, voxel_size_mm), voxel_size_mm), cone)

    return first - iterate_conjugate_gradients(project, torch.zeros_like(field), project(first), iterations=30)


def compare_volumes(head: RealHead, maps: dict[str, NDArray[np.float32]]) -> pd.DataFrame:
    """Measure both sides of each nucleus in mm³ in labels of several maps of the head; one row per nucleus."""
    model, rows = get_model("default"), []
    for name, chi in maps.items():
        labels = segment_map(head.field.with_array(chi), model).labels
        for structure in model.structures:
            rows.append((structure.nucleus, name, 1000 * head.field.volume_ml(labels == structure.index)))
    volumes = pd.DataFrame(rows, columns=["nucleus", "map", "mm3"])
    table = volumes.pivot_table("mm3", index="nucleus", columns="map", aggfunc="sum", sort=False)
    table.loc["SN+STN"] = table.loc["SN"] + table.loc["STN"]
    return table.assign(**{"CV, %": 100 * table.std(axis=1) / table.mean(axis=1)})
