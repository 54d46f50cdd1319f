"""Compare the results of the demo dataset with stored ones: check_output.py OUTPUT_DIR [--write].

The stored values are results of this program (regression values, not a reference). Nuclei may differ by a few voxels at
their border, since PyTorch chooses its kernels by processor and number of threads; each nucleus has its tolerances.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

STORED = Path(__file__).parent
KEYS = ["scan", "abbreviation"]


def list_files(output: Path) -> list[str]:
    """Return the paths of all files; the names of folders of single runs are replaced by RUN."""
    paths = (path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    return sorted(re.sub(r"^logs/\d{8}-\d{6}-\w+/", "logs/RUN/", path) for path in paths)


def read_stats(output: Path) -> pd.DataFrame:
    """Return volume and mean susceptibility per scan and nucleus, with tolerances.

    A volume may change by 3 voxels or 2 %, whatever is more; the mean by as many voxels that are two standard
    deviations away from it, and by 0.0005 ppm.
    """
    tables = []
    for path in sorted(output.rglob("*_stats.tsv")):
        if path.name.startswith("group_"):
            continue
        table = pd.read_csv(path, sep="\t", na_values="n/a")
        share = (3 / table["n_voxels"]).clip(lower=0.02)
        table["scan"] = path.name.partition("_seg-")[0]
        table["volume_tolerance_mm3"] = share * table["volume_mm3"]
        table["mean_tolerance_ppm"] = 2 * share * table["std_ppm"] + 0.0005
        tables.append(table)
    columns = [*KEYS, "volume_mm3", "volume_tolerance_mm3", "mean_ppm", "mean_tolerance_ppm"]
    return pd.concat(tables)[columns].round(5)


def differences(output: Path) -> list[str]:
    """Describe everything that differs from the stored list of files and the stored values."""
    found, expected = list_files(output), (STORED / "demo_files.txt").read_text(encoding="utf-8").split("\n")[:-1]
    lines = [f"missing: {path}" for path in sorted({*expected} - {*found})]
    lines += [f"not expected: {path}" for path in sorted({*found} - {*expected})]
    stored = pd.read_csv(STORED / "demo_stats.tsv", sep="\t").set_index(KEYS)
    values = read_stats(output).set_index(KEYS)
    if list(values.index) != list(stored.index):
        return [*lines, f"scans or nuclei differ: {sorted({*values.index} ^ {*stored.index})}"]
    for quantity in ("volume_mm3", "mean_ppm"):
        tolerance = stored[quantity.replace("_", "_tolerance_")]
        wrong = ~((values[quantity] - stored[quantity]).abs() <= tolerance)
        for key in values.index[wrong]:
            expected_value = f"{stored[quantity][key]:g} ± {tolerance[key]:g}"
            lines.append(f"{' '.join(key)}: {quantity} is {values[quantity][key]:g}, expected {expected_value}")
    return lines


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "--write" in sys.argv:
        (STORED / "demo_files.txt").write_text("".join(f"{path}\n" for path in list_files(folder)), encoding="utf-8")
        read_stats(folder).to_csv(STORED / "demo_stats.tsv", sep="\t", index=False)
    elif problems := differences(folder):
        sys.exit("\n".join(problems))
