"""The device type: what torch.get_device_module("vgpu") gives, and the factories of torch.

As torch.cuda, the device is initialised by its first use: a tensor, a stream, a question about its memory. Statistics
can't be reset before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import autocast, streams
from .hardware import DEVICE_TYPE, Hardware, active, current
from .support import require, set_up
from .tensor import KNOWN, VirtualTensor, attention, copy_

Device = Any  # there is one

_library = torch.library.Library("aten", "IMPL")  # for factories; everything else arrives with a wrapper


def _used() -> Hardware:
    gpu = current()
    gpu.timeline.initialized = True
    return gpu


class DeviceModule:
    """What torch.get_device_module("vgpu") gives: the functions of torch.cuda that device-generic code uses."""

    @staticmethod
    def is_available() -> bool:
        return bool(active)

    @staticmethod
    def is_initialized() -> bool:
        return bool(active) and current().initialized

    @staticmethod
    def init() -> None:
        current().timeline.initialized = True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        _used()
        return 0

    @staticmethod
    def set_device(device: Device) -> None:
        _used()

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def empty_cache() -> None:
        current().empty_cache()

    @staticmethod
    def synchronize(device: Device = None) -> None:
        _used().timeline.synchronize()

    @staticmethod
    def Stream(device: Device = None, priority: int = 0) -> streams.Stream:
        return _used().timeline.new_stream()

    @staticmethod
    def Event(
        enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> streams.Event:
        return streams.Event(current().timeline)

    @staticmethod
    def current_stream(device: Device = None) -> streams.Stream:
        return _used().timeline.current

    @staticmethod
    def default_stream(device: Device = None) -> streams.Stream:
        return _used().timeline.default

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: streams.Stream | None) -> Iterator[None]:
        """Submit this thread's work to that stream inside; None changes nothing."""
        timeline = current().timeline
        before = timeline.current
        timeline.here.stream = stream or before
        try:
            yield
        finally:
            timeline.here.stream = before

    @staticmethod
    def memory_allocated(device: Device = None) -> int:
        return current().live

    @staticmethod
    def max_memory_allocated(device: Device = None) -> int:
        return current().peak

    @staticmethod
    def memory_reserved(device: Device = None) -> int:
        return current().reserved

    @staticmethod
    def max_memory_reserved(device: Device = None) -> int:
        return current().peak_reserved

    @staticmethod
    def reset_peak_memory_stats(device: Device = None) -> None:
        gpu = current()
        if not gpu.initialized:
            raise RuntimeError(
                "Invalid device argument: the device has no statistics before init() or its first use"
            )
        gpu.reset_peak()

    @staticmethod
    def set_per_process_memory_fraction(fraction: float, device: Device = None) -> None:
        """Hold the allocator to this part of the capacity, as CUDA does: counted in whole segments."""
        if not isinstance(fraction, float):
            raise TypeError("the fraction must be a float")
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction must be between 0 and 1, not {fraction}")
        gpu = _used()
        if gpu.capacity is not None:
            gpu.allocator.limit = int(fraction * gpu.capacity)

    @staticmethod
    def mem_get_info(device: Device = None) -> tuple[int, int]:
        """Free and total bytes; without a capacity the total is 2**63 - 1."""
        gpu = _used()
        capacity = 2**63 - 1 if gpu.capacity is None else gpu.capacity
        return capacity - gpu.reserved, capacity


def _fresh(make: Callable, size: Sequence[int], *args: Any, **options: Any) -> VirtualTensor:
    """A new tensor from a factory of torch, held as the current GPU holds its tensors."""
    gpu = current()
    options["device"] = "meta" if gpu.meta and torch.Size(size).numel() > KNOWN else "cpu"
    return VirtualTensor(make(size, *args, **options), gpu)


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    dtype: Any = None,
    layout: Any = None,
    device: Device = None,
    pin_memory: Any = None,
) -> VirtualTensor:
    return _fresh(torch.empty_strided, size, stride, dtype=dtype)


def _empty(
    size: Sequence[int],
    dtype: Any = None,
    layout: Any = None,
    device: Device = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> VirtualTensor:
    memory_format = memory_format or torch.contiguous_format
    return _fresh(torch.empty, size, dtype=dtype, memory_format=memory_format)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return copy_(destination, source, non_blocking)


@functools.cache
def register() -> None:
    """Make the device type, once per process; VirtualGPU does it.

    From then on PyTorch takes it for the process's accelerator: page-locked memory for CUDA is not to be had any more.

    Raises UnsupportedError.
    """
    require()
    set_up(DEVICE_TYPE, backend_module=DeviceModule)
    autocast.register(_library, DEVICE_TYPE)
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    _library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
