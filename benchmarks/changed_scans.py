"""Detection of maps with another scale or zero at the group level, on simulated tables.

    python benchmarks/changed_scans.py [--studies N] [--seed S]

People of one site differ in all nuclei together and in each nucleus by the same standard deviation, and by 5 % between
the sides. One map is multiplied, or its zero is moved. Prints how often it is named (%), and how many of the unchanged
scans are. The peer is a z-score of each nucleus alone: the changed map counts as found if most of its nuclei are
outliers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bids_dgmseg.arguments import positive_int
from bids_dgmseg.stats.outliers import find_changed_scans, robust_z

PPM = {"CN": 0.045, "PUT": 0.04, "GP": 0.13, "RN": 0.1, "SN": 0.11, "STN": 0.085, "DN": 0.12, "IN": 0.06}
CHANGES = {"x 0.5": (0.5, 0.0), "x 2": (2.0, 0.0), "+ 0.03 ppm": (1.0, 0.03), "- 0.03 ppm": (1.0, -0.03)}
SPREADS, SIZES = (0.10, 0.15), (10, 20, 60)


def simulate(rng: np.random.Generator, *, n_scans: int, spread: float) -> pd.DataFrame:
    """Draw the susceptibilities of the nuclei of people at one site."""
    names = list(PPM)
    common = 1 + spread * rng.standard_normal((n_scans, 1, 1))
    nucleus = 1 + spread * rng.standard_normal((n_scans, len(names), 1))
    sides = 1 + 0.05 * rng.standard_normal((n_scans, len(names), 2))
    values = np.array(list(PPM.values()))[None, :, None] * common * nucleus * sides
    scan, which, side = np.indices(values.shape).reshape(3, -1)
    abbreviations = [f"{names[number]}_{'LR'[other]}" for number, other in zip(which, side, strict=True)]
    return pd.DataFrame(
        {"scan": scan, "model": "m", "site": "A", "abbreviation": abbreviations, "value": values.ravel()}
    )


def find(table: pd.DataFrame) -> tuple[set[int], set[int]]:
    """Return the scans that the program names, and those of which most nuclei are outliers."""
    scores = robust_z(table, value="value", by=("model", "abbreviation"))
    expected = table.assign(**scores[["expected", "median", "n_site"]])
    flagged = find_changed_scans(expected, value="value", by=("model",), with_shift=True)
    alone = scores["outlier"].groupby(table["scan"]).mean()
    return set(flagged.loc[flagged["outlier"], "scan"]), set(alone.index[alone > 0.5])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=positive_int, default=100, help="per row (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    print("| people differ by | scans | change | found | found by single nuclei | others named |")
    print("| --- | --- | --- | --- | --- | --- |")
    for spread in SPREADS:
        for n_scans in SIZES:
            for name, (factor, shift) in CHANGES.items():
                counts = np.zeros(3)
                for _ in range(args.studies):
                    table = simulate(rng, n_scans=n_scans, spread=spread)
                    changed = table["scan"] == 0
                    table.loc[changed, "value"] = factor * table.loc[changed, "value"] + shift
                    named, alone = find(table)
                    counts += [0 in named, 0 in alone, len(named - {0}) / (n_scans - 1)]
                rates = " | ".join(f"{rate:.0f} %" for rate in 100 * counts / args.studies)
                print(f"| {100 * spread:.0f} % | {n_scans} | {name} | {rates} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
