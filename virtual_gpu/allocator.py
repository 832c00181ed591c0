"""PyTorch's caching allocator for CUDA as a model: which bytes a card must have, not only which are in use.

The allocator takes segments from the driver, hands out blocks of them, and keeps what is freed for the next request.
So it holds more than the program uses (`reserved` against `allocated`), and what runs out is the former. The rules
are those of c10/cuda/CUDACachingAllocator.cpp with default settings:

- Sizes are rounded up to 512 bytes. Requests up to 1 MiB and larger ones have a pool each, per stream.
- A request takes the smallest free block of its pool that holds it, of several the one at the lowest address. What
  remains is split off: from 512 bytes on in the small pool, if it is more than 1 MiB in the large one.
- Where no block fits, the driver gives a segment: 2 MiB in the small pool; in the large one 20 MiB for requests below
  10 MiB, and the request rounded up to 2 MiB else.
- A block that is freed merges with free neighbours of its segment. If other streams used it, it first waits for them.
- When the driver refuses, all segments that are free as a whole go back to it, and it is asked once more.

With expandable segments each pool has one segment of which pages are mapped as needed, 2 MiB each in the small pool
and 20 MiB in the large one. A request may start in the free end of what is mapped; blocks are split from 512 bytes on;
whole free pages go back to the driver wherever they lie.

Left out: the end of a segment's address space, where CUDA starts another one after 9/8 of the card's memory, and the
driver's own fragmentation.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable

import torch

MIB = 2**20
ROUNDING = 512
GRANULARITY = 2 * MIB  # of what is taken from the driver, and all of a small segment
LARGE_SEGMENT = 10  # granules
OWN_SEGMENT = 5  # granules; from here on a request gets a segment of its size


def rounded(nbytes: int, unit: int = ROUNDING) -> int:
    return -(-nbytes // unit) * unit


class Block:
    """A range of a segment: in use, free, or (of expandable segments) without memory behind it.

    used: of a block in use, the bytes of the request, rounded; `size` may be more.
    """

    __slots__ = ("address", "free", "mapped", "next", "pool", "previous", "size", "used")

    def __init__(self, pool: Pool, address: int, size: int, mapped: bool = True):
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.free, self.used = True, 0
        self.previous: Block | None = None
        self.next: Block | None = None

    @property
    def end(self) -> int:
        return self.address + self.size

    def split(self, size: int) -> Block:
        """Keep the first `size` bytes; returns the rest as a block behind."""
        rest = Block(self.pool, self.address + size, self.size - size, self.mapped)
        self.size = size
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next = rest
        return rest

    def absorb_next(self) -> None:
        rest = self.next
        self.size += rest.size
        self.next = rest.next
        if self.next is not None:
            self.next.previous = self

    @property
    def room(self) -> int:
        """Bytes that it has or can get by mapping what follows it."""
        follows = self.next
        return self.size + (follows.size if follows is not None and not follows.mapped else 0)


class Pool:
    """The blocks of one stream for small or for large requests."""

    def __init__(self, small: bool, granularity: int, expandable: bool):
        self.small = small
        self.granularity = granularity
        self.page = granularity if small else LARGE_SEGMENT * granularity
        self.expandable = expandable
        self._free: list[tuple[int, int, Block]] = []  # by size, then address
        self._unmapped: list[tuple[int, Block]] = []  # by address

    def free_blocks(self) -> list[Block]:
        return [block for _, _, block in self._free]

    def keep(self, block: Block) -> Block:
        """Take a block that is not in use, merged with such neighbours; returns the block that it became."""
        block.free = True
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free and neighbour.mapped == block.mapped:
                self.remove(neighbour)
                if neighbour is block.previous:
                    block = neighbour
                block.absorb_next()
        if block.mapped:
            bisect.insort(self._free, (block.size, block.address, block))
        else:
            bisect.insort(self._unmapped, (block.address, block))
        return block

    def remove(self, block: Block) -> None:
        if block.mapped:
            del self._free[bisect.bisect_left(self._free, (block.size, block.address))]
        else:
            del self._unmapped[bisect.bisect_left(self._unmapped, (block.address,))]

    def best_fit(self, size: int) -> Block | None:
        """Take out the free block for a request: the smallest, but the end of what is mapped only if no other fits."""
        free, found = self._free, bisect.bisect_left(self._free, (size,))
        if self.expandable:
            while found + 1 < len(free) and free[found + 1][2].room < free[found][2].room:
                found += 1
        return free.pop(found)[2] if found < len(free) else None

    def lowest_room(self, size: int) -> Block:
        """Where free and unmapped blocks in a row hold `size` bytes: the first of them, at the lowest address."""
        for _, unmapped in self._unmapped:
            first = unmapped
            if first.previous is not None and first.previous.free:
                first = first.previous
            held, block = 0, first
            while held < size and block is not None and block.free:
                held += block.size
                block = block.next
            if held >= size:
                return first
        raise AssertionError("the address space of a segment has no end")

    def split_off(self, rest: int) -> bool:
        """Whether what remains of a block becomes a block of its own."""
        return rest >= ROUNDING if self.small or self.expandable else rest > self.granularity // 2

    def segment(self, size: int) -> int:
        """The bytes of a segment for a request that no block holds."""
        if self.small or size < OWN_SEGMENT * self.granularity:
            return self.page
        return rounded(size, self.granularity)


class CachingAllocator:
    """Hands out blocks of a device's memory. Not safe for use from several threads at once.

    capacity: bytes that the driver has, None for no limit. expandable_segments: as in PYTORCH_CUDA_ALLOC_CONF.
    granularity: bytes; with a smaller one all limits and segments shrink, for models that are toys as well.

    limit: bytes that this process may take from the driver, as set_per_process_memory_fraction sets it, or None.

    allocated, reserved: bytes handed out, rounded up to 512 per request, and bytes taken from the driver.
    peak_allocated, peak_reserved: at most since the start or the last reset_peak().
    """

    def __init__(
        self, capacity: int | None = None, expandable_segments: bool = False, granularity: int = GRANULARITY
    ):
        self.capacity, self.expandable_segments, self.granularity = capacity, expandable_segments, granularity
        self.limit: int | None = None
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._pools: dict[tuple[Hashable, bool], Pool] = {}
        self._waiting: list[tuple[Block, Callable[[], bool] | None]] = []
        self._working = (
            False  # the garbage collector may free blocks at any moment, also amid the work on others
        )
        self._addresses = 0  # given out so far

    def alloc(self, nbytes: int, stream: Hashable = None) -> Block | None:
        """A block for a request on a stream; None for no bytes.

        Raises:
            torch.OutOfMemoryError: the driver has too little. Attribute `requested` is `nbytes`.
        """
        if nbytes == 0:
            return None
        self._working = True
        try:
            return self._alloc(nbytes, stream)
        finally:
            self._working = False

    def free(self, block: Block, done: Callable[[], bool] | None = None) -> None:
        """Take a block back. If `done` is given, it is used again only when that is true, or the cache is emptied."""
        self.allocated -= block.used
        if done is not None or self._working:
            self._waiting.append((block, done))
            return
        self._working = True
        block.pool.keep(block)
        self._working = False

    def empty_cache(self) -> None:
        """Wait for every block that waits, and give the driver back what is free as a whole."""
        self._working = True
        self._flush()
        self._working = False

    def reset_peak(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _alloc(self, nbytes: int, stream: Hashable) -> Block:
        if self._waiting:
            self._settle()
        size = rounded(nbytes)
        pool = self._pool(stream, size <= self.granularity // 2)
        block = pool.best_fit(size) or self._grow(pool, size)
        if block is None:
            self._flush()
            block = self._grow(pool, size)
        if block is None:
            raise self._out_of_memory(nbytes)
        block.free, block.used = False, size
        if pool.split_off(block.size - size):
            pool.keep(block.split(size))
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for block, done in waiting:
            if done is None or done():
                block.pool.keep(block)
            else:
                self._waiting.append((block, done))

    def _flush(self) -> None:
        while self._waiting:
            block, _ = self._waiting.pop()
            block.pool.keep(block)
        for pool in self._pools.values():
            for block in pool.free_blocks():
                if pool.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _pool(self, stream: Hashable, small: bool) -> Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(small, self.granularity, self.expandable_segments)
            if pool.expandable:
                endless = LARGE_SEGMENT * self.granularity << 30  # whole pages of either size
                pool.keep(Block(pool, self._new_addresses(endless), endless, mapped=False))
        return pool

    def _new_addresses(self, nbytes: int) -> int:
        self._addresses += nbytes
        return self._addresses - nbytes

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """A block of at least `size` bytes, with memory that the driver gives; None if it refuses."""
        segment = pool.segment(size)
        if self.limit is not None and self.reserved + segment > self.limit:
            return None
        if pool.expandable:
            return self._expand(pool, size)
        return Block(pool, self._new_addresses(segment), segment) if self._take(segment) else None

    def _expand(self, pool: Pool, size: int) -> Block | None:
        block = pool.lowest_room(size)
        while not block.mapped or block.size < size:
            unmapped, missing = (block.next, size - block.size) if block.mapped else (block, size)
            pages = rounded(min(missing, unmapped.size), pool.page)
            if not self._take(pages):
                return None
            pool.remove(unmapped)
            rest = unmapped.split(pages) if unmapped.size > pages else None
            unmapped.mapped = True
            if rest is not None:
                pool.keep(rest)
            block = pool.keep(unmapped)
        pool.remove(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Give the whole pages of a free block back."""
        pool = block.pool
        begin = rounded(block.address, pool.page)
        end = block.end // pool.page * pool.page
        if begin >= end:
            return
        pool.remove(block)
        block.free = False
        if end < block.end:
            pool.keep(block.split(end - block.address))
        if begin > block.address:
            before, block = block, block.split(begin - block.address)
            block.free = False
            pool.keep(before)
        block.mapped = False
        self.reserved -= block.size
        pool.keep(block)

    def _take(self, nbytes: int) -> bool:
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            return False
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _out_of_memory(self, nbytes: int) -> torch.OutOfMemoryError:
        limit = self.capacity if self.limit is None else self.limit
        error = torch.OutOfMemoryError(
            f"out of memory: {nbytes} bytes requested with {self.reserved} of {limit} reserved, "
            f"{self.allocated} of them in use"
        )
        error.requested = nbytes
        return error
