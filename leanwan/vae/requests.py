"""Predicts the device memory that the VAE takes, by recording the passes of leanwan/vae/passes.py in a Ledger.

For each class of leanwan/vae/operations.py a function records the tensors that its call makes and drops. Only the first
frames of a video are walked, until every causal operation remembers as much as it ever will, and only one tile of each
of the largest shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from torch import nn

from ..record.ledger import Ledger
from .geometry import STRIDE, TileShape, output_length, tiles
from .operations import (
    Attention,
    Convolution,
    Double,
    Halve,
    InPlace,
    Norm,
    Operation,
    Passes,
    Residual,
    Resize,
    attention_rows,
    decoder_passes,
    encoder_passes,
)
from .passes import decoded_frames, encoded_frames

BYTES = 4  # of an fp32 number
FILLED = 5  # latent frames after which every operation remembers as much as it ever will
PERIOD = 4  # frames of a video for each latent frame
NEAR = 0.75  # share of the largest tile's area from which on a tile may take as much memory
# Except for videos of hundreds of frames the allocator reserves at most RESERVED times the live bytes, plus SEGMENTS.
RESERVED, SEGMENTS = 1.25, int(0.2 * 2**30)


def surely_reserved(live: float) -> float:
    """Upper bound of the bytes that the allocator reserves when the VAE's live tensors take `live` bytes."""
    return SEGMENTS + RESERVED * live


def decode_peak_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int = 0) -> int:
    """Peak bytes of decoding on the device, with the decoder's weights, without the latents that it is given.

    Args:
        model: the VAE's modules, on any device.
        frames, height, width: of the decoded video.
        tile: side of a tile in pixels, 0 for whole frames.
    """
    ledger = Ledger()
    decode_stage(ledger, model, frames, height, width, tile, arrives=True)
    return ledger.peak


def encode_peak_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int = 0) -> int:
    """Peak bytes of encoding on the device, with the encoder's weights and the latents that it returns.

    The arguments are those of `decode_peak_bytes`; frames, height and width are of the video to encode.
    """
    ledger = Ledger()
    encode_stage(ledger, model, frames, height, width, tile, arrives=True)
    return ledger.peak


def decode_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int) -> int:
    """As `decode_peak_bytes`, without the weights."""
    ledger = Ledger()
    decode_stage(ledger, model, frames, height, width, tile, arrives=False)
    return ledger.peak


def encode_bytes(model: nn.Module, frames: int, height: int, width: int, tile: int) -> int:
    """As `encode_peak_bytes`, without the weights."""
    ledger = Ledger()
    encode_stage(ledger, model, frames, height, width, tile, arrives=False)
    return ledger.peak


