"""Repeatability of volumes and susceptibilities, and recovery of planted changes, with and without `--longitudinal`.

    python benchmarks/longitudinal.py MAP... [--noise-ppm S] [--spacing-mm X Y Z] [--change PERCENT ...] [--seed N]

Each map is taken for a head and scanned twice: turned by about 5 degrees, shifted, on a new grid, with new noise.
Spread: mean absolute difference of the two sessions. Recovery: in the second session four nuclei of the left side are
smaller by a percentage; the change that is measured, less that without a planted change, over the true one. The peer is
the segmentation of each session alone, in the same run. Maps with a ``_dseg`` beside them or below ``derivatives``
(`dgmseg simulate`) serve for planted changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid, box_of_mask, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.segment import SegmentedMap, segment_map
from bids_dgmseg.segmentation.sessions import align_sessions, find_shared_spaces

MODEL = get_model("dgm16")

CHANGED = ("CN_L", "PUT_L", "RN_L", "DN_L")
"""They are far enough from each other to shrink separately."""

_FADING_MM = 5.0


def scan(head: Volume, *, spacing_mm: Sequence[float], noise_ppm: float, rng: np.random.Generator) -> Volume:
    """Scan a head once more: in another pose, on another grid, with other noise."""
    valid = head.array != 0
    box = box_of_mask(head.with_array(valid))
    rotation = Rotation.from_rotvec(np.deg2rad(rng.normal(0, 5, 3))).as_matrix()
    centre = np.array(box.centre_mm)
    pose = from_matvec(rotation, centre - rotation @ centre + rng.normal(0, 3, 3))
    x, y, z = spacing_mm
    grid = world_grid(box.expanded(12), (x, y, z))
    values, inside = (
        resample(Volume(array, pose @ head.affine), grid, antialias=True).array
        for array in (head.array, valid.astype(np.float32))
    )
    noise = ndimage.gaussian_filter(rng.normal(size=values.shape), 0.5)
    noisy = np.where(inside > 0.5, values + noise_ppm * noise / noise.std(), 0)
    return Volume(noisy.astype(np.float32), grid.affine)


def shrink(head: Volume, labels: NDArray[np.integer], change: float) -> tuple[Volume, dict[str, float]]:
    """Change the volume of some nuclei by a smooth deformation; return the head and the true relative changes."""
    points = Grid(head.shape, head.affine).centres_mm()
    moved, scale = points.copy(), (1 + change) ** (1 / 3)
    for structure in MODEL.structures:
        if structure.abbreviation in CHANGED:
            mask = labels == structure.index
            centre = apply_affine(head.affine, np.argwhere(mask).mean(axis=0))
            distance = ndimage.distance_transform_edt(~mask, sampling=head.voxel_size_mm)
            fading = np.clip(1 - (distance - 1) / _FADING_MM, 0, 1)[..., None]
            moved += fading * (1 / scale - 1) * (points - centre)
    indices = np.moveaxis(apply_affine(np.linalg.inv(head.affine), moved), -1, 0)
    array = ndimage.map_coordinates(head.array, indices, order=1)
    true = {}
    for structure in MODEL.structures:
        if structure.abbreviation in CHANGED:
            mask = (labels == structure.index).astype(np.float32)
            true[structure.abbreviation] = float(ndimage.map_coordinates(mask, indices, order=1).sum() / mask.sum() - 1)
    return head.with_array(array), true


def segment_alone(maps: Sequence[Volume]) -> list[SegmentedMap]:
    """Segment each session by itself."""
    return [segment_map(chi, MODEL) for chi in maps]


def segment_together(maps: Sequence[Volume]) -> list[SegmentedMap]:
    """Segment the sessions in their mid-space."""
    spaces = find_shared_spaces(align_sessions(maps), MODEL)
    return [segment_map(chi, MODEL, shared=space) for chi, space in zip(maps, spaces, strict=True)]


WAYS = {"alone": segment_alone, "together": segment_together}


def measure(chi: Volume, result: SegmentedMap) -> pd.DataFrame:
    """Return volumes (mm³, from labels and from probabilities) and mean susceptibilities (ppb), by nucleus."""
    voxel_mm3, rows = float(np.prod(chi.voxel_size_mm)), {}
    for channel, structure in enumerate(MODEL.structures, 1):
        mask = result.labels == structure.index
        rows[structure.abbreviation] = {
            "labels": mask.sum() * voxel_mm3,
            "probabilities": result.block.probabilities[channel].sum() * voxel_mm3,
            "ppb": 1000 * chi.array[mask].mean() if mask.any() else np.nan,
        }
    return pd.DataFrame(rows).T


def measure_sessions(maps: Sequence[Volume], way: str) -> list[pd.DataFrame]:
    """Segment and measure sessions."""
    return [measure(chi, one) for chi, one in zip(maps, WAYS[way](maps), strict=True)]


def spread(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return absolute differences: volumes in % of their mean, susceptibilities in ppb."""
    volumes = ["labels", "probabilities"]
    percent = 200 * (first[volumes] - second[volumes]).abs() / (first[volumes] + second[volumes])
    return percent.join((first["ppb"] - second["ppb"]).abs())


