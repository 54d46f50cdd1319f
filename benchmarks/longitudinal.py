"""Repeatability of volumes and susceptibilities, and recovery of simulated changes, with and without `--longitudinal`.

    python benchmarks/longitudinal.py MAP... [--noise-ppm S] [--spacing-mm X Y Z] [--change PERCENT ...]
        [--one-sided PERCENT] [--susceptibility PERCENT] [--way WAY ...] [--seed N]

Each map is taken for a head and scanned twice: turned by about 5 degrees, shifted, on a new grid, with new noise.
Spread: mean absolute difference of the two sessions. Recovery: in the second session four nuclei of the left side are
smaller by a percentage, in all directions or from the lateral side; the change that is measured, less that without a
simulated change, over the true one. With a simulated change of susceptibility, no volume should change. The peer is
the segmentation of each session alone, in the same run; together, the volume is also measured by the change between the
maps (`bids_dgmseg.measurement.nuclei`). Maps with a ``_dseg`` beside them or below ``derivatives``
(`dgmseg simulate`) serve for simulated changes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, resample, world_grid
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.measurement.nuclei import measure_session_volumes
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.segment import SegmentedMap, segment_map
from bids_dgmseg.segmentation.sessions import align_sessions, find_shared_spaces, segment_mean

MODEL = get_model("dgm16")

CHANGED = ("CN_L", "PUT_L", "RN_L", "DN_L")
"""They are far enough from each other to shrink separately."""

_FADING_MM = 5.0

_EDGE_VOXELS = 0.6


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


def shrink(
    head: Volume, labels: NDArray[np.integer], change: float, *, one_sided: bool = False
) -> tuple[Volume, dict[str, float]]:
    """Change the volume of some nuclei by a smooth deformation; return the head and the true relative changes."""
    points = Grid(head.shape, head.affine).centres_mm()
    shift = np.zeros_like(points)
    for structure in MODEL.structures:
        if structure.abbreviation in CHANGED:
            mask = labels == structure.index
            inside = apply_affine(head.affine, np.argwhere(mask))
            distance = ndimage.distance_transform_edt(~mask, sampling=head.voxel_size_mm)
            fading = np.clip(1 - (distance - 1) / _FADING_MM, 0, 1)[..., None]
            if one_sided:  # they are left: their medial end stays where it is
                from_end = points[..., :1] - inside[:, 0].max()
                shift[..., :1] += fading * (1 / (1 + change) - 1) * from_end
            else:
                shift += fading * ((1 + change) ** (-1 / 3) - 1) * (points - inside.mean(axis=0))
    moved = np.any(shift != 0, axis=-1)
    indices = apply_affine(np.linalg.inv(head.affine), (points + shift)[moved]).T
    array = head.array.copy()
    array[moved] = ndimage.map_coordinates(head.array, indices, order=1, mode="nearest")
    true = {}
    for structure in MODEL.structures:
        if structure.abbreviation in CHANGED:
            mask = (labels == structure.index).astype(np.float32)
            true[structure.abbreviation] = float(ndimage.map_coordinates(mask, indices, order=1).sum() / mask.sum() - 1)
    return head.with_array(array), true


def brighten(head: Volume, labels: NDArray[np.integer], change: float) -> Volume:
    """Change the susceptibility of the nuclei by a part of its mean; their edges are blurred by about a voxel."""
    array = head.array.copy()
    for structure in MODEL.structures:
        if structure.abbreviation in CHANGED:
            mask = labels == structure.index
            array += change * array[mask].mean() * ndimage.gaussian_filter(mask.astype(np.float32), _EDGE_VOXELS)
    return head.with_array(array)


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


def measure_alone(maps: Sequence[Volume]) -> list[pd.DataFrame]:
    """Segment each session by itself."""
    return [measure(chi, segment_map(chi, MODEL)) for chi in maps]


def measure_together(maps: Sequence[Volume]) -> list[pd.DataFrame]:
    """Segment the sessions in their mid-space; add the volumes by the change between the maps."""
    aligned = align_sessions(maps)
    spaces = find_shared_spaces(aligned, MODEL)
    mean = segment_mean(aligned, MODEL, spaces[0].location)
    inside = mean.block.slices
    labels = Volume(mean.labels[inside], block_affine(aligned.mean.affine, inside))
    volumes = measure_session_volumes(aligned.maps, labels, mean.block.probabilities[1:], MODEL.structures)
    tables = []
    for chi, space, session in zip(maps, spaces, volumes, strict=True):
        table = measure(chi, segment_map(chi, MODEL, shared=space))
        by_maps = {name: item["mean_mm3"] * (1 + item["change_percent"] / 100) for name, item in session.items()}
        tables.append(table.assign(maps=pd.Series(by_maps)))
    return tables


WAYS = {"alone": measure_alone, "together": measure_together}

VOLUMES = ("labels", "probabilities", "maps")
"""By which volumes are measured."""


def spread(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return absolute differences: volumes in % of their mean, susceptibilities in ppb."""
    volumes = [name for name in VOLUMES if name in first]
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


