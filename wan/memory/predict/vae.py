"""The device memory that the VAE takes, from the facts of its operations.

Counted are live tensors in units of the allocator. It is the weights, and the most that one of the passes holds at a
time: what causal operations remember; the pairs of frames that wait at temporal upsamplings; and the largest set of
tensors that one operation needs at a time. A tile counts with its margins, the largest tile of the grid.
"""

import functools
import math
from collections.abc import Sequence

from torch import nn

from ...modules.vae_forward import decoded_frames, encoded_frames
from ...modules.vae_operations import (
    Attention,
    Convolution,
    Double,
    Halve,
    Norm,
    Operation,
    Residual,
    Resize,
    attention_rows,
    decoder_passes,
    encoder_passes,
)
from ..tile_geometry import STRIDE, needed_intervals, output_length, split

BYTES = 4  # of an fp32 number
ALLOCATION = 512  # bytes, granularity of the device's allocator


def decode_peak_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int = 0) -> int:
    """Device memory that decoding takes at most, with the decoder's weights, without the latents it is given.

    Args:
        model: the VAE's modules, on any device.
        frames, height, width: of the video that comes out.
        tile: side of a tile in pixels, 0 for whole frames.
    """
    return _weight_bytes(model.decoder, model.conv2) + decode_bytes(model, frames, height, width, tile)


def encode_peak_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int = 0) -> int:
    """Device memory that encoding takes at most, with the encoder's weights and the latents that it returns.

    The arguments are those of `decode_peak_bytes`; frames, height and width are of the video that goes in.
    """
    return _weight_bytes(model.encoder, model.conv1) + encode_bytes(model, frames, height, width, tile)


