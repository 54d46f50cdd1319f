"""Change of the volume of nuclei between sessions, from the differences of their aligned maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.masks import share_covered
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import SESSION_COLUMNS, find_regions
from bids_dgmseg.models.structures import Structure, with_wholes

SMOOTHING_MM = 0.7
"""Standard deviation of the Gaussian that smooths the maps: noise of their gradients would weaken a change."""

REACH_MM = 2.3
"""Voxels outside of a nucleus are compared if their centre is this close to that of a voxel inside."""

_EDGE_MM = 2.5
"""Half of the width of blurred edges: voxels that are closer to the surface move with it."""

MIN_VOLUME_MM3 = 20.0
"""Of a nucleus whose change is measured: there are 14 unknowns."""

MIN_COVERED = 0.8
"""Of the voxels that are compared, so many must have a value in all sessions."""

_MARGIN_MM = REACH_MM + 5 * SMOOTHING_MM

_INSIDE = 0.9
"""Of a voxel, so much must be covered by a map."""


def measure_volume_change(
    maps: Sequence[NDArray[np.floating]],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:
    r"""Measure how the volume of each nucleus differs between sessions.

    The change is found from the maps by registration, not as the difference of two segmentations, which comes out too
    small, as a network has learned how large nuclei are.

    Parameters
    ----------
    maps : sequence of K ndarray of shape (X, Y, Z)
        Susceptibility in ppm of two or more sessions, aligned rigidly on one grid; NaN where there is no value.
    dseg : ndarray of int, shape (X, Y, Z)
        Labels of the nuclei on the same grid, indices of ``structures.tsv``, best of the mean of the maps.
    structures : sequence of Structure
    voxel_size_mm : tuple of 3 float

    Returns
    -------
    DataFrame
        One row per structure, indexed by abbreviation, and one column per map (0 to K - 1): the volume relative to the
        mean of all sessions in percent, so that each row sums to 0. NaN for a nucleus below 20 mm³, or if more than 20
        % of the voxels that are compared lack a value.

    Notes
    -----
    Let :math:`I_k` be the maps, smoothed by a Gaussian of 0.7 mm, and :math:`\bar I` their mean. If the nucleus of
    session k differs from the mean by a small affine displacement :math:`u_k(x) = A_k (x - c) + t_k`, then

    .. math:: I_k(x) - \bar I(x) = -\nabla \bar I(x) \cdot u_k(x) + a_k + b_k M(x) + \text{noise}

    to second order, because the gradient is that of the mean [1]_. For x within 2.5 mm of the surface of the nucleus,
    :math:`u_k` is that of the nearest point of the surface: the edge keeps its width. The 14 unknowns per session are
    found by least squares over the nucleus and all voxels up to 2.3 mm from it. :math:`a_k` is a shift of the zero of
    the map, and :math:`b_k` (with the equally smoothed mask M) a change of the susceptibility of the nucleus, neither
    of which is a change of volume. Residual motion is :math:`t_k` and the antisymmetric part of :math:`A_k`. The
    relative change of volume is the divergence of the displacement, :math:`\operatorname{tr} A_k`. As all sessions
    have the same equations, their changes sum to 0 and none is favoured.

    The boundary shift integral [2]_ integrates the differences themselves; in susceptibility maps, whose contrast
    differs around a nucleus and whose zero fluctuates, it was less accurate (docs/how-to/longitudinal.md).

    References
    ----------
    .. [1] Reuter M, Rosas HD, Fischl B. Highly accurate inverse consistent registration: a robust approach. NeuroImage
       53 (2010) 1181-1196. doi:10.1016/j.neuroimage.2010.07.020
    .. [2] Freeborough PA, Fox NC. The boundary shift integral: an accurate and robust measure of cerebral volume
       changes from registered repeat MRI. IEEE Trans Med Imaging 16 (1997) 623-629. doi:10.1109/42.640753
    """
    images = np.stack(maps).astype(np.float64)
    valid = np.isfinite(images.sum(axis=0))
    margin = np.ceil(_MARGIN_MM / np.array(voxel_size_mm)).astype(int)
    changes = {}
    for structure, (box, region) in zip(structures, find_regions(dseg, structures), strict=True):
        change = np.full(len(images), np.nan)
        if np.count_nonzero(region) * np.prod(voxel_size_mm) >= MIN_VOLUME_MM3:
            x, y, z = (
                slice(max(part.start - more, 0), part.stop + more) for part, more in zip(box, margin, strict=True)
            )
            mask = np.isin(dseg[x, y, z], structure.labels)
            change = 100 * _divergence(images[:, x, y, z], mask, valid[x, y, z], voxel_size_mm)
        changes[structure.abbreviation] = change
    return pd.DataFrame.from_dict(changes, orient="index", columns=range(len(images)), dtype=np.float64)


def _divergence(
    images: NDArray[np.float64],
    mask: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """Return the divergence of the displacement of each image (K, x, y, z) from their mean."""
    compared = ndimage.distance_transform_edt(~mask, sampling=voxel_size_mm) <= REACH_MM
    sigma = SMOOTHING_MM / np.array(voxel_size_mm)
    if not valid.all():
        images = np.where(valid, images, images[:, valid].mean() if valid.any() else 0)
        near = np.pad(valid, 1, mode="edge")  # the images go on
        to_invalid_mm = np.asarray(ndimage.distance_transform_edt(near, sampling=voxel_size_mm))
        usable = to_invalid_mm[1:-1, 1:-1, 1:-1] > 2 * SMOOTHING_MM
        if np.count_nonzero(compared & usable) < MIN_COVERED * np.count_nonzero(compared):
            return np.full(len(images), np.nan)
        compared &= usable
    smooth = np.stack([ndimage.gaussian_filter(image, sigma) for image in images])
    mean = smooth.mean(axis=0)
    gradient = np.stack([part[compared] for part in _slopes(mean, voxel_size_mm)], axis=1)
    # the edge of the nucleus in the maps is that of the mask, blurred by voxels and by the smoothing
    edge = ndimage.gaussian_filter(mask.astype(np.float64), np.sqrt(2) * sigma)[compared]
    x = _to_surface(mask, voxel_size_mm)[compared] - np.argwhere(mask).mean(axis=0) * voxel_size_mm
    affine = -(gradient[:, :, None] * x[:, None, :]).reshape(len(x), 9)
    design = np.column_stack([affine, -gradient, np.ones(len(x)), edge])
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1
    unknowns = np.linalg.lstsq(design / scale, (smooth - mean)[:, compared].T)[0] / scale[:, None]
    divergence: NDArray[np.float64] = unknowns[[0, 4, 8]].sum(axis=0)
    return divergence


def _slopes(image: NDArray[np.float64], voxel_size_mm: tuple[float, float, float]) -> Iterator[NDArray[np.float64]]:
    """Yield the slope along each axis, per mm: that of the cubic spline, as differences of neighbours blunt edges."""
    coefficients = ndimage.spline_filter(image, order=3, output=np.float64, mode="mirror")
    for axis, size_mm in enumerate(voxel_size_mm):
        slope = ndimage.correlate1d(coefficients, [-0.5 / size_mm, 0, 0.5 / size_mm], axis=axis, mode="mirror")
        for other in {0, 1, 2} - {axis}:
            slope = ndimage.correlate1d(slope, [1 / 6, 4 / 6, 1 / 6], axis=other, mode="mirror")
        yield slope


def _to_surface(mask: NDArray[np.bool_], voxel_size_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return the positions (x, y, z, 3) of voxels in mm; those near the surface of a mask are moved to it.

    The blurred edge of a nucleus keeps its width when the nucleus shrinks: it moves as its surface does.
    """
    size_mm = np.array(voxel_size_mm)
    position: NDArray[np.float64] = np.moveaxis(np.indices(mask.shape), 0, -1) * size_mm
    across = np.empty_like(position)
    for side in (mask, ~mask):
        nearest = ndimage.distance_transform_edt(
            side, sampling=voxel_size_mm, return_distances=False, return_indices=True
        )
        across[side] = np.moveaxis(nearest, 0, -1)[side] * size_mm
    step = across - position
    length = np.linalg.norm(step, axis=-1, keepdims=True)
    position += np.where(length <= _EDGE_MM, step * (1 - size_mm.min() / 2 / length), 0)
    return position


