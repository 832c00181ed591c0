"""Patches of torch on the host while a virtual GPU's block is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from .hardware import current
from .tensor import VirtualTensor


@contextlib.contextmanager
def host_side() -> Iterator[None]:
    """Inside, parameters move to the device and back in place, as with CUDA, and memory can be pinned."""
    swap_was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    patches: dict[tuple[Any, str], Any] = {(torch.Tensor, "data"): property(_get_data, _set_data)}
    patches[torch.Tensor, "pin_memory"] = lambda tensor, device=None: current().pin(tensor.clone())
    patches[torch.Tensor, "is_pinned"] = lambda tensor, device=None: current().is_pinned(tensor)
    _device_constructors()  # `with torch.device(...)` finds the factories by identity, as they are when first listed
    for name in ("empty", "empty_like", "zeros"):
        patches[torch, name] = _pinning(getattr(torch, name))
    before = {key: getattr(*key) for key in patches}
    for key, value in patches.items():
        setattr(*key, value)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap_was)
        for key, value in before.items():
            setattr(*key, value)


def _pinning(factory: Callable) -> Callable:
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if not pin_memory:
            return factory(*args, **kwargs)
        gpu = current()
        if gpu.meta:
            kwargs["device"] = "meta"
        return gpu.pin(factory(*args, **kwargs))

    return make


_plain_data = torch.Tensor.data


def _get_data(tensor: torch.Tensor) -> torch.Tensor:
    return _plain_data.__get__(tensor)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if not (isinstance(tensor, VirtualTensor) or isinstance(value, VirtualTensor)):
        _plain_data.__set__(tensor, value)
        return
    value = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)
    # Other attributes that were set on the tensor stay on it.
    for name in vars(value).keys() - {"held", "allocation", "signature"}:
        setattr(tensor, name, getattr(value, name))
