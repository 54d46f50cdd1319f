"""What a model makes of maps that were changed on purpose: other grids, tilts, cuts, values.

    python benchmarks/changed.py DATASET [--model MODEL] [--weights FOLDER] [--out FILE.tsv]

Segments every labelled map of a BIDS dataset as it is and changed in each way, carries what was found back to the
map's own grid by nearest neighbour, and compares it with the labels there. That alone costs thin nuclei some hundredths
where the other grid's voxels are large. Prints Markdown: mean Dice of left and right, and how many nuclei that are
labelled were not found.
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
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import run_command
from bids_dgmseg.image.boxes import Box, OrientedBox, box_of_mask
from bids_dgmseg.image.grids import Grid, block_affine, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice
from bids_dgmseg.train.data import read_labelled_maps
from bids_dgmseg.train.run_finetuning import given_labels

GRIDS = {
    "1 × 1 × 1 mm": (1.0, 1.0, 1.0),
    "0.6 × 0.6 × 0.6 mm": (0.6, 0.6, 0.6),
    "1 × 1 × 2 mm": (1.0, 1.0, 2.0),
    "2 × 2 × 2 mm": (2.0, 2.0, 2.0),
}
TURNS_DEG = {
    "nodding by 20°": (20.0, 0.0, 0.0),
    "nodding by −20°": (-20.0, 0.0, 0.0),
    "rolled by 15°": (0.0, 15.0, 0.0),
    "turned by 15°": (0.0, 0.0, 15.0),
    "all three by 20°": (20.0, -20.0, 20.0),
}
"""Axes of the grid about x, y and z; its voxels are 1 mm large."""
GAINS, SHIFTS_PPM, NOISE_PPM = (0.7, 1.3), (-0.02, 0.02), 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="folder in place of the model's own weights")
    parser.add_argument("--out", type=Path, help="all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("changed", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model, tables = get_model(args.model), []
    for one in read_labelled_maps(args.dataset.absolute(), model, say=print):
        labels = one.map.chi.with_array(given_labels(one.map, model))
        known = [model.structures[channel - 1] for channel in one.map.channels]
        for name, chi in changes(one.map.chi, labels):
            found = carry_back(find(chi, model, args.weights), labels)
            table = dice(labels.array, found.array, structures=known)
            tables.append(table.assign(scan=one.map.name, change=name))
            sys.stderr.write(f"{one.map.name}: {name}\n")
    scores = pd.concat(tables, ignore_index=True)
    print(as_markdown(scores))
    if args.out:
        scores.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def changes(chi: Volume, labels: Volume) -> Iterator[tuple[str, Volume]]:
    """Yield a map as it is, then changed in one way after the other, with a name."""
    yield "as it is", chi
    for name, spacing_mm in GRIDS.items():
        yield name, regrid(chi, spacing_mm)
    for name, turn_deg in TURNS_DEG.items():
        yield name, regrid(chi, (1.0, 1.0, 1.0), turn_deg)
    yield "slices of the nuclei alone", cut(chi, np.any(labels.array, axis=(0, 1))[None, None])
    yield "cropped to the brain", cut(chi, chi.array != 0)
    noise = np.random.default_rng(0).normal(0, NOISE_PPM, chi.shape).astype(np.float32)
    yield f"noise of {NOISE_PPM:g} ppm outside", chi.with_array(np.where(chi.array == 0, noise, chi.array))
    for gain in GAINS:
        yield f"values times {gain:g}", chi.with_array(chi.array * np.float32(gain))
    for shift in SHIFTS_PPM:
        moved = np.where(chi.array == 0, np.float32(0), chi.array + np.float32(shift))
        yield f"zero moved by {shift:+g} ppm".replace("-", "−"), chi.with_array(moved)


def regrid(chi: Volume, spacing_mm: tuple[float, float, float], turn_deg: Sequence[float] = (0.0, 0.0, 0.0)) -> Volume:
    """Resample a map to a grid that covers it, turned about its middle."""
    axes = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()
    everything = Volume(np.ones(chi.shape, bool), from_matvec(axes.T) @ chi.affine)
    inside = box_of_mask(everything)  # along the turned axes
    box = Box.around(axes @ inside.centre_mm, OrientedBox.from_axes(axes, inside.size_mm))
    return resample(chi, world_grid(box, spacing_mm), antialias=True)


def cut(chi: Volume, kept: NDArray[np.bool_]) -> Volume:
    """Leave out what lies beyond a mask, which may have one voxel along an axis that stays whole."""
    places = np.argwhere(np.broadcast_to(kept, chi.shape))
    block = tuple(map(slice, places.min(axis=0), places.max(axis=0) + 1))
    return replace(chi, array=chi.array[block], affine=block_affine(chi.affine, block))


def find(chi: Volume, model: Model, weights: Path | None) -> Volume:
    """Label a map as in use."""
    return chi.with_array(segment_map(chi, model, weights=weights).labels)


def carry_back(found: Volume, own: Volume) -> Volume:
    """Look labels up at the voxel centres of the map's own grid."""
    return resample(found, Grid(own.shape, own.affine), order=0)


def as_markdown(scores: pd.DataFrame) -> str:
    """Lay changes out in rows and nuclei in columns."""
    nuclei = scores.assign(nucleus=scores["abbreviation"].str.split("_").str[0])
    wide = nuclei.pivot_table(index="change", columns="nucleus", values="dice", aggfunc="mean", sort=False)
    wide["mean"] = wide.mean(axis=1)
    missed = (scores["dice"] == 0).groupby(scores["change"]).sum()
    lines = ["| Dice | " + " | ".join(wide.columns) + " | missed |", "| --- " * (len(wide.columns) + 2) + "|"]
    for (name, row), count in zip(wide.iterrows(), missed[wide.index], strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + f" | {count} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
