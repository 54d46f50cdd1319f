"""Fake GPU: CPU tensors that are tracked as if they were on another device.

A storage carries a mark if its tensor is meant to be on the GPU. Two torch modes maintain the marks:

- `_Calls` intercepts torch functions called from Python: it answers ``tensor.device``, moves tensors (copying them, as
  a transfer does), removes ``device="cuda"`` from calls that create tensors, and refuses ``.numpy()``.
- `_Operators` intercepts the underlying operators, including those of the backward pass: it marks the results of
  marked tensors and, like CUDA, refuses to mix marked and unmarked ones.

The CPU computes all values, so values and control flow are real; CUDA kernels, their precision and missing kernels
are not tested. Autocast is that of the CPU, with bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bids_dgmseg.segmentation.inference import SafeGradients

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

_CROSSING = {"copy_", "fill_", "_foreach_copy_", "_has_compatible_shallow_copy_type"}
"""Operators that accept both devices: copies, and the check whether one tensor can replace another."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operators whose indices may be on the CPU."""
_PRETENDS = "pretends"
"""Attribute that marks a storage."""
_local = threading.local()


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Make torch report one GPU, in this thread and in threads started meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in _CUDA.items():
            patch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
        # Checks whether a stream is being captured; the name differs between torch versions.
        check = "_accelerator_graph_capture_health_check"
        patch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.autocast, "__init__", _on_the_cpu(torch.autocast.__init__))
        patch.setattr(threading.Thread, "run", _watched(threading.Thread.run))
        # Checkpoints record the device of a tensor and restore it there unless told otherwise.
        places = [(5, _name_place, _restore_place), *torch.serialization._package_registry]
        patch.setattr(torch.serialization, "_package_registry", places)
        with _watching():
            yield


def place_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor from its mark; torch itself may be wrong outside the modes."""
    with torch._C.DisableTorchFunction():
        return GPU if _is_marked(tensor) else CPU


_CUDA = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "empty_cache": None,
    "synchronize": None,
    "get_device_name": "Pretended",
    "get_device_capability": (9, 0),
    "is_current_stream_capturing": False,
}


class _Generator(torch.Generator):
    """CPU generator that reports another device."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.place = _full(torch.device(device))
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute in the stubs, read-only in torch
        return self.place


def _on_the_cpu(init: Callable[..., None]) -> Callable[..., None]:
    def begin(self: torch.autocast, device_type: str, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "cuda" else device_type, dtype or torch.bfloat16, **kwargs)

    return begin


