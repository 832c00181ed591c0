"""The VAE in tiles that give the picture of the whole frame.

Of all layers only the attention in `middle` sees the whole frame; the norms work on each position for itself,
and what remains are convolutions with small kernels. So the layers at the resolution of the latents run on
whole frames, where these are small, and those at larger resolutions run on one tile after another, each with
the margin of its neighbours' pixels that its convolutions reach: nothing is blended, and no pixel knows
whether there were tiles.

The margin is not one number but follows from the layers: walking back from a tile of the output, each layer's
input is cropped to what is still needed. Where a tile ends at the border of the frame, so does the crop, and
the layer pads with zeros as it does for the whole frame.

A tile goes through all frames before the next one starts, with a temporal cache of its own, and is written
straight to its place in a video on the CPU.
"""

import contextlib
import functools
import gc
import logging
import math

import torch
from torch import nn

from ..modules.vae_forward import (
    FrameWriter,
    TemporalCache,
    attention_rows,
    changes_rate,
    decoded_frames,
    denormalized,
    empty_latents,
    encoded_frames,
    normalized_mean,
    operations,
    run,
    upsamples,
)
from ..utils.errors import InputError

SMALLEST_TILE, TILE_STEP = 64, 16  # pixels
SPARE = 0.1  # share of the free memory that auto leaves to kernels' workspaces and fragmentation
STRIDE = 8  # pixels that one latent cell covers
BYTES = 4  # of an fp32 number
ALLOCATION = 512  # bytes, granularity of the device's allocator

log = logging.getLogger(__name__)


def check_tile(value):
    """Returns `value` if it is a tile size: "auto", 0 (whole frames) or a multiple of 16 pixels, at least 64.

    Raises InputError.
    """
    if value == "auto" or value == 0:
        return value
    if not isinstance(value, int) or value < SMALLEST_TILE or value % TILE_STEP:
        raise InputError(
            f"--vae_tile {value}: give auto, 0 for whole frames, or a multiple of {TILE_STEP} pixels from "
            f"{SMALLEST_TILE} on, such as 272"
        )
    return value


def apply_tiling(vae, tile="auto"):
    """Gives a VAE tiled `encode` and `decode` of the same signatures: a list or batch in, a list out.

    They compute on the device where the weights are when they are called, without autocast, one sample at a
    time. Videos come back on the CPU, latents on the device.

    Args:
        vae: has `model`, the module tree, and `scale`, [mean, 1 / std] of the latent channels.
        tile: see `check_tile`. With "auto" each call takes the fewest tiles that fit the memory free at that
            time.

    Raises:
        InputError: not a tile size.
    """
    check_tile(tile)
    vae.encode = functools.partial(encode_each, vae, tile=tile)
    vae.decode = functools.partial(decode_each, vae, tile=tile)


@torch.no_grad()
def encode_each(vae, videos, tile):
    """Encodes each video where the encoder's weights are now, without autocast; see `encode`."""
    with _no_autocast(vae.model.conv1.weight.device.type):
        return [encode(vae.model, video, vae.scale, tile) for video in videos]


@torch.no_grad()
def decode_each(vae, zs, tile):
    """Decodes each latent where the decoder's weights are now, without autocast; see `decode`."""
    with _no_autocast(vae.model.conv2.weight.device.type):
        return [decode(vae.model, z, vae.scale, tile) for z in zs]


