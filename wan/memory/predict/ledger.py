"""What a stage asks of a device's allocator, request by request, and what that takes of the device.

Predictors write down the tensors that the code makes and drops, in its order. Live bytes follow from sizes alone. What
the allocator reserves for them depends on the order, too, for it hands out pieces of what it has: the ledger plays the
requests to a model of PyTorch's caching allocator on a device without end, which never has to give anything back. A
device with so much room serves them all.
"""

from __future__ import annotations

import bisect
import math

ROUNDING = 512  # bytes, the allocator's unit
MIB = 2**20
SMALL = MIB  # the largest request that the pool for small ones serves
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB  # what a pool takes from the driver at a time
OWN_SEGMENT = 10 * MIB  # from here on a request gets a segment of its own size where segments cannot grow


def rounded(nbytes: float, unit: int = ROUNDING) -> int:
    """Bytes in whole units."""
    return math.ceil(nbytes / unit) * unit


class Ledger:
    """The requests of one stage.

    Attributes:
        live, peak: bytes in tensors now, and at most so far, in the allocator's units.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._requests: list[tuple[int, int]] = []  # (number of the tensor, its bytes; 0 when it is dropped)
        self._sizes: list[int] = []

    def take(self, nbytes: float) -> int:
        """A new tensor; returns the number by which it is dropped."""
        size = rounded(nbytes)
        self._sizes.append(size)
        number = len(self._sizes) - 1
        self._requests.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        return number

    def drop(self, *numbers: int | None) -> None:
        """Tensors that are needed no more, in this order; None is none."""
        for number in numbers:
            if number is not None:
                self._requests.append((number, 0))
                self.live -= self._sizes[number]

    def become(self, nbytes: float, *before: int | None) -> int:
        """A new tensor, and then others dropped, of which it was made."""
        number = self.take(nbytes)
        self.drop(*before)
        return number

    def reserved(self, expandable: bool = True) -> int:
        """Bytes that the allocator takes from the driver at most.

        expandable: whether its segments can grow.
        """
        pools = _Pool(True, expandable), _Pool(False, expandable)
        blocks: dict[int, tuple[_Pool, tuple[int, int]]] = {}
        for number, size in self._requests:
            if size:
                pool = pools[size > SMALL]
                blocks[number] = pool, pool.take(size)
            elif number in blocks:
                pool, block = blocks.pop(number)
                pool.give(*block)
        return sum(pool.taken for pool in pools)


class _Pool:
    """Blocks for small or for large requests. What is taken stays: the driver is asked for more, never given back.

    Attributes:
        taken: bytes from the driver.
    """

    def __init__(self, small: bool, expandable: bool):
        self.taken = 0
        self._small, self._expandable = small, expandable
        self._page = SMALL_PAGE if small else LARGE_PAGE
        self._end = 0  # of the last segment, of all addresses given
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._sizes: dict[int, int] = {}  # of free blocks, by address
        self._starts: dict[int, int] = {}  # the same, by the address behind them

    def take(self, size: int) -> tuple[int, int]:
        """(address, size) of a block of at least so many bytes: the smallest that is free, else a new one."""
        block = self._best_fit(size) or self._grow(size)
        start, room = block
        self._remove(start)
        rest = room - size
        if rest >= ROUNDING if self._small or self._expandable else rest > SMALL:
            self._insert(start + size, rest)
            return start, size
        return block

    def give(self, start: int, size: int) -> None:
        """Takes a block back; it joins free neighbours."""
        before = self._starts.get(start)
        if before is not None:
            size += self._sizes[before]
            self._remove(before)
            start = before
        behind = self._sizes.get(start + size)
        if behind is not None:
            self._remove(start + size)
            size += behind
        self._insert(start, size)

    def _best_fit(self, size: int) -> tuple[int, int] | None:
        """Of a segment that can grow, its free end is taken only if no other block fits."""
        last = None
        for room, start in self._free[bisect.bisect_left(self._free, (size, -1)) :]:
            if not self._expandable or start + room != self._end:
                return start, room
            last = start, room
        return last

    def _grow(self, size: int) -> tuple[int, int]:
        if not self._expandable:
            own = not self._small and size >= OWN_SEGMENT
            segment = rounded(size, SMALL_PAGE) if own else self._page
            start = self._end + 1  # a gap: blocks of two segments are no neighbours
        else:
            start = self._starts.get(self._end, self._end)
            segment = rounded(size - self._sizes.get(start, 0), self._page)
        self.taken += segment
        self._end = (start if not self._expandable else self._end) + segment
        self.give(self._end - segment, segment)
        return start, self._sizes[start]

    def _insert(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._sizes[start] = size
        self._starts[start + size] = start

    def _remove(self, start: int) -> None:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        del self._free[bisect.bisect_left(self._free, (size, start))]
