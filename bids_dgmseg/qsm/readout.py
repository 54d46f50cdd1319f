"""Take out what readouts of alternating direction add to the phase."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bids_dgmseg.qsm.unwrap import wrap

_EVEN = 0.01
"""Part of the mean distance of echoes by which distances may differ."""

_LEAST_RAD = 0.1
"""Range over the tissue below which phase is left as it is: noise makes less."""


def remove_alternation(
    phase: Tensor, magnitude: Tensor, mask: Tensor, *, echo_times_s: Sequence[float]
) -> tuple[Tensor, float | None]:
    r"""Remove a phase ramp whose sign alternates from echo to echo, as bipolar readouts make it.

    Parameters
    ----------
    phase : Tensor of shape (E, X, Y, Z)
        Wrapped phase in rad.
    magnitude : Tensor of shape (E, X, Y, Z)
        Signal, in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Where there is tissue.
    echo_times_s : sequence of E float
        Echo times in s, rising.

    Returns
    -------
    phase : Tensor of shape (E, X, Y, Z)
        The phase itself where no ramp is seen; else wrapped anew.
    ramp_rad : float or None
        Range of the ramp r over the tissue; 0 where none is seen, None where none can be: with fewer than three echoes,
        or uneven times.

    Notes
    -----
    Where the phase of echo j is :math:`\varphi_0 + \omega T_j + (-1)^j r`, offset and field fall out of three
    successive echoes at even times:

    .. math:: \varphi_j - 2 \varphi_{j+1} + \varphi_{j+2} = (-1)^j\, 4 r \pmod{2\pi}.

    The gradient of 4r along each axis is the angle of the mean product of neighbouring voxels. What is left after a
    ramp, such as a constant, is not removed [1]_.

    References
    ----------
    .. [1] Li J, et al. Phase-corrected bipolar gradients in multi-echo gradient-echo sequences for quantitative
       susceptibility mapping. Magn Reson Mater Phys 28 (2015) 347-355. doi:10.1007/s10334-014-0470-3
    """
    if not mask.any() or not _are_even(echo_times_s):
        return phase, None
    fourfold = torch.zeros(mask.shape, dtype=torch.complex64, device=phase.device)
    for echo in range(len(phase) - 2):
        angle = (-1) ** echo * (phase[echo] - 2 * phase[echo + 1] + phase[echo + 2])
        fourfold += torch.polar(magnitude[echo + 2] * mask, angle)
    ramp = torch.zeros((), device=phase.device)
    for axis, size in enumerate(mask.shape):
        place = torch.arange(size, device=phase.device).view([-1 if other == axis else 1 for other in range(3)])
        before, after = fourfold.narrow(axis, 0, size - 1), fourfold.narrow(axis, 1, size - 1)
        ramp = ramp + (after * before.conj()).sum().angle() / 4 * place
    seen = ramp[mask]
    range_rad = float(seen.max() - seen.min())
    if range_rad < _LEAST_RAD:
        return phase, 0.0
    signs = torch.tensor([(-1.0) ** echo for echo in range(len(phase))], device=phase.device)
    return wrap(phase - signs.view(-1, 1, 1, 1) * ramp), range_rad


def _are_even(times_s: Sequence[float]) -> bool:
    apart = [after - before for before, after in pairwise(times_s)]
    return len(apart) > 1 and max(apart) - min(apart) < _EVEN * sum(apart) / len(apart)
