"""What changes no live count of a run on the virtual GPU, and makes it short: see test_memory_benchmark.py."""

import contextlib
from unittest import mock

from leanwan.dit import forward
from leanwan.vae import geometry, tiles

FEW_CHUNKS = 4
FEW_BLOCKS = 3  # a VACE block, the first block that takes a hint, one that takes none


@contextlib.contextmanager
def few_blocks():
    """Of the DiT's blocks, which need the same memory, the first few run, on the first few chunks of tokens."""
    with contextlib.ExitStack() as stack:
        for name in ("keys_and_values", "self_attention", "cross_attention", "ffn"):
            stack.enter_context(
                mock.patch.object(forward.Layers, name, _of_few(getattr(forward.Layers, name)))
            )
        yield


def _of_few(visit):
    def some(layers, block, *args):
        seen = vars(layers).setdefault("seen", {})  # blocks, and how many were seen before each
        if seen.setdefault(block, len(seen)) < FEW_BLOCKS:
            all_chunks, layers.spans = layers.spans, layers.spans[:FEW_CHUNKS]
            visit(layers, block, *args)
            layers.spans = all_chunks

    return some


@contextlib.contextmanager
def largest_tile():
    """Of the VAE's tiles, the longest with margins on all sides, or else on one."""
    all_tiles = geometry.grid

    def longest(intervals, length):
        return max(intervals, key=lambda at: ((at[0] > 0) + (at[1] < length), at[1] - at[0]))

    def one(height, width, tile):
        rows, columns = zip(*all_tiles(height, width, tile))
        return [(longest(rows, height), longest(columns, width))]

    with mock.patch.object(geometry, "grid", one):
        yield


@contextlib.contextmanager
def one_tile_of_each_shape():
    """Of the VAE's tiles, the first of each shape, between which memory is given back; without those that are smaller
    than the largest by a quarter."""

    def first(*args):
        parts = {}
        for part in geometry.tiles(*args):
            parts.setdefault(part.shape, part)
        areas = {shape: sum(rows * columns for rows, columns in shape) for shape in parts}
        return [part for shape, part in parts.items() if areas[shape] > 0.75 * max(areas.values())]

    with mock.patch.object(tiles, "tiles", first):
        yield
