"""Overlap of segmentations, and distances of their surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.io.files import read_data_dictionaries
from bids_dgmseg.models.structures import Structure

OVERLAP_COLUMNS = read_data_dictionaries("evaluation")["overlap"]
"""Column → description and units, in the order of the table of `overlap`."""


def overlap(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:
    r"""Compute overlap, volumes and distances of two segmentations on the same grid.

    Parameters
    ----------
    reference, prediction : ndarray of int, shape (X, Y, Z)
        Labels of `structures`; others are ignored.
    structures : sequence of Structure
        Nuclei to compare.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm; the axes are perpendicular.

    Returns
    -------
    DataFrame
        One row per nucleus, the columns of `OVERLAP_COLUMNS`. A nucleus in neither has counts and volumes of 0 and NaN
        otherwise; one in a single segmentation has a Dice, a Jaccard and a volume similarity of 0 and no distances.

    Raises
    ------
    ValueError
        If the shapes differ or an array does not hold integers.

    Notes
    -----
    With the voxels :math:`R` and :math:`P` of a nucleus, volumes :math:`V`, and centres of mass :math:`c` in mm:

    .. math::

       \text{dice} = \frac{2\,|R \cap P|}{|R| + |P|}, \quad
       \text{jaccard} = \frac{|R \cap P|}{|R \cup P|} = \frac{\text{dice}}{2 - \text{dice}}, \quad
       \text{volume similarity} = 1 - \frac{|V_P - V_R|}{V_P + V_R},

    volume difference :math:`V_P - V_R`, centre distance :math:`\lVert c_P - c_R \rVert` [1]_. Surface distances are
    those of `surface_distances`.

    References
    ----------
    .. [1] Taha AA, Hanbury A. Metrics for evaluating 3D medical image segmentation: analysis, selection, and tool.
       BMC Med Imaging 15 (2015) 29. doi:10.1186/s12880-015-0068-x
    """
    table = dice(reference, prediction, structures=structures)
    n_reference, n_prediction = (table[f"n_{name}"].to_numpy(float) for name in ("reference", "prediction"))
    voxel_mm3 = float(np.prod(voxel_size_mm))
    total, difference = n_reference + n_prediction, n_prediction - n_reference
    table["jaccard"] = table["dice"] / (2 - table["dice"])
    table["volume_similarity"] = 1 - _ratio(np.abs(difference), total)
    table["volume_reference_mm3"] = n_reference * voxel_mm3
    table["volume_prediction_mm3"] = n_prediction * voxel_mm3
    table["volume_difference_mm3"] = np.where(total > 0, difference * voxel_mm3, np.nan)
    table["volume_difference_percent"] = 100 * _ratio(difference, n_reference)
    top = max((structure.index for structure in structures), default=0)
    boxes = [ndimage.find_objects(labels.astype(np.int64), max_label=top) for labels in (reference, prediction)]
    distances = []
    for structure in structures:
        extents = [each[structure.index - 1] for each in boxes if each[structure.index - 1] is not None]
        axes = zip(*extents, strict=True) if extents else [(slice(0),)] * 3
        # The smallest box around the nucleus in either segmentation, empty if it is in neither.
        box = tuple(slice(min(s.start or 0 for s in axis), max(s.stop for s in axis)) for axis in axes)
        masks = reference[box] == structure.index, prediction[box] == structure.index
        centre = np.nan
        if masks[0].any() and masks[1].any():
            between = np.argwhere(masks[0]).mean(axis=0) - np.argwhere(masks[1]).mean(axis=0)
            centre = float(np.linalg.norm(between * np.asarray(voxel_size_mm)))
        distances.append((*astuple(surface_distances(*masks, voxel_size_mm=voxel_size_mm)), centre))
    names = "hausdorff_mm hd95_mm mean_surface_distance_mm mean_surface_distance_area_mm centre_distance_mm".split()
    table[names] = np.array(distances, float).reshape(len(structures), len(names))
    return table[list(OVERLAP_COLUMNS)]


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return ratio


def dice(
    reference: NDArray[np.integer], prediction: NDArray[np.integer], *, structures: Sequence[Structure]
) -> pd.DataFrame:
    r"""Compute the Dice coefficient of each nucleus of two segmentations on the same grid.

    Parameters
    ----------
    reference, prediction, structures
        As in `overlap`.

    Returns
    -------
    DataFrame
        One row per nucleus: ``index``, ``abbreviation``, ``n_reference``, ``n_prediction`` (voxels) and ``dice``, from
        0 to 1, NaN if the nucleus is in neither.

    Raises
    ------
    ValueError
        If the shapes differ or an array does not hold integers.

    Notes
    -----
    :math:`\text{dice} = 2\,|R \cap P| / (|R| + |P|)` [1]_.

    References
    ----------
    .. [1] Dice LR. Measures of the amount of ecologic association between species. Ecology 26 (1945) 297-302.
       doi:10.2307/1932409
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, expected {reference.shape}")
    for name, array in (("reference", reference), ("prediction", prediction)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} holds {array.dtype}, expected integers")
    numbers = [structure.index for structure in structures]
    n_reference = _count(reference, numbers)
    n_prediction = _count(prediction, numbers)
    n_both = _count(reference[reference == prediction], numbers)
    total = n_reference + n_prediction
    return pd.DataFrame(
        {
            "index": numbers,
            "abbreviation": [structure.abbreviation for structure in structures],
            "n_reference": n_reference,
            "n_prediction": n_prediction,
            "dice": np.divide(2 * n_both, total, out=np.full(len(numbers), np.nan), where=total > 0),
        }
    )


