"""A GPU made of CPU memory, for tests and for counting memory where no GPU is at hand.

    with VirtualGPU(capacity=8 * 2**30) as gpu:
        module.to("vgpu")
        module(torch.randn(2, 3, device="vgpu"))
    print(gpu.peak)

A tensor on the device is a wrapper that reports device ``vgpu:0`` and holds a CPU tensor. Every operator runs on
the held tensors and its results are wrapped again, so values are those of the CPU, bit for bit. Each distinct
storage is counted once, rounded up to 512 bytes as CUDA's caching allocator rounds, from the moment it appears
until the last tensor on it is gone.

With ``meta=True`` meta tensors are held: full-size models are counted without being computed. Weights on the host
may then be meta tensors too, and what comes back to the host is zeros that take no memory until touched. Only small
tensors whose values came from the host or a factory keep true values (indices, lengths, time steps), until they meet
others.

What is counted is what operators return. Memory that a CUDA kernel allocates for itself (workspaces, casts inside a
copy) is not. Operators that PyTorch composes from others are counted step by step. Scaled dot product attention
counts as a fused kernel for 16-bit types and with its score matrix for float32 and float64.

Streams, events and pinned memory: see streams.py. It all rests on PyTorch's Python backend for the PrivateUse1
dispatch key, which is experimental: it is made for tests and benchmarks, not for the package. Importing this file
registers the device type; there is nothing else to set up, and it works in every thread.
"""

import contextlib
import itertools
import threading
import weakref
from typing import NamedTuple

import torch
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import autocast
from .streams import Event, RaceError, Timeline
from .tensor import DEVICE_TYPE, KNOWN, Allocation, VirtualTensor, attention, copy_

__all__ = ["DEVICE", "RaceError", "Record", "VirtualGPU", "VirtualTensor"]


class Record(NamedTuple):
    """One thing that happened on the device.

    kind: "alloc", "free", "copy_in" (host to device), "copy_out", "op", "record_event", "wait_event", "record_stream"
        or "pin". name: the operator or event. allocation: number of the storage, in order of allocation.
    """

    kind: str
    name: str
    nbytes: int
    stream: str
    label: str | None
    allocation: int | None


class VirtualGPU:
    """Makes device ``vgpu:0`` usable inside its `with` block.

    capacity: bytes, or None for no limit. An allocation beyond it raises torch.OutOfMemoryError, whose attribute
        `requested` is the bytes asked for.
    meta: count without computing.
    pin_limit: bytes of host memory that can be pinned, or None for no limit; beyond it pinning raises RuntimeError.
    record_ops: note every operator in the record, not only memory, moves and events.

    live, peak: bytes allocated now, and at most since the start or the last reset_peak(). pinned: bytes of pinned
        host memory now. record: list of Record, in order.

    A tensor that outlives the block stays usable and goes on counting in the ledger of the GPU that made it. Leaving
    the block without an exception waits for all streams and raises RaceError if that shows a race.
    """

    def __init__(self, capacity=None, meta=False, *, pin_limit=None, record_ops=False):
        self.capacity, self.meta, self.pin_limit, self.record_ops = capacity, meta, pin_limit, record_ops
        self.live = self.peak = self.pinned = 0
        self.timeline = Timeline(self)
        self._record = []
        self._numbers = itertools.count()
        self._allocations = {}  # weak references by address of the held storage
        self._pinned = {}  # bytes by address of the storage
        self._callbacks = []
        self._lock = threading.RLock()
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        _active.append(self)
        self._patches.enter_context(_host_side())
        return self

    def __exit__(self, exception_type, exception, traceback):
        self._patches.close()
        _active.remove(self)
        if exception is None:
            self.timeline.synchronize()

    def reset_peak(self):
        self.peak = self.live

    @contextlib.contextmanager
    def label(self, text):
        """Records and errors of this thread carry this label inside."""
        here = self.timeline.here
        before, here.label = here.label, text
        try:
            yield
        finally:
            here.label = before

    @property
    def record(self):
        return [Record(*fields) for fields in self._record]

    def on_op(self, callback):
        """Call `callback(name)` before every operator, copies and attention included. What it raises, that raises."""
        self._callbacks.append(callback)

    def note(self, kind, name="", nbytes=0, stream=None, allocation=None):
        here = self.timeline.here
        stream = stream or here.stream or self.timeline.default
        self._record.append((kind, name, nbytes, stream.name, here.label, allocation))

    def submit(self, name, reads=(), writes=()):
        """An operator is about to run on the current stream; raises RaceError, or what a callback raises."""
        for callback in self._callbacks:
            callback(name)
        if self.record_ops:
            self.note("op", name)
        with self._lock:
            self.timeline.submit(name, reads, writes)

    def pin(self, tensor):
        """Count the memory of a host tensor as pinned, for as long as it lives; returns the tensor."""
        if isinstance(tensor, VirtualTensor):
            raise RuntimeError("only memory of the host can be pinned")
        nbytes, storage = tensor.nbytes, tensor.untyped_storage()
        if self.pin_limit is not None and self.pinned + nbytes > self.pin_limit:
            raise RuntimeError(f"cannot pin {nbytes} bytes: {self.pinned} of {self.pin_limit} are pinned")
        self.pinned += nbytes
        self._pinned[storage._cdata] = nbytes
        weakref.finalize(storage, self._unpin, storage._cdata).atexit = False
        self.note("pin", nbytes=nbytes)
        return tensor

    def is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self._pinned

    def _unpin(self, address):
        self.pinned -= self._pinned.pop(address)

    def _allocation_of(self, held):
        storage = held.untyped_storage()
        with self._lock:
            known = self._allocations.get(storage._cdata)
            allocation = known and known()
            if allocation is None:
                allocation = Allocation(self, storage)
                self._know(storage, allocation)
        return allocation

    def _know(self, storage, allocation):
        self._allocations[storage._cdata] = weakref.ref(allocation)

    def _reserve(self, nbytes, requested):
        with self._lock:
            if self.capacity is not None and self.live + nbytes > self.capacity:
                error = torch.OutOfMemoryError(
                    f"{DEVICE} is out of memory: {requested} bytes requested with {self.live} of {self.capacity} in use"
                )
                error.requested = requested
                raise error
            self.live += nbytes
            self.peak = max(self.peak, self.live)

    def _release(self, allocation):
        with self._lock:
            self.live -= allocation.nbytes
            for storage in (allocation.storage, allocation.former):
                if storage is not None:
                    self._allocations.pop(storage._cdata, None)
            if allocation.accesses:  # else it was refused
                self.note("free", nbytes=allocation.nbytes, allocation=allocation.number)
                self.timeline.freed(allocation.accesses, allocation.stream, allocation.streams)

    def _fresh(self, make, size, *args, **options):
        """A new tensor from a factory of torch, held as this GPU holds its tensors."""
        numel = 1
        for n in size:
            numel *= n
        options["device"] = "meta" if self.meta and numel > KNOWN else "cpu"
        return VirtualTensor(make(size, *args, **options), self)


