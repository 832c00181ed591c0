"""What a virtual GPU is to its tensors: memory that is counted, streams and pinned memory; and which GPU is current."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .allocator import Block
from .streams import DeviceTensor, Fields, Stream, Timeline

DEVICE_TYPE = "vgpu"
DEVICE = torch.device("privateuseone", 0)  # as PyTorch calls it before the type is registered


class Allocation:
    """The bytes of one storage on the device; given back when the last tensor that shares it is gone."""

    __slots__ = (
        "__weakref__",
        "accesses",
        "block",
        "former",
        "gpu",
        "number",
        "storage",
        "stream",
        "streams",
    )

    def __init__(self, gpu: Hardware, storage: torch.UntypedStorage):
        self.gpu = gpu
        self.storage = storage  # keeps the address, by which the ledger knows it, taken
        # the storage with values, when they are known no more
        self.former: torch.UntypedStorage | None = None
        self.stream = gpu.timeline.current
        self.streams: tuple[Stream, ...] = ()  # those that record_stream named
        self.accesses: Sequence[Fields] = ()  # none while it may be refused
        self.block: Block | None = None
        requested = storage.nbytes()
        self.resize(requested)
        self.number = next(gpu._numbers)
        self.accesses = [gpu.timeline.birth(requested)]
        gpu.timeline.note("alloc", nbytes=self.nbytes, allocation=self.number)

    @property
    def nbytes(self) -> int:
        return 0 if self.block is None else self.block.used

    def resize(self, requested: int) -> None:
        block, self.block = self.block, self.gpu._allocate(requested, self.stream)
        if block is not None:
            self.gpu._give_back(block)

    def __del__(self, exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not exiting():  # Python takes modules apart before the last objects
            self.gpu._release(self)


class Hardware:
    """Everything of a virtual GPU but its place in PyTorch; see VirtualGPU."""

    device = DEVICE

    def __init__(self, allocator: Any, meta: bool, pin_limit: int | None, record_ops: bool):
        self.allocator, self.meta, self.pin_limit, self.record_ops = allocator, meta, pin_limit, record_ops
        self.pinned = 0
        self.timeline = Timeline()
        self._numbers = itertools.count()
        self._allocations: dict[int, weakref.ref[Allocation]] = {}  # by address of the held storage
        self._pinned: dict[int, int] = {}  # bytes by address of the storage
        self._callbacks: list[Callable[[str], Any]] = []

    @property
    def initialized(self) -> bool:
        return self.timeline.initialized

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
        with self.timeline.lock:
            self.allocator.empty_cache()

    def submit(
        self, name: str, reads: Iterable[DeviceTensor] = (), writes: Iterable[DeviceTensor] = ()
    ) -> None:
        """An operator is about to run on the current stream; raises RaceError, or what a callback raises."""
        for callback in self._callbacks:
            callback(name)
        if self.record_ops:
            self.timeline.note("op", name)
        with self.timeline.lock:
            self.timeline.submit(name, reads, writes)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the memory of a host tensor as pinned, for as long as it lives; returns the tensor."""
        if tensor.device == self.device:
            raise RuntimeError("only memory of the host can be pinned")
        nbytes, storage = tensor.nbytes, tensor.untyped_storage()
        if self.pin_limit is not None and self.pinned + nbytes > self.pin_limit:
            raise RuntimeError(f"cannot pin {nbytes} bytes: {self.pinned} of {self.pin_limit} are pinned")
        self.pinned += nbytes
        self._pinned[storage._cdata] = nbytes
        weakref.finalize(storage, self._unpin, storage._cdata).atexit = False
        self.timeline.note("pin", nbytes=nbytes)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _unpin(self, address: int) -> None:
        self.pinned -= self._pinned.pop(address)

    def _allocation_of(self, held: torch.Tensor) -> Allocation:
        storage = held.untyped_storage()
        with self.timeline.lock:
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
        self.timeline.initialized = True
        with self.timeline.lock:
            return self.allocator.alloc(nbytes, stream)

    def _give_back(self, block: Block | None, done: Callable[[], bool] | None = None) -> None:
        if block is not None:
            with self.timeline.lock:
                self.allocator.free(block, done)

    def _release(self, allocation: Allocation) -> None:
        with self.timeline.lock:
            for storage in (allocation.storage, allocation.former):
                if storage is not None:
                    self._allocations.pop(storage._cdata, None)
            if not allocation.accesses:
                return  # it was refused
            others = [stream for stream in allocation.streams if stream is not allocation.stream]
            self._give_back(allocation.block, self.timeline.when_known(others) if others else None)
            self.timeline.note("free", nbytes=allocation.nbytes, allocation=allocation.number)
            self.timeline.freed(allocation.accesses, allocation.stream, allocation.streams)


active: list[Hardware] = []  # the GPUs whose blocks are open, innermost last


def current() -> Hardware:
    if not active:
        raise RuntimeError(f"no virtual GPU is there: use {DEVICE_TYPE} inside `with VirtualGPU():`")
    return active[-1]
