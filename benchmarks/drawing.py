"""How quickly maps are drawn, beside the training that learns from them.

    python benchmarks/drawing.py [--template LABELS] [--maps N] [--device cpu|cuda] [--seed S]

Draws samples as ``dgmseg train-simulated`` (segmenter) does, voxels of 1 mm: on a CPU with one thread, as a worker
of the training; on a GPU on it. The peer, in the same run: steps of that training on these samples, which wait in
memory, with all cores or on the GPU. Prints Markdown: samples and steps a second, and their ratio. On a CPU the
network waits for no map where it is above 1, if the worker has a core of its own; a GPU draws and learns in turn.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.cli.options import positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.weights import load_weights, pick_device, segmenter_network, to_channels_last
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.train.loop import Progress, Schedule, train, use_cores
from bids_dgmseg.train.simulated import among_ordinary, simulated_maps

_UNTIMED = 3
"""First samples and steps, in which kernels are chosen and memory is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, help="label template (default: the phantom alone)")
    parser.add_argument("--maps", type=positive_int, default=30, help="to time (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--seed", type=seed, default=1)
    args = parser.parse_args(argv)
    return run_command("drawing", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    use_cores()
    keep_freed_memory()
    device = pick_device(args.device)
    drawn, samples = draw(args.template, args.maps + _UNTIMED, args.seed, device)
    taken = learn(samples, device)
    per_sample, per_step = (sum(seconds[_UNTIMED:]) / args.maps for seconds in (drawn, taken))
    one, all_of_them = ("1 core", f"{torch.get_num_threads()} cores") if device.type == "cpu" else ("GPU", "GPU")
    print("| | on | a second | seconds each |\n| --- | --- | --- | --- |")
    print(f"| samples drawn | {one} | {1 / per_sample:.2f} | {per_sample:.2f} |")
    print(f"| steps of training | {all_of_them} | {1 / per_step:.2f} | {per_step:.2f} |")
    print(f"\nSamples drawn on {one} while a step is taken on {all_of_them}: {per_step / per_sample:.2f}")
    return 0


def draw(
    template: Path | None, number: int, seed: int, device: torch.device
) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Draw samples; returns the seconds that each took, and them."""
    model = get_model("dgm16")
    maps = among_ordinary(simulated_maps(model, template, "segmenter", seed=seed, device=device), model)
    seconds, samples = [], []
    for index in range(number):
        started = now(device)
        samples.append(maps[index])
        seconds.append(now(device) - started)
    return seconds, samples


def learn(samples: list[tuple[Tensor, Tensor]], device: torch.device) -> list[float]:
    """Take one step on each sample, with the shipped network; returns the seconds that each took."""
    model, schedule = get_model("dgm16"), Schedule(steps=len(samples), checkpoint_minutes=math.inf)
    network = load_weights(segmenter_network(model), model, "segmenter").requires_grad_(True)
    progress = Progress.start(to_channels_last(network, device), schedule)
    times = [now(device)]
    with tempfile.TemporaryDirectory() as folder:
        train(
            progress,
            cast("Dataset[tuple[Tensor, Tensor]]", samples),
            schedule=schedule,
            checkpoint=Path(folder) / "checkpoint.pt",
            minutes=math.inf,
            device=device,
            report=lambda reached: times.append(now(device)),
            workers=0,
        )
    return [after - before for before, after in pairwise(times)]


def now(device: torch.device) -> float:
    """Tell the time when all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
