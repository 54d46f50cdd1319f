"""Figures of the voxelwise tests: slices with the t statistic and the significant voxels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.report.figures import DPI, WIDTH_IN
from bids_dgmseg.report.group_data import GroupData
from bids_dgmseg.report.group_figures import PageFigure
from bids_dgmseg.report.html import save_plot, slug

_N_CUTS = 7

_SIGNIFICANT = -np.log10(0.05)


def voxelwise_figures(data: GroupData, output_dir: Path) -> Iterator[PageFigure]:
    """Draw axial slices of each test, as ``group_voxelwise.json`` lists them."""
    table = data.tables.get("group_voxelwise")
    contrasts = table.dictionary.get("Contrasts") if table else None
    for contrast in contrasts if isinstance(contrasts, list) else ():
        paths = {part.partition("_stat-")[2].partition("_")[0]: output_dir / part for part in contrast["Maps"]}
        if not all(paths.get(stat, Path()).is_file() for stat in ("t", "logp")):
            continue
        name, model = str(contrast["Contrast"]), str(contrast.get("model", ""))
        ending = f", {model}" if len(data.models) > 1 else ""
        images = {stat: load_image(paths[stat]) for stat in ("t", "logp")}
        n = int((np.asarray(images["logp"].dataobj) >= _SIGNIFICANT).sum())
        found = f"{n} voxels have p < 0.05, corrected (outlined)" if n else "no voxel has p < 0.05, corrected"
        correction = {"tfce": "threshold-free cluster enhancement", "cluster": "mass of clusters"}
        yield PageFigure(
            save_plot(_draw(images), output_dir, slug(f"group_voxelwise_{name}{ending}")),
            title=f"Voxelwise: {name}{ending}",
            alt=f"Axial slices in MNI space with the t statistic of {name} within the nuclei; {found}.",
            caption=f"t statistic of {contrast.get('Participants')} participants, over the MNI template; {found}: "
            f"{correction.get(str(contrast.get('Correction')), '')}, {contrast.get('Permutations')} permutations, "
            "family-wise error over all nuclei. The patient's left is on the left.",
        )


def _draw(images: Mapping[str, Any]) -> bytes:
    """Draw the slices that have most of the nuclei and of the largest t statistics, as PNG."""
    from nilearn.datasets import load_mni152_template  # slow to import
    from nilearn.plotting import plot_stat_map

    t, logp = (np.nan_to_num(np.asarray(images[stat].dataobj, np.float64)) for stat in ("t", "logp"))
    levels = np.flatnonzero(np.abs(t).max(axis=(0, 1)) > 0)
    cuts = np.linspace(levels[0], levels[-1], _N_CUTS + 2)[1:-1] if len(levels) else np.zeros(1)
    if (logp >= _SIGNIFICANT).any():  # the middle of what was found
        weight = (logp >= _SIGNIFICANT).sum(axis=(0, 1))
        cuts = np.unique([*cuts[1:], float(np.argmax(weight))])
    heights = [float(nib.affines.apply_affine(images["t"].affine, (0, 0, cut))[2]) for cut in cuts]
    figure = Figure(figsize=(WIDTH_IN, 2.4), dpi=DPI)
    display = plot_stat_map(
        nib.Nifti1Image(t.astype(np.float32), images["t"].affine),
        bg_img=load_mni152_template(resolution=2),
        display_mode="z",
        cut_coords=heights,
        figure=figure,
        threshold=1e-6,
        symmetric_cbar=True,
        radiological=False,
        black_bg=False,
    )
    if (logp >= _SIGNIFICANT).any():
        outline = nib.Nifti1Image(logp.astype(np.float32), images["logp"].affine)
        display.add_contours(outline, levels=[_SIGNIFICANT], colors="black", linewidths=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