def find_labels(path: Path) -> list[Path]:
    """List the labels of a map that `dgmseg simulate` wrote."""
    name = path.name.replace("_Chimap", "*_dseg")
    dataset = next((parent for parent in path.parents if (parent / "dataset_description.json").is_file()), path.parent)
    return sorted(dataset.rglob(name))


def print_table(title: str, rows: Mapping[str, Iterable[object]], columns: Sequence[str]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(map(str, cells))} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", nargs="+", type=Path)
    parser.add_argument("--noise-ppm", type=float, default=0.008)
    parser.add_argument("--spacing-mm", type=float, nargs=3, help="default: that of each map")
    parser.add_argument("--change", type=float, nargs="*", default=[], metavar="PERCENT", help="such as -2 -5 -10")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spreads: dict[str, list[pd.DataFrame]] = {way: [] for way in WAYS}
    recovered: dict[tuple[float, str], list[dict[str, float]]] = {}
    for number, path in enumerate(options.maps):
        head = Volume.read(path)
        head = head.with_array(np.nan_to_num(head.array))

        def repeat(again: Volume, number: int = number, head: Volume = head) -> list[Volume]:
            """Return two sessions; the noise and poses are those of the seed."""
            rng = np.random.default_rng([options.seed, number])
            given = {"spacing_mm": options.spacing_mm or head.voxel_size_mm, "noise_ppm": options.noise_ppm}
            return [scan(one, **given, rng=rng) for one in (head, again)]

        measured = {way: measure_sessions(repeat(head), way) for way in WAYS}
        for way, (first, second) in measured.items():
            spreads[way].append(spread(first, second))
        labels = [read_labels(one).array for one in find_labels(path)[:1]]
        for percent in options.change if labels else ():
            smaller, true = shrink(head, labels[0], percent / 100)
            for way, (first, second) in measured.items():
                then, now = measure_sessions(repeat(smaller), way)
                ratio = (now / then - second / first)["probabilities"]
                recovered.setdefault((percent, way), []).append({one: ratio[one] / true[one] for one in CHANGED})
        print(f"{path.name}: done", flush=True)
    rows = {}
    for way, tables in spreads.items():
        mean = pd.concat(tables).groupby(lambda name: name[:-2], sort=False).mean()
        cells = [f"{one.labels:.1f} / {one.probabilities:.1f} / {one.ppb:.1f}" for one in mean.itertuples()]
        whole = mean.mean()
        rows[way] = [*cells, f"{whole.labels:.1f} / {whole.probabilities:.1f} / {whole.ppb:.2f}"]
    print_table("spread: volume of labels, % / of probabilities, % / ppb", rows, [*mean.index, "mean"])
    if recovered:
        shares = {f"{percent:g} %, {way}": pd.DataFrame(found).mean() for (percent, way), found in recovered.items()}
        cells_of = {name: [f"{one:.2f}" for one in [*mean, mean.mean()]] for name, mean in shares.items()}
        print_table("share of a planted change of volume", cells_of, [*CHANGED, "mean"])


if __name__ == "__main__":
    main()
