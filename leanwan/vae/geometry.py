"""Which part of every frame a tile needs: grids, margins, crops.

The margin is not one number but follows from the operations: walking back from a tile of the output, each operation's
input is cropped to what its output needs. Where a tile ends at the border of the frame, so does the crop, and the
operation pads with zeros as it does for the whole frame.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .operations import Operation

Interval = tuple[int, int]  # [low, high)
TileShape = tuple[tuple[int, int], ...]

STRIDE = 8  # pixels that one latent cell covers


class Tile(NamedTuple):
    """One tile of a pass: what it reads, what it writes, and the crops between operations.

    source: index of the part that it reads of the input video [C, F, H, W].
    target: index of the part that it writes of the output video.
    crops: the (rows, columns) slices of each operation's input and of the last one's output, counted from the
        start of the frame that arrives there.
    """

    source: tuple
    target: tuple
    crops: list

    @property
    def shape(self) -> TileShape:
        """(rows, columns) of each operation's input and of the last one's output; they decide the tile's memory."""
        return tuple((rows.stop - rows.start, columns.stop - columns.start) for rows, columns in self.crops)


def tiles(
    operations: Sequence[Operation], input_size: Sequence[int], output_size: Sequence[int], tile: int
) -> Iterator[Tile]:
    """The Tiles of a pass between latent cells and pixels, in either direction.

    Args:
        operations: list of Operation, none of which sees the whole frame.
        input_size, output_size: (height, width) of the frames that go in and come out.
        tile: side in pixels, 0 for whole frames.
    """
    height, width = pixel_size(input_size, output_size)
    unit = height // output_size[0]
    for rows, columns in grid(height, width, tile):
        intervals = [(low // unit, high // unit) for low, high in (rows, columns)]
        needed = [
            needed_intervals(operations, *interval, length) for interval, length in zip(intervals, input_size)
        ]
        yield Tile(
            source=_index(*(axis[0] for axis in needed)),
            target=_index(*intervals),
            crops=list(zip(*(_relative(operations, axis) for axis in needed))),
        )


def pixel_size(input_size: Sequence[int], output_size: Sequence[int]) -> tuple[int, ...]:
    """(height, width) in pixels of the video that a pass takes or makes, cut to whole latent cells."""
    return tuple(STRIDE * min(lengths) for lengths in zip(input_size, output_size))


def grid(height: int, width: int, tile: int) -> list[tuple[Interval, Interval]]:
    """The tiles of a frame, row by row, as ((top, bottom), (left, right)) in pixels; one if `tile` is 0."""
    return [(rows, columns) for rows in split(height, tile) for columns in split(width, tile)]


def split(length: int, tile: int) -> list[Interval]:
    """Cuts [0, length) into the fewest intervals of at most `tile`, near equal and aligned to the stride."""
    cells = length // STRIDE
    count = math.ceil(length / tile) if tile else 1
    cuts = [STRIDE * (cells * i // count) for i in range(count)] + [length]
    return list(zip(cuts, cuts[1:]))


def needed_intervals(operations: Sequence[Operation], low: int, high: int, length: int) -> list[Interval]:
    """The interval of each operation's input that [low, high) of the last one's output needs, along one axis.

    Args:
        operations: list of Operation.
        low, high: interval of the last operation's output.
        length: of the first operation's input along this axis.

    Returns:
        List of (low, high), one for each operation's input and last the one of the output.
    """
    lengths = [length]
    for operation in operations:
        lengths.append(output_length(operation, lengths[-1]))
    needed = [(low, high)]
    for operation, length in zip(reversed(operations), reversed(lengths[:-1])):
        low, high = input_interval(operation, low, high)
        low, high = max(0, low), min(length, high)
        needed.append((low, high))
    return needed[::-1]


def input_interval(operation: Operation, low: int, high: int) -> Interval:
    """The interval of its input that an operation reads for [low, high) of its output; it may reach past the border."""
    before, after = operation.halo
    return math.floor((low - before) / operation.scale), math.ceil((high + after) / operation.scale)


def output_length(operation: Operation, length: int) -> int:
    """Length of an operation's output for an input of `length`, in pixels."""
    return int(length * operation.scale)


def _relative(operations: Sequence[Operation], needed: Sequence[Interval]) -> list[slice]:
    """The needed intervals as slices of the frame that arrives at each operation, and of the last one's output."""
    start, slices = needed[0][0], []
    for operation, (low, high) in zip([*operations, None], needed):
        slices.append(slice(low - start, high - start))
        start = output_length(operation, low) if operation else start
    return slices


def _index(rows: Interval, columns: Interval) -> tuple[slice, ...]:
    return slice(None), slice(None), slice(*rows), slice(*columns)
