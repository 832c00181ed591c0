"""Tensors over all tokens of a sample, as the forward pass sees them: read, written and added to by spans of tokens.

These live on the device; subclasses may keep them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Piece = tuple[slice, torch.Tensor]

_ROWS = 32  # rows that kernels take at a time, or a multiple of it


def spans(length: int, chunk: int, part: slice | None = None) -> list[slice]:
    """Slices that cut `length` tokens into pieces of at most `chunk`, which is 64 or more; 0 means one piece.

    CPU kernels take rows in blocks, and one to three rows that are left over by another kernel, which rounds
    otherwise. So a piece leaves none where the whole leaves none, and the last piece as many as the whole does.

    part: cuts these of the tokens only; it starts and stops where the pieces of a cut do, one of 64 or more.
    """
    start, stop = (part.start, part.stop) if part else (0, length)
    if stop - start == length and (not chunk or chunk >= length):
        return [slice(0, length)]
    left, last = length % _ROWS, 0
    if 0 < left < 4:
        # PyTorch's attention takes 32 queries at a time, from 192 on 64 and from 768 on 256.
        block = 256 if length >= 768 else 64 if length >= 192 else 32
        last = left + (_ROWS if length % block < 4 else _ROWS // 2)
    step = chunk // _ROWS * _ROWS or length
    body = max(start, min(stop, length - last))
    ends = [*range(start + step, body, step), body, stop]
    return [slice(begin, end) for begin, end in zip([start, *ends], ends) if begin < end]


class Tokens:
    """A tensor [1, L, ...], on the device of what is first written to it; from then on it is there.

    Args:
        length: L.
        shape: of one token.
        dtype: what is written is cast to it.
    """

    def __init__(self, length: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.length, self.shape, self.dtype = length, shape, dtype
        self.whole: torch.Tensor | None = None

    def read(self, spans: Iterable[slice]) -> Iterator[Piece]:
        """Each span with its tokens [1, n, ...], which may change until the next span is asked for by `add` only."""
        for span in spans:
            yield span, self.whole[:, span]

    def write(self, span: slice, value: torch.Tensor) -> None:
        if self.whole is None:
            self.whole = value.new_empty(1, self.length, *self.shape, dtype=self.dtype)
        self.whole[:, span] = value

    def add(self, span: slice, value: torch.Tensor) -> None:
        self.whole[:, span].add_(value)


class Place:
    """Where they live: cuts them, makes them, and attends over them."""

    def spans(self, length: int, chunk: int) -> list[slice]:
        """The pieces, of at most `chunk` tokens, in which a sample's tokens are computed here; see `spans`."""
        return spans(length, chunk)

    def stream(self, name: str, length: int, width: int) -> Tokens:
        """A residual stream, fp32. One of the same name that was made before is not used any more."""
        return Tokens(length, (width,), torch.float32)

    def heads(self, name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tokens:
        """Keys or values of one layer; shape: (heads, head_dim). Names as of streams."""
        return Tokens(length, shape, dtype)

    def attended(
        self, attention: Attention, queries: Iterable[Piece], keys: Tokens, values: Tokens
    ) -> Iterator[Piece]:
        """Each span of the queries with softmax(q k^T) v over all keys: [1, n, heads, head_dim]."""
        for span, query in queries:
            out = attention(query, keys.whole, values.whole)
            del query
            yield span, out
            del out

    def joined(self, pieces: Sequence[torch.Tensor], length: int, width: int) -> torch.Tensor:
        """What was computed here of all spans, [1, n, width] fp32 each, as [1, length, width]."""
        return torch.cat(list(pieces), 1)


ON_DEVICE = Place()
