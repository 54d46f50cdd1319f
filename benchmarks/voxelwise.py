"""Voxelwise group analysis on simulated studies: family-wise false positives, and how often a planted effect is found.

    python benchmarks/voxelwise.py [--studies 1000] [--correction tfce] [--permutations N]

A study has 24 participants of two groups and two sites, smooth noise in a small nucleus, and effects of age, sex and
site, which differ between the groups a little. A false positive is a study without a difference between the groups in
which any voxel has a corrected p of 0.05 or less. The default is the fewest permutations with a p of exactly 0.05, 19
(tfce) or 39 (cluster); the planted effect is tested with 199.
"""

from __future__ import annotations

import argparse

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from bids_dgmseg.study.voxelwise import Correction, infer_voxels

SIZE = 5
"""Voxels along each side of the nucleus."""

NOISE_PPM = 0.012
"""Standard deviation of each voxel between participants."""

EFFECT_PPM = 0.02
"""Planted in the 27 voxels of a corner."""


def nucleus() -> nib.Nifti1Image:
    """Return the mask of the nucleus."""
    inside = np.pad(np.ones((SIZE, SIZE, SIZE), np.uint8), 1)
    return nib.Nifti1Image(inside, np.diag([2.0, 2.0, 2.0, 1.0]))


def simulate(rng: np.random.Generator, mask: nib.Nifti1Image, *, effect_ppm: float) -> tuple[np.ndarray, pd.DataFrame]:
    """Simulate the values of a study in ppm, of shape (participants, voxels), and its design."""
    inside = np.asarray(mask.dataobj) > 0
    group = np.repeat([0.0, 1.0], 12)
    age = rng.uniform(45, 80, 24) + 3 * group
    sex, site = (rng.random(24) < 0.5 + 0.1 * group).astype(float), np.tile([0.0, 1.0], 12)
    values = []
    for person in range(24):
        noise = gaussian_filter(rng.normal(size=inside.shape), 1, mode="wrap")
        chi = 0.1 + NOISE_PPM * noise / 0.188  # the standard deviation that the filter leaves
        chi += 0.0008 * age[person] + 0.004 * sex[person] + 0.008 * site[person]
        chi[1:4, 1:4, 1:4] += effect_ppm * group[person]
        values.append(chi[inside])
    design = pd.DataFrame({"intercept": 1.0, "group PD": group, "age": age - age.mean(), "sex": sex, "site": site})
    return np.array(values), design.loc[:, (design != design.iloc[0]).any() | (design.columns == "intercept")]


def share_detected(
    n_studies: int, *, effect_ppm: float, correction: Correction, n_permutations: int, seed: int
) -> float:
    """Return the share of studies with a significant voxel."""
    rng, mask = np.random.default_rng(seed), nucleus()
    detected = 0
    for number in range(n_studies):
        values, design = simulate(rng, mask, effect_ppm=effect_ppm)
        images = infer_voxels(
            values,
            design,
            "group PD",
            mask,
            n_permutations=n_permutations,
            correction=correction,
            rng_seed=seed * n_studies + number,
        )
        detected += bool((np.asarray(images["logp"].dataobj) >= -np.log10(0.05) - 1e-9).any())
    return detected / n_studies


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--correction", choices=("tfce", "cluster"), default="tfce")
    parser.add_argument("--permutations", type=int)
    options = parser.parse_args()
    print("| correction | null studies | false positives | standard error | planted effect found (50 studies) |")
    print("| --- | --- | --- | --- | --- |")
    n_permutations = options.permutations or {"tfce": 19, "cluster": 39}[options.correction]
    settings = {"correction": options.correction, "n_permutations": n_permutations}
    rate = share_detected(options.studies, effect_ppm=0.0, seed=1, **settings)
    error = np.sqrt(rate * (1 - rate) / options.studies)
    power = share_detected(50, effect_ppm=EFFECT_PPM, seed=2, **{**settings, "n_permutations": 199})
    print(f"| {options.correction} | {options.studies} | {rate:.1%} | {error:.1%} | {power:.0%} |")


if __name__ == "__main__":
    main()