def _no_autocast(device_type):
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def decode(model, z, scale, tile=0):
    """Decodes one latent video on the device of the decoder's weights.

    When the device runs out of memory over the tiles, goes on with tiles of half the size.

    Args:
        model: the VAE's modules; its decoder and `conv2` are used.
        z: [z_dim, F, h, w], on any device.
        scale: [mean, 1 / std] of the latent channels.
        tile: see `check_tile`.

    Returns:
        [3, 4 F - 3, 8 h, 8 w] fp32 in [-1, 1] on the CPU.
    """
    weight = model.conv2.weight
    _, frames, height, width = z.shape
    size = (STRIDE * height, STRIDE * width)
    video = torch.empty(3, decoded_frames(frames), *size)
    global_part, latent_part, large_part = _decoder_parts(model.decoder)
    if tile == "auto":
        tile = _fitting_tile(_decode_bytes, model, video.shape[1:], weight.device)

    features = _frame_major(model.decoder.conv1.out_channels, frames, height, width)
    _through(global_part, denormalized(model, z, scale), FrameWriter(features))
    # Written over while it is read: what these layers remember is never their input itself.
    _through(latent_part, _frames(features, weight), FrameWriter(features))

    def by_tiles(tile):
        for rows, columns in _grid(*size, tile):
            crops = _Crops(large_part, rows, columns, (height, width))
            write = FrameWriter(video[:, :, slice(*rows), slice(*columns)])
            source = _frames(features[crops.source], weight)
            _through(large_part, source, lambda out, write=write: write(out.clamp_(-1, 1)), crops.inner)

    _with_smaller_tiles(by_tiles, tile, size, weight.device)
    return video


