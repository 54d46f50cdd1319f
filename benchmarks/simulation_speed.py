"""Speed of drawing simulated maps, compared with the training steps that use them.

    python benchmarks/simulation_speed.py [--template LABELS] [--maps N] [--device cpu|cuda] [--seed S]

Draws samples as ``dgmseg train-simulated`` (segmenter) does, with voxels of 1 mm: on a CPU with one thread, as a worker
does, or on a GPU. For comparison, takes training steps on these samples from memory with all cores or the GPU. On a CPU
the network never waits for samples if the last ratio is above 1 and the worker has a core; a GPU does both in turn.
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

import pandas as pd
import torch
from reporting import markdown
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.arguments import positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.lab.train.core import Run, State, StepSchedule, train, use_all_cores
from bids_dgmseg.lab.train.losses import DiceCrossEntropyLoss
from bids_dgmseg.lab.train.simulated import mix_in_typical_maps, simulated_maps
from bids_dgmseg.models.model_folder import load_weights, pick_device, segmenter_network, to_channels_last
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.resources import keep_freed_memory

_UNTIMED = 3
"""Warm-up: kernels are chosen and memory is allocated."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time drawing and training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, help="label template (default: the phantom alone)")
    parser.add_argument("--maps", type=positive_int, default=30, help="number of samples (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--seed", type=seed, default=1)
    args = parser.parse_args(argv)
    return run_command("simulation_speed", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    use_all_cores()
    keep_freed_memory()
    device = pick_device(args.device)
    draw_s, samples = draw(args.template, args.maps + _UNTIMED, args.seed, device)
    step_s = learn(samples, device)
    per_sample, per_step = (sum(seconds[_UNTIMED:]) / args.maps for seconds in (draw_s, step_s))
    worker, trainer = ("1 core", f"{torch.get_num_threads()} cores") if device.type == "cpu" else ("GPU", "GPU")
    rows = [
        {"": "samples drawn", "on": worker, "per second": 1 / per_sample, "seconds each": per_sample},
        {"": "training steps", "on": trainer, "per second": 1 / per_step, "seconds each": per_step},
    ]
    print(markdown(pd.DataFrame(rows), 2))
    print(f"\nSamples drawn on {worker} per training step on {trainer}: {per_step / per_sample:.2f}")
    return 0


def draw(
    template: Path | None, number: int, seed: int, device: torch.device
) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Draw samples; return the seconds per sample and the samples."""
    model = get_model("dgm16")
    maps = mix_in_typical_maps(simulated_maps(model, template, "segmenter", seed=seed, device=device), model)
    seconds, samples = [], []
    for index in range(number):
        started = now(device)
        samples.append(maps[index])
        seconds.append(now(device) - started)
    return seconds, samples


def learn(samples: list[tuple[Tensor, Tensor]], device: torch.device) -> list[float]:
    """Train the shipped network on each sample; return the seconds per step."""
    model, schedule = get_model("dgm16"), StepSchedule(steps=len(samples))
    network = load_weights(segmenter_network(model), model, "segmenter").requires_grad_(True)
    state = State.start(to_channels_last(network, device), schedule)
    times = [now(device)]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            schedule,
            DiceCrossEntropyLoss(),
            Path(folder) / "checkpoint.pt",
            device=device,
            checkpoint_minutes=math.inf,
        )
        train(
            state,
            cast("Dataset[tuple[Tensor, Tensor]]", samples),
            run,
            report=lambda state, result: times.append(now(device)),
        )
    return [after - before for before, after in pairwise(times)]


def now(device: torch.device) -> float:
    """Return the time after all operations of a device have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
