"""Compare the results of the demo dataset with its truth.tsv: check_output.py DATASET OUTPUT_DIR."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

VOLUME_TOLERANCE, VOLUME_TOLERANCE_MM3, MEAN_TOLERANCE = 0.05, 20, 0.25
"""Voxels at the border may belong to either side: a few of them in small nuclei. They also lower the mean."""
CUT_SCAN, CUT_NUCLEI = "sub-06_ses-1", "DN|IN|SN"
"""What the field of view of a scan cuts or leaves out."""
N_MASKS = 16 + 2
"""Nuclei, brain and cerebellum."""


def find_problems(dataset: Path, output: Path) -> Iterator[str]:
    """Describe missing files, and nuclei whose volume or mean susceptibility is not the true one."""
    truth = pd.read_csv(dataset / "derivatives" / "truth" / "truth.tsv", sep="\t").set_index(["scan", "abbreviation"])
    scans = list(dict.fromkeys(truth.index.get_level_values("scan")))
    pages = sorted({f"{scan.split('_')[0]}.html" for scan in scans})
    yield from (f"missing: {name}" for name in ("group.html", *pages) if not (output / name).is_file())
    for scan in scans:
        folder = output.joinpath(*scan.split("_"), "anat")
        for ending in ("dseg.nii.gz", "dseg.json", "probseg.nii.gz", "probseg.json", "stats.tsv", "stats.json"):
            if not (path := folder / f"{scan}_seg-dgm16_{ending}").is_file():
                yield f"missing: {path}"
        if (n_masks := len(list(folder.glob(f"{scan}_*label-*_mask.nii.gz")))) != N_MASKS:
            yield f"{scan}: {n_masks} masks, expected {N_MASKS}"
        if (table := path.with_suffix(".tsv")).is_file():
            yield from compare(pd.read_csv(table, sep="\t", na_values="n/a").set_index("abbreviation"), truth, scan)


def compare(stats: pd.DataFrame, truth: pd.DataFrame, scan: str) -> Iterator[str]:
    """Describe the rows of a table that differ from the truth."""
    expected = truth.loc[scan]
    if scan == CUT_SCAN:
        expected = expected[~expected.index.str.match(CUT_NUCLEI)]
    measured = stats.reindex(expected.index)
    columns = {"volume_mm3": (VOLUME_TOLERANCE, VOLUME_TOLERANCE_MM3), "mean_ppm": (MEAN_TOLERANCE, 0.0)}
    for column, (share, rest) in columns.items():
        difference = (measured[column] - expected[column]).abs()
        for name in expected.index[~(difference <= share * expected[column] + rest)]:  # NaN is a difference
            yield f"{scan} {name}: {column} is {measured[column][name]:g}, expected about {expected[column][name]:g}"


if __name__ == "__main__":
    if problems := list(find_problems(Path(sys.argv[1]), Path(sys.argv[2]))):
        sys.exit("\n".join(problems))