def plant(
    head: Volume, labels: NDArray[np.integer], options: argparse.Namespace
) -> Iterator[tuple[str, Volume, dict[str, float] | None]]:
    """Yield the simulated changes: name, changed head, true relative changes of volume; None for susceptibilities."""
    for percent in options.change:
        yield f"{percent:g} %", *shrink(head, labels, percent / 100)
    for percent in options.one_sided:
        yield f"{percent:g} % from one side", *shrink(head, labels, percent / 100, one_sided=True)
    for percent in options.susceptibility:
        yield f"{percent:+g} %", brighten(head, labels, percent / 100), None


def changes(
    before: Mapping[str, list[pd.DataFrame]], after: Mapping[str, list[pd.DataFrame]]
) -> Iterator[tuple[str, pd.Series]]:
    """Yield the relative changes of volume of the changed nuclei, less those without a simulated change."""
    for way, (first, second) in before.items():
        then, now = after[way]
        for name in [name for name in VOLUMES[1:] if name in then]:
            yield f"{way}, {name}", (now[name] / then[name] - second[name] / first[name])[list(CHANGED)]


def print_means(title: str, series: Mapping[str, Sequence[pd.Series]], *, digits: int) -> None:
    """Print the mean over the heads for each simulated change, if there are any."""
    means = {name: pd.DataFrame(rows).mean()[list(CHANGED)] for name, rows in series.items()}
    rows = {name: [f"{value:.{digits}f}" for value in (*mean, mean.mean())] for name, mean in means.items()}
    if rows:
        print_table(title, rows, [*CHANGED, "mean"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", nargs="+", type=Path)
    parser.add_argument("--noise-ppm", type=float, default=0.008)
    parser.add_argument("--spacing-mm", type=float, nargs=3, help="default: that of each map")
    parser.add_argument("--change", type=float, nargs="*", default=[], metavar="PERCENT", help="such as -2 -5 -10")
    parser.add_argument("--one-sided", type=float, nargs="*", default=[], metavar="PERCENT", help="such as -5")
    parser.add_argument("--susceptibility", type=float, nargs="*", default=[], metavar="PERCENT", help="such as 10")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spreads: dict[str, list[pd.DataFrame]] = {way: [] for way in options.way}
    recovered: dict[str, list[pd.Series]] = defaultdict(list)
    false: dict[str, list[pd.Series]] = defaultdict(list)
    for number, path in enumerate(options.maps):
        head = Volume.read(path)
        head = head.with_array(np.nan_to_num(head.array))

        def repeat(again: Volume, number: int = number, head: Volume = head) -> dict[str, list[pd.DataFrame]]:
            """Measure two sessions in all ways; the noise and poses are those of the seed."""
            rng = np.random.default_rng([options.seed, number])
            sampling = {"spacing_mm": options.spacing_mm or head.voxel_size_mm, "noise_ppm": options.noise_ppm}
            maps = [scan(item, **sampling, rng=rng) for item in (head, again)]
            return {way: WAYS[way](maps) for way in options.way}

        measured = repeat(head)
        for way, (first, second) in measured.items():
            spreads[way].append(spread(first, second))
        for labels in [read_labels(item).array for item in find_labels(path)[:1]]:
            for name, changed, true in plant(head, labels, options):
                for how, change in changes(measured, repeat(changed)):
                    if true:
                        recovered[f"{name}, {how}"].append(change / pd.Series(true))
                    else:
                        false[f"{name}, {how}"].append(100 * change)
        print(f"{path.name}: done", flush=True)
    for way, tables in spreads.items():
        mean = pd.concat(tables).groupby(lambda name: name[:-2], sort=False).mean()
        mean.loc["mean"] = mean.mean()
        cells = [" / ".join(f"{value:.1f}" for value in row) for row in mean.to_numpy()]
        names = " / ".join(f"volume by {name}, %" for name in mean.columns[:-1])
        print_table(f"spread: {names} / ppb", {way: cells}, list(mean.index))
    print_means("share of a simulated change of volume", recovered, digits=2)
    print_means("change of volume (%) by one of susceptibility", false, digits=1)


if __name__ == "__main__":
    main()