_active = []  # the GPUs whose blocks are open, innermost last


def _current():
    if not _active:
        raise RuntimeError(f"no virtual GPU is there: use {DEVICE} inside `with VirtualGPU():`")
    return _active[-1]


# The device type


class _DeviceModule:
    """What torch.get_device_module("vgpu") gives: the functions of torch.cuda that device-generic code uses."""

    @staticmethod
    def is_available():
        return bool(_active)

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def set_device(device):
        pass

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def empty_cache():
        pass

    @staticmethod
    def synchronize(device=None):
        _current().timeline.synchronize()

    @staticmethod
    def Stream(device=None, priority=0):
        return _current().timeline.new_stream()

    @staticmethod
    def Event(enable_timing=False, blocking=False, interprocess=False):
        return Event(_current())

    @staticmethod
    def current_stream(device=None):
        return _current().timeline.current

    @staticmethod
    def default_stream(device=None):
        return _current().timeline.default

    @staticmethod
    @contextlib.contextmanager
    def stream(stream):
        """Submit this thread's work to that stream inside; None changes nothing."""
        timeline = _current().timeline
        before = timeline.current
        timeline.here.stream = stream or before
        try:
            yield
        finally:
            timeline.here.stream = before

    @staticmethod
    def memory_allocated(device=None):
        return _current().live

    @staticmethod
    def max_memory_allocated(device=None):
        return _current().peak

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    @staticmethod
    def reset_peak_memory_stats(device=None):
        _current().reset_peak()

    @staticmethod
    def mem_get_info(device=None):
        """Free and total bytes; without a capacity the total is 2**63 - 1."""
        gpu = _current()
        capacity = 2**63 - 1 if gpu.capacity is None else gpu.capacity
        return capacity - gpu.live, capacity


_setup_privateuseone_for_python_backend(DEVICE_TYPE, backend_module=_DeviceModule)
DEVICE = VirtualGPU.device = torch.device(DEVICE_TYPE, 0)
_library = torch.library.Library("aten", "IMPL")  # for factories; everything else arrives with a wrapper
autocast.register(_library, DEVICE_TYPE)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return _current()._fresh(torch.empty_strided, size, stride, dtype=dtype)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return _current()._fresh(torch.empty, size, dtype=dtype, memory_format=memory_format)


def _copy_from(source, destination, non_blocking=False):
    return copy_(destination, source, non_blocking)


_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")


# The host


@contextlib.contextmanager
def _host_side():
    """What must change on the host while a virtual GPU is there.

    Parameters move to the device and back in place, as with CUDA, and memory can be pinned.
    """
    swap_was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    patches = {(torch.Tensor, "data"): property(_get_data, _set_data)}
    patches[torch.Tensor, "pin_memory"] = lambda tensor, device=None: _current().pin(tensor.clone())
    patches[torch.Tensor, "is_pinned"] = lambda tensor, device=None: _current().is_pinned(tensor)
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


def _pinning(factory):
    def make(*args, pin_memory=False, **kwargs):
        if not pin_memory:
            return factory(*args, **kwargs)
        gpu = _current()
        if gpu.meta:
            kwargs["device"] = "meta"
        return gpu.pin(factory(*args, **kwargs))

    return make


_plain_data = torch.Tensor.data


def _get_data(tensor):
    return _plain_data.__get__(tensor)


def _set_data(tensor, value):
    if not (isinstance(tensor, VirtualTensor) or isinstance(value, VirtualTensor)):
        _plain_data.__set__(tensor, value)
        return
    value = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)
    # What else was set on the tensor stays on it.
    for name in vars(value).keys() - {"held", "allocation", "signature"}:
        setattr(tensor, name, getattr(value, name))
