"""Inversions of papers recover a nucleus; the fluid of MEDI+0 is uniform and the reference."""

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import apply_kernel, dipole_kernel
from bids_dgmseg.qsm.paper_inversions import find_ventricles, ilsqr, medi

X, Y, Z = torch.meshgrid(*[torch.arange(36) - 17.5] * 3, indexing="ij")
BALL, FLUID = (X - 6) ** 2 + Y**2 + Z**2 < 25, (X + 6) ** 2 + Y**2 + Z**2 < 16
BRAIN, CHI = X**2 + Y**2 + Z**2 < 256, 0.1 * BALL
KERNEL = dipole_kernel(CHI.shape, (1, 1, 1))


@pytest.mark.parametrize(("method", "lowest"), [(medi, 0.085), (ilsqr, 0.07)])
def test_nucleus_is_recovered(method, lowest):
    noise = 0.002 * torch.randn(CHI.shape, generator=torch.Generator().manual_seed(1))
    local = torch.where(BRAIN, apply_kernel(CHI, KERNEL) + noise, 0.0)
    more = {"strength": 6e-4, "mask": BRAIN, "magnitude": 1 - 3 * CHI, "fluid": FLUID} if method is medi else {}
    done = method(local, KERNEL, voxel_size_mm=(1, 1, 1), weight=BRAIN * torch.ones_like(CHI), **more)
    assert lowest < float(done[BALL].mean() - done[BRAIN & ~BALL].mean()) < 0.11
    assert float(torch.corrcoef(torch.stack([done[BRAIN], CHI[BRAIN]]))[0, 1]) > 0.8
    assert method is ilsqr or float(done[FLUID].abs().max()) < 0.005


def test_ventricles_decay_slowly_near_the_centre_and_are_no_sheet():
    brain = np.asarray(sum((axis - 30) ** 2 for axis in np.ogrid[:61, :61, :61]) < 25**2)
    r2star = np.full(brain.shape, 20, np.float32)
    r2star[27:34, 27:34, 27:34] = r2star[20, 25:36, 25:36] = 1
    fluid = find_ventricles(torch.from_numpy(r2star), torch.from_numpy(brain), voxel_size_mm=(1.5, 1.5, 1.5)).numpy()
    assert 0.8 * 7**3 < fluid[27:34].sum() == fluid.sum()  # an opening rounds corners
