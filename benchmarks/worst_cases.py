"""Pictures of the simulated maps with the lowest Dice: true outlines above those found.

    python benchmarks/worst_cases.py SCORES.tsv OUT [--pictures N] [--template FILE] [--model MODEL]
                                     [--weights FOLDER] [--plane PLANE]

``SCORES.tsv`` was written by ``accuracy.py --maps N --each N --out`` with the same template, model and weights. The
nuclei with the lowest Dice, each from a different condition and a different nucleus or side, are drawn and segmented
again and shown in ``OUT/NUCLEUS.png``: up to six slices with the true outlines above and the found ones below.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conditions import conditions
from numpy.typing import NDArray

from bids_dgmseg.errors import run_command
from bids_dgmseg.image.grids import block_affine
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import phantom_head, read_training_head
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.mosaic import LAYOUTS, PLANES, Plane, draw_mosaic
from bids_dgmseg.segmentation.segment import segment_map

_MARGIN_MM = 12.0
_SLICES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="scores from `accuracy.py --out`")
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--pictures", type=int, default=5, help="number of pictures (default: 5)")
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--plane", choices=PLANES, default="axial")
    args = parser.parse_args(argv)
    return run_command("worst_cases", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model = get_model(args.model)
    head = read_training_head(args.template) if args.template else phantom_head()
    by_name = {condition.name: condition for condition in conditions()}
    args.out.mkdir(parents=True, exist_ok=True)
    for row in worst_rows(pd.read_csv(args.scores, sep="\t"), n=args.pictures):
        chi, truth = by_name[row["condition"]].draw(head, int(row["seed"]), model.structures)
        side, title = str(row["abbreviation"]), f"{row['abbreviation']}: Dice {row['dice']:.2f} · {row['condition']}"
        draw_comparison(
            chi,
            truth,
            segment_map(chi, model, weights=args.weights).labels,
            args.out / f"{side}.png",
            side=side,
            model=model,
            plane=args.plane,
            title=title,
        )
        print(f"{side}.png: {title}, seed {int(row['seed'])}", flush=True)
    return 0


def worst_rows(scores: pd.DataFrame, *, n: int) -> list[pd.Series[Any]]:
    """Select the rows with the lowest Dice (ties: larger nucleus first), each condition and each side at most once."""
    left = scores[scores["dataset"] == "drawn"].sort_values(["dice", "true_mm3"], ascending=[True, False])
    rows: list[pd.Series[Any]] = []
    while len(left) and len(rows) < n:
        rows.append(left.iloc[0])
        left = left[(left["condition"] != rows[-1]["condition"]) & (left["abbreviation"] != rows[-1]["abbreviation"])]
    return rows


def draw_comparison(
    chi: Volume,
    truth: NDArray[np.uint8],
    segmented: NDArray[np.uint8],
    out: Path,
    *,
    side: str,
    model: Model,
    plane: Plane,
    title: str,
) -> None:
    """Draw the slices of a nucleus twice, with the true outlines above and the found ones below."""
    view, index = LAYOUTS[plane], STRUCTURES.named(side).index
    part = _block_around((truth == index) | (segmented == index), chi.voxel_size_mm, axis=view.axis)
    gap = [(1, 1) if axis == view.up else (0, 0) for axis in range(3)]
    padded = np.pad(chi.array[part], gap, constant_values=np.nan)
    labels = np.concatenate([np.pad(array[part], gap) for array in (segmented, truth)], axis=view.up)
    affine = block_affine(chi.affine, part)
    affine[:3, view.axis] *= part[view.axis].step
    shown = [structure for structure in model.structures if (labels == structure.index).any()]
    stacked = Volume(np.concatenate([padded, padded], axis=view.up), affine)
    draw_mosaic(stacked, Volume(labels, affine), out, plane=plane, structures=shown, title=title)


def _block_around(there: NDArray[np.bool_], voxel_size_mm: Sequence[float], *, axis: int) -> tuple[slice, ...]:
    """Return a block around a nucleus: in plane with a margin, along `axis` with up to six slices."""
    part = []
    for number, (segmented, edge_mm) in enumerate(zip(np.nonzero(there), voxel_size_mm, strict=True)):
        first, last = int(segmented.min()), int(segmented.max())
        if number == axis:
            step = -(-(last + 1 - first) // _SLICES)
            part.append(slice(first + (last - first) % step // 2, last + 1, step))
        else:
            margin = round(_MARGIN_MM / edge_mm)
            part.append(slice(max(0, first - margin), last + margin + 1, 1))
    return tuple(part)


if __name__ == "__main__":
    raise SystemExit(main())
