"""Sizes of a streamer's buffers, and how many of an encoder's equal layers to record."""

from __future__ import annotations

from collections.abc import Sequence

from leanwan.record.ledger import Ledger, rounded
from leanwan.streaming import ALIGNMENT, ring_buffers, spread

Sizes = Sequence[int]  # bytes of parameters


def attach(ledger: Ledger, groups: Sequence[Sizes], buffers: int, resident_bytes: int = 0) -> list[int]:
    """Records what a Streamer of such layer groups allocates; returns the tensors' numbers."""
    return ledger.arrive(streamer_buffers(groups, buffers, resident_bytes))


def streamer_buffers(groups: Sequence[Sizes], buffers: int, resident_bytes: int = 0) -> list[int]:
    """Bytes of each buffer of a Streamer: those of the ring, then one for each group that stays."""
    sizes = [sum(rounded(size, ALIGNMENT) for size in group) for group in groups]
    stays = spread(sizes, resident_bytes)
    streamed = [size for size, stay in zip(sizes, stays) if not stay]
    return ring_buffers(streamed, buffers) + [size for size, stay in zip(sizes, stays) if stay]


def few(layers: int) -> int:
    """How many layers of an encoder to record: the rest repeat the second one's requests, input and output swapped."""
    return min(layers, 2 + layers % 2)
