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
    batch = lay_out(torch.from_numpy(np.ascontiguousarray(values)), where)
    with torch.inference_mode(), mixed_precision(where):
        logits: Tensor = network(batch)
    return logits.float()


def lay_out(batch: Tensor, device: torch.device) -> Tensor:
    """Move a batch (B, channels, ...) to a device, in the memory layout of `to_channels_last`."""
    return batch.to(device, memory_format=torch.channels_last if batch.ndim == 4 else torch.channels_last_3d)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Give the context in which networks compute in bfloat16, on devices that gain by it; in float32 on others."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_fast_bfloat16(device))


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)
