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
dispatch key, which came with 2.10 and is experimental: it is made for tests and benchmarks, not for the package.
The first VirtualGPU of a process registers the device type; there is nothing else to set up, and it works in every
thread. A process that computes on a real GPU must have none: see backend.register().
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .allocator import GRANULARITY, Block, CachingAllocator
from .host import host_side
from .replay import RecordingAllocator
from .streams import Stream, Timeline
from .tensor import DEVICE, DEVICE_TYPE, KNOWN, Allocation, VirtualTensor


class Record(NamedTuple):
    """One thing that happened on the device.

    kind: "alloc", "free", "copy_in" (host to device), "copy_out", "op", "record_event", "wait_event", "record_stream"
        or "pin". name: the operator or event; of a copy_out, the operator whose result the host had to know, without
        bytes. allocation: number of the storage, in order of allocation.
    """

    kind: str
    name: str
    nbytes: int
    stream: str
    label: str | None
    allocation: int | None


class VirtualGPU:
    """Makes device ``vgpu:0`` usable inside its `with` block.

    capacity: bytes that the allocator can reserve, or None for no limit. An allocation that needs more raises
        torch.OutOfMemoryError, whose attribute `requested` is the bytes asked for.
    expandable_segments, granularity: of the allocator, see allocator.py; a finer granularity suits toys.
    meta: count without computing.
    record_requests: keep the allocator's trace, for replay.py.
    pin_limit: bytes of host memory that can be pinned, or None for no limit; beyond it pinning raises RuntimeError.
    record_ops: note every operator in the record, not only memory, moves and events.

    live, peak: bytes allocated now, and at most since the start or the last reset_peak(). reserved, peak_reserved: the
        same for the bytes that the allocator holds. pinned: bytes of pinned host memory now. record: list of Record,
        in order. initialized: whether the device was used yet.

    A tensor that outlives the block stays usable and goes on counting in the ledger of the GPU that made it. Leaving
    the block without an exception waits for all streams and raises RaceError if that shows a race.

    Raises UnsupportedError, before the block, with a PyTorch that is too old.
    """

    device = DEVICE

    def __init__(
        self,
        capacity: int | None = None,
        meta: bool = False,
        *,
        expandable_segments: bool = False,
        granularity: int = GRANULARITY,
        record_requests: bool = False,
        pin_limit: int | None = None,
        record_ops: bool = False,
    ):
        from .backend import register  # which needs this module

        register()
        self.meta, self.pin_limit, self.record_ops = meta, pin_limit, record_ops
        allocator = RecordingAllocator if record_requests else CachingAllocator
        self.allocator: Any = allocator(capacity, expandable_segments, granularity)
        self.initialized = False
        self.pinned = 0
        self.timeline = Timeline(self)
        self._record: list[tuple] = []
        self._numbers = itertools.count()
        self._allocations: dict[int, weakref.ref[Allocation]] = {}  # by address of the held storage
        self._pinned: dict[int, int] = {}  # bytes by address of the storage
        self._callbacks: list[Callable[[str], Any]] = []
        self._lock = threading.RLock()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> VirtualGPU:
        active.append(self)
        self._patches.enter_context(host_side(current))
        return self

    def __exit__(self, exception_type: Any, exception: BaseException | None, traceback: Any) -> None:
        self._patches.close()
        active.remove(self)
        if exception is None:
            self.timeline.synchronize()

    def initialize(self) -> None:
        self.initialized = True

    @property
    def capacity(self) -> int | None:
        return self.allocator.capacity

    @capacity.setter
    def capacity(self, nbytes: int | None) -> None:
        self.allocator.capacity = nbytes

    @property
    def live(self) -> int:
        return self.allocator.allocated

    @property
    def peak(self) -> int:
        return self.allocator.peak_allocated

    @property
    def reserved(self) -> int:
        return self.allocator.reserved

    @property
    def peak_reserved(self) -> int:
        return self.allocator.peak_reserved

    def reset_peak(self) -> None:
        self.allocator.reset_peak()

    def empty_cache(self) -> None:
        with self._lock:
            self.allocator.empty_cache()

    @contextlib.contextmanager
    def label(self, text: str) -> Iterator[None]:
        """Records and errors of this thread carry this label inside."""
        here = self.timeline.here
        before, here.label = here.label, text
        try:
            yield
        finally:
            here.label = before

    @property
    def record(self) -> list[Record]:
        return [Record(*fields) for fields in self._record]

    def on_op(self, callback: Callable[[str], Any]) -> None:
        """Call `callback(name)` before every operator, copies and attention included. What it raises, that raises."""
        self._callbacks.append(callback)

    def note(
        self,
        kind: str,
        name: str = "",
        nbytes: int = 0,
        stream: Stream | None = None,
        allocation: int | None = None,
    ) -> None:
        here = self.timeline.here
        stream = stream or here.stream or self.timeline.default
        self._record.append((kind, name, nbytes, stream.name, here.label, allocation))

    def submit(
        self, name: str, reads: Iterable[VirtualTensor] = (), writes: Iterable[VirtualTensor] = ()
    ) -> None:
        """An operator is about to run on the current stream; raises RaceError, or what a callback raises."""
        for callback in self._callbacks:
            callback(name)
        if self.record_ops:
            self.note("op", name)
        with self._lock:
            self.timeline.submit(name, reads, writes)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
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

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _unpin(self, address: int) -> None:
        self.pinned -= self._pinned.pop(address)

    def _allocation_of(self, held: torch.Tensor) -> Allocation:
        storage = held.untyped_storage()
        with self._lock:
            known = self._allocations.get(storage._cdata)
            allocation = known() if known is not None else None
            if allocation is None:
                allocation = Allocation(self, storage)
                self._know(storage, allocation)
        return allocation

    def _know(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        self._allocations[storage._cdata] = weakref.ref(allocation)

    def _allocate(self, nbytes: int, stream: Stream) -> Block | None:
        """A block for a stream; None for no bytes."""
        self.initialized = True
        with self._lock:
            return self.allocator.alloc(nbytes, stream)

    def _give_back(self, block: Block | None, done: Callable[[], bool] | None = None) -> None:
        if block is not None:
            with self._lock:
                self.allocator.free(block, done)

    def _release(self, allocation: Allocation) -> None:
        with self._lock:
            for storage in (allocation.storage, allocation.former):
                if storage is not None:
                    self._allocations.pop(storage._cdata, None)
            if not allocation.accesses:
                return  # the allocator refused it
            others = [stream for stream in allocation.streams if stream is not allocation.stream]
            self._give_back(allocation.block, self.timeline.when_known(others) if others else None)
            self.note("free", nbytes=allocation.nbytes, allocation=allocation.number)
            self.timeline.freed(allocation.accesses, allocation.stream, allocation.streams)

    def _fresh(self, make: Callable, size: Sequence[int], *args: Any, **options: Any) -> VirtualTensor:
        """A new tensor from a factory of torch, held as this GPU holds its tensors."""
        numel = 1
        for n in size:
            numel *= n
        options["device"] = "meta" if self.meta and numel > KNOWN else "cpu"
        return VirtualTensor(make(size, *args, **options), self)


active: list[VirtualGPU] = []  # the GPUs whose blocks are open, innermost last


def current() -> VirtualGPU:
    if not active:
        raise RuntimeError(f"no virtual GPU is there: use {DEVICE_TYPE} inside `with VirtualGPU():`")
    return active[-1]
