"""Compute bids_dgmseg/data/mni_shapes.tsv: each nucleus of the atlases in MNI space as a union of few balls.

Usage: python benchmarks/mni_shapes.py CIT168.nii.gz LABELS.nii.gz > bids_dgmseg/data/mni_shapes.tsv

CIT168.nii.gz holds the CIT168 probabilities in MNI152NLin2009cAsym (Pauli et al. 2018, doi:10.1038/sdata.2018.63), as
RGBA: the two most probable structures and their probabilities. LABELS.nii.gz is the label template of
workflows/make_template (Allen Human Reference Atlas 3D, Ding et al. 2016), from which the cerebellar nuclei come.

Balls inside the nucleus are chosen greedily, each the one that covers most of what is not covered yet. Their radii are
then enlarged by the same length, so that the union has the volume of the nucleus.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

CIT168 = {
    "RN": ["Red Nucleus"],
    "SN": ["Substantia Nigra pars compacta", "Substantia-Nigra-pars-reticulata"],
    "STN": ["Subthalamic Nucleus"],
    "CN": ["Caudate"],
    "PUT": ["Putamen"],
    "GP": ["Globus Pallidus externa", "Globus Pallidus interna"],
}
TEMPLATE = {"DN_L": 1, "DN_R": 2, "IN_L": 3, "IN_R": 4}
MAX_BALLS, MAX_CANDIDATES, COVERED = 40, 1000, 0.95
LARGE = ("CN", "PUT")
"""Nuclei drawn at 1 mm instead of 0.5 mm."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cit168", metavar="CIT168.nii.gz", type=Path)
    parser.add_argument("template", metavar="LABELS.nii.gz", type=Path)
    args = parser.parse_args()
    print("abbreviation\tx_mm\ty_mm\tz_mm\tradius_mm")
    masks = {**read_template(args.template), **read_cit168(args.cit168)}
    for name, (mask, affine) in masks.items():
        centres, radii = cover(mask, affine)
        for (x, y, z), radius in zip(centres, radii, strict=True):
            print(f"{name}\t{x:.1f}\t{y:.1f}\t{z:.1f}\t{radius:.1f}")
        grid = apply_affine(affine, np.moveaxis(np.indices(mask.shape), 0, -1))
        drawn = np.zeros(mask.shape, bool)
        for centre, radius in zip(np.round(centres, 1), np.round(radii, 1), strict=True):
            drawn |= ((grid - centre) ** 2).sum(-1) <= radius**2
        dice = 2 * (drawn & mask).sum() / (drawn.sum() + mask.sum())
        print(
            f"{name}: {len(radii)} balls, Dice {dice:.3f}, volume ratio {drawn.sum() / mask.sum():.2f}", file=sys.stderr
        )


def cover(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centres (N, 3) and radii in mm of balls whose union resembles a mask."""
    points = apply_affine(affine, np.argwhere(mask))
    step_mm = affine[0, 0]
    radii = ndimage.distance_transform_edt(mask)[mask] * step_mm - step_mm / 2
    chosen = np.arange(0, len(points), -(-len(points) // MAX_CANDIDATES))
    inside = np.stack([((points - points[i]) ** 2).sum(-1) <= radii[i] ** 2 for i in chosen])
    left = np.ones(len(points), bool)
    picked: list[int] = []
    while len(picked) < MAX_BALLS and left.mean() > 1 - COVERED:
        best = int((inside & left).sum(axis=1).argmax())
        picked.append(int(chosen[best]))
        left &= ~inside[best]
    centres, radii = points[picked], radii[picked]
    box = np.pad(mask, 6)
    box_affine = affine @ np.block([[np.eye(3), np.full((3, 1), -6.0)], [np.zeros(3), 1.0]])
    grid = apply_affine(box_affine, np.moveaxis(np.indices(box.shape), 0, -1))
    signed = np.max(
        [radius - np.linalg.norm(grid - centre, axis=-1) for centre, radius in zip(centres, radii, strict=True)], axis=0
    )
    grow = -np.sort(signed.ravel())[::-1][mask.sum()]
    return centres, radii + grow


def read_probabilities(path: Path) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Yield abbreviation, probability and affine of the nuclei in CIT168's image, whose names are in its JSON file."""
    image: Any = nib.load(path)
    names = json.loads(path.with_suffix("").with_suffix(".json").read_text())["labels"]
    rgba = np.asarray(image.dataobj)
    for nucleus, parts in CIT168.items():
        for side in "LR":
            wanted = [index for index, name in enumerate(names) if name.strip() in {f"{side} {part}" for part in parts}]
            probability = sum(
                np.where(rgba[code] == index, rgba[value] / 255.0, 0)
                for index in wanted
                for code, value in ("RB", "GA")
            )
            yield f"{nucleus}_{side}", np.asarray(probability), image.affine


def read_cit168(path: Path) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Read the nuclei above the cerebellum at 0.5 mm."""
    masks: dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]] = {}
    for name, probability, coarse in read_probabilities(path):
        nucleus = name.partition("_")[0]
        factor = 1 if nucleus in LARGE else 2
        fine = ndimage.zoom(probability, factor, order=1, grid_mode=True, mode="grid-constant")
        mask = fine > 0.5
        if nucleus == "GP":  # the lamina between the segments belongs to the nucleus as QSM shows it
            mask = ndimage.binary_closing(mask, ndimage.generate_binary_structure(3, 1), iterations=4)
        affine = coarse @ np.diag([1 / factor] * 3 + [1.0])
        affine[:3, 3] -= (1 - 1 / factor) / 2
        masks[name] = crop(mask, affine)
    return masks


def read_template(path: Path) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Read the cerebellar nuclei."""
    image: Any = nib.load(path)
    labels = np.asarray(image.dataobj)
    return {name: crop(labels == index, image.affine) for name, index in TEMPLATE.items()}


def crop(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Crop a mask to its bounding box with a margin of two voxels."""
    (block,) = ndimage.find_objects(mask.astype(np.uint8))
    start = np.array([axis.start for axis in block]) - 2
    cropped = np.pad(mask[block], 2)
    shifted = affine.copy()
    shifted[:3, 3] = apply_affine(affine, start)
    return cropped, shifted


if __name__ == "__main__":
    main()
