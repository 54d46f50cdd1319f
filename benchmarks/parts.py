"""Paramagnetic and diamagnetic parts on a phantom of magnetised spheres: correlation with the known parts.

    python benchmarks/parts.py [--seed S]

The signal of tissue with spheres of 1.5 and -0.5 ppm is that of exact static dephasing [1]_, with R2 of the tissue,
texture, noise (SNR 100) and voxels of half the size, at 3 T; map and R2* are reconstructed from five echoes.

References
----------
.. [1] Yablonskiy DA, Haacke EM. Magn Reson Med 32 (1994) 749-763. doi:10.1002/mrm.1910320610
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.arguments import seed
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, dipole_field, separate_sources
from bids_dgmseg.qsm.inversion import Acquisition
from bids_dgmseg.qsm.reconstruct import reconstruct_chi

TIMES_S, SIZE, SPHERES_PPM = [0.004, 0.010, 0.016, 0.022, 0.028], 84, (1.5, -0.5)
_TISSUES = (
    (38, 0, 0, 0, 0.025, 0.015, 11.5),
    (31, 0, 0, 0, 0.012, 0.040, 14),
    (7, 11, 5, 0, 0.15, 0.025, 20),
    (7, 20, 9, 3, 0.07, 0.02, 14.5),
    (6, 9, 18, 9, 0.055, 0.015, 13),
    (4, 5, -8, -13, 0.12, 0.04, 18),
    (7, 9, -14, 6, 0.03, 0.035, 13),
    (5, 0, -21, 10, 0.01, 0.065, 15),
    (4, 0, 8, 18, 0, 0, 1.5),
)
"""Radius and centre in mm of balls on both sides; parts in ppm and R2 in 1/s: cortex, white matter, pallidum, putamen,
caudate, red nucleus, thalamus, capsule, CSF."""


def dephasing(tau: float) -> complex:
    """Integrate 1 - exp(i w t) around a magnetised sphere, per its volume; tau is t times the shift at its equator.

    The shift at distance r is (R / r)^3 (3 cos^2 - 1) times that at the equator.
    """
    x, cosine = (np.arange(300) + 0.5) / 300, (np.arange(100) + 0.5) / 100
    turns = tau * np.multiply.outer(x, 3 * cosine**2 - 1)  # x is (R / r)^3, so that the volume is dx / x^2
    return complex(((1 - np.exp(1j * turns)).mean(axis=1) / x**2).mean())


def average(image: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Average over blocks of 2 x 2 x 2 voxels."""
    half = SIZE // 2
    return image.reshape(half, 2, half, 2, half, 2).mean(axis=(1, 3, 5))


def correlate_parts(number: int) -> tuple[float, float]:
    """Return the correlations of both parts with the known ones in the brain, for a seed."""
    random = np.random.default_rng(number)
    x, y, z = np.meshgrid(*[np.arange(SIZE) - SIZE / 2 + 0.5] * 3, indexing="ij")
    truth = np.zeros((3, *x.shape))
    for radius, right, front, up, *values in _TISSUES:
        inside = (abs(x) - right) ** 2 + (y - front) ** 2 + (z - up) ** 2 < radius**2
        truth[:, inside] = np.array(values)[:, None]
    brain = x**2 + y**2 + z**2 < _TISSUES[0][0] ** 2
    for image, sd in zip(truth, (0.15, 0.15, 0.05), strict=True):
        texture = ndimage.gaussian_filter(random.normal(size=brain.shape), 4)
        image *= 1 + sd * texture / texture.std()
    positive, negative, r2 = truth
    field = dipole_field(torch.from_numpy(positive - negative).float(), voxel_size_mm=(1, 1, 1)).numpy()
    rate, echoes = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0, []
    for time_s in TIMES_S:
        decays = [dephasing(rate * time_s * ppm / 3) / abs(ppm) for ppm in SPHERES_PPM]
        decay = r2 * time_s + positive * decays[0] + negative * decays[1]
        noise = random.normal(scale=0.01, size=(2, *[SIZE // 2] * 3))
        echoes.append(average(brain * np.exp(1j * rate * time_s * field - decay)) + noise[0] + 1j * noise[1])
    signal, mask = np.array(echoes, np.complex64), average(brain.astype(complex)).real > 0.5
    result = reconstruct_chi(np.angle(signal), np.abs(signal), Acquisition(TIMES_S, 3.0, (2, 2, 2)), mask=mask)
    assert result.r2star_per_s is not None
    parts = separate_sources(result.chi_ppm, result.r2star_per_s, b0_tesla=3.0)
    true_parts = (average(part.astype(complex)).real for part in (positive, negative))
    both = zip(parts, true_parts, strict=True)
    first, second = (float(np.corrcoef(part[result.mask], true[result.mask])[0, 1]) for part, true in both)
    return first, second


def main(argv: Sequence[str] | None = None) -> int:
    """Print the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=1)
    first, second = correlate_parts(parser.parse_args(argv).seed)
    sys.stdout.write(f"r of the paramagnetic part {first:.3f}, of the diamagnetic part {second:.3f}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
