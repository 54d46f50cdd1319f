"""Accuracy of reconstructed chi maps and of segmentations on them, compared with other inputs.

    python benchmarks/reconstruction.py --template LABELS.nii.gz [--heads N] [--seed S] [--spacing MM] [--out FILE.tsv]
    python benchmarks/reconstruction.py --memory

Simulates echoes of heads at 3 T, reconstructs them from all echoes, with the true brain mask and from the last echo
only, and segments every map with the shipped model. The table gives means over heads: correlation with the true
susceptibility in the brain; slope of the contrast of nuclei to their surroundings against the true one; largest error
of a contrast; Dice with the true labels; seconds. ``--memory`` compares the memory of processes with the estimate.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from reporting import markdown
from scipy import ndimage

from bids_dgmseg.cli.options import positive_float, positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.qsm.reconstruct import estimate_memory_gb, reconstruct_chi
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.label_template import read_template
from bids_dgmseg.simulate.sample import draw_head, nuclei_labels, template_head
from bids_dgmseg.simulate.signal import Echoes, draw_echoes
from bids_dgmseg.simulate.simulated_dataset import scanner_grid, whole_head_view
from bids_dgmseg.stats.overlap import dice

_FIRST_SEED = 4 * 10**13
"""Of heads not used in training."""
_SURROUNDINGS_MM = 4.0
_MIN_TISSUE = 0.5
"""A contrast counts if at least this fraction of the surroundings is tissue, not nuclei or background."""

SIZES = (
    ((64, 192, 128), (1.0, 1.0, 1.0), 4),
    ((160, 192, 128), (1.0, 1.0, 1.0), 2),
    ((160, 192, 128), (1.0, 1.0, 1.0), 8),
    ((256, 256, 160), (0.9, 0.9, 1.0), 4),
    ((256, 256, 48), (0.9, 0.9, 3.0), 5),
)
"""Shape, voxel size in mm and number of echoes."""

Inputs = Callable[[Echoes, NDArray[np.bool_]], Mapping[str, Any]]
"""Maps echoes and the true brain mask to arguments of `reconstruct_chi`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare reconstructions, or measured and estimated memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--template", type=Path, help="label template from `dgmseg template`")
    what.add_argument("--memory", action="store_true", help="compare measured and estimated memory")
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--spacing", type=positive_float, default=1.0, help="voxel size in mm (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all results as TSV")
    args = parser.parse_args(argv)
    return run_command("reconstruction", lambda: _compare_memory() if args.memory else _run(args))


def _run(args: argparse.Namespace) -> int:
    head, view, rows = template_head(read_template(args.template)), whole_head_view(args.spacing), []
    for number in range(args.heads):
        generator = torch.Generator().manual_seed(_FIRST_SEED + 1_000_000 * args.seed + number)
        chi, labels = draw_head([(head, 1.0)], view, generator)
        echoes = draw_echoes(chi, labels, voxel_size_mm=(args.spacing,) * 3, generator=generator)
        for inputs, options in INPUTS.items():
            started = time.monotonic()
            result = reconstruct_chi(**options(echoes, labels.numpy() > 0), voxel_size_mm=(args.spacing,) * 3)
            seconds = time.monotonic() - started
            found = Volume(result.chi_ppm, scanner_grid(view).affine)
            truth = found.with_array(labels.numpy())
            rows.append(
                {"head": number, "inputs": inputs, **score(found, result.mask, chi.numpy(), truth), "seconds": seconds}
            )
            sys.stderr.write(f"head {number + 1}: {inputs}\n")
    table = pd.DataFrame(rows)
    print(as_markdown(table))
    if args.out:
        table.to_csv(args.out, sep="\t", index=False)
    return 0


def _compare_memory() -> int:
    rows = []
    for shape, edges_mm, n_echoes in SIZES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            measured = fresh.submit(measure_memory, shape, edges_mm, n_echoes).result()
        rows.append(
            {
                "voxels": " × ".join(map(str, shape)),
                "voxel size, mm": " × ".join(map(str, edges_mm)),
                "echoes": n_echoes,
                "estimated, GB": estimate_memory_gb(shape, edges_mm, n_echoes=n_echoes),
                "measured, GB": measured,
            }
        )
    print(markdown(pd.DataFrame(rows), 1))
    return 0


def measure_memory(shape: tuple[int, int, int], edges_mm: tuple[float, float, float], n_echoes: int) -> float:
    """Reconstruct an ellipsoid with a linear field and noise; return the peak memory of the process in GB."""
    random = np.random.default_rng(0)
    sides = (np.linspace(-1.15, 1.15, size, dtype=np.float32) for size in shape)
    x, y, z = np.meshgrid(*sides, indexing="ij", sparse=True)
    inside = x**2 + y**2 + z**2 < 1
    rate = 4 * z + 0.05 * random.standard_normal(shape, np.float32)
    phase, magnitude = (np.empty((n_echoes, *shape), np.float32) for _ in range(2))
    for echo in range(n_echoes):
        phase[echo] = np.remainder(rate * (echo + 1) + math.pi, 2 * math.pi) - math.pi
        magnitude[echo] = 100 * inside + random.random(shape, np.float32)
    del rate, inside
    times_s = [0.005 * (echo + 1) for echo in range(n_echoes)]
    reconstruct_chi(phase, magnitude, echo_times_s=times_s, b0_tesla=3.0, voxel_size_mm=edges_mm)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _all_echoes(echoes: Echoes, brain: NDArray[np.bool_]) -> dict[str, Any]:
    return _some_echoes(echoes, range(len(echoes.echo_times_s)))


def _true_mask(echoes: Echoes, brain: NDArray[np.bool_]) -> dict[str, Any]:
    return {**_all_echoes(echoes, brain), "mask": brain}


def _last_echo(echoes: Echoes, brain: NDArray[np.bool_]) -> dict[str, Any]:
    return _some_echoes(echoes, [len(echoes.echo_times_s) - 1])


def _some_echoes(echoes: Echoes, which: Sequence[int]) -> dict[str, Any]:
    return {
        "phase": echoes.phase[list(which)].numpy(),
        "magnitude": echoes.magnitude[list(which)].numpy(),
        "echo_times_s": [echoes.echo_times_s[echo] for echo in which],
        "b0_tesla": echoes.b0_tesla,
    }


INPUTS: Mapping[str, Inputs] = {
    "four echoes": _all_echoes,
    "four echoes, true brain mask": _true_mask,
    "last echo only": _last_echo,
}


def score(found: Volume, mask: NDArray[np.bool_], chi: NDArray[np.float32], truth: Volume) -> dict[str, float]:
    """Compare a map, and the model's labels on it, with the truth."""
    inside, model = mask & (truth.array > 0), get_model("default")
    nuclei = found.with_array(nuclei_labels(torch.from_numpy(truth.array)).numpy())
    overlap = dice(nuclei.array, segment_map(found, model).labels, structures=model.structures)
    contrasts = np.array(list(contrasts_ppm(truth, (chi, found.array))))
    slope, _ = np.polyfit(contrasts[:, 0], contrasts[:, 1], 1)
    return {
        "correlation": float(np.corrcoef(chi[inside], found.array[inside])[0, 1]),
        "slope": float(slope),
        "largest_error_ppm": float(np.abs(contrasts[:, 1] - contrasts[:, 0]).max()),
        "dice": float(overlap["dice"].mean()),
    }


def contrasts_ppm(truth: Volume, maps: Sequence[NDArray[np.float32]]) -> Iterator[tuple[float, ...]]:
    """Yield the contrast of each nucleus to the tissue within 4 mm, in each of several maps."""
    for structure in STRUCTURES:
        nucleus = truth.array == structure.index
        near = ndimage.distance_transform_edt(~nucleus, sampling=truth.voxel_size_mm) <= _SURROUNDINGS_MM
        around = near & (truth.array > len(STRUCTURES))
        if nucleus.any() and around.sum() > _MIN_TISSUE * (near & ~nucleus).sum():
            yield tuple(float(chi[nucleus].mean() - chi[around].mean()) for chi in maps)


def as_markdown(table: pd.DataFrame) -> str:
    """Format the means over heads, one row per input."""
    means = table.drop(columns="head").groupby("inputs", sort=False).mean().rename_axis("map from")
    columns = {"largest_error_ppm": "largest error, ppm", "dice": "mean Dice", "seconds": "s"}
    return markdown(means.rename(columns=columns), {"slope": 2, "s": 0})


if __name__ == "__main__":
    raise SystemExit(main())