def encode(model, video, scale, tile=0):
    """Encodes one video on the device of the encoder's weights.

    When the device runs out of memory over the tiles, goes on with tiles of half the size.

    Args:
        model: the VAE's modules; its encoder and `conv1` are used.
        video: [3, F, H, W] in [-1, 1], on any device; what a tile needs of a frame is taken when it is
            needed.
        scale: [mean, 1 / std] of the latent channels.
        tile: see `check_tile`.

    Returns:
        [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] fp32 on the device, the mean of the distribution.
    """
    weight = model.conv1.weight
    large_part, latent_part, global_part = _encoder_parts(model.encoder)
    latents = empty_latents(model, video)
    _, frames, height, width = latents.shape
    size = (STRIDE * height, STRIDE * width)
    video = video[:, : decoded_frames(frames)]
    if tile == "auto":
        tile = _fitting_tile(_encode_bytes, model, (video.size(1), *size), weight.device)
    features = _frame_major(model.encoder.middle[0].residual[0].gamma.size(0), frames, height, width)

    def by_tiles(tile):
        for rows, columns in _grid(*size, tile):
            rows, columns = ((low // STRIDE, high // STRIDE) for low, high in (rows, columns))
            crops = _Crops(large_part, rows, columns, video.shape[2:])
            write = FrameWriter(features[:, :, slice(*rows), slice(*columns)])
            _through(large_part, _frames(video[crops.source], weight), write, crops.inner)

    _with_smaller_tiles(by_tiles, tile, size, weight.device)
    _through(latent_part, _frames(features, weight), FrameWriter(features))
    write = FrameWriter(latents)
    _through(global_part, _frames(features, weight), lambda out: write(normalized_mean(model, out, scale)))
    return latents


def _decoder_parts(decoder):
    """Operations of the passes: with the whole frame in view, at the size of the latents, at larger sizes."""
    upsamplings = list(decoder.upsamples)
    first = next(i for i, layer in enumerate(upsamplings) if hasattr(layer, "resample"))
    return (
        operations([decoder.conv1, *decoder.middle]),
        operations(upsamplings[:first]),
        operations([*upsamplings[first:], *decoder.head]),
    )


def _encoder_parts(encoder):
    """Operations of the passes: at larger sizes, at the size of the latents, with the whole frame in view."""
    downsamplings = list(encoder.downsamples)
    last = max(i for i, layer in enumerate(downsamplings) if hasattr(layer, "resample"))
    return (
        operations([encoder.conv1, *downsamplings[: last + 1]]),
        operations(downsamplings[last + 1 :]),
        operations([*encoder.middle, *encoder.head]),
    )


def _through(operations, source, sink, crops=None):
    """One pass over a video, with a temporal cache of its own."""
    cache = TemporalCache()
    for frame in source:
        run(operations, frame, cache, sink, crops)


def _frames(video, weight):
    """The frames [1, C, 1, H, W] of a video [C, F, H, W], each brought to where `weight` is when asked for."""
    for frame in video.unsqueeze(0).split(1, dim=2):
        yield frame.to(weight)


def _frame_major(channels, frames, height, width):
    """Room on the CPU for features [C, F, h, w], each frame's contiguous."""
    return torch.empty(frames, channels, height, width).transpose(0, 1)


def _with_smaller_tiles(by_tiles, tile, size, device):
    """Calls by_tiles(tile); again with half the tile, if that can be, when the device is out of memory."""
    tile = min(tile or max(size), max(size))
    while True:
        try:
            return by_tiles(tile)
        except torch.OutOfMemoryError:
            smaller = tile // 2 // TILE_STEP * TILE_STEP
            if smaller < SMALLEST_TILE:
                raise
        gc.collect()  # outside the except clause, which keeps the failed pass alive
        log.warning("VAE: out of memory with tiles of %d pixels, going on with %d", tile, smaller)
        tile = smaller
        torch.get_device_module(device).empty_cache()


# Geometry ---------------------------------------------------------------------------------------------------


def _grid(height, width, tile):
    """The tiles of a frame, row by row, as ((top, bottom), (left, right)) in pixels; one if `tile` is 0."""
    return [(rows, columns) for rows in _split(height, tile) for columns in _split(width, tile)]


def _split(length, tile):
    """Cuts [0, length) into the fewest intervals of at most `tile`, near equal and aligned to the stride."""
    cells = length // STRIDE
    count = math.ceil(length / tile) if tile else 1
    cuts = [STRIDE * (cells * i // count) for i in range(count)] + [length]
    return list(zip(cuts, cuts[1:]))


class _Crops:
    """What a tile of the output takes of the frames that arrive at each operation.

    source: index of what is taken of the input video [C, F, H, W].
    inner: for `run`, starting from that.
    """

    def __init__(self, operations, rows, columns, input_size):
        axes = [
            needed_intervals(operations, *interval, length)
            for interval, length in zip((rows, columns), input_size)
        ]
        self.source = (slice(None), slice(None), *(slice(*needed[0]) for needed in axes))
        self.inner = list(zip(*(_relative(operations, needed) for needed in axes)))


def halo(operation):
    """How far, in its own pixels, an operation that keeps the size looks beyond each position."""
    layers = operation.residual if hasattr(operation, "residual") else [operation]
    return sum(layer.kernel_size[1] // 2 for layer in layers if isinstance(layer, nn.Conv3d))


def needed_intervals(operations, low, high, length):
    """What [low, high) of the output needs along one axis: an interval for the input of each operation.

    Args:
        operations: list of modules, none of them attention.
        low, high: interval of the last operation's output.
        length: of this axis of the first operation's input.

    Returns:
        List of (low, high), one for each operation and last that of the output.
    """
    lengths = [length]
    for operation in operations:
        lengths.append(_output_interval(operation, 0, lengths[-1])[1])
    needed = [(low, high)]
    for operation, length in zip(reversed(operations), reversed(lengths[:-1])):
        low, high = _input_interval(operation, low, high)
        low, high = max(0, low), min(length, high)
        needed.append((low, high))
    return needed[::-1]


def _input_interval(operation, low, high):
    if not isinstance(operation, nn.Sequential):
        return low - halo(operation), high + halo(operation)
    if upsamples(operation):  # each pixel four times, then a 3x3 convolution
        return (low - 1) // 2, -(-(high + 1) // 2)
    return 2 * low, 2 * high + 1  # a 3x3 convolution at every other pixel, of that one and the two after it


def _output_interval(operation, low, high):
    """Where the output lies that an operation makes of [low, high); a halving one takes an even `low`."""
    if not isinstance(operation, nn.Sequential):
        return low, high
    return (2 * low, 2 * high) if upsamples(operation) else (low // 2, high // 2)


def _relative(operations, needed):
    """The needed intervals as slices of what arrives at each operation and leaves the last one."""
    start, slices = needed[0][0], []
    for operation, (low, high) in zip([*operations, None], needed):
        slices.append(slice(low - start, high - start))
        start = _output_interval(operation, low, high)[0]
    return slices


# Prediction -------------------------------------------------------------------------------------------------


def decode_peak_bytes(model, frames, height, width, tile=0):
    """Device memory that `decode` takes at most, with the decoder's weights, without the latents it is given.

    It is the weights, and the most that one of the passes holds at a time: what causal layers remember, two
    frames of each one's input; the pairs of frames that wait at temporal upsamplings; and the largest set of
    tensors that one layer needs at a time, see `_operation_bytes`. A tile counts with its margins, the largest
    tile of the grid.

    Args:
        model: the VAE's modules, on any device.
        frames, height, width: of the video that comes out.
        tile: side of a tile in pixels, 0 for whole frames.
    """
    return _weight_bytes(model.decoder, model.conv2) + _decode_bytes(model, frames, height, width, tile)


def encode_peak_bytes(model, frames, height, width, tile=0):
    """Device memory that `encode` takes at most, with the encoder's weights and the latents that it returns.

    Counted as in `decode_peak_bytes`; height and width are those of the video that goes in.
    """
    return _weight_bytes(model.encoder, model.conv1) + _encode_bytes(model, frames, height, width, tile)


def _decode_bytes(model, frames, height, width, tile):
    global_part, latent_part, large_part = _decoder_parts(model.decoder)
    frames, size = encoded_frames(frames), (height // STRIDE, width // STRIDE)
    channels = model.decoder.conv1.out_channels
    lengths = _longest(large_part, size, height, width, tile, scale=1)
    return max(
        _pass_bytes(global_part, frames, model.z_dim, *_same_lengths(global_part, size)),
        _pass_bytes(latent_part, frames, channels, *_same_lengths(latent_part, size)),
        _pass_bytes(large_part, frames, channels, *lengths),
    )


def _encode_bytes(model, frames, height, width, tile):
    large_part, latent_part, global_part = _encoder_parts(model.encoder)
    latent_frames, size = encoded_frames(frames), (height // STRIDE, width // STRIDE)
    channels = model.encoder.middle[0].residual[0].gamma.size(0)
    lengths = _longest(large_part, (height, width), height, width, tile, scale=STRIDE)
    latents = _allocated(model.z_dim * latent_frames, math.prod(size))
    return latents + max(
        _pass_bytes(large_part, decoded_frames(latent_frames), 3, *lengths),
        _pass_bytes(latent_part, latent_frames, channels, *_same_lengths(latent_part, size)),
        _pass_bytes(global_part, latent_frames, channels, *_same_lengths(global_part, size)),
    )


def _weight_bytes(*modules):
    return sum(_allocated(1, p.numel()) for module in modules for p in module.parameters())


def _allocated(channels, area):
    return -(-BYTES * channels * area // ALLOCATION) * ALLOCATION


def _same_lengths(operations, size):
    return [[length] * (len(operations) + 1) for length in size]


def _longest(operations, input_size, height, width, tile, scale):
    """Rows and columns of each operation's input and of the last one's output, the most of all tiles."""
    longest = []
    for length, input_length in zip((height, width), input_size):
        needed = (
            needed_intervals(operations, low // scale, high // scale, input_length)
            for low, high in _split(length, tile)
        )
        longest.append([max(high - low for low, high in position) for position in zip(*needed)])
    return longest


def _pass_bytes(operations, frames, channels, rows, columns):
    """The most that a pass holds at a time, weights apart.

    Args:
        operations: list of modules.
        frames: how many arrive at the first operation.
        channels: of these frames.
        rows, columns: of the input of each operation, one list each.
    """
    frame = _allocated(channels, rows[0] * columns[0])  # what arrives at an operation
    single, remembered, waiting, most = frames == 1, 0, frame, 0
    for operation, height, width in zip(operations, rows, columns):
        kept, working = _operation_bytes(operation, frames, frame, channels, height, width)
        remembered += kept
        # In a video every layer remembers; before the second frame, only those that the first one has passed.
        most = max(most, waiting + working + (remembered if single else 0))
        if changes_rate(operation):
            doubles = operation.stride[0] == 1
            if doubles and frames > 1:  # the pair waits until both have gone all the way
                waiting += _allocated(operation.out_channels, height * width)
            frames = 2 * frames - 1 if doubles else 1 + (frames - 1) // 2
        channels = _output_channels(operation, channels)
        frame = _allocated(channels, math.prod(_output_interval(operation, 0, n)[1] for n in (height, width)))
    return most if single else remembered + most


def _operation_bytes(operation, frames, frame, channels, height, width):
    """What an operation remembers between frames, and the most that it holds beside that while it works.

    Args:
        operation: module.
        frames: how many it gets.
        frame: bytes of one of them as it arrives.
        channels, height, width: of its input.
    """
    area = height * width
    if changes_rate(operation):
        if operation.stride[0] == 1:  # the first frame passes it by
            return _causal_bytes(operation, frames - 1, area, frame) if frames > 1 else (0, frame)
        window = _allocated(3 * channels, area) + _allocated(channels, area)
        return min(frames, 2) * frame, frame + (window if frames > 2 else 0)
    if isinstance(operation, nn.Conv3d):
        return _causal_bytes(operation, frames, area, frame)
    if hasattr(operation, "residual"):
        first, second = (
            _causal_bytes(conv, frames, area, _allocated(conv.in_channels, area))
            for conv in operation.residual
            if isinstance(conv, nn.Conv3d)
        )
        out = _allocated(operation.residual[-1].out_channels, area)
        beside = (
            out if isinstance(operation.shortcut, nn.Conv3d) else 2 * _allocated(1, area)
        )  # shortcut or norm
        return first[0] + second[0], frame + max(first[1], second[1], out + beside)
    if hasattr(operation, "to_qkv"):
        one, scores = _allocated(channels, area), _allocated(attention_rows(area), area)
        return 0, frame + max(6 * one, 4 * one + scores)  # qkv and its transpose; q, k, v, output and scores
    if isinstance(operation, nn.Sequential):
        conv = operation[-1]
        if upsamples(operation):
            return 0, frame + _allocated(conv.in_channels, 4 * area) + _allocated(conv.out_channels, 4 * area)
        padded = _allocated(channels, (height + 1) * (width + 1))
        return 0, frame + padded + _allocated(conv.out_channels, (height // 2) * (width // 2))
    if hasattr(operation, "gamma"):
        return 0, frame + _allocated(channels, area) + 2 * _allocated(1, area)
    return 0, frame


def _causal_bytes(conv, frames, area, frame):
    """As `_operation_bytes`, of a convolution over three frames: the window of them, and then its output."""
    window = _allocated(min(frames, 3) * conv.in_channels, area) if frames > 1 else 0
    forgotten = frame if frames > 2 else 0
    return min(frames, 2) * frame, window + max(forgotten, _allocated(conv.out_channels, area))


def _output_channels(operation, channels):
    if changes_rate(operation):
        return operation.in_channels  # twice as many that become two frames, or as many
    if isinstance(operation, nn.Conv3d):
        return operation.out_channels
    if hasattr(operation, "residual"):
        return operation.residual[-1].out_channels
    return operation[-1].out_channels if isinstance(operation, nn.Sequential) else channels


def _fitting_tile(bytes_needed, model, shape, device):
    """The tile size with the fewest tiles whose predicted peak fits what is free on the device; 0 on the CPU.

    Args:
        bytes_needed: function of model, frames, height, width, tile: what is needed beside the weights, which
            are there already.
        shape: (frames, height, width) of the video.
    """
    if device.type == "cpu":
        return 0
    accelerator = torch.get_device_module(device)
    free, _ = accelerator.mem_get_info(device)
    free += accelerator.memory_reserved(device) - accelerator.memory_allocated(device)
    largest = (max(shape[1:]) - 1) // TILE_STEP * TILE_STEP
    for tile in (0, *range(largest, SMALLEST_TILE - 1, -TILE_STEP)):
        if bytes_needed(model, *shape, tile) <= (1 - SPARE) * free:
            break
    log.info("VAE: %s", f"tiles of {tile} pixels" if tile else "whole frames")
    return tile
