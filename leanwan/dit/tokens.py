"""Tensors over all tokens of a sample (residual streams, keys, values), read and written by spans of tokens.

The classes here keep them on the device; subclasses keep them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Piece = tuple[slice, torch.Tensor]

_ROWS = 32  # rows in a block of the CPU kernels, or a multiple of that


def spans(length: int, chunk: int, part: slice | None = None) -> list[slice]:
    """Cuts `length` tokens into slices of at most `chunk` tokens, which is 64 or more; 0 means one slice.

    CPU kernels compute rows in blocks, and one to three rows left over with another kernel, which rounds differently.
    So the last slice has as many rows left over as the uncut sequence has, and the other slices have none.

    part: the tokens to cut, if not all; it starts and stops where slices of some chunk of 64 or more do.
    """
    start, stop = (part.start, part.stop) if part else (0, length)
    if stop - start == length and (not chunk or chunk >= length):
        return [slice(0, length)]
    left, last = length % _ROWS, 0
    if 0 < left < 4:
        # PyTorch's attention takes blocks of 32 queries; of 64 from 192 queries on, of 256 from 768 on.
        block = 256 if length >= 768 else 64 if length >= 192 else 32
        last = left + (_ROWS if length % block < 4 else _ROWS // 2)
    step = chunk // _ROWS * _ROWS or length
    body = max(start, min(stop, length - last))
    ends = [*range(start + step, body, step), body, stop]
    return [slice(begin, end) for begin, end in zip([start, *ends], ends) if begin < end]


class Tokens:
    """A tensor [1, L, ...], allocated at the first write, on the device of the written value.

    Args:
        length: L.
        shape: of one token.
        dtype: of the tensor; written values are cast to it.
    """

    def __init__(self, length: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.length, self.shape, self.dtype = length, shape, dtype
        self.whole: torch.Tensor | None = None

    def read(self, spans: Iterable[slice]) -> Iterator[Piece]:
        """Yields each span and its tokens [1, n, ...]. Until the next span is asked for, only `add` may change them."""
        for span in spans:
            yield span, self.whole[:, span]

    def write(self, span: slice, value: torch.Tensor) -> None:
        if self.whole is None:
            self.whole = value.new_empty(1, self.length, *self.shape, dtype=self.dtype)
        self.whole[:, span] = value

    def add(self, span: slice, value: torch.Tensor) -> None:
        self.whole[:, span].add_(value)


class Place:
    """Decides where the tensors over all tokens live: makes them, cuts them into spans and attends over them."""

    def spans(self, length: int, chunk: int) -> list[slice]:
        """The spans, of at most `chunk` tokens, in which this process computes a sample's tokens; see `spans`."""
        return spans(length, chunk)

    def stream(self, name: str, length: int, width: int) -> Tokens:
        """Makes a residual stream, fp32. The stream made before under the same name must not be used any more."""
        return Tokens(length, (width,), torch.float32)

    def heads(self, name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tokens:
        """Makes keys or values of one layer; shape: (heads, head_dim). A name is used again as a stream's is."""
        return Tokens(length, shape, dtype)

    def attended(
        self, attention: Attention, queries: Iterable[Piece], keys: Tokens, values: Tokens
    ) -> Iterator[Piece]:
        """Yields each span of the queries with softmax(q k^T) v over all keys, [1, n, heads, head_dim]."""
        for span, query in queries:
            out = attention(query, keys.whole, values.whole)
            del query
            yield span, out
            del out

    def joined(self, pieces: Sequence[torch.Tensor], length: int, width: int) -> torch.Tensor:
        """Joins the pieces that this process computed, [1, n, width] fp32 for each span, to [1, length, width]."""
        return torch.cat(list(pieces), 1)


ON_DEVICE = Place()
