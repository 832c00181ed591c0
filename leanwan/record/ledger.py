"""Predicts the device memory that PyTorch's caching allocator reserves for a sequence of allocations and frees.

A predictor records in a Ledger the tensors that the code makes and drops, in the code's order. Live bytes follow from
sizes alone. Reserved bytes also depend on the order, because the allocator reuses what was freed: a Device replays the
requests on a model of the allocator with endless memory, which never has to return any to the driver. A real device
with as much room as that model reserves serves all the requests.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

ROUNDING = 512  # bytes, the allocator's unit
MIB = 2**20
SMALL = MIB  # the largest request that the small pool serves
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB  # what the small and the large pool take from the driver at a time
OWN_SEGMENT = 10 * MIB  # where segments cannot grow, larger requests get a segment of their own size


def rounded(nbytes: float, unit: int = ROUNDING) -> int:
    """Bytes, rounded up to whole units."""
    return math.ceil(nbytes / unit) * unit


Request = tuple[int, int]  # (number of a tensor, its bytes; 0 when it is dropped)
RELEASE = -1  # in place of a tensor's number: the allocator returns unused memory to the driver
PLAYED = -2  # or: play another ledger; its index in `_played` follows
REPEATED = -3  # or: repeat requests; their index in `_repeated` follows
Pairs = tuple[tuple[int, int], ...]
State = tuple[int, int, Pairs, Pairs, Pairs]  # see _Pool.state
# Effects of playing a ledger, by that ledger and the states of the small and the large pool before: peak of the bytes
# taken, the pools' states after, and of each tensor left its number, whether it is in the small pool, address and size.
Known = dict[tuple["Ledger", State, State], tuple[int, State, State, list[tuple[int, bool, int, int]]]]


class Ledger:
    """The allocations and frees of one stage, or of a part of a stage, which other ledgers play.

    Attributes:
        live, peak: bytes of the live tensors, now and at most so far; each tensor counts in whole units of ROUNDING.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._requests: list[Request] = []
        self._numbers = 0
        self._held: dict[int, int] = {}  # bytes of the live tensors, by number
        self._played: list[tuple[Ledger, int]] = []  # a ledger, and the number of its first tensor
        self._repeated: list[tuple[list[Request], range]] = []  # requests, and what each time adds to numbers

    def take(self, nbytes: float) -> int:
        """Makes a tensor; returns the number by which it is dropped."""
        size = int(-(-nbytes // ROUNDING)) * ROUNDING
        number = self._numbers
        self._numbers = number + 1
        self._held[number] = size
        self._requests.append((number, size))
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
        return number

    def arrive(self, sizes: Iterable[int]) -> list[int]:
        """Makes tensors one by one; returns their numbers."""
        return [self.take(size) for size in sizes]

    def drop(self, *numbers: int | None) -> None:
        """Frees tensors, in this order; None is skipped."""
        for number in numbers:
            if number is not None:
                self._requests.append((number, 0))
                self.live -= self._held.pop(number)

    def become(self, nbytes: float, *before: int | None) -> int:
        """Makes a tensor, then frees the tensors that it was made of; returns its number."""
        number = self.take(nbytes)
        self.drop(*before)
        return number

    def release(self) -> None:
        """Has the allocator return unused memory to the driver."""
        self._requests.append((RELEASE, 0))

    def play(self, part: Ledger) -> list[int]:
        """Makes the requests of a part here; returns the numbers of the tensors that the part left."""
        first = self._numbers
        self._requests.append((PLAYED, len(self._played)))
        self._played.append((part, first))
        self._numbers += part._numbers
        self.peak = max(self.peak, self.live + part.peak)
        self.live += part.live
        left = {first + number: size for number, size in part._held.items()}
        self._held |= left
        return [*left]

    @property
    def held(self) -> list[int]:
        """The numbers of the live tensors."""
        return list(self._held)

    @property
    def made(self) -> int:
        """Bytes of all tensors that were ever made."""
        made = 0
        for number, size in self._requests:
            if number >= 0:
                made += size
            elif number == PLAYED:
                made += self._played[size][0].made
            elif number == REPEATED:
                requests, growth = self._repeated[size]
                made += len(growth) * sum(again for _, again in requests)
        return made

    def restart(self) -> None:
        """Sets `peak` back to the live bytes."""
        self.peak = self.live

    def mark(self) -> tuple[int, int]:
        """The present place, from which `again` repeats."""
        return len(self._requests), self._numbers

    def again(self, mark: tuple[int, int], times: int) -> int:
        """Repeats the requests since a mark `times` more times; returns what that adds to the live tensors' numbers.

        These requests must make as much as they free, and play no ledger. Each time must replace all live tensors by
        new ones.
        """
        since, grown = self._requests[mark[0] :], self._numbers - mark[1]
        self._requests.append((REPEATED, len(self._repeated)))
        self._repeated.append((since, range(grown, (times + 1) * grown, grown)))
        self._numbers += times * grown
        self._held = {number + times * grown: size for number, size in self._held.items()}
        return times * grown

    def reserved(self, expandable: bool = True, known: Known | None = None) -> int:
        """Peak of the bytes that the allocator takes from the driver; the arguments are Device's."""
        device = Device(expandable, known)
        device.serve(self)
        return device.most


class Device:
    """A model of the allocator on a device with endless memory, which serves the requests of one ledger.

    Args:
        expandable: whether the allocator's segments can grow.
        known: effects of playing ledgers on such devices, looked up and added to; None for none yet.

    Attributes:
        most: peak of the bytes taken from the driver since `restart`.
    """

    def __init__(self, expandable: bool, known: Known | None = None):
        self.most = 0
        self._small, self._large = _Pool(True, expandable), _Pool(False, expandable)
        self._blocks: dict[int, tuple[_Pool, int, int]] = {}
        self._known = {} if known is None else known
        self._served = 0

    def restart(self) -> None:
        """Sets `most` back to the bytes taken now."""
        self.most = self._small.taken + self._large.taken

    def serve(self, ledger: Ledger) -> None:
        """Serves the requests that were made since the last call; `ledger` must always be the same one."""
        self._serve(ledger, ledger._requests[self._served :], 0)
        self._served = len(ledger._requests)

    def _serve(self, part: Ledger, requests: Iterable[Request], first: int) -> None:
        """Serves requests of a part; `first` is added to its tensors' numbers."""
        small, large, blocks = self._small, self._large, self._blocks
        for number, size in requests:
            if size and number >= 0:
                pool = small if size <= SMALL else large
                before = pool.taken
                blocks[first + number] = pool, *pool.take(size)
                if pool.taken > before:
                    self.most = max(self.most, small.taken + large.taken)
            elif number >= 0:
                if first + number in blocks:
                    pool, begin, length = blocks.pop(first + number)
                    pool.give(begin, length)
            elif number == RELEASE:
                small.release()
                large.release()
            elif number == PLAYED:
                inner, offset = part._played[size]
                self._play(inner, first + offset)
            else:
                repeated, growth = part._repeated[size]
                for more in growth:
                    self._serve(part, repeated, first + more)

    def _play(self, part: Ledger, first: int) -> None:
        """Serves a whole part. It frees only its own tensors, so its effect depends on the pools' states alone."""
        small, large = self._small, self._large
        key = part, small.state(), large.state()
        most = self.most
        if key not in self._known:
            self.restart()
            self._serve(part, part._requests, first)
            blocks = [(n, self._blocks[first + n]) for n, size in part._held.items() if size]
            left = [(n, pool is small, begin, length) for n, (pool, begin, length) in blocks]
            self._known[key] = self.most, small.state(), large.state(), left
        else:
            self.most, of_small, of_large, left = self._known[key]
            small.become(of_small)
            large.become(of_large)
            for n, is_small, begin, length in left:
                self._blocks[first + n] = small if is_small else large, begin, length
        self.most = max(most, self.most)


class _Pool:
    """The allocator's pool of blocks for small or for large requests.

    Attributes:
        taken: bytes taken from the driver now.
    """

    def __init__(self, small: bool, expandable: bool):
        self.taken = 0
        self._small, self._expandable = small, expandable
        self._page = SMALL_PAGE if small else LARGE_PAGE
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._sizes: dict[int, int] = {}  # of free blocks, by address
        self._starts: dict[int, int] = {}  # addresses of free blocks, by the address behind each
        # Parts of the one expandable segment without memory: bytes by address; the last part is endless.
        self._gaps: dict[int, int] = {0: 1 << 60}
        # Segments that cannot grow: bytes by address; and the end of the last one.
        self._segments: dict[int, int] = {}
        self._end = 0

    def state(self) -> State:
        """Everything that the effect of later requests depends on."""
        return (
            self.taken,
            self._end,
            tuple(self._free),
            tuple(sorted(self._gaps.items())),
            tuple(self._segments.items()),
        )

    def become(self, state: State) -> None:
        self.taken, self._end, free, gaps, segments = state
        self._free, self._gaps, self._segments = list(free), dict(gaps), dict(segments)
        self._sizes = {start: size for size, start in free}
        self._starts = {start + size: start for size, start in free}

    def take(self, size: int) -> tuple[int, int]:
        """Takes the smallest free block of at least `size` bytes, else a new one; returns its address and size."""
        free, sizes, starts = self._free, self._sizes, self._starts
        found = bisect.bisect_left(free, (size, -1))
        if found < len(free):
            if sum(free[found]) in self._gaps:  # a gap follows the block
                found = self._least_room(found)
        else:
            place = self._expand(size) if self._expandable else self._segment(size)
            found = bisect.bisect_left(free, (sizes[place], place))
        length, start = free.pop(found)
        del sizes[start], starts[start + length]
        rest = length - size
        if rest >= ROUNDING if self._small or self._expandable else rest > SMALL:
            self._insert(start + size, rest)
            return start, size
        return start, length

    def give(self, start: int, size: int) -> None:
        """Frees a block and joins it with its free neighbours."""
        sizes, starts = self._sizes, self._starts
        if start in starts:
            before = starts[start]
            size += sizes[before]
            self._remove(before)
            start = before
        if start + size in sizes:
            behind = start + size
            size += sizes[behind]
            self._remove(behind)
        self._insert(start, size)

    def release(self) -> None:
        """Returns to the driver whole pages, or whole segments, of which nothing is in use."""
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

    def _least_room(self, found: int) -> int:
        """Index of the first free block, from `found` on, whose size and gap behind it are no more than the next's."""
        rooms = (room + self._gaps.get(start + room, 0) for room, start in self._free[found:])
        least = next(rooms)
        for room in rooms:
            if room >= least:
                break
            found, least = found + 1, room
        return found

    def _expand(self, size: int) -> int:
        """Fills the first gap that gives, with the free blocks beside it, `size` bytes; returns the block's address."""
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
        """Address at which a block of `size` bytes could start around this gap; -1 if there is no room for it."""
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