def _watched(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def watch(self: threading.Thread) -> None:
        with _watching():
            run(self)

    return watch


@contextmanager
def _watching() -> Iterator[None]:
    with ExitStack() as modes:
        modes.enter_context(_Operators())
        modes.enter_context(SafeGradients())  # CPU kernel bugs do not occur on the GPU
        modes.enter_context(_Calls())
        yield


def _name_place(storage: Any) -> str | None:
    return str(GPU) if getattr(storage, _PRETENDS, False) else None


def _restore_place(storage: Any, location: str) -> Any:
    if not location.startswith("cuda"):
        return None
    setattr(storage, _PRETENDS, True)
    return storage


def _full(device: torch.device) -> torch.device:
    return GPU if device.type == "cuda" else device


def _is_marked(tensor: Tensor) -> bool:
    return bool(getattr(tensor.untyped_storage(), _PRETENDS, False))


def _mark(tensor: Tensor, place: torch.device) -> Tensor:
    setattr(tensor.untyped_storage(), _PRETENDS, place == GPU)
    return tensor


def _tensors(values: Any) -> Iterator[Tensor]:
    """Find the tensors among arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class _Move(torch.autograd.Function):
    """Transfer between devices; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: torch.device) -> Tensor:
        ctx.back = place_of(tensor)
        with torch._C.DisableTorchFunction():
            return _mark(tensor.clone(), place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with torch._C.DisableTorchFunction():
            return _mark(gradients[0].clone(), ctx.back), None


def _moved(tensor: Tensor, place: torch.device) -> Tensor:
    moved: Tensor = tensor if place_of(tensor) == place else _Move.apply(tensor, place)
    return moved


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Mimic ``Tensor.to`` in two steps: dtype and layout, then device."""
    if args and isinstance(args[0], Tensor):  # like another tensor
        args = (place_of(args[0]), args[0].dtype, *args[1:])
    parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)  # None if not given
    device, dtype, _, layout = parsed
    place = place_of(tensor) if device is None else _full(device)
    how: dict[str, Any] = {"dtype": dtype or tensor.dtype, "memory_format": layout or torch.preserve_format}
    return _moved(torch.Tensor.to(tensor, **how, copy=copy), place)


def _refuse(tensor: Tensor, *args: Any, original: Callable[..., Any], **kwargs: Any) -> Any:
    if place_of(tensor) == GPU:
        raise TypeError(
            f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
            "host memory first."
        )
    return original(tensor, *args, **kwargs)


_KIND: Any = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _KIND.device.__get__: place_of,
    _KIND.is_cuda.__get__: lambda tensor: place_of(tensor) == GPU,
    _KIND.is_cpu.__get__: lambda tensor: place_of(tensor) == CPU,
    torch.Tensor.get_device: lambda tensor: 0 if place_of(tensor) == GPU else -1,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda tensor, *args, **kwargs: _moved(tensor, CPU),
    torch.Tensor.cuda: lambda tensor, *args, **kwargs: _moved(tensor, GPU),
    torch.Tensor.numpy: lambda *args, **kwargs: _refuse(*args, original=torch.Tensor.numpy, **kwargs),
    torch.Tensor.__array__: lambda *args, **kwargs: _refuse(*args, original=torch.Tensor.__array__, **kwargs),
}
_SHARING = {torch.as_tensor, torch.asarray}
"""Functions that share memory with their input if possible, which never happens across devices."""


class _Calls(TorchFunctionMode):
    """Answer for the GPU when Python calls torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        wanted = kwargs.pop("device", None)
        with torch._C.DisableTorchFunction():
            on_gpu = any(_is_marked(tensor) for tensor in _tensors([args, kwargs]))
        place = (GPU if on_gpu else CPU) if wanted is None else _full(torch.device(wanted))
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != place.type:
            raise RuntimeError(
                f"Expected a '{place.type}' device type for generator but found '{generator.device.type}'"
            )
        before, _local.place = getattr(_local, "place", None), place
        try:
            result = func(*args, **kwargs)
        finally:
            _local.place = before
        if wanted is None and func is not torch.Tensor.__deepcopy__:  # deepcopy copies the storage without an operator
            return result
        return _moved(result, place) if func in _SHARING else _mark(result, place)


class _Operators(TorchDispatchMode):
    """Mark results and refuse mixed devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = list(_tensors([args, kwargs]))
            if any(_is_marked(tensor) for tensor in given):
                _check(func, args, kwargs)
                place = GPU
            else:
                place = CPU if given else _place_of_new()
            result = func(*args, **kwargs)
            if place == GPU:
                own = {tensor.untyped_storage()._cdata for tensor in given}
                for tensor in _tensors(result):
                    if tensor.untyped_storage()._cdata not in own:
                        _mark(tensor, GPU)
            return result


def _place_of_new() -> torch.device:
    """Return the device of a new tensor: that of the call, or of the gradients in a backward pass."""
    place: torch.device | None = getattr(_local, "place", None)
    if place is None:
        return GPU if torch._C._current_graph_task_id() != -1 else CPU
    return place


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise the error of CUDA if the tensors of an operator are on different devices."""
    name = func._schema.name.partition("::")[2]
    if name in _CROSSING:
        return
    values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    indices = list(_tensors(values.pop("indices", None))) if name in _INDEXING else []
    strangers = [
        tensor
        for key, value in values.items()
        for tensor in _tensors(value)
        if not _is_marked(tensor) and (tensor.ndim or key in written or not _takes_numbers(func, name))
    ]
    at_home = [tensor for tensor in _tensors(values) if _is_marked(tensor)]
    if strangers and (at_home or any(map(_is_marked, indices))):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and "
            f"{CPU}! (in {func}, of shape {tuple(strangers[0].shape)} on {CPU})"
        )


def _takes_numbers(func: Any, name: str) -> bool:
    """Return whether an operator treats a CPU tensor without dimensions as a number."""
    return torch.Tag.pointwise in func.tags or name.startswith("_foreach") or name in _INDEXING
