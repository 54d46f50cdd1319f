"""How true maps are that are made of echoes, and what a model finds on them.

    python benchmarks/reconstruction.py --template LABELS.nii.gz [--heads N] [--seed S] [--spacing MM] [--out FILE.tsv]
    python benchmarks/reconstruction.py --memory

Draws heads with their echoes at 3 T, reconstructs them as the program does and in other ways, segments every map with
the shipped model and prints Markdown, means of the heads: correlation with the true susceptibility in the brain; slope
of the nuclei's contrast to what lies around them over the true one; largest error of such a contrast; Dice with the
true labels; seconds. `--memory` prints, for some sizes of echoes, the memory that a process took beside what the
program plans for it.
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
from scipy import ndimage

from bids_dgmseg.cli.options import positive_float, positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.qsm.reconstruct import estimate_memory_gb, reconstruct_chi
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.dataset import read_template, scanner_grid, whole_head_view
from bids_dgmseg.simulate.echoes import Echoes, draw_echoes
from bids_dgmseg.simulate.sample import draw_head, nuclei_labels, template_head
from bids_dgmseg.stats.overlap import dice

_FIRST_SEED = 4 * 10**13
"""Of heads that nothing was trained on."""
_AROUND_MM = 4.0
_SHARE = 0.5
"""Of the voxels around a nucleus that must be no nucleus for its contrast to count."""

SIZES = (
    ((64, 192, 128), (1.0, 1.0, 1.0), 4),
    ((160, 192, 128), (1.0, 1.0, 1.0), 2),
    ((160, 192, 128), (1.0, 1.0, 1.0), 8),
    ((256, 256, 160), (0.9, 0.9, 1.0), 4),
    ((256, 256, 48), (0.9, 0.9, 3.0), 5),
)
"""Voxels, their edges in mm, echoes: whose memory is compared."""

Way = Callable[[Echoes, NDArray[np.bool_]], Mapping[str, Any]]
"""From echoes and the true brain to arguments of `reconstruct_chi`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--template", type=Path, help="label template, as `dgmseg template` writes it")
    what.add_argument("--memory", action="store_true", help="print the memory of some sizes instead")
    parser.add_argument("--heads", type=positive_int, default=4, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument(
        "--spacing", type=positive_float, default=1.0, help="edge of the voxels in mm (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="all figures as TSV")
    args = parser.parse_args(argv)
    return run_command("reconstruction", lambda: _compare_memory() if args.memory else _run(args))


def _run(args: argparse.Namespace) -> int:
    head, view, rows = template_head(read_template(args.template)), whole_head_view(args.spacing), []
    for number in range(args.heads):
        generator = torch.Generator().manual_seed(_FIRST_SEED + 1_000_000 * args.seed + number)
        chi, labels = draw_head([(head, 1.0)], view, generator)
        echoes = draw_echoes(chi, labels, voxel_size_mm=(args.spacing,) * 3, generator=generator)
        for way, options in WAYS.items():
            started = time.monotonic()
            done = reconstruct_chi(**options(echoes, labels.numpy() > 0), voxel_size_mm=(args.spacing,) * 3)
            seconds = time.monotonic() - started
            found = Volume(done.chi_ppm, scanner_grid(view).affine)
            truth = found.with_array(labels.numpy())
            rows.append({"head": number, "way": way, **judge(found, done.mask, chi.numpy(), truth), "seconds": seconds})
            sys.stderr.write(f"head {number + 1}: {way}\n")
    table = pd.DataFrame(rows)
    print(as_markdown(table))
    if args.out:
        table.to_csv(args.out, sep="\t", index=False)
    return 0


def _compare_memory() -> int:
    print("| voxels | edges, mm | echoes | planned, GB | taken, GB |\n" + "| --- " * 5 + "|")
    for shape, edges_mm, n_echoes in SIZES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            taken = fresh.submit(take_memory, shape, edges_mm, n_echoes).result()
        planned = estimate_memory_gb(shape, edges_mm, n_echoes=n_echoes)
        voxels, edges = (" × ".join(map(str, sizes)) for sizes in (shape, edges_mm))
        print(f"| {voxels} | {edges} | {n_echoes} | {planned:.1f} | {taken:.1f} |", flush=True)
    return 0


def take_memory(shape: tuple[int, int, int], edges_mm: tuple[float, float, float], n_echoes: int) -> float:
    """Reconstruct a bright ellipsoid whose field is noise on a slope, and tell the process's peak in GB."""
    random = np.random.default_rng(0)
    sides = (np.linspace(-1.15, 1.15, size, dtype=np.float32) for size in shape)
    x, y, z = np.meshgrid(*sides, indexing="ij", sparse=True)
    inside = x**2 + y**2 + z**2 < 1
    turn = 4 * z + 0.05 * random.standard_normal(shape, np.float32)
    phase, magnitude = (np.empty((n_echoes, *shape), np.float32) for _ in range(2))
    for echo in range(n_echoes):
        phase[echo] = np.remainder(turn * (echo + 1) + math.pi, 2 * math.pi) - math.pi
        magnitude[echo] = 100 * inside + random.random(shape, np.float32)
    del turn, inside
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


WAYS: Mapping[str, Way] = {
    "four echoes": _all_echoes,
    "with the true mask of the brain": _true_mask,
    "the last echo alone": _last_echo,
}


def judge(found: Volume, mask: NDArray[np.bool_], chi: NDArray[np.float32], truth: Volume) -> dict[str, float]:
    """Compare a map with the truth, and the model's labels on it with the true ones."""
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
    """Yield how far each nucleus stands out from what lies around it and is no nucleus, in each of some maps."""
    for structure in STRUCTURES:
        nucleus = truth.array == structure.index
        near = ndimage.distance_transform_edt(~nucleus, sampling=truth.voxel_size_mm) <= _AROUND_MM
        around = near & (truth.array > len(STRUCTURES))
        if nucleus.any() and around.sum() > _SHARE * (near & ~nucleus).sum():
            yield tuple(float(chi[nucleus].mean() - chi[around].mean()) for chi in maps)


def as_markdown(table: pd.DataFrame) -> str:
    """Lay the means of the heads out, a row a way."""
    lines = ["| map of | correlation | slope | largest error, ppm | mean Dice | s |", "| --- " * 6 + "|"]
    for way, rows in table.groupby("way", sort=False):
        mean = rows.mean(numeric_only=True)
        lines.append(
            f"| {way} | {mean.correlation:.3f} | {mean.slope:.2f} | {mean.largest_error_ppm:.3f} | {mean.dice:.3f} | "
            f"{mean.seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
