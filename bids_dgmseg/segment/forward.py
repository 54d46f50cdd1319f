"""Networks over batches: layout, precision, device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bids_dgmseg.segment.weights import pick_device, to_channels_last


def forward(network: nn.Module, values: NDArray[np.float32], device: str) -> Tensor:
    """Run a network over one patch.

    Parameters
    ----------
    network : Module
        Ready to predict.
    values : ndarray of shape (channels, X, Y, Z)
        Normalized input.
    device : {"cpu", "cuda", "auto"}
        Where to run.

    Returns
    -------
    Tensor of shape (classes, X, Y, Z)
        Probabilities of a network with one softmax, float32.
    """
    return forward_batch(network, values[None], device)[0].softmax(dim=0)


def forward_batch(network: nn.Module, values: NDArray[np.float32], device: str) -> Tensor:
    """Run a network over patches (B, channels, ...) of the same size; logits (B, classes, ...), else as `forward`."""
    where = pick_device(device)
    network = to_channels_last(network, where)
    layout = torch.channels_last if values.ndim == 4 else torch.channels_last_3d
    batch = torch.from_numpy(np.ascontiguousarray(values)).to(where, memory_format=layout)
    with torch.inference_mode(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=_has_fast_bfloat16(where)):
        logits: Tensor = network(batch)
    return logits.float()


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)