def _count(labels: NDArray[np.integer], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Count the voxels of each label in one pass."""
    top = max(numbers, default=0)
    inside = labels[(labels > 0) & (labels <= top)]
    return np.bincount(inside.ravel(), minlength=top + 1)[list(numbers)].astype(np.int64)


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces in mm; NaN if a mask is empty."""

    hausdorff_mm: float
    hd95_mm: float
    mean_mm: float
    mean_area_mm: float
    """Weighted by the area of the outer faces of each surface voxel."""


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]
) -> SurfaceDistances:
    r"""Compute the distances between the surfaces of two masks on the same grid.

    Parameters
    ----------
    reference, prediction : ndarray of bool, shape (X, Y, Z)
        The masks.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    SurfaceDistances
        NaN if a mask is empty.

    Raises
    ------
    ValueError
        If the shapes differ.

    Notes
    -----
    The surface :math:`S` of a mask consists of its voxels that share a face with a voxel outside it (or the image).
    :math:`d(a, B)` is the distance from the centre of voxel :math:`a` to the nearest centre in :math:`B`, and
    :math:`D_{RP} = \{d(a, S_P) : a \in S_R\}`. Then

    .. math::

       \text{Hausdorff} = \max(\max D_{RP}, \max D_{PR}), \quad
       \text{HD95} = \max(P_{95} D_{RP}, P_{95} D_{PR}), \quad
       \text{mean} = \frac{\sum D_{RP} + \sum D_{PR}}{|S_R| + |S_P|},

    with percentiles by linear interpolation [1]_ [2]_. Every surface voxel counts once, as in MONAI; other
    implementations pool both directions before HD95. With thick slices, flat ends count for more than their area:
    ``mean_area_mm`` weights each voxel by the area :math:`w` of its outer faces, :math:`\sum w d / \sum w` over both
    surfaces.

    References
    ----------
    .. [1] Huttenlocher DP, et al. Comparing images using the Hausdorff distance. IEEE Trans Pattern Anal Mach Intell
       15 (1993) 850-863. doi:10.1109/34.232073
    .. [2] Heimann T, et al. Comparison and evaluation of methods for liver segmentation from CT datasets. IEEE Trans
       Med Imaging 28 (2009) 1251-1265. doi:10.1109/TMI.2009.2013851
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, expected {reference.shape}")
    if not (reference.any() and prediction.any()):
        return SurfaceDistances(np.nan, np.nan, np.nan, np.nan)
    box = ndimage.find_objects((reference | prediction).astype(np.uint8))[0]
    masks = [np.pad(mask[box], 1) for mask in (reference, prediction)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    distances = [
        ndimage.distance_transform_edt(~target, sampling=voxel_size_mm)[start]
        for start, target in (surfaces, surfaces[::-1])
    ]
    both = np.concatenate(distances)
    areas = []  # of the outer faces of each voxel in mm²
    for mask, surface in zip(masks, surfaces, strict=True):
        area = np.zeros(mask.shape)
        for axis, edge in enumerate(voxel_size_mm):
            face_mm2 = np.prod(voxel_size_mm) / edge
            for step in (-1, 1):
                area += face_mm2 * (mask & ~np.roll(mask, step, axis))
        areas.append(area[surface])
    return SurfaceDistances(
        hausdorff_mm=float(both.max()),
        hd95_mm=float(max(np.percentile(each, 95.0) for each in distances)),
        mean_mm=float(both.mean()),
        mean_area_mm=float(np.average(both, weights=np.concatenate(areas))),
    )
