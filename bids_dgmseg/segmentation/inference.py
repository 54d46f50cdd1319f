"""Run networks on batches of normalized patches, quickly on each kind of processor."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bids_dgmseg.models.model_folder import pick_device, to_channels_last

FloatArray = NDArray[np.float32]


def in_ppm(chi: FloatArray) -> FloatArray:
    """Scale to tenths of a ppm, clipped at ±0.5 ppm; only veins and streaks exceed that."""
    return np.clip(chi, -0.5, 0.5) * np.float32(10)


def zscore(chi: FloatArray) -> FloatArray:
    """Scale a patch to mean 0 and SD 1; a constant patch becomes 0."""
    spread = chi.std()
    return (chi - chi.mean()) / spread if spread > 0 else np.zeros_like(chi)


def minmax(chi: FloatArray) -> FloatArray:
    """Scale a patch to the range from 0 to 1; a constant patch becomes 0."""
    low, high = chi.min(), chi.max()
    return (chi - low) / (high - low) if high > low else np.zeros_like(chi)


def in_percentile(magnitude: FloatArray) -> FloatArray:
    """Scale a magnitude to the 98th percentile of its positive values, clipped at 1.5: vessels and fat are brighter."""
    positive = magnitude[magnitude > 0]
    return np.clip(magnitude / np.percentile(positive, 98), 0, 1.5) if positive.size else np.zeros_like(magnitude)


NORMALIZATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "ppm": in_ppm,
    "zscore": zscore,
    "minmax": minmax,
    "magnitude": in_percentile,
}


def forward_batch(network: nn.Module, values: NDArray[np.float32], device: str) -> Tensor:
    """Return the float32 logits (B, classes, ...) of normalized patches (B, channels, ...)."""
    target = pick_device(device)
    network = to_channels_last(network, target)
    batch = batch_to_device(torch.from_numpy(np.ascontiguousarray(values)), target)
    with torch.inference_mode(), FastLayers(), mixed_precision(target):
        logits: Tensor = network(batch)
    return logits.float()


def batch_to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Move a batch (B, channels, ...) to a device, in the memory layout of `to_channels_last`.

    For one channel torch takes all layouts for the same, and computes in the other one unless the strides show it.
    """
    if device.type == "mps":
        return batch.to(device)
    return batch.to(device).movedim(1, -1).contiguous().movedim(-1, 1)


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """Compute in bfloat16 on devices with hardware support, in float32 on others.

    On CPUs, `SafeGradients` keeps float32 for convolutions whose bfloat16 gradients are wrong.
    """
    quick = _has_fast_bfloat16(device)
    with (
        torch.autocast(device.type, dtype=torch.bfloat16) if quick else nullcontext(),
        SafeGradients() if quick and device.type == "cpu" else nullcontext(),
    ):
        yield


class SafeGradients(TorchFunctionMode):
    """Compute gradients in float32 for convolutions of images smaller than the kernel.

    For these, oneDNN 3.13 (x86, torch 2.15) computes the gradient of bfloat16 weights from uninitialized memory: a
    different number, or NaN, each time. Gradients in float32, and in bfloat16 for larger images, are correct.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a torch function, in float32 if its gradient would be wrong."""
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and torch.is_grad_enabled() and _is_small(*args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                return func(*map(_as_float, args), **{name: _as_float(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


_CONVOLUTIONS = {
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
}


def _is_small(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Check whether the image is smaller than the kernel along any axis."""
    axes = weight.ndim - 2
    return any(side < reach for side, reach in zip(input.shape[-axes:], weight.shape[-axes:], strict=True))


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class FastLayers(TorchFunctionMode):
    """In inference on CPUs, compute 3D convolutions and instance normalizations faster than torch itself.

    Convolutions use oneDNN also where torch chooses its own, slower code in float32: for few channels, small images
    and, on one thread, kernels of one voxel. Normalization avoids copies between memory layouts. Results differ from
    torch's by rounding only.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a torch function, or its faster equivalent."""
        fast = _FAST.get(func)
        if not fast or not args or torch.is_grad_enabled() or args[0].device.type != "cpu" or args[0].ndim != 5:
            return func(*args, **kwargs or {})
        return fast(*args, **kwargs or {})


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] | str = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve (B, C, X, Y, Z) by oneDNN; kernels of one voxel are products of matrices.

    The result of the latter is in the memory layout in which a softmax is fast.
    """
    if weight.shape[2:] == (1, 1, 1) and bias is not None and {*stride} == {1} and {*padding} == {0} and groups == 1:
        products = [torch.addmm(bias[:, None], weight.flatten(1), sample.flatten(1)) for sample in x]
        batch = torch.stack(products) if len(x) > 1 else products[0]  # without a copy
        return batch.view(len(x), -1, *x.shape[2:])
    if torch.is_autocast_enabled("cpu") or isinstance(padding, str) or not _HAS_ONEDNN:
        return functional.conv3d(x, weight, bias, stride, padding, dilation, groups)
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)


def _normalize(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel of (B, C, X, Y, Z); for a single sample, batch statistics equal instance statistics."""
    if len(x) > 1 or running_mean is not None or x[0, 0].numel() == 1:
        return functional.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum=momentum, eps=eps
        )
    if x.dtype != torch.float32:
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    # batch_norm itself adds millions of float32 numbers one by one: results are off by a thousandth.
    slabs = x[0].movedim(0, -1).flatten(1, 2)
    n_voxels = x[0, 0].numel()
    mean = (slabs.sum(dim=1).sum(dim=0, dtype=torch.float64) / n_voxels).float()
    squares = torch.stack([(slab - mean).square_().sum(dim=0) for slab in slabs])
    variance = (squares.sum(dim=0, dtype=torch.float64) / n_voxels).float()
    return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_FAST: dict[Any, Callable[..., Tensor]] = {functional.conv3d: _convolve, functional.instance_norm: _normalize}


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Check whether the device computes faster in bfloat16 than in float32; emulated, it is slower.

    AVX-512's bfloat16 is twice as fast on processors by AMD (Zen 4), but slower on those by Intel, whose AMX is fast.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":  # mps: not measured
        return False
    return _supports("_is_amx_tile_supported") or (_supports("_is_avx512_bf16_supported") and not _is_by_intel())


def _supports(check: str) -> bool:
    return bool(getattr(torch.cpu, check, lambda: False)())


@lru_cache
def _is_by_intel() -> bool:
    """Check the maker of the processor, which Python's `platform` does not know on Linux."""
    details = Path("/proc/cpuinfo")
    return "GenuineIntel" in (details.read_text() if details.exists() else platform.processor())
