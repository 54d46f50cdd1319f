"""Time and memory of the group level on a large study, compared with plain pandas.

    python benchmarks/group_level.py [--scans N] [--folder FOLDER] [--seed S]

Writes synthetic derivatives (16 nuclei per scan, two sessions per participant, eight sites, three groups), runs
``bids_dgmseg ... group`` on them and, for comparison, reads and concatenates the same tables with pandas, each in a
separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from reporting import markdown, measure

from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES

_PEER = """
import sys
from pathlib import Path
import pandas as pd
paths = sorted(Path(sys.argv[1]).glob("sub-*/ses-*/anat/*_stats.tsv"))
table = pd.concat([pd.read_csv(path, sep="\\t", na_values="n/a").assign(file=path.name) for path in paths])
table.to_csv(sys.argv[2], sep="\\t", index=False, na_rep="n/a")
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the derivatives, run both programs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=10_000, help="number of scans (default: 10000)")
    parser.add_argument("--folder", type=Path, help="folder to keep the derivatives in (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "ds").exists():
            write_derivatives(folder, args.scans, np.random.default_rng(args.seed))
        out = str(folder / "out")
        commands = {
            "bids_dgmseg group: all tables and statistics": [
                *(sys.executable, "-m", "bids_dgmseg", str(folder / "ds"), out, "group"),
                *("--controls", "HC"),
            ],
            "pandas: read and concatenate the same tables": [
                *(sys.executable, "-c", _PEER, out, str(folder / "peer.tsv"))
            ],
        }
        usage = pd.DataFrame({name: vars(measure(command)) for name, command in commands.items()}).T
        print(f"\n{args.scans} scans of {len(STRUCTURES)} nuclei, {os.cpu_count()} cores\n")
        print(markdown(usage.rename_axis("command"), {"seconds": 0, "cpu_seconds": 0, "peak_gb": 2}))
    return 0


def write_derivatives(folder: Path, n_scans: int, rng: np.random.Generator) -> None:
    """Write the tables of the participant level, without images."""
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
            (anat / f"{scan}_qc.json").write_text(json.dumps(QC))
    (folder / "ds" / "participants.tsv").write_text("\n".join(lines) + "\n")


QC = {
    "scan": "a scan",
    "model": "dgm16",
    "warnings": [],
    "box_mm": {"low": [-50, -80, -60], "high": [50, 40, 50]},
    "input": {"file": "a_Chimap.nii.gz", "units": "ppm", "reference": "whole-brain", "shape": [160, 160, 96]},
}


def draw_rows(age: float, rng: np.random.Generator) -> list[str]:
    """Draw the rows of one scan, with a value in every column of the statistics."""
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
    raise SystemExit(main())
