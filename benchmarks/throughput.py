"""Time of the participant level on one core and on two: seconds of the run, and of each step.

    python benchmarks/throughput.py [--scans N] [--map FILE]

Participants with copies of one map, by default a simulated head (anatomy of the phantom) of 256 x 256 x 52 voxels, are
processed by the app with its default options, first on one CPU, then on two: a run that uses both fully takes half the
time. Seconds of a step are those of its node, mean over the scans, from the log of the run; CPU seconds, which a busy
machine changes less, are those of its process. For Linux, whose processes can be confined to CPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from reporting import markdown

from bids_dgmseg.arguments import positive_int
from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset

_SHAPE, _SPACING_MM = (256, 256, 52), (0.9375, 0.9375, 3.0)
_LOGGED = re.compile(r"(?P<step>\w+): (?P<seconds>[\d.]+) s, CPU (?P<cpu_seconds>[\d.]+) s$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app on one and two CPUs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=positive_int, default=8, help="number of maps (default: 8)")
    parser.add_argument("--map", type=Path, help="chi map in ppm (default: a simulated head)")
    args = parser.parse_args(argv)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        parser.error("needs two CPUs")
    with tempfile.TemporaryDirectory() as folder:
        root, load = Path(folder), os.getloadavg()[0]
        write_study(root / "ds", args.map or simulate_map(root), args.scans)
        single, double = (run_app(root / "ds", root / f"out_{n}", cpus[:n]) for n in (1, 2))
    table = single.add_suffix(", 1 core").join(double.add_suffix(", 2 cores"))
    print(f"{args.scans} scans, load {load:.0f} before; steps: mean per scan\n\n{markdown(table, 2)}\n")
    print(f"Time on two cores over time on one: {double['seconds'].iloc[-1] / single['seconds'].iloc[-1]:.2f}")
    return 0


def simulate_map(root: Path) -> Path:
    """Write a simulated head on thick slices."""
    list(simulate_dataset(root / "heads", n_scans=1, seed=2))  # all nuclei are found
    chi = Volume.read(next((root / "heads").glob("sub-*/anat/*_Chimap.nii.gz")))
    affine = np.diag([*_SPACING_MM, 1.0])
    centre = chi.affine @ [*((np.array(chi.shape) - 1) / 2), 1]
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ ((np.array(_SHAPE) - 1) / 2)
    thick = resample(chi, Grid(_SHAPE, affine), antialias=True)
    nib.Nifti1Image(thick.array, thick.affine).to_filename(root / "head.nii.gz")
    return root / "head.nii.gz"


def write_study(root: Path, chi: Path, n_scans: int) -> None:
    """Write a dataset whose participants have the same map."""
    for number in range(1, n_scans + 1):
        anat = root / f"sub-{number:02d}" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{number:02d}_Chimap.json").write_text('{"Units": "ppm"}', encoding="utf-8")
        shutil.copyfile(chi, anat / f"sub-{number:02d}_Chimap.nii.gz")
    (root / "dataset_description.json").write_text('{"Name": "One map", "BIDSVersion": "1.10.0"}', encoding="utf-8")


def run_app(dataset: Path, out: Path, cpus: Sequence[int]) -> pd.DataFrame:
    """Process a dataset on some CPUs: seconds and CPU seconds per step and scan, and of the whole run."""
    command = [sys.executable, "-m", "bids_dgmseg", str(dataset), str(out), "participant", "--skip-bids-validation"]
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        start_s = time.monotonic()
        subprocess.run([*command, "-w", str(out.with_suffix(".work"))], check=True, stdout=subprocess.DEVNULL)
        whole_s = time.monotonic() - start_s
    finally:
        os.sched_setaffinity(0, every)
    (log,) = out.glob("logs/*/nipype.log")
    steps = pd.DataFrame([match.groupdict() for match in _LOGGED.finditer(log.read_text(encoding="utf-8"))])
    values = steps.astype({"seconds": float, "cpu_seconds": float})
    table = values.groupby("step", sort=False).mean()
    table.loc["whole run"] = [whole_s, values["cpu_seconds"].sum()]
    return table


if __name__ == "__main__":
    raise SystemExit(main())
