"""Accuracy of the normalization to MNI152NLin2009cAsym: overlap of nuclei with atlases, Jacobian determinants.

Usage: python benchmarks/standard_space.py ATLAS_DIR NAME=DSEG[,BRAIN,VENTRICLES] ...

ATLAS_DIR holds CIT168_paqd.nii.gz with its .json (RGBA) and bigbrain_dseg.nii.gz with its .tsv. Prints one row per scan
and nucleus: Dice of the affine alone and with warps, with CIT168 and BigBrain, mean of both sides.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from mni_shapes import CIT168, read_probabilities
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.registration.mni import Normalization, register, scan_indices, warp_labels

BIGBRAIN = {
    "RN": ["red-nucleus"],
    "SN": ["substantia-nigra"],
    "STN": ["subthalamic-nucleus"],
    "CN": ["caudate"],
    "PUT": ["putamen"],
    "GP": ["globus-pallidus-externa", "globus-pallidus-interna"],
}


def read_atlases(folder: Path) -> dict[str, Volume]:
    """Read both atlases with the labels of structures.tsv."""
    path = folder / "CIT168_paqd.nii.gz"
    image: Any = nib.load(path)
    cit = np.zeros(image.shape, np.uint8)
    for name, probability, _ in read_probabilities(path):
        cit[probability > 0.5] = STRUCTURES.named(name).index
    big: Any = nib.load(folder / "bigbrain_dseg.nii.gz")
    table, shown = pd.read_csv(folder / "bigbrain_dseg.tsv", sep="\t"), np.asarray(big.dataobj)
    labels = np.zeros(big.shape, np.uint8)
    for nucleus, parts in BIGBRAIN.items():
        for side, word in (("L", "Left"), ("R", "Right")):
            rows = table["name"].isin([f"{word}-{part}" for part in parts])
            labels[np.isin(shown, table["index"][rows])] = STRUCTURES.named(f"{nucleus}_{side}").index
    return {"CIT168": crop(Volume(cit, image.affine)), "BigBrain": crop(Volume(labels, big.affine))}


def crop(labels: Volume) -> Volume:
    """Crop a label image to its labels with a margin, and halve a resolution of 0.5 mm."""
    step = 2 if min(labels.voxel_size_mm) < 0.75 else 1
    (block,) = ndimage.find_objects((labels.array > 0).astype(np.uint8))
    start = [max(axis.start - 8, 0) for axis in block]
    part = tuple(slice(low, axis.stop + 8, step) for low, axis in zip(start, block, strict=True))
    affine = labels.affine @ np.diag([step, step, step, 1.0])
    affine[:3, 3] = nib.affines.apply_affine(labels.affine, start)
    return Volume(labels.array[part], affine)


def dice_with(atlas: Volume, labels: Volume, normalization: Normalization) -> dict[str, float]:
    """Compute Dice per nucleus, mean of both sides, on the grid of an atlas."""
    grid = Grid(atlas.shape, atlas.affine)
    warped = warp_labels(labels.array, scan_indices(normalization, grid, labels.affine))
    result = {}
    for nucleus in CIT168:
        sides = []
        for structure in STRUCTURES.both_sides([nucleus]):
            a, b = warped == structure.index, atlas.array == structure.index
            sides.append(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
        result[nucleus] = float(np.mean(sides))
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlases", metavar="ATLAS_DIR", type=Path)
    parser.add_argument("scans", metavar="NAME=DSEG[,BRAIN,VENTRICLES]", nargs="+")
    args = parser.parse_args()
    atlases, rows = read_atlases(args.atlases), []
    for argument in args.scans:
        name, files = argument.split("=")
        dseg, *masks = files.split(",")
        labels, start = read_labels(Path(dseg)), time.perf_counter()
        regions = dict(zip(("brain", "ventricles"), (read_labels(Path(mask)) for mask in masks), strict=False))
        normalization = register(labels, regions)
        took_s = time.perf_counter() - start
        jacobian = normalization.jacobian()
        print(f"{name}: {took_s:.0f} s, Jacobian {jacobian.min():.2f} to {jacobian.max():.2f}", file=sys.stderr)
        for title, atlas in atlases.items():
            for stage, used in (
                ("affine", Normalization(normalization.to_scan, normalization.grid)),
                ("warp", normalization),
            ):
                rows.append({"scan": name, "atlas": title, "stage": stage, **dice_with(atlas, labels, used)})
    table = pd.DataFrame(rows).round(2)
    print(table.to_string(index=False))
    print(table.groupby(["atlas", "stage"]).mean(numeric_only=True).round(2).to_string())


if __name__ == "__main__":
    main()
