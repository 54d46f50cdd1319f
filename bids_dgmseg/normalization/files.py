"""Normalize the files of a scan: map, labels and probabilities in standard space, and the transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.config import parse_output_space
from bids_dgmseg.image.grids import Grid, box_of_mask, check_grid, world_grid
from bids_dgmseg.image.volume import Volume, read_block, read_labels
from bids_dgmseg.normalization.register import Channels, overlap, register
from bids_dgmseg.normalization.standard_space import standard_grid
from bids_dgmseg.normalization.transform import (
    FieldWarp,
    scan_indices,
    warp_fractions,
    warp_labels,
    warp_map,
    write_field,
)

_FIELD_MM = 2
"""Resolution of displacement fields."""

_STANDARD_CODE = 4  # NIFTI_XFORM_MNI_152

_PROBABILITY_STEP = 1 / 255

_MIN_DICE = 0.5

_MIN_JACOBIAN = 0.05


def normalize_files(
    chi: Path,
    dseg: Path,
    probseg: Path | None,
    regions: Mapping[str, Path],
    *,
    output_space: str,
    folder: Path,
    find_warp: Callable[[Channels, Grid], FieldWarp] | None = None,
    warps: str = "two diffeomorphic warps",
) -> dict[str, Any]:
    """Align a scan with MNI152NLin2009cAsym by its labels, and resample it.

    Parameters
    ----------
    chi : path
        Map in ppm, NaN or 0 where not measured.
    dseg, probseg : path
        Labels of structures.tsv on the grid of the map and, optionally, probabilities on it or a block of it.
    regions : mapping of str to path
        Masks ``brain`` and ``ventricles`` of the scan, as far as there are any.
    output_space : str
        See `bids_dgmseg.config.parse_output_space`.
    folder : path
        Where the results are written.
    find_warp : callable, optional
        See `bids_dgmseg.normalization.register.register`.
    warps : str
        What follows the affine transform, for the report.

    Returns
    -------
    dict
        ``out_chi``, ``out_dseg``, ``out_probseg``, ``out_xfm``, ``out_inverse_xfm``: files, ``out_files``: all
        of them by these names; ``report``, ``warnings``.

    Raises
    ------
    InputError
        If the space is unknown, a grid differs from that of the map, or too few nuclei are labelled.
    """
    space, resolution = parse_output_space(output_space)
    source, labels = Volume.read(chi), read_labels(dseg)
    masks = {name: read_labels(path) for name, path in regions.items()}
    for path, image in ((dseg, labels), *((regions[name], mask) for name, mask in masks.items())):
        check_grid(path, image, source)
    if ventricles := masks.get("ventricles"):
        masks["ventricles"] = ventricles.with_array(np.where(labels.array == 0, ventricles.array, 0))
    normalization = register(labels, masks, find_warp=find_warp)
    grid, coarse = standard_grid(resolution), standard_grid(_FIELD_MM)
    indices = scan_indices(normalization, grid, source.affine)
    files = {
        "out_chi": _write(warp_map(source.array, indices), grid, folder / "standard_chi.nii.gz"),
        "out_dseg": _write(warp_labels(labels.array, indices), grid, folder / "standard_dseg.nii.gz"),
        "out_xfm": write_field(normalization.field_mm(coarse), coarse, folder / "to_standard_xfm.nii.gz"),
    }
    if probseg is not None:
        fractions, block = read_block(probseg, source)
        whole = np.zeros((*grid.shape, len(fractions)), np.uint8, order="F")
        for channel, fraction in enumerate(fractions):
            padded = np.zeros(source.shape, np.float32)
            padded[block] = fraction
            whole[..., channel] = np.rint(warp_fractions(padded, indices) / _PROBABILITY_STEP).astype(np.uint8)
        path = folder / "standard_probseg.nii.gz"
        files["out_probseg"] = _write(whole, grid, path, scale=_PROBABILITY_STEP)
    own = world_grid(box_of_mask(source.with_array(np.ones(source.shape, bool))), (float(_FIELD_MM),) * 3)
    inverse = normalization.field_mm(own, inverse=True)
    files["out_inverse_xfm"] = write_field(inverse, own, folder / "from_standard_xfm.nii.gz")
    jacobian, dice = normalization.jacobian(normalization.warps[-1].grid), overlap(normalization, labels)
    low, high = float(jacobian.min()), float(jacobian.max())
    report = {
        "space": space,
        "resolution_mm": resolution or 1,
        "method": f"affine and {warps} driven by the labels of the nuclei, brain and ventricles",
        "jacobian_min": round(low, 3),
        "jacobian_max": round(high, 3),
        "dice": dice,
    }
    warnings = []
    typical = float(np.median(list(dice.values()))) if dice else 0.0
    if typical < _MIN_DICE or low < _MIN_JACOBIAN:
        warnings.append(
            f"the alignment with {space} is doubtful (median Dice of the nuclei {typical:.2f}, smallest Jacobian "
            f"determinant {low:.2f}); look at the images in standard space before they are used"
        )
    paths = {name: str(path) for name, path in files.items()}
    return {**paths, "out_files": paths, "report": report, "warnings": warnings}


def _write(array: NDArray[Any], grid: Grid, path: Path, *, scale: float | None = None) -> Path:
    image = nib.Nifti1Image(array, grid.affine)
    image.set_qform(grid.affine, _STANDARD_CODE)
    image.set_sform(grid.affine, _STANDARD_CODE)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    image.to_filename(path)
    return path
