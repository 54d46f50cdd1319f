"""Borders of labels beside those that a map shows, where half of the contrast of a nucleus is reached.

    python benchmarks/borders.py MAP [MAP ...] [--model MODEL] [--weights FOLDER] [--labels FILE ...]
        [--voxels-mm X Y Z] [--out FILE.tsv]

Labels of other people are too wide or too tight on real maps. In each axial slice of a nucleus the half-maximum region
is what lies above the middle between its inside (third quartile) and a ring 1.5 to 5 mm around it. Slices with less
than a quarter of the contrast of the whole nucleus have none; those with up to a half, where the nucleus ends within
the slice, are not compared. Nor is the putamen, whose front has no contrast.
A second table has the volume of the caudate high above the putamen, where veins and fluid are taken for it: in 34
manually labelled hemispheres at most 830 mm³ lie more than 6 mm, and at most 300 mm³ more than 9 mm above its top. A
third one has the share of sides with more than one piece in one of the three lowest slices, and with one of up to 13
voxels.
``--labels`` scores label images (numbers of structures.tsv), in the order of the maps, in the place of a model's.
The labels of ``dgmseg simulate`` show what the truth scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from reporting import markdown
from robustness import move_labels, regrid
from scipy import ndimage

from bids_dgmseg.errors import run_command
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.rating import HEIGHTS_MM3, volumes_above
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES, join_parts
from bids_dgmseg.segmentation.segment import segment_map

_NUCLEI = {"DN": ("DN",), "RN": ("RN",), "SN+STN": ("SN", "STN"), "CN": ("CN",), "GP": ("GP",)}
_RING_MM = (1.5, 5.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Score the labels of every map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", metavar="MAP", type=Path, nargs="+", help="chi map in ppm")
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--labels", type=Path, nargs="+", default=[], help="label images to score")
    parser.add_argument("--voxels-mm", type=float, nargs=3, help="resample maps and label images to this voxel size")
    parser.add_argument("--out", type=Path, help="write all scores as TSV")
    args = parser.parse_args(argv)
    return run_command("borders", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    borders, heights, pieces = [], [], []
    for number, path in enumerate(args.maps):
        chi = Volume.read(path, np.float32)
        if args.voxels_mm:
            chi = regrid(chi, args.voxels_mm)
        if args.labels:
            labels = move_labels(Volume.read(args.labels[number], np.uint8), chi).array
        else:
            labels = segment_map(chi, get_model(args.model), weights=args.weights).labels
        labels, name = join_parts(labels).astype(np.uint8), path.name.partition("_")[0]
        borders.append(score_borders(chi, labels).assign(map=name))
        heights.append(caudate_heights(chi, labels).assign(map=name))
        pieces.append(lowest_pieces(labels))
        print(name, flush=True)
    scores = pd.concat(borders)
    table = scores.groupby("nucleus", sort=False).agg(
        dice=("dice", "mean"),
        lowest=("dice", "min"),
        mm3=("volume_mm3", "mean"),
        half_maximum_mm3=("half_maximum_mm3", "mean"),
    )
    print(f"\n{markdown(table.reset_index())}")
    print(f"\ncaudate above the putamen\n\n{markdown(pd.concat(heights))}")
    shares = pd.concat(pieces).groupby("nucleus", sort=False).mean().reset_index()
    print(f"\nshare of sides in pieces in a lowest slice\n\n{markdown(shares)}")
    if args.out:
        scores.to_csv(args.out, sep="\t", index=False, na_rep="n/a")
    return 0


def score_borders(chi: Volume, labels: NDArray[np.uint8]) -> pd.DataFrame:
    """Compare each side of each nucleus with its half-maximum region; one row per side."""
    rows = []
    for nucleus, parts in _NUCLEI.items():
        for side in ("L", "R"):
            inside = np.isin(labels, [STRUCTURES.named(f"{part}_{side}").index for part in parts])
            if inside.any():
                region, compared = half_maximum(chi, inside, (labels > 0) & ~inside)
                label = inside & compared
                total = int(label.sum() + region.sum())
                rows.append(
                    {
                        "nucleus": nucleus,
                        "side": side,
                        "dice": 2 * int((label & region).sum()) / total,
                        "volume_mm3": chi.volume_ml(label) * 1000,
                        "half_maximum_mm3": chi.volume_ml(region) * 1000,
                    }
                )
    return pd.DataFrame(rows)


def half_maximum(
    chi: Volume, inside: NDArray[np.bool_], others: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the half-maximum region of a nucleus, within 3 mm of its label and outside other labels.

    The second array (Z,) is False for slices that are not compared.
    """
    valid, away_mm = is_valid(chi.array), ndimage.distance_transform_edt(~inside, chi.voxel_size_mm)
    ring = (away_mm > _RING_MM[0]) & (away_mm <= _RING_MM[1]) & ~others & valid
    near = (away_mm <= 2 * _RING_MM[0]) & ~others & valid
    contrast = np.percentile(chi.array[inside & valid], 75) - np.median(chi.array[ring])
    region, compared = np.zeros_like(inside), np.ones(inside.shape[2], bool)
    for place in np.unique(np.nonzero(near)[2]):  # arrays are RAS+
        values, within, around = (array[..., place] for array in (chi.array, inside & valid, ring))
        high = np.percentile(values[within if within.any() else near[..., place]], 75)
        low = np.median(values[around]) if around.any() else np.nan
        if high - low >= contrast / 2:
            region[..., place] = near[..., place] & (values > (high + low) / 2)
        compared[place] = not contrast / 4 <= high - low < contrast / 2
    components, _ = ndimage.label(region)
    touching = np.unique(components[inside & region])
    return np.isin(components, touching[touching > 0]), compared


def caudate_heights(chi: Volume, labels: NDArray[np.uint8]) -> pd.DataFrame:
    """Measure the caudate above the top of the putamen on its side; one row per side."""
    rows = []
    for side in ("L", "R"):
        voxels_mm = {}
        for nucleus in ("CN", "PUT"):
            voxels = np.argwhere(labels == STRUCTURES.named(f"{nucleus}_{side}").index)
            voxels_mm[nucleus] = nib.affines.apply_affine(chi.affine, voxels)
        if min(map(len, voxels_mm.values())):
            volumes = volumes_above(voxels_mm["CN"], voxels_mm["PUT"], float(np.prod(chi.voxel_size_mm)))
            too_much = any(volumes[h] > limit for h, limit in HEIGHTS_MM3.items())
            rows.append({"side": side, **{f"above_{h:g}_mm": round(v) for h, v in volumes.items()}, "veins": too_much})
    return pd.DataFrame(rows)


def lowest_pieces(labels: NDArray[np.uint8]) -> pd.DataFrame:
    """Find pieces within one of the three lowest slices of a nucleus; one row per side."""
    rows = []
    for structure in STRUCTURES:
        mask = labels == structure.index
        if structure.nucleus in ("CN", "PUT", "GP") and mask.any():
            slices = [ndimage.label(mask[..., z], np.ones((3, 3)))[0] for z in np.flatnonzero(mask.any((0, 1)))[:3]]
            # without the background, of which no voxel is counted, and the largest piece
            sizes = [size for numbers in slices for size in sorted(np.bincount(numbers[numbers > 0]))[1:-1]]
            rows.append((structure.nucleus, bool(sizes), min(sizes, default=99) <= 13))
    return pd.DataFrame(rows, columns=["nucleus", "pieces", "small"])


if __name__ == "__main__":
    raise SystemExit(main())
