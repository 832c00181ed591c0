"""The causal VAE's passes over a video, one frame at a time.

The frames that a temporal upsampling makes of one go through all later layers before the next frame starts, so that no
layer ever holds more than one frame's activations and the frames that it remembers.

All layers at the size of the latents run on whole frames, which are small there, with their features on the CPU between
the passes. The caller decides how the layers at larger sizes run: on whole frames, or by tiles.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from .operations import InPlace, Operation, TemporalCache, decoder_passes, encoder_passes

Sink = Callable[[torch.Tensor], None]  # is given a frame
Crop = tuple[slice, slice]  # rows, columns
# See `on_whole_frames`.
LargePass = Callable[[Sequence[Operation], torch.Tensor, torch.Tensor, torch.Tensor], None]


class Stored(Protocol):
    """Converts a piece of a frame, [1, 3, h, w] in [-1, 1], to what is stored of it; it may overwrite the piece."""

    dtype: torch.dtype
    finite: bool  # whether all values were numbers

    def __call__(self, frame: torch.Tensor) -> torch.Tensor: ...


def run(
    operations: Sequence[Operation],
    frame: torch.Tensor,
    cache: TemporalCache,
    sink: Sink,
    crops: Sequence[Crop] | None = None,
) -> None:
    """Pushes one frame through `operations`; calls `sink` with each frame that comes out, in order.

    Args:
        operations: list of Operation.
        frame: [B, C, H, W].
        cache: TemporalCache of this pass.
        sink: function of a frame.
        crops: for each operation the (rows, columns) slices that its input is cropped to, and those of the
            last one's output; None to crop nothing.
    """
    for i, operation in enumerate(operations):
        if crops is not None:
            frame = frame[(..., *crops[i])]
        frames = operation(frame, cache)
        if len(frames) != 1:
            rest = None if crops is None else crops[i + 1 :]
            for single in frames:
                run(operations[i + 1 :], single, cache, sink, rest)
            return
        (frame,) = frames
    sink(frame if crops is None else frame[(..., *crops[-1])])


def run_pass(
    operations: Sequence[Operation],
    frames: Iterable[torch.Tensor],
    sink: Sink,
    crops: Sequence[Crop] | None = None,
) -> None:
    """Runs `operations` over the frames of a video, with a temporal cache of their own; see `run`."""
    cache = TemporalCache()
    for frame in frames:
        run(operations, frame, cache, sink, crops)


def on_whole_frames(
    operations: Sequence[Operation], source: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> None:
    """The large pass over whole frames.

    Args:
        operations: list of Operation.
        source: [C, F, H, W], on any device.
        target: [C', F', H', W'], to be written.
        weight: tensor of the type and on the device in which to compute.
    """
    run_pass(operations, frames_of(source, weight), FrameWriter(target))


@torch.no_grad()
def decode(
    model: nn.Module,
    z: torch.Tensor,
    scale: Sequence[torch.Tensor],
    large_pass: LargePass = on_whole_frames,
    stored: Stored | None = None,
) -> torch.Tensor:
    """Decodes one latent video on the device of the decoder's weights.

    Args:
        model: the VAE's modules; its decoder and `conv2` are used.
        z: [z_dim, F, h, w], on any device.
        scale: [mean, 1 / std] of the latent channels.
        large_pass: runs the operations above the size of the latents, see `on_whole_frames`.
        stored: see Stored; default: frames are stored as they are.

    Returns:
        [3, 4 F - 3, 8 h, 8 w] on the CPU: fp32 in [-1, 1], or what `stored` makes of that.
    """
    passes, weight = decoder_passes(model), model.conv2.weight
    _, frames, height, width = z.shape
    features = frame_major(passes.whole[-1].out_channels, frames, height, width)
    run_pass(passes.whole, denormalized(z, scale, weight), FrameWriter(features))
    # The features are overwritten while they are read: these layers never remember the input tensor itself.
    run_pass(passes.small, frames_of(features, weight), FrameWriter(features))
    dtype, last = (stored.dtype, [InPlace(stored)]) if stored else (torch.float32, [])
    video = torch.empty(3, decoded_frames(frames), 8 * height, 8 * width, dtype=dtype)
    large_pass([*passes.large, *last], features, video, weight)
    return video


@torch.no_grad()
def encode(
    model: nn.Module,
    video: torch.Tensor,
    scale: Sequence[torch.Tensor],
    large_pass: LargePass = on_whole_frames,
) -> torch.Tensor:
    """Encodes one video on the device of the encoder's weights.

    Args:
        model: the VAE's modules; its encoder and `conv1` are used.
        video: [3, F, H, W] in [-1, 1], on any device; the needed part of a frame is read when its turn comes.
        scale: [mean, 1 / std] of the latent channels.
        large_pass: runs the operations above the size of the latents, see `on_whole_frames`.

    Returns:
        [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] fp32 on the device of the weights, the mean of the
        distribution.
    """
    passes, weight = encoder_passes(model), model.conv1.weight
    _, frames, height, width = video.shape
    shape = (encoded_frames(frames), height // 8, width // 8)
    features = frame_major(passes.whole[0].in_channels, *shape)
    large_pass(passes.large, video[:, : decoded_frames(shape[0])], features, weight)
    run_pass(passes.small, frames_of(features, weight), FrameWriter(features))
    latents = torch.empty(weight.size(0) // 2, *shape, device=weight.device)
    mean, inverse_std = per_channel(scale, weight)
    write = FrameWriter(latents)
    run_pass(
        passes.whole,
        frames_of(features, weight),
        lambda moments: write((moments.chunk(2, dim=1)[0] - mean) * inverse_std),
    )
    return latents


def decoded_frames(latent_frames: int) -> int:
    """Frames that a latent video decodes to."""
    return 1 + 4 * (latent_frames - 1)


def encoded_frames(frames: int) -> int:
    """Latent frames of a video; as in the published encoder, frames after the last full four are left out."""
    return 1 + (frames - 1) // 4


class FrameWriter:
    """Writes frames [1, C, H, W], in order, into a region of a preallocated video [C, F, H, W]."""

    def __init__(self, video: torch.Tensor):
        self.video = video
        self.next = 0

    def __call__(self, frame: torch.Tensor) -> None:
        self.video[:, self.next] = frame[0].to(self.video.device)
        self.next += 1


def frames_of(video: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the frames [1, C, H, W] of a video [C, F, H, W], each with `weight`'s device and type."""
    for frame in video.unsqueeze(0).unbind(dim=2):
        yield frame.to(weight)


def denormalized(
    z: torch.Tensor, scale: Sequence[torch.Tensor], weight: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yields the latent frames [1, z_dim, h, w] of z in the decoder's own units, with `weight`'s device and type."""
    mean, inverse_std = per_channel(scale, weight)
    for frame in frames_of(z, weight):
        yield frame / inverse_std + mean


def frame_major(channels: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Allocates features [C, F, h, w] on the CPU, each frame's contiguous."""
    return torch.empty(frames, channels, height, width).transpose(0, 1)


def per_channel(scale: Sequence[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """The mean and 1 / std of the latent channels, [1, z_dim, 1, 1] each, with `weight`'s device and type."""
    return [statistic.to(weight).view(1, -1, 1, 1) for statistic in scale]
