"""Compare simulated with real maps, tissue by tissue.

    python benchmarks/contrasts.py DATASET [DATASET ...] [--tissues] [--out FILE.tsv] [--figure FILE.png]

A dataset is a BIDS dataset of chi maps with labels in ``derivatives/*/``, as for `accuracy.py`, for example one of
`dgmseg simulate` and one of labelled real maps. Labels are eroded by one voxel in plane, so that they differ less
between protocols. Gradients are those of thirds of a nucleus along an axis, relative to its mean. ``--tissues`` adds
what raters do not label: accumbens, thalamus and ventricle as `dgm24` finds them, relative to the median of the brain
between 3 and 15 mm from nuclei. Prints the 10th, 50th and 90th percentile per dataset; the figure has an axial slice of
six scans per dataset.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from reporting import markdown
from scipy import ndimage

from bids_dgmseg.bids.labelled_scans import manual_labels, read_labelled_maps
from bids_dgmseg.errors import run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.segment import find_ventricles, segment_map

_AXES = {"back - front": (1, -1), "top - bottom": (2, 1), "lateral - medial": (0, 1)}
"""Axis and sign of the differences; the first axis is that of the right side."""

_HALO_MM = 4.0

_NEAR_MM = (3.0, 15.0)
"""Distance from nuclei of the brain to which tissues are compared."""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", metavar="DATASET", type=Path, nargs="+")
    parser.add_argument("--tissues", action="store_true", help="measure accumbens, thalamus and ventricle")
    parser.add_argument("--out", type=Path, help="write the values of each scan as TSV")
    parser.add_argument("--figure", type=Path, help="draw slices side by side, one row per dataset")
    args = parser.parse_args()
    return run_command("contrasts", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    rows = [row for dataset in args.datasets for row in measure_dataset(dataset, tissues=args.tissues)]
    table = pd.DataFrame(rows).set_index(["dataset", "scan"])
    if args.out:
        table.to_csv(args.out, sep="\t")
    spread = pd.DataFrame(
        {
            f"{Path(str(dataset)).name} p{100 * q:.0f}": scans.quantile(q)
            for dataset, scans in table.groupby("dataset", sort=False)
            for q in (0.1, 0.5, 0.9)
        }
    )
    print(markdown(spread.rename_axis("measure").reset_index(), 3))
    if args.figure:
        draw_slices(args.datasets, args.figure)
    return 0


def draw_slices(datasets: Sequence[Path], path: Path) -> None:
    """Draw the axial slice with the largest section of the putamina in the first scans of each dataset."""
    model = get_model("dgm16")
    size_mm, columns = 150.0, 6
    figure, axes = plt.subplots(len(datasets), columns, figsize=(1.6 * columns, 1.6 * len(datasets)), squeeze=False)
    for row, dataset in zip(axes, datasets, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, scan in zip(row, read_labelled_maps(dataset, model, warn=print), strict=False):
            labels = manual_labels(scan, model)
            putamina = np.isin(labels, [structure.index for structure in STRUCTURES if structure.nucleus == "PUT"])
            z = int(putamina.sum(axis=(0, 1)).argmax())
            x_mm, y_mm, _ = scan.chi.voxel_size_mm
            middle = np.argwhere(labels[:, :, z] > 0).mean(axis=0) * (x_mm, y_mm)
            extent = (0, scan.chi.shape[0] * x_mm, 0, scan.chi.shape[1] * y_mm)
            axis.imshow(scan.chi.array[:, :, z].T, origin="lower", cmap="gray", vmin=-0.1, vmax=0.15, extent=extent)
            axis.set_xlim(middle[0] - size_mm / 2, middle[0] + size_mm / 2)
            axis.set_ylim(middle[1] - size_mm / 2, middle[1] + size_mm / 2)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure_dataset(dataset: Path, *, tissues: bool = False) -> Iterator[dict[str, float | str]]:
    """Measure each labelled scan of a dataset."""
    model = get_model("dgm16")
    for scan in read_labelled_maps(dataset, model, warn=print):
        tissue_ppm = measure_tissues(scan.chi) if tissues else {}
        yield {
            "dataset": str(dataset),
            "scan": scan.name,
            **measure_scan(scan.chi, manual_labels(scan, model)),
            **tissue_ppm,
        }


def measure_tissues(chi: Volume) -> dict[str, float]:
    """Measure accumbens, thalamus and lateral ventricle of a map in ppm (RAS+), found by dgm24."""
    model = get_model("dgm24")
    segmented = segment_map(chi, model)
    fluid = find_ventricles(chi, segmented.location.box, model)
    distance_mm = ndimage.distance_transform_edt(segmented.labels == 0, sampling=chi.voxel_size_mm)
    near = (distance_mm > _NEAR_MM[0]) & (distance_mm < _NEAR_MM[1])
    near &= _inner_brain(chi.array) & ~fluid
    beside_ppm = np.median(chi.array[near])
    regions = {
        name: np.isin(
            segmented.labels, [structure.index for structure in model.structures if structure.nucleus == nucleus]
        )
        for nucleus, name in (("NAC", "accumbens"), ("THA", "thalamus"))
    } | {"lateral ventricle": fluid}
    plane = np.ones((3, 3, 1), bool)
    return {
        f"{name} - brain near nuclei, ppm": float(np.median(chi.array[inner]) - beside_ppm)
        for name, region in regions.items()
        if (inner := ndimage.binary_erosion(region, plane)).sum() >= 20
    }


def measure_scan(chi: Volume, labels: NDArray[np.uint8]) -> dict[str, float]:
    """Measure contrasts and texture of a map in ppm (RAS+) with labels as in structures.tsv."""
    values: dict[str, list[float]] = {}
    means: dict[str, list[float]] = {}
    plane = np.ones((3, 3, 1), bool)
    brain = chi.array != 0
    nuclei = ndimage.binary_dilation(labels > 0, plane, iterations=2)
    for structure in STRUCTURES:
        inner = ndimage.binary_erosion(labels == structure.index, plane) & brain
        if inner.sum() < 20:
            continue
        inside = chi.array[inner].astype(float)
        nucleus = structure.nucleus
        means.setdefault(nucleus, []).append(inside.mean())
        values.setdefault(f"{nucleus} coefficient of variation", []).append(inside.std() / abs(inside.mean()))
        for name, (axis, sign) in _AXES.items():
            place = np.argwhere(inner)[:, axis] * sign * (-1 if axis == 0 and structure.hemisphere == "L" else 1)
            low, high = np.quantile(place, [1 / 3, 2 / 3])
            difference = inside[place >= high].mean() - inside[place <= low].mean()
            values.setdefault(f"{nucleus} ({name}) / mean", []).append(difference / abs(inside.mean()))
        halo = _shell(labels == structure.index, chi) & brain & (labels == 0)
        if halo.any():
            values.setdefault(f"around {nucleus}, 5th percentile, ppm", []).append(np.percentile(chi.array[halo], 5))
            values.setdefault(f"around {nucleus}, median, ppm", []).append(np.median(chi.array[halo]))
    row = {f"{nucleus}, ppm": float(np.mean(sides)) for nucleus, sides in means.items()}
    row |= {name: float(np.mean(sides)) for name, sides in values.items()}
    if {"PUT", "CN"} <= set(means):
        row["PUT - CN, ppm"] = row["PUT, ppm"] - row["CN, ppm"]
    return row | _background(chi.array, brain & ~nuclei)


def _shell(mask: NDArray[np.bool_], chi: Volume) -> NDArray[np.bool_]:
    """Return the voxels up to 4 mm in plane from a mask."""
    steps = max(1, round(_HALO_MM / chi.voxel_size_mm[0]))
    grown: NDArray[np.bool_] = ndimage.binary_dilation(mask, np.ones((3, 3, 1), bool), iterations=steps)
    return grown & ~mask


def _background(chi: NDArray[np.float32], where: NDArray[np.bool_]) -> dict[str, float]:
    """Measure veins and texture outside the nuclei, away from the border of the brain."""
    where = where & _inner_brain(chi)
    detail = chi - ndimage.gaussian_filter(chi, (1.5, 1.5, 0))
    return {
        "background above .1 ppm, %": float(100 * (chi[where] > 0.1).mean()),
        "background below -.08 ppm, %": float(100 * (chi[where] < -0.08).mean()),
        "background SD, ppm": float(chi[where].std()),
        "texture, ppm": float(1.4826 * np.median(np.abs(detail[where]))),
    }


def _inner_brain(chi: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the brain without five voxels at its border, where reconstruction is least reliable."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(chi != 0, iterations=5)
    return inner


if __name__ == "__main__":
    raise SystemExit(main())
