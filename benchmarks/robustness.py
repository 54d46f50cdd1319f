"""Robustness of a model: labels of maps beside those of the same maps after a change of grid, field of view or values.

    python benchmarks/robustness.py MAP [MAP ...] [--model MODEL] [--weights FOLDER] [--out FILE.tsv]

Labels of a changed map are resampled to the grid of the unchanged one, with whose labels they are compared. Rows
"voxels alone" have the unchanged labels after both resamplings: what large voxels cost thin nuclei without any change
of a label. To compare models, run it with each of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import from_matvec
from numpy.typing import NDArray
from reporting import dice_by_nucleus, markdown
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import run_command
from bids_dgmseg.image.grids import Box, Grid, OrientedBox, block_affine, box_of_mask, resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

GRIDS = {
    "1 × 1 × 1 mm": (1.0, 1.0, 1.0),
    "0.6 × 0.6 × 0.6 mm": (0.6, 0.6, 0.6),
    "1 × 1 × 2 mm": (1.0, 1.0, 2.0),
    "2 × 2 × 2 mm": (2.0, 2.0, 2.0),
}
ROTATIONS_DEG = {
    "pitch 20°": (20.0, 0.0, 0.0),
    "pitch −20°": (-20.0, 0.0, 0.0),
    "roll 15°": (0.0, 15.0, 0.0),
    "yaw 15°": (0.0, 0.0, 15.0),
    "all three by 20°": (20.0, -20.0, 20.0),
}
"""Rotation of the grid about x, y and z, with voxels of 1 mm."""
GAINS, SHIFTS_PPM, NOISE_PPM, BLUR_MM = (0.7, 1.3), (-0.02, 0.02), (0.01, 0.03), 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Segment the changed maps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", metavar="MAP", type=Path, nargs="+", help="chi map in ppm")
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--out", type=Path, help="write all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("robustness", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model, tables = get_model(args.model), []
    for path in args.maps:
        chi = Volume.read(path, np.float32)
        labels = segment_map(chi, model, weights=args.weights).labels
        for name, changed in changes(chi, labels):
            compared = {name: changed.with_array(segment_map(changed, model, weights=args.weights).labels)}
            if name in GRIDS:
                compared[f"{name}, voxels alone"] = move_labels(chi.with_array(labels), changed)
            for row, result in compared.items():
                table = dice(labels, move_labels(result, chi).array, structures=model.structures)
                tables.append(table.assign(scan=path.name, change=row))
            sys.stderr.write(f"{path.name}: {name}\n")
    scores = pd.concat(tables, ignore_index=True)
    print(as_markdown(scores))
    if args.out:
        scores.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def move_labels(labels: Volume, target: Volume) -> Volume:
    """Resample labels to the grid of another map: a voxel gets what fills most of it."""
    numbers = np.union1d([0], labels.array).astype(labels.array.dtype)
    grid = Grid(target.shape, target.affine)
    masks = (labels.with_array((labels.array == number).astype(np.float32)) for number in numbers[1:])
    fractions = [resample(mask, grid, antialias=True).array for mask in masks]
    return target.with_array(numbers[np.argmax([1 - np.sum(fractions, axis=0), *fractions], axis=0)])


def changes(chi: Volume, labels: NDArray[np.integer]) -> Iterator[tuple[str, Volume]]:
    """Yield the map after each change, with a name."""
    for name, spacing_mm in GRIDS.items():
        yield name, regrid(chi, spacing_mm)
    for name, rotation_deg in ROTATIONS_DEG.items():
        yield name, regrid(chi, (1.0, 1.0, 1.0), rotation_deg)
    yield "slices of the nuclei only", crop(chi, np.any(labels, axis=(0, 1))[None, None])
    yield "cropped to the brain", crop(chi, chi.array != 0)
    sigma = np.divide(BLUR_MM / 2.355, (*chi.voxel_size_mm[:2], np.inf))  # its width at half maximum
    values = {f"smoothed by {BLUR_MM:g} mm in plane": ndimage.gaussian_filter(chi.array, sigma)}
    for noise in NOISE_PPM:
        normal = np.random.default_rng(0).normal(0, noise, chi.shape)
        values[f"noise of {noise:g} ppm"] = chi.array + normal.astype(np.float32)
    values |= {f"values multiplied by {gain:g}": chi.array * np.float32(gain) for gain in GAINS}
    for shift in SHIFTS_PPM:
        values[f"reference shifted by {shift:+g} ppm".replace("-", "−")] = chi.array + np.float32(shift)
    for name, array in values.items():
        yield name, chi.with_array(np.where(chi.array == 0, np.float32(0), array))


def regrid(
    chi: Volume, spacing_mm: tuple[float, float, float], rotation_deg: Sequence[float] = (0.0, 0.0, 0.0)
) -> Volume:
    """Resample a map to a rotated grid that covers it."""
    axes = Rotation.from_euler("xyz", rotation_deg, degrees=True).as_matrix()
    everything = Volume(np.ones(chi.shape, bool), from_matvec(axes.T) @ chi.affine)
    inside = box_of_mask(everything)  # along the rotated axes
    box = Box.around(axes @ inside.centre_mm, OrientedBox.from_axes(axes, inside.size_mm))
    return resample(chi, world_grid(box, spacing_mm), antialias=True)


def crop(chi: Volume, kept: NDArray[np.bool_]) -> Volume:
    """Crop a map to a mask, which is broadcast to its shape."""
    voxels = np.argwhere(np.broadcast_to(kept, chi.shape))
    block = tuple(map(slice, voxels.min(axis=0), voxels.max(axis=0) + 1))
    return replace(chi, array=chi.array[block], affine=block_affine(chi.affine, block))


def as_markdown(scores: pd.DataFrame) -> str:
    """Format the Dice per change and nucleus, with the number of nuclei that were not found."""
    wide = dice_by_nucleus(scores, "change")
    wide["missed"] = (scores["dice"] == 0).groupby(scores["change"]).sum()
    return markdown(wide.rename_axis("Dice"))


if __name__ == "__main__":
    raise SystemExit(main())
