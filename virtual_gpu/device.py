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
from collections.abc import Callable, Iterator
from typing import Any

from .allocator import GRANULARITY, CachingAllocator
from .backend import register
from .hardware import Hardware, active
from .host import host_side
from .replay import RecordingAllocator
from .streams import Record


class VirtualGPU(Hardware):
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
        register()
        allocator = RecordingAllocator if record_requests else CachingAllocator
        super().__init__(allocator(capacity, expandable_segments, granularity), meta, pin_limit, record_ops)
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> VirtualGPU:
        active.append(self)
        self._patches.enter_context(host_side())
        return self

    def __exit__(self, exception_type: Any, exception: BaseException | None, traceback: Any) -> None:
        self._patches.close()
        active.remove(self)
        if exception is None:
            self.timeline.synchronize()

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
        return [Record(*fields) for fields in self.timeline.record]

    def on_op(self, callback: Callable[[str], Any]) -> None:
        """Call `callback(name)` before every operator, copies and attention included. What it raises, that raises."""
        self._callbacks.append(callback)
