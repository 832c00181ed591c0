"""Sequence parallelism: each rank computes a part of a sample's tokens, and attends with a part of the heads over all.

Before attention every rank sends to each other rank the queries, keys and values of its own tokens and the other's
heads; afterwards it gets back the attention output of its own tokens (Jacobs et al., DeepSpeed Ulysses, 2023). Parts
need not be equal. Tokens are cut where chunks are, and heads are independent, so each number is computed as in one
process; merging partial sums of the softmax, as ring attention does, would round differently.

A rank without tokens still calls every layer, with empty tensors, for it may hold a part of the layers' weights.

The exchange has rounds. In each a rank sends one piece of its tokens, or nothing when it has sent all, so that no more
than one piece is held twice. Another Place, the inner one, keeps the tensors of a rank on the device or in RAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from leanwan.dit.tokens import ON_DEVICE, Attention, Piece, Place, Tokens, spans
from leanwan.methods import Undo, layer_methods

BLOCK = 64  # tokens; a rank's part consists of whole blocks


class Exchanging(Protocol):
    """A team of `size` ranks, seen from its member `rank`, which computes on `device`."""

    rank: int
    size: int
    device: torch.device

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Sends one part to each rank; returns the parts that the ranks sent here, of these shapes."""


def apply_ranks(model: nn.Module, team: Exchanging) -> Undo:
    """Makes a DiT compute this rank's share of each pass; all ranks of the team must make the same calls.

    Each rank gets the whole result. Works inside of chunking and activation offload. Returns the undo.

    Raises RuntimeError if it is applied already.
    """
    if team.size == 1:
        return lambda: None

    def shared(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, place: Place = ON_DEVICE, **kwargs: Any) -> Any:
            return forward(*args, place=OverRanks(team, place), **kwargs)

        return call

    return layer_methods(model, "ranks", innermost=True, forward=shared)


