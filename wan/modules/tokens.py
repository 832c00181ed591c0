"""Tensors over all tokens of a sample, as the forward pass sees them: read, written and added to by spans of tokens.

These live on the device; subclasses may keep them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Piece = tuple[slice, torch.Tensor]


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
    """Where they live: makes them, and attends over them."""

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


ON_DEVICE = Place()