def decode_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int) -> int:
    """As `decode_peak_bytes`, without the weights."""
    passes, frames = decoder_passes(model), encoded_frames(frames)
    size = (height // STRIDE, width // STRIDE)
    statistics = 2 * _allocated(model.z_dim, 1)
    return max(
        statistics + _pass_bytes(passes.whole, frames, *_whole(passes.whole, size)),
        _pass_bytes(passes.small, frames, *_whole(passes.small, size)),
        _pass_bytes(passes.large, frames, *_longest(passes.large, size, (height, width), 1, tile)),
    )


def encode_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int) -> int:
    """As `encode_peak_bytes`, without the weights."""
    passes, frames = encoder_passes(model), encoded_frames(frames)
    size = (height // STRIDE, width // STRIDE)
    latents = _allocated(model.z_dim * frames, math.prod(size)) + 2 * _allocated(model.z_dim, 1)
    lengths = _longest(passes.large, (height, width), (height, width), STRIDE, tile)
    return max(
        _pass_bytes(passes.large, decoded_frames(frames), *lengths),
        _pass_bytes(passes.small, frames, *_whole(passes.small, size)),
        latents + _pass_bytes(passes.whole, frames, *_whole(passes.whole, size)),
    )


def _weight_bytes(*modules: nn.Module) -> int:
    return sum(_allocated(1, p.numel()) for module in modules for p in module.parameters())


def _allocated(channels: float, area: int) -> int:
    return -int(-BYTES * channels * area // ALLOCATION) * ALLOCATION


def _whole(operations: Sequence[Operation], size: Sequence[int]) -> list[list[int]]:
    return [[length] * (len(operations) + 1) for length in size]


def _longest(
    operations: Sequence[Operation], input_size: Sequence[int], pixels: Sequence[int], unit: int, tile: int
) -> list[list[int]]:
    """Rows and columns of each operation's input and of the last one's output, the most of all tiles.

    Args:
        pixels: (height, width) of the video.
        unit: pixels that one of the output covers.
    """
    longest = []
    for length, input_length in zip(pixels, input_size):
        needed = (
            needed_intervals(operations, low // unit, high // unit, input_length)
            for low, high in split(length, tile)
        )
        longest.append([max(high - low for low, high in position) for position in zip(*needed)])
    return longest


def _pass_bytes(
    operations: Sequence[Operation], frames: int, rows: Sequence[int], columns: Sequence[int]
) -> int:
    """The most that a pass holds at a time, weights apart.

    Args:
        operations: list of Operation.
        frames: how many arrive at the first one.
        rows, columns: of the input of each operation, one list each.
    """
    channels = operations[0].in_channels
    frame = _allocated(channels, rows[0] * columns[0])  # what arrives at an operation
    single, remembered, waiting, most = frames == 1, 0, frame, 0
    for operation, height, width in zip(operations, rows, columns):
        channels = operation.in_channels or channels
        kept, working = _held(operation, frames, frame, channels, height, width)
        remembered += kept
        # In a video every operation remembers; before the second frame, only those that the first one has passed.
        most = max(most, waiting + working + (remembered if single else 0))
        if operation.rate == 2:
            if frames > 1:  # the pair waits until both have gone all the way
                waiting += _allocated(2 * operation.out_channels, height * width)
            frames = 2 * frames - 1
        elif operation.rate == 0.5:
            frames = 1 + (frames - 1) // 2
        channels = operation.out_channels or channels
        frame = _allocated(channels, math.prod(output_length(operation, n) for n in (height, width)))
    return most if single else remembered + most


@functools.singledispatch
def _held(
    operation: Operation, frames: int, frame: int, channels: int, height: int, width: int
) -> tuple[int, int]:
    """What an operation remembers between frames, and the most that it holds beside that while it works.

    Args:
        operation: one of any kind; this is the rule for those that work in place.
        frames: how many it gets.
        frame: bytes of one of them as it arrives.
        channels, height, width: of its input.
    """
    return 0, frame


@_held.register
def _(operation: Norm, frames: int, frame: int, channels: int, height: int, width: int) -> tuple[int, int]:
    norms = 2 * _allocated(1, height * width)
    return 0, frame + _allocated(channels, height * width) + norms + _allocated(channels, 1)


@_held.register
def _(
    operation: Convolution, frames: int, frame: int, channels: int, height: int, width: int
) -> tuple[int, int]:
    """The window of frames, and then the frame that comes out; of three the window drops one when it is made."""
    if not operation.memory:
        return 0, frame + _allocated(operation.out_channels, height * width)
    window = _allocated((operation.memory + 1) * channels, height * width) if frames > 1 else 0
    forgotten = frame if frames > operation.memory else 0
    out = _allocated(operation.out_channels * operation.rate, height * width)
    return min(frames, operation.memory) * frame, window + max(forgotten, out)


@_held.register
def _(operation: Double, frames: int, frame: int, channels: int, height: int, width: int) -> tuple[int, int]:
    if frames == 1:
        return 0, frame
    return _held.dispatch(Convolution)(operation, frames - 1, frame, channels, height, width)


@_held.register
def _(operation: Halve, frames: int, frame: int, channels: int, height: int, width: int) -> tuple[int, int]:
    area = height * width
    window = _allocated(3 * channels, area) + _allocated(operation.out_channels, area)
    return min(frames, 2) * frame, frame + (window if frames > 2 else 0)


@_held.register
def _(operation: Resize, frames: int, frame: int, channels: int, height: int, width: int) -> tuple[int, int]:
    out = _allocated(operation.out_channels, math.prod(output_length(operation, n) for n in (height, width)))
    padded = 4 * height * width if operation.scale == 2 else (height + 1) * (width + 1)
    return 0, frame + _allocated(channels, padded) + out


@_held.register
def _(
    operation: Residual, frames: int, frame: int, channels: int, height: int, width: int
) -> tuple[int, int]:
    area, remembered, most = height * width, 0, 0
    for part in operation.parts:
        channels = part.in_channels or channels
        if isinstance(part, Convolution):
            kept, working = _held(part, frames, _allocated(channels, area), channels, height, width)
            remembered, most = remembered + kept, max(most, working)
    out = _allocated(operation.out_channels, area)
    beside = (
        out if operation.shortcut else 2 * _allocated(1, area) + _allocated(channels, 1)
    )  # shortcut or norm
    return remembered, frame + max(most, out + beside)


@_held.register
def _(
    operation: Attention, frames: int, frame: int, channels: int, height: int, width: int
) -> tuple[int, int]:
    """The keys, queries and values and their transpose; then these, what comes of them, and a piece's scores."""
    area = height * width
    one, scores = _allocated(channels, area), _allocated(attention_rows(area), area)
    return 0, frame + max(6 * one, 4 * one + scores)