def parts_of(length: int, ranks: int) -> list[slice]:
    """The tokens of each rank: whole blocks, near equally many; the last ranks may get none."""
    blocks = spans(length, BLOCK)
    starts = [block.start for block in blocks] + [length]
    cuts = [starts[-(-len(blocks) * rank // ranks)] for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:])]


def heads_of_ranks(heads: int, ranks: int) -> list[slice]:
    """The heads of each rank: consecutive, near equally many; with more ranks than heads some ranks have none."""
    cuts = [heads * rank // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:])]


class OverRanks(Place):
    """A Place whose tokens are shared out over a team; each rank keeps its part in the place `inner`."""

    def __init__(self, team: Exchanging, inner: Place = ON_DEVICE):
        self._team, self._inner = team, inner
        self._cuts: dict[int, list[list[slice]]] = {}  # by number of tokens: the spans of each rank

    def spans(self, length: int, chunk: int) -> list[slice]:
        parts = parts_of(length, self._team.size)
        self._cuts[length] = [spans(length, chunk, part) or [part] for part in parts]
        return self._cuts[length][self._team.rank]

    def stream(self, name: str, length: int, width: int) -> Tokens:
        part = self._part(length)
        return _Part(self._inner.stream(name, _length(part), width), part, length, self._team.device)

    def heads(self, name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tokens:
        part = self._part(length)
        inner = self._inner.heads(name, _length(part), shape, dtype)
        return _Part(inner, part, length, self._team.device)

    def attended(
        self, attention: Attention, queries: Iterable[Piece], keys: Tokens, values: Tokens
    ) -> Iterator[Piece]:
        length, shape, dtype = keys.length, keys.shape, keys.dtype
        exchange = _Heads(self._team, shape, dtype)
        cuts = self._cuts[length]
        own = cuts[self._team.rank]
        contents = []
        for name, part in (("all keys", keys), ("all values", values)):
            whole = self._inner.heads(name, length, (exchange.count, shape[1]), dtype)
            for pieces in exchange.to_heads(part.read(own), cuts):
                for span, piece in pieces:
                    whole.write(span, piece)
            contents.append(whole)
        arriving = (piece for pieces in exchange.to_heads(queries, cuts) for piece in pieces)
        yield from exchange.to_tokens(self._inner.attended(attention, arriving, *contents), cuts)

    def joined(self, pieces: Sequence[torch.Tensor], length: int, width: int) -> torch.Tensor:
        team = self._team
        none = torch.empty(1, 0, width, device=team.device)
        own = torch.cat([*pieces, none], 1)
        shapes = [(1, part.stop - part.start, width) for part in parts_of(length, team.size)]
        return torch.cat(team.exchange([own] * team.size, shapes), 1)

    def _part(self, length: int) -> slice:
        return parts_of(length, self._team.size)[self._team.rank]


class _Heads:
    """Exchanges pieces [1, n, heads, head_dim] between the ranks of their tokens and the ranks of their heads.

    A rank without heads computes the first head too, and no rank asks it for the result: so all make the same calls.

    Attributes:
        count: number of heads that this rank computes.
    """

    def __init__(self, team: Exchanging, shape: tuple[int, ...], dtype: torch.dtype):
        self._team, self._dtype = team, dtype
        heads, self._width = shape
        self._shares = heads_of_ranks(heads, team.size)
        self._seen = [share if share.stop > share.start else slice(0, 1) for share in self._shares]
        self.count = self._count(self._seen[team.rank])

    def to_heads(self, pieces: Iterable[Piece], cuts: Sequence[Sequence[slice]]) -> Iterator[list[Piece]]:
        """Takes this rank's spans with all heads; yields, each round, every rank's next span with this rank's heads."""
        mine = iter(pieces)
        for spans_ in _rounds(cuts):
            piece = next(mine)[1] if spans_[self._team.rank] else self._nothing(self._count(self._shares))
            shapes = [(1, _length(span), self.count, self._width) for span in spans_]
            arrived = self._team.exchange([piece[:, :, share] for share in self._seen], shapes)
            del piece
            yield [(span, part) for span, part in zip(spans_, arrived) if span and _length(span)]
        for _ in mine:  # the reader releases its last piece when it is asked for another
            pass

    def to_tokens(self, pieces: Iterator[Piece], cuts: Sequence[Sequence[slice]]) -> Iterator[Piece]:
        """The way back: takes every rank's spans with this rank's heads; yields this rank's spans with all heads."""
        counts = [self._count(share) for share in self._shares]
        for spans_ in _rounds(cuts):
            own = spans_[self._team.rank]
            asked = counts[self._team.rank]
            parts = [
                next(pieces)[1][:, :, :asked] if _length(span) else self._nothing(asked) for span in spans_
            ]
            shapes = [(1, _length(own), count, self._width) for count in counts]
            arrived = self._team.exchange(parts, shapes)
            del parts
            if own:
                yield own, torch.cat(arrived, dim=2)

    def _count(self, share: slice | Sequence[slice]) -> int:
        return share.stop - share.start if isinstance(share, slice) else sum(map(self._count, share))

    def _nothing(self, heads: int) -> torch.Tensor:
        return torch.empty(1, 0, heads, self._width, dtype=self._dtype, device=self._team.device)


class _Part(Tokens):
    """This rank's tokens, addressed by their positions among all tokens; writes to other ranks' tokens are ignored."""

    def __init__(self, inner: Tokens, part: slice, length: int, device: torch.device):
        super().__init__(length, inner.shape, inner.dtype)
        self._inner, self._part, self._device = inner, part, device

    def read(self, spans: Iterable[slice]) -> Iterator[Piece]:
        start = self._part.start
        if not _length(self._part):
            none = torch.empty(1, 0, *self.shape, dtype=self.dtype, device=self._device)
            yield from ((span, none) for span in spans)
            return
        for span, piece in self._inner.read(slice(span.start - start, span.stop - start) for span in spans):
            yield slice(span.start + start, span.stop + start), piece
            del piece

    def write(self, span: slice, value: torch.Tensor) -> None:
        start, stop = max(span.start, self._part.start), min(span.stop, self._part.stop)
        if start < stop:
            own = value[:, start - span.start : stop - span.start]
            self._inner.write(slice(start - self._part.start, stop - self._part.start), own)

    def add(self, span: slice, value: torch.Tensor) -> None:
        if _length(span):
            self._inner.add(slice(span.start - self._part.start, span.stop - self._part.start), value)


def _rounds(cuts: Sequence[Sequence[slice]]) -> Iterator[list[slice | None]]:
    """Yields for each round the next span of every rank, None for a rank that has no more."""
    for turn in range(max(map(len, cuts))):
        yield [cut[turn] if turn < len(cut) else None for cut in cuts]


def _length(span: slice | None) -> int:
    return span.stop - span.start if span else 0
