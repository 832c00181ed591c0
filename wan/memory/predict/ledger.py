"""What a stage asks of a device's allocator, request by request, and what that takes of the device.

Predictors write down the tensors that the code makes and drops, in its order. Live bytes follow from sizes alone. What
the allocator reserves for them depends on the order, too, for it hands out pieces of what it has: the ledger plays the
requests to a model of PyTorch's caching allocator on a device without end, which never has to give anything back. A
device with so much room serves them all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

ROUNDING = 512  # bytes, the allocator's unit
MIB = 2**20
SMALL = MIB  # the largest request that the pool for small ones serves
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB  # what a pool takes from the driver at a time
OWN_SEGMENT = 10 * MIB  # from here on a request gets a segment of its own size where segments cannot grow


def rounded(nbytes: float, unit: int = ROUNDING) -> int:
    """Bytes in whole units."""
    return math.ceil(nbytes / unit) * unit


Request = tuple[int, int]  # (number of a tensor, its bytes; 0 when it is dropped)
RELEASE = -1  # in place of a number: what is not in use is given back
PLAYED = -2  # or of one that belongs to what was played, whose place in `_played` follows


class Ledger:
    """The requests of one stage, or of a part of one, which others play.

    Attributes:
        live, peak: bytes in tensors now, and at most so far, in the allocator's units.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._requests: list[Request] = []
        self._sizes: list[int] = []
        self._played: list[tuple[Ledger, int]] = []  # and the number of its first tensor

    def take(self, nbytes: float) -> int:
        """A new tensor; returns the number by which it is dropped."""
        size = int(-(-nbytes // ROUNDING)) * ROUNDING
        number = len(self._sizes)
        self._sizes.append(size)
        self._requests.append((number, size))
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
        return number

    def arrive(self, sizes: Iterable[int]) -> list[int]:
        """Tensors that come one by one; returns what drops them."""
        return [self.take(size) for size in sizes]

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

    def release(self) -> None:
        """The allocator gives back to the driver what is not in use."""
        self._requests.append((RELEASE, 0))

    def play(self, part: Ledger) -> int:
        """The requests of a part, as if they were made here; returns what its tensors' numbers grow by."""
        first = len(self._sizes)
        self._requests.append((PLAYED, len(self._played)))
        self._played.append((part, first))
        self._sizes += part._sizes
        self.peak = max(self.peak, self.live + part.peak)
        self.live += part.live
        return first

    def reserved(self, expandable: bool = True) -> int:
        """Bytes that the allocator takes from the driver at most.

        expandable: whether its segments can grow.
        """
        served = _Served(_Pool(True, expandable), _Pool(False, expandable))
        served.serve(self, 0)
        return served.most


class _Served:
    """Requests served by the pools for small and large ones.

    What is played in a state of the pools in which it was played before takes and leaves what it did then.

    Attributes:
        most: bytes taken from the driver so far.
    """

    def __init__(self, small: _Pool, large: _Pool):
        self.pools = small, large
        self.most = 0
        self._blocks: dict[int, tuple[int, int]] = {}

    def serve(self, part: Ledger, first: int) -> None:
        """Serves a part whose tensors' numbers grow by `first`."""
        small, large = self.pools
        blocks, sizes, requests = self._blocks, part._sizes, part._requests
        for number, size in requests:
            if number >= 0:
                pool = small if sizes[number] <= SMALL else large
                if size:
                    blocks[first + number] = pool.take(size)
                    self.most = max(self.most, small.taken + large.taken)
                elif first + number in blocks:
                    pool.give(*blocks.pop(first + number))
            elif number == RELEASE:
                small.release()
                large.release()
            else:
                inner, offset = part._played[size]
                self.serve(inner, first + offset)


class _Pool:
    """Blocks for small or for large requests.

    Attributes:
        taken: bytes from the driver now.
    """

    def __init__(self, small: bool, expandable: bool):
        self.taken = 0
        self._small, self._expandable = small, expandable
        self._page = SMALL_PAGE if small else LARGE_PAGE
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._sizes: dict[int, int] = {}  # of free blocks, by address
        self._starts: dict[int, int] = {}  # the same, by the address behind them
        # Of a segment that can grow, what has no memory behind it: bytes by address; the last is without end.
        self._gaps: dict[int, int] = {0: 1 << 60}
        # Of segments that cannot, bytes by address; and the end of the last.
        self._segments: dict[int, int] = {}
        self._end = 0

    def take(self, size: int) -> tuple[int, int]:
        """(address, size) of a block of at least so many bytes: the smallest that is free, else a new one."""
        start = self._best_fit(size)
        if start is None:
            start = self._expand(size) if self._expandable else self._segment(size)
        rest = self._sizes[start] - size
        self._remove(start)
        if rest >= ROUNDING if self._small or self._expandable else rest > SMALL:
            self._insert(start + size, rest)
            rest = 0
        return start, size + rest

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

    def release(self) -> None:
        """Gives back whole pages, or segments, of which nothing is in use."""
        for size, start in list(self._free):
            if not self._expandable:
                if self._segments.get(start) == size:
                    self._remove(start)
                    self.taken -= size
                continue
            low, high = rounded(start, self._page), (start + size) // self._page * self._page
            if low < high:
                self._remove(start)
                self.taken -= high - low
                for first, last in ((start, low), (high, start + size)):
                    if first < last:
                        self._insert(first, last - first)
                self._add_gap(low, high - low)

    def _best_fit(self, size: int) -> int | None:
        """The smallest free block; of those that could grow, the one with the least room, only if no other fits."""
        found = bisect.bisect_left(self._free, (size, -1))
        if found == len(self._free):
            return None
        rooms = (room + self._gaps.get(start + room, 0) for room, start in self._free[found:])
        least = next(rooms)
        for room in rooms:
            if room >= least:
                break
            found, least = found + 1, room
        return self._free[found][1]

    def _expand(self, size: int) -> int:
        """Puts memory behind the first gap where that, with what is free beside it, makes so large a block."""
        places = (self._room_at(gap, size) for gap in sorted(self._gaps))
        start = next(place for place in places if place >= 0)
        while self._sizes.get(start, 0) < size:
            gap = start + self._sizes.get(start, 0)
            there = self._gaps.pop(gap)
            taken = min(rounded(size - self._sizes.get(start, 0), self._page), there)
            if taken < there:
                self._gaps[gap + taken] = there - taken
            self.taken += taken
            self.give(gap, taken)
        return start

    def _room_at(self, gap: int, size: int) -> int:
        """Where a block of so many bytes could start at this gap; -1 if it could not."""
        first = end = self._starts.get(gap, gap)
        while end - first < size:
            step = self._sizes.get(end) or self._gaps.get(end)
            if not step:
                return -1
            end += step
        return first

    def _segment(self, size: int) -> int:
        own = not self._small and size >= OWN_SEGMENT
        taken = rounded(size, SMALL_PAGE) if own else self._page
        start = self._end + 1  # the byte between keeps blocks of two segments from being neighbours
        self._segments[start] = taken
        self._end = start + taken
        self.taken += taken
        self._insert(start, taken)
        return start

    def _add_gap(self, start: int, size: int) -> None:
        if start + size in self._gaps:
            size += self._gaps.pop(start + size)
        before = next((gap for gap, length in self._gaps.items() if gap + length == start), None)
        if before is None:
            self._gaps[start] = size
        else:
            self._gaps[before] += size

    def _insert(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._sizes[start] = size
        self._starts[start + size] = start

    def _remove(self, start: int) -> None:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        del self._free[bisect.bisect_left(self._free, (size, start))]
