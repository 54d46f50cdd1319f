"""How long the group level takes on a study of many scans, and how much memory, beside plain pandas.

    python benchmarks/group.py [--scans N] [--folder FOLDER] [--seed S]

Writes a synthetic output tree (16 nuclei a scan, two sessions a participant, eight sites, three groups), runs
``bids_dgmseg ... group`` on it and, as a peer, pandas' read_csv and concat of the same tables, each in a process of its
own. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES

_PEER = """
import sys
from pathlib import Path
import pandas as pd
paths = sorted(Path(sys.argv[1]).glob("sub-*/ses-*/anat/*_stats.tsv"))
table = pd.concat([pd.read_csv(path, sep="\\t", na_values="n/a").assign(file=path.name) for path in paths])
table.to_csv(sys.argv[2], sep="\\t", index=False, na_rep="n/a")
"""


def main() -> None:
    """Write the tree, run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=10_000, help="number of scans (default: 10000)")
    parser.add_argument("--folder", type=Path, help="where the tree goes, kept; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "ds").exists():
            write_tree(folder, args.scans, np.random.default_rng(args.seed))
        print(f"\n{args.scans} scans of {len(STRUCTURES)} nuclei, {os.cpu_count()} cores\n")
        print("| command | seconds | CPU seconds | memory (GB) |\n| --- | --- | --- | --- |")
        command = [
            sys.executable,
            "-m",
            "bids_dgmseg",
            str(folder / "ds"),
            str(folder / "out"),
            "group",
            "--control-filter",
            'group == "HC"',
        ]
        measure("bids_dgmseg group: all tables and statistics", command)
        peer = [sys.executable, "-c", _PEER, str(folder / "out"), str(folder / "peer.tsv")]
        measure("pandas read_csv and concat of the same tables: group_stats.tsv alone", peer)


def measure(name: str, command: list[str]) -> None:
    """Run a command by a process of its own, whose largest child is the command: that is the memory printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"| {name} | {seconds:.0f} | {cpu:.0f} | {int(done.stdout.split()[-1]) / 2**20:.2f} |", flush=True)


def write_tree(folder: Path, n_scans: int, rng: np.random.Generator) -> None:
    """Write what the participant level leaves of each scan, without images."""
    header = "\t".join(STATS_COLUMNS)
    lines = ["participant_id\tage\tsex\tgroup\tsite"]
    for number in range(n_scans // 2):
        age, label = rng.uniform(20, 80), f"{number:05d}"
        sex, group, site = rng.choice(["F", "M"]), rng.choice(["HC", "PD", "MSA"]), rng.choice(list("ABCDEFGH"))
        lines.append(f"sub-{label}\t{age:.1f}\t{sex}\t{group}\t{site}")
        sessions = folder / "ds" / f"sub-{label}" / f"sub-{label}_sessions.tsv"
        sessions.parent.mkdir(parents=True)
        sessions.write_text(f"session_id\tage\nses-1\t{age:.1f}\nses-2\t{age + 2:.1f}\n")
        for session in (1, 2):
            scan = f"sub-{label}_ses-{session}_seg-dgm16"
            anat = folder / "out" / f"sub-{label}" / f"ses-{session}" / "anat"
            anat.mkdir(parents=True)
            (anat / f"{scan}_stats.tsv").write_text("\n".join([header, *draw_rows(age + 2 * session, rng)]) + "\n")
            (anat / f"{scan}_qc.json").write_text(json.dumps(QUALITY))
    (folder / "ds" / "participants.tsv").write_text("\n".join(lines) + "\n")


QUALITY = {
    "scan": "a scan",
    "model": "dgm16",
    "warnings": [],
    "box_mm": {"low": [-50, -80, -60], "high": [50, 40, 50]},
    "input": {"file": "a_Chimap.nii.gz", "units": "ppm", "reference": "whole-brain", "shape": [160, 160, 96]},
}


def draw_rows(age: float, rng: np.random.Generator) -> list[str]:
    """Draw the rows of one scan, a value in every column of the statistics."""
    means, volumes = 0.1 * (1 - np.exp(-0.05 * age)) + rng.normal(0, 0.01, 16), rng.normal(700, 80, 16)
    rows = []
    for structure, mean, volume in zip(STRUCTURES, means, volumes, strict=True):
        values = dict.fromkeys(STATS_COLUMNS, str(mean)) | {
            "index": str(structure.index),
            "name": structure.name,
            "abbreviation": structure.abbreviation,
            "hemisphere": structure.hemisphere,
            "n_voxels": str(int(volume)),
            "volume_mm3": str(volume),
        }
        rows.append("\t".join(values.values()))
    return rows


if __name__ == "__main__":
    main()
