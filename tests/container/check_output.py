"""Compare the results of the demo dataset with the truth of its phantom: check_output.py DATASET OUTPUT_DIR."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bids_dgmseg.phantom.head import PHANTOM

VOLUME_TOLERANCE, VOLUME_TOLERANCE_MM3, MEAN_TOLERANCE = 0.05, 20, 0.2
"""Voxels at the border may belong to either side: a few of them in small nuclei. They also lower the mean."""


def find_problems(dataset: Path, output: Path) -> Iterator[str]:
    """Describe missing files, and nuclei whose volume or mean susceptibility is not that of the phantom."""
    chis = sorted(dataset.rglob("*_Chimap.nii.gz"))
    if not chis:
        yield f"{dataset}: no chi maps"
    pages = {f"{chi.name.split('_')[0]}.html" for chi in chis}
    yield from (f"missing: {name}" for name in sorted({"group.html", *pages}) if not (output / name).is_file())
    for chi in chis:
        folder, scan = output / chi.parent.relative_to(dataset), chi.name.removesuffix("_Chimap.nii.gz")
        for ending in ("dseg.nii.gz", "dseg.json", "probseg.nii.gz", "probseg.json", "stats.tsv", "stats.json"):
            if not (path := folder / f"{scan}_seg-dgm16_{ending}").is_file():
                yield f"missing: {path}"
        if path.with_suffix(".tsv").is_file():
            yield from compare(pd.read_csv(path.with_suffix(".tsv"), sep="\t", na_values="n/a"), scan)
        n_masks = len(list(folder.glob(f"{scan}_label-*_mask.nii.gz")))
        if n_masks != 16 + 3:
            yield f"{scan}: {n_masks} masks, expected 16 nuclei and 3 regions"


def compare(stats: pd.DataFrame, scan: str) -> Iterator[str]:
    """Describe the rows of a table that differ from the phantom."""
    if list(stats["abbreviation"]) != list(PHANTOM.volumes_mm3):
        yield f"{scan}: nuclei are {', '.join(stats['abbreviation'])}"
        return
    for name, volume_mm3, mean_ppm in stats[["abbreviation", "volume_mm3", "mean_ppm"]].itertuples(index=False):
        expected_mm3, expected_ppm = PHANTOM.volumes_mm3[name], PHANTOM.chi_ppm[name]
        if not abs(volume_mm3 - expected_mm3) <= VOLUME_TOLERANCE * expected_mm3 + VOLUME_TOLERANCE_MM3:
            yield f"{scan} {name}: volume is {volume_mm3:g} mm³, expected about {expected_mm3:g}"
        if not abs(mean_ppm - expected_ppm) <= MEAN_TOLERANCE * expected_ppm:
            yield f"{scan} {name}: mean is {mean_ppm:g} ppm, expected about {expected_ppm:g}"


if __name__ == "__main__":
    if problems := list(find_problems(Path(sys.argv[1]), Path(sys.argv[2]))):
        sys.exit("\n".join(problems))
