"""Weights that ranks share out, as one of them has them: distributed/sharding.py and FSDP2, request by request."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from torch import nn

from leanwan.record.ledger import Ledger

from .buffers import Sizes

Rows = tuple[int, int]  # of a parameter: how many it has, and bytes of one


class Shards:
    """Layer groups of which each rank keeps a part.

    Attributes:
        parts: bytes of each parameter's part, by groups; those of all ranks are alike, the last ones filled up.
        nbytes: of all parts.

    Args:
        groups: of parameters, in the order of their visits.
        ranks: that share them out.
    """

    def __init__(self, groups: Iterable[Iterable[Rows]], ranks: int):
        self.ranks = ranks
        groups = [list(group) for group in groups]
        self._whole = [[rows * row for rows, row in group] for group in groups]
        self.parts: list[Sizes] = [[-(-rows // ranks) * row for rows, row in group] for group in groups]
        self.nbytes = sum(map(sum, self.parts))

    def cut(self, ledger: Ledger) -> None:
        """The groups come one by one, and leave their parts there."""
        for whole, parts in zip(self._whole, self.parts):
            group = ledger.arrive(whole)
            ledger.arrive(parts)
            ledger.drop(*group)

    @property
    def between(self) -> list[int]:
        """What of Gathered is there between passes."""
        return [*self.gathered(-1), sum(self.gathered(0))]

    def gathered(self, n: int) -> Sizes:
        """Bytes of each parameter of the nth group, from all ranks."""
        return [part * self.ranks for part in self.parts[n % len(self.parts)]]


class Gathered:
    """The groups that are whole on a rank: the one that computes; of the one after it, what the ranks send.

    It begins as a pass leaves it for the next one.
    """

    def __init__(self, ledger: Ledger, shards: Shards):
        self._ledger, self._shards = ledger, shards
        self._number: int | None = None
        self._current = ledger.arrive(shards.gathered(-1))
        self._coming = ledger.take(sum(shards.gathered(0)))

    def visit(self, number: int) -> None:
        """A module of this group is called; groups are called in their order."""
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
        """As `drop`; what the ranks have sent arrives before."""
        self._ledger.drop(*self._current)
        arrived = self._ledger.arrive(self._shards.gathered(0))
        self._ledger.drop(self._coming, *arrived)


@functools.lru_cache(maxsize=8)
def shards_of(model: nn.Module, ranks: int) -> Shards:
    """Those of a DiT."""
    groups = [
        [rows_of(p.shape, p.element_size()) for p in group.parameters()] for group in model.layer_groups()
    ]
    return Shards(groups, ranks)


@functools.lru_cache(maxsize=8)
def cut(shards: Shards) -> Ledger:
    """What cutting asks for, for others to play; the parts stay."""
    ledger = Ledger()
    shards.cut(ledger)
    return ledger


def rows_of(shape: Sequence[int], itemsize: int) -> Rows:
    """Of a parameter."""
    row = itemsize
    for length in shape[1:]:
        row *= length
    return shape[0], row