def measure_session_volumes(
    maps: Sequence[Volume], dseg: Volume, probseg: NDArray[np.floating], structures: Sequence[Structure]
) -> list[dict[str, dict[str, float]]]:
    """Measure the volume of each nucleus in each session, as the mean volume and the change from it.

    Parameters
    ----------
    maps : sequence of Volume
        Maps in ppm with their affines in the space of `dseg`, on any grids; 0 where there is no value.
    dseg : Volume
        Labels of the mean of the maps.
    probseg : ndarray of shape (C, X, Y, Z)
        Probabilities of the mean of the maps on the grid of `dseg`, in the order of `structures`.
    structures : sequence of C Structure

    Returns
    -------
    list of dict
        Per map, abbreviation of each nucleus whose change can be measured → ``mean_mm3``, the summed probability of the
        mean of the maps, and ``change_percent``, see `measure_volume_change`. Nuclei that are labelled in parts follow.
    """
    grid = Grid(dseg.shape, dseg.affine)
    images = []
    for chi in maps:
        is_covered = share_covered(chi, grid) > _INSIDE
        images.append(np.where(is_covered, resample(chi, grid, antialias=True).array, np.float32(np.nan)))
    size_mm, nuclei = dseg.voxel_size_mm, with_wholes(structures)
    changes = measure_volume_change(images, dseg.array, structures=nuclei, voxel_size_mm=size_mm).dropna()
    sums = probseg.sum(axis=(1, 2, 3), dtype=np.float64) * np.prod(size_mm)
    volume_of = {structure.index: float(volume) for structure, volume in zip(structures, sums, strict=True)}
    means = {nucleus.abbreviation: sum(volume_of[label] for label in nucleus.labels) for nucleus in nuclei}
    return [
        {
            str(name): {"mean_mm3": means[str(name)], "change_percent": float(change)}
            for name, change in changes[number].items()
        }
        for number in range(len(maps))
    ]


