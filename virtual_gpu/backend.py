"""The device type: what torch.get_device_module("vgpu") gives, and the factories of torch.

As torch.cuda, the device is initialised by its first use: a tensor, a stream, a question about its memory. Statistics
can't be reset before.
"""

import contextlib

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import autocast
from .device import VirtualGPU, active, current
from .streams import Event
from .tensor import DEVICE_TYPE, attention, copy_


def _used() -> VirtualGPU:
    gpu = current()
    gpu.initialize()
    return gpu


class _DeviceModule:
    """What torch.get_device_module("vgpu") gives: the functions of torch.cuda that device-generic code uses."""

    @staticmethod
    def is_available():
        return bool(active)

    @staticmethod
    def is_initialized():
        return bool(active) and current().initialized

    @staticmethod
    def init():
        current().initialize()

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        _used()
        return 0

    @staticmethod
    def set_device(device):
        _used()

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def empty_cache():
        current().empty_cache()

    @staticmethod
    def synchronize(device=None):
        _used().timeline.synchronize()

    @staticmethod
    def Stream(device=None, priority=0):
        return _used().timeline.new_stream()

    @staticmethod
    def Event(enable_timing=False, blocking=False, interprocess=False):
        return Event(current())

    @staticmethod
    def current_stream(device=None):
        return _used().timeline.current

    @staticmethod
    def default_stream(device=None):
        return _used().timeline.default

    @staticmethod
    @contextlib.contextmanager
    def stream(stream):
        """Submit this thread's work to that stream inside; None changes nothing."""
        timeline = current().timeline
        before = timeline.current
        timeline.here.stream = stream or before
        try:
            yield
        finally:
            timeline.here.stream = before

    @staticmethod
    def memory_allocated(device=None):
        return current().live

    @staticmethod
    def max_memory_allocated(device=None):
        return current().peak

    @staticmethod
    def memory_reserved(device=None):
        return current().reserved

    @staticmethod
    def max_memory_reserved(device=None):
        return current().peak_reserved

    @staticmethod
    def reset_peak_memory_stats(device=None):
        gpu = current()
        if not gpu.initialized:
            raise RuntimeError(
                "Invalid device argument: the device has no statistics before init() or its first use"
            )
        gpu.reset_peak()

    @staticmethod
    def set_per_process_memory_fraction(fraction, device=None):
        """Hold the allocator to this part of the capacity, as CUDA does: counted in whole segments."""
        if not isinstance(fraction, float):
            raise TypeError("the fraction must be a float")
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction must be between 0 and 1, not {fraction}")
        gpu = _used()
        if gpu.capacity is not None:
            gpu.allocator.limit = int(fraction * gpu.capacity)

    @staticmethod
    def mem_get_info(device=None):
        """Free and total bytes; without a capacity the total is 2**63 - 1."""
        gpu = _used()
        capacity = 2**63 - 1 if gpu.capacity is None else gpu.capacity
        return capacity - gpu.reserved, capacity


_setup_privateuseone_for_python_backend(DEVICE_TYPE, backend_module=_DeviceModule)
DEVICE = VirtualGPU.device = torch.device(DEVICE_TYPE, 0)
_library = torch.library.Library("aten", "IMPL")  # for factories; everything else arrives with a wrapper
autocast.register(_library, DEVICE_TYPE)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return current()._fresh(torch.empty_strided, size, stride, dtype=dtype)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return current()._fresh(torch.empty, size, dtype=dtype, memory_format=memory_format)


def _copy_from(source, destination, non_blocking=False):
    return copy_(destination, source, non_blocking)


_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
