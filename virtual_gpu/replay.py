"""Records a run's requests to the allocator once, and replays them on cards of other sizes in seconds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from .allocator import Block, CachingAllocator

Request = tuple[int | None, int | None, Hashable]


class RecordingAllocator(CachingAllocator):
    """Keeps `trace`: in order, (number, bytes, stream) of each block handed out, (number, None, None) when it comes
    back, (None, None, None) when the cache is emptied."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.trace: list[Request] = []
        self._numbers: dict[Block, int] = {}

    def alloc(self, nbytes: int, stream: Hashable = None) -> Block | None:
        block = super().alloc(nbytes, stream)
        if block is not None:
            self._numbers[block] = len(self.trace)
            self.trace.append((len(self.trace), nbytes, stream))
        return block

    def free(self, block: Block, done: Callable[[], bool] | None = None) -> None:
        self.trace.append((self._numbers.pop(block), None, None))
        super().free(block, done)

    def empty_cache(self) -> None:
        self.trace.append((None, None, None))
        super().empty_cache()


def replay(trace: Iterable[Request], allocator: CachingAllocator) -> CachingAllocator:
    """Plays a trace on an allocator, and returns it. Raises torch.OutOfMemoryError where the run would."""
    blocks: dict[int, Block] = {}
    for number, nbytes, stream in trace:
        if nbytes is not None:
            blocks[number] = allocator.alloc(nbytes, stream)
        elif number is None:
            allocator.empty_cache()
        else:
            allocator.free(blocks.pop(number))
    return allocator


def least_capacity(recorded: RecordingAllocator, step: int | None = None) -> int:
    """The smallest capacity, a multiple of `step`, at which such an allocator serves all the requests of its trace.

    step: bytes; the allocator's granularity by default, whose multiples are all that it can reserve.
    """
    kind, step = (recorded.expandable_segments, recorded.granularity), step or recorded.granularity
    whole = replay(recorded.trace, CachingAllocator(None, *kind))
    too_little, enough = whole.peak_allocated // step - 1, -(-whole.peak_reserved // step)
    while enough - too_little > 1:
        middle = (too_little + enough) // 2
        try:
            replay(recorded.trace, CachingAllocator(middle * step, *kind))
            enough = middle
        except torch.OutOfMemoryError:
            too_little = middle
    return enough * step