def add_session_columns(
    stats: pd.DataFrame, volumes: Mapping[str, Mapping[str, float]] | None, structures: Sequence[Structure]
) -> pd.DataFrame:
    """Add the columns of `SESSION_COLUMNS` to a table of `measure_nuclei`, if the volumes in the session are known.

    They are NaN for nuclei that were edited by hand or of which voxels are lesions (``edited``,
    ``excluded_fraction``), because the volumes are those of other outlines. Structures that have no volumes of their
    own, such as both sides of a nucleus, have the sum of those that they join, NaN if one is unknown.
    """
    if volumes is None:
        return stats
    rows = []
    for structure in structures:
        name = structure.abbreviation
        members = [name] if name in volumes else [member.abbreviation for member in structure.members]
        entries = [volumes.get(member, {"mean_mm3": np.nan, "change_percent": np.nan}) for member in members]
        mean = sum(entry["mean_mm3"] for entry in entries)
        volume = sum(entry["mean_mm3"] * (1 + entry["change_percent"] / 100) for entry in entries)
        change = entries[0]["change_percent"] if len(entries) == 1 else 100 * (volume / mean - 1) if entries else np.nan
        rows.append((change, volume if entries else np.nan))
    changed = (stats.reindex(columns=["edited", "excluded_fraction"]) > 0).any(axis=1)
    columns = pd.DataFrame(rows, stats.index, list(SESSION_COLUMNS), dtype=np.float64)
    return stats.join(columns.mask(changed))
