"""The device memory of sharded weights on one rank: records what distributed/sharding.py and FSDP2 make and drop."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from torch import nn

from leanwan.record.ledger import Ledger

from .buffers import Sizes

Rows = tuple[int, int]  # of a parameter: number of rows, bytes of a row


class Shards:
    """Layer groups of which each rank keeps a part.

    Attributes:
        parts: bytes of each parameter's part, by groups; all ranks' parts have one size, the last ones padded to it.
        nbytes: of all parts of one rank.

    Args:
        groups: the Rows of each group's parameters, groups in the order of their visits.
        ranks: number of ranks.
    """

    def __init__(self, groups: Iterable[Iterable[Rows]], ranks: int):
        self.ranks = ranks
        groups = [list(group) for group in groups]
        self._whole = [[rows * row for rows, row in group] for group in groups]
        self.parts: list[Sizes] = [[-(-rows // ranks) * row for rows, row in group] for group in groups]
        self.nbytes = sum(map(sum, self.parts))

    def cut(self, ledger: Ledger) -> None:
        """Records that the groups arrive one by one, and are cut to this rank's parts."""
        for whole, parts in zip(self._whole, self.parts):
            group = ledger.arrive(whole)
            ledger.arrive(parts)
            ledger.drop(*group)

    @property
    def between(self) -> list[int]:
        """Bytes of the tensors that Gathered holds between passes."""
        return [*self.gathered(-1), sum(self.gathered(0))]

    def gathered(self, n: int) -> Sizes:
        """Bytes of each parameter of the nth group, gathered from all ranks."""
        return [part * self.ranks for part in self.parts[n % len(self.parts)]]


class Gathered:
    """What a rank holds beside its parts: the group that computes, whole, and the buffer that gathers the next group.

    Its first state is the one that a pass leaves for the next pass.
    """

    def __init__(self, ledger: Ledger, shards: Shards):
        self._ledger, self._shards = ledger, shards
        self._number: int | None = None
        self._current = ledger.arrive(shards.gathered(-1))
        self._coming = ledger.take(sum(shards.gathered(0)))

    def visit(self, number: int) -> None:
        """Records that a module of this group is called; groups are called in their order."""
        if number == self._number:
            return
        self._number = number
        ledger, shards = self._ledger, self._shards
        ledger.drop(*self._current)
        self._current = ledger.arrive(shards.gathered(number))
        ledger.drop(self._coming)
        self._coming = ledger.take(sum(shards.gathered(number + 1)))

    def drop(self) -> None:
        self._ledger.drop(*self._current, self._coming)

    def leave(self) -> None:
        """As `drop`, but the gathered group is unpacked before."""
        self._ledger.drop(*self._current)
        arrived = self._ledger.arrive(self._shards.gathered(0))
        self._ledger.drop(self._coming, *arrived)


@functools.lru_cache(maxsize=8)
def shards_of(model: nn.Module, ranks: int) -> Shards:
    """The Shards of a DiT."""
    groups = [
        [rows_of(p.shape, p.element_size()) for p in group.parameters()] for group in model.layer_groups()
    ]
    return Shards(groups, ranks)


@functools.lru_cache(maxsize=8)
def cut(shards: Shards) -> Ledger:
    """The requests of cutting, to be played; the parts stay."""
    ledger = Ledger()
    shards.cut(ledger)
    return ledger


def rows_of(shape: Sequence[int], itemsize: int) -> Rows:
    """The Rows of a parameter of this shape."""
    row = itemsize
    for length in shape[1:]:
        row *= length
    return shape[0], row