def decode_stage(
    ledger: Ledger,
    model: nn.Module,
    frames: int,
    height: int,
    width: int,
    tile: int,
    arrives: bool,
    most_tiles: int | None = None,
) -> None:
    """Records the decoding of a latent video, which leaves no tensor.

    Args:
        model, frames, height, width, tile: as `decode_peak_bytes`'.
        arrives: whether the decoder is brought to the device for it and leaves again; else it is there already.
        most_tiles: how many of the largest shapes of tiles to record at most; None for all.
    """
    weights = ledger.arrive(_decoder(model)) if arrives else []
    shapes = _tile_shapes(decoder_passes, model, height, width, tile)
    latent = (height // STRIDE, width // STRIDE)
    latent_frames = encoded_frames(frames)
    statistics = [ledger.take(BYTES * model.z_dim) for _ in range(2)] if arrives else []
    ledger.play(_decoding(model, "whole", latent_frames, (latent,)))
    ledger.drop(*statistics)
    ledger.play(_decoding(model, "small", latent_frames, (latent,)))
    _play_tiles(ledger, [_decoding(model, "large", latent_frames, shape) for shape in shapes[:most_tiles]])
    ledger.drop(*weights)
    ledger.release()


@functools.lru_cache(maxsize=256)
def _decoding(model: nn.Module, which: str, frames: int, shape: TileShape) -> Ledger:
    """One of the decoder's passes, "whole", "small" or "large", over `frames` latent frames, to be played."""
    operations = getattr(decoder_passes(model), which)
    walk = _Walk(Ledger(), operations, shape)

    def denormalized(numel: int) -> int:
        return walk.become(numel, walk.new(numel))

    if which == "whole":
        walk.run(frames, model.z_dim, arriving=denormalized)
    else:
        walk.run(frames, operations[0].in_channels)
    return walk.ledger


def encode_stage(
    ledger: Ledger,
    model: nn.Module,
    frames: int,
    height: int,
    width: int,
    tile: int,
    arrives: bool,
    most_tiles: int | None = None,
) -> None:
    """Records the encoding of a video; its latents stay.

    The arguments are those of `decode_stage`; frames, height and width are of the video to encode.
    """
    weights = ledger.arrive(_encoder(model)) if arrives else []
    shapes = _tile_shapes(encoder_passes, model, height, width, tile)
    latent, latent_frames = (height // STRIDE, width // STRIDE), encoded_frames(frames)
    _play_tiles(ledger, [_encoding(model, "large", latent_frames, shape) for shape in shapes[:most_tiles]])
    ledger.play(_encoding(model, "small", latent_frames, (latent,)))
    ledger.take(BYTES * model.z_dim * latent_frames * math.prod(latent))
    statistics = [ledger.take(BYTES * model.z_dim) for _ in range(2)] if arrives else []
    ledger.play(_encoding(model, "whole", latent_frames, (latent,)))
    ledger.drop(*statistics, *weights)
    ledger.release()


@functools.lru_cache(maxsize=256)
def _encoding(model: nn.Module, which: str, frames: int, shape: TileShape) -> Ledger:
    """As `_decoding`, for one of the encoder's passes; frames: latent frames of the result."""
    operations = getattr(encoder_passes(model), which)
    walk = _Walk(Ledger(), operations, shape)
    if which == "large":
        walk.run(decoded_frames(frames), operations[0].in_channels, period=PERIOD)
        return walk.ledger
    latent = model.z_dim * math.prod(shape[-1])

    def write(moments: int) -> None:
        walk.drop(walk.become(latent, walk.new(latent)))

    walk.run(frames, operations[0].in_channels, sink=write if which == "whole" else None)
    return walk.ledger


@functools.lru_cache(maxsize=256)
def _tile_shapes(
    passes: Callable[[nn.Module], Passes], model: nn.Module, height: int, width: int, tile: int
) -> list[TileShape]:
    """Shapes of the tiles of a large pass with at least NEAR of the largest one's area, the largest first."""
    latent, pixels = (height // STRIDE, width // STRIDE), (height, width)
    before, after = (latent, pixels) if passes is decoder_passes else (pixels, latent)
    areas = {
        part.shape: sum(rows * columns for rows, columns in part.shape)
        for part in tiles(passes(model).large, before, after, tile)
    }
    least = NEAR * max(areas.values())
    return sorted((shape for shape in areas if areas[shape] >= least), key=lambda shape: -areas[shape])


def _play_tiles(ledger: Ledger, tiles: Sequence[Ledger]) -> None:
    """Plays tiles as leanwan.vae.tiles.by_tiles runs them: unused memory is released before each and at the end."""
    for one in tiles:
        ledger.release()
        ledger.play(one)
    ledger.release()


def weight_sizes(model: nn.Module) -> tuple[list[int], list[int]]:
    """Bytes of each of the encoder's parameters, and of each of the decoder's."""
    return _encoder(model), _decoder(model)


@functools.lru_cache(maxsize=8)
def _encoder(model: nn.Module) -> list[int]:
    return [p.nbytes for module in (model.encoder, model.conv1) for p in module.parameters()]


@functools.lru_cache(maxsize=8)
def _decoder(model: nn.Module) -> list[int]:
    return [p.nbytes for module in (model.conv2, model.decoder) for p in module.parameters()]


class _Walk:
    """Records a pass over a video, as `run_pass` runs it. A frame is its tensor's number; references are counted.

    Args:
        operations: list of Operation.
        shape: (rows, columns) of each operation's input, or of the first one's where all inputs have one size.
    """

    def __init__(self, ledger: Ledger, operations: Sequence[Operation], shape: TileShape):
        self.ledger, self.operations = ledger, operations
        self.shape = shape * len(operations) if len(shape) == 1 else shape
        self.past: dict[Operation, list[int]] = {}
        self._holders: dict[int, int] = {}

    def run(
        self,
        frames: int,
        channels: int,
        period: int = 1,
        arriving: Callable[[int], int] | None = None,
        sink: Callable[[int], None] | None = None,
    ) -> None:
        """Records the pass.

        Args:
            frames, channels: number of the first operation's input frames, and of their channels.
            period: frames after which the requests repeat.
            arriving: records how an input frame of so many numbers is made; default: it is copied to the device.
            sink: records what happens to each frame that comes out, besides its copy to the CPU.
        """
        numel = channels * math.prod(self.shape[0])
        walked = 1 + (FILLED - 1) * period  # by then operations remember as much as they ever will
        before, mark = None, None
        for n in range(min(frames, walked)):
            if n == walked - period:
                mark = self.ledger.mark()
            frame = arriving(numel) if arriving else self.new(numel)
            self.drop(before)
            self._run(0, frame, channels, sink)
            before = frame
        if mark and frames > walked:
            before += self._again(mark, (frames - walked) // period)
        self.drop(*[frame for held in self.past.values() for frame in held], before)

    def _again(self, mark: tuple[int, int], times: int) -> int:
        """Repeats the frames since a mark `times` more times; returns what that adds to the numbers of frames."""
        grown = self.ledger.again(mark, times)
        self._holders = {frame + grown: count for frame, count in self._holders.items()}
        self.past = {
            operation: [frame + grown for frame in frames] for operation, frames in self.past.items()
        }
        return grown

    def _run(self, start: int, frame: int, channels: int, sink: Callable[[int], None] | None) -> None:
        self.hold(frame)
        for i in range(start, len(self.operations)):
            operation = self.operations[i]
            frames = _called(operation, self, frame, channels, *self.shape[i])
            channels = operation.out_channels or channels
            if len(frames) != 1:
                for single in frames:
                    self._run(i + 1, single, channels, sink)
                self.drop(*frames, frame)
                return
            self.drop(frame)
            (frame,) = frames
        if sink:
            sink(frame)
        self.drop(frame)

    def new(self, numel: float) -> int:
        tensor = self.ledger.take(BYTES * numel)
        self._holders[tensor] = 1
        return tensor

    def become(self, numel: float, *before: int | None) -> int:
        tensor = self.new(numel)
        self.drop(*before)
        return tensor

    def hold(self, tensor: int) -> int:
        self._holders[tensor] += 1
        return tensor

    def drop(self, *tensors: int | None) -> None:
        for tensor in tensors:
            if tensor is None:
                continue
            self._holders[tensor] -= 1
            if not self._holders[tensor]:
                del self._holders[tensor]
                self.ledger.drop(tensor)

    def window(self, operation: Operation, frame: int, numel: int) -> int | None:
        """Records the stacked window, None where it is a view of one frame; the frame is remembered from now on."""
        frames = [*self.past.get(operation, ()), self.hold(frame)]
        kept = frames[-operation.memory :] if operation.memory else []
        if operation.memory:
            self.past[operation] = kept
        window = self.stacked(len(frames), operation.memory + 1, numel)
        self.drop(*frames[: len(frames) - len(kept)])
        return window

    def stacked(self, frames: int, count: int, numel: int) -> int | None:
        if frames == 1:
            return None
        zero = self.new(1)
        if frames < count:  # the zero, expanded, stands for the missing frames
            return self.become(count * numel, zero)
        self.drop(zero)
        return self.new(count * numel)


@functools.singledispatch
def _called(
    operation: Operation, walk: _Walk, frame: int, channels: int, height: int, width: int
) -> list[int]:
    """Records the call of an operation; returns the frames that come out, each with a reference for the caller.

    Args:
        operation: one of any kind.
        frame: the input frame.
        channels, height, width: of the input frame after cropping.
    """
    raise NotImplementedError(type(operation).__name__)


@_called.register
def _(operation: InPlace, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    return [walk.hold(frame)]


@_called.register
def _(operation: Norm, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    scale = walk.new(channels)
    norms = walk.become(height * width, walk.new(height * width))
    out = walk.become(channels * height * width, norms)
    walk.drop(scale)
    return [out]


@_called.register
def _(operation: Convolution, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    window = walk.window(operation, frame, channels * height * width)
    return [walk.become(operation.conv.out_channels * height * width, window)]


@_called.register
def _(operation: Double, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    if operation not in walk.past:
        walk.past[operation] = []
        return [walk.hold(frame)]
    (pair,) = _called.dispatch(Convolution)(operation, walk, frame, channels, height, width)
    return [pair, walk.hold(pair)]


@_called.register
def _(operation: Halve, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    walk.hold(frame)
    if operation not in walk.past:
        walk.past[operation] = [frame]
        return [walk.hold(frame)]
    frames = [*walk.past[operation], frame]
    if len(frames) <= operation.memory:
        walk.past[operation] = frames
        return []
    walk.past[operation] = [frame]
    window = walk.stacked(len(frames), len(frames), channels * height * width)
    out = walk.become(operation.out_channels * height * width, window)
    walk.drop(*frames[:-1])
    return [out]


@_called.register
def _(operation: Resize, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    padded = 4 * height * width if operation.scale == 2 else (height + 1) * (width + 1)
    out = math.prod(output_length(operation, length) for length in (height, width))
    return [walk.become(operation.out_channels * out, walk.new(channels * padded))]


@_called.register
def _(operation: Residual, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    out, inside = walk.hold(frame), channels
    for part in operation.parts:
        (made,) = _called(part, walk, out, inside, height, width)
        walk.drop(out)
        out, inside = made, part.out_channels or inside
    if operation.shortcut:
        walk.drop(*_called(operation.shortcut, walk, frame, channels, height, width))
    return [out]


@_called.register
def _(operation: Attention, walk: _Walk, frame: int, channels: int, height: int, width: int) -> list[int]:
    area = height * width
    (normed,) = _called(operation.norm, walk, frame, channels, height, width)
    separate = walk.become(3 * channels * area, walk.become(3 * channels * area, normed))
    pieces = []
    for start in range(0, area, attention_rows(area)):
        rows = min(attention_rows(area), area - start)
        pieces.append(walk.new(rows * channels))
        walk.drop(walk.new(rows * area))
    out = walk.become(channels * area, *pieces)
    walk.drop(separate)
    projected = walk.new(channels * area)
    return [walk.become(channels * area, projected, out)]
