"""The causal VAE's layers as operations on single frames, with the facts that passes, tiles and predictions use.

Layers are recognised here and nowhere else, by the attribute names that the checkpoint fixes: any module tree that
carries them can be run, the published one too. An operation keeps its modules, not their parameters, which may come
and go between calls.

All layers are causal in time, so a video goes through them frame by frame, each causal layer remembering the two
frames before. One frame comes out of at most three, which makes a convolution over frames a two-dimensional one over
their stacked channels: the same sum, and kernels that are faster and need less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

ATTENTION_SCORES = 2**24  # entries of the score matrix that attention may materialise at a time


class TemporalCache:
    """The frames before the current one that operations remember, for one pass over one video.

    `past[operation]` is a list of frames [B, C, H, W], oldest first. An operation that has not run has no entry.
    """

    def __init__(self) -> None:
        self.past: dict[Operation, list[torch.Tensor]] = {}

    def window(self, operation: Operation, frame: torch.Tensor) -> torch.Tensor:
        """Stacks the operation's remembered frames and `frame`, which is remembered from now on; see `stacked`."""
        frames = [*self.past.get(operation, ()), frame]
        if operation.memory:
            self.past[operation] = frames[-operation.memory :]
        return stacked(frames, operation.memory + 1)

    def __contains__(self, operation: Operation) -> bool:
        return operation in self.past


def stacked(frames: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Stacks frames to [B, C, count, H, W], zeros before those given; a single frame to a view [B, C, 1, H, W]."""
    if len(frames) == 1:
        return frames[0].unsqueeze(2)
    zeros = [frames[0].new_zeros(()).expand_as(frames[0])] * (count - len(frames))
    return torch.stack([*zeros, *frames], dim=2)


class Operation:
    """A layer that is called with a frame [B, C, H, W] and the TemporalCache of the pass.

    Returns the list of the frames that come out, 0 to 2 of them.

    Facts:
        in_channels, out_channels: None if it takes any number of channels and keeps it.
        scale: pixels out for one pixel in, along height and width: 2, 1 or 0.5.
        halo: how far a pixel of the output sees beyond its own area, (towards the start, towards the end) of each
            axis, in pixels of the output; infinite if it sees the whole frame.
        rate: frames out for one frame in: 2, 1 or 0.5; the first frame always gives one.
        memory: past frames that it remembers.
    """

    in_channels: int | None = None
    out_channels: int | None = None
    scale: float = 1
    halo: tuple[float, ...] = (0, 0)
    rate: float = 1
    memory: int = 0

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        raise NotImplementedError


class InPlace(Operation):
    """A pointwise function that writes over its input, which the operation before has just made."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        return [self.function(frame)]


class Norm(Operation):
    """L2 norm over the channels of each position, scaled by sqrt(channels) and `gamma`."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.in_channels = self.out_channels = module.gamma.size(0)

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        scale = self.module.gamma.view(-1, 1, 1) * self.in_channels**0.5
        return [F.normalize(frame, dim=1).mul_(scale)]


class Convolution(Operation):
    """A causal convolution with stride 1. At the first frame, the zeros before the video are left out of the sum."""

    def __init__(self, conv: nn.Conv3d):
        self.conv = conv
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.memory = conv.kernel_size[0] - 1
        self.halo = (conv.kernel_size[1] // 2,) * 2

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        return [self.of(cache.window(self, frame))]

    def of(self, window: torch.Tensor) -> torch.Tensor:
        """The frame [B, C', H, W] that comes out of a window [B, C, frames, H, W]."""
        weight = self.conv.weight[:, :, -window.size(2) :]
        return F.conv2d(window.flatten(1, 2), weight.flatten(1, 2), self.conv.bias, padding=int(self.halo[0]))


class Double(Convolution):
    """Makes two frames of one; the first frame passes as it is, and the convolution never sees it."""

    rate = 2

    def __init__(self, conv: nn.Conv3d):
        super().__init__(conv)
        self.out_channels = conv.out_channels // 2

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        if self not in cache:
            cache.past[self] = []
            return [frame]
        return super().__call__(frame, cache)[0].chunk(2, dim=1)


class Halve(Convolution):
    """Makes one frame of two and the one before them; the first frame passes as it is."""

    rate = 0.5

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        if self not in cache:
            cache.past[self] = [frame]
            return [frame]
        frames = [*cache.past[self], frame]
        if len(frames) <= self.memory:
            cache.past[self] = frames
            return []
        cache.past[self] = [frame]
        return [self.of(stacked(frames, len(frames)))]


class Resize(Operation):
    """Doubles height and width: each pixel four times, then a 3x3 convolution. Or halves them: a 3x3 convolution at
    every other pixel, over that pixel and the two after it."""

    def __init__(self, resample: nn.Sequential):
        self.resample = resample
        conv = resample[-1]
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.scale, self.halo = (2, (1, 1)) if isinstance(resample[0], nn.Upsample) else (0.5, (0, 0.5))

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        return [self.resample(frame)]


class Residual(Operation):
    """Operations in a row, whose result is added to their input, or to the shortcut's result for that input."""

    def __init__(self, parts: Sequence[Operation], shortcut: Operation | None = None):
        self.parts = parts
        self.shortcut = shortcut
        convolutions = [part for part in parts if isinstance(part, Convolution)]
        self.in_channels, self.out_channels = convolutions[0].in_channels, convolutions[-1].out_channels
        self.halo = tuple(sum(part.halo[side] for part in parts) for side in (0, 1))

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        out = frame
        for part in self.parts:
            (out,) = part(out, cache)
        return [out.add_(self.shortcut(frame, cache)[0] if self.shortcut else frame)]


class Attention(Operation):
    """Single-head self attention over the positions of one frame, in pieces of rows that bound the score matrix."""

    halo = (float("inf"), float("inf"))

    def __init__(self, block: nn.Module):
        self.block = block
        self.norm = Norm(block.norm)
        self.in_channels = self.out_channels = self.norm.in_channels

    def __call__(self, frame: torch.Tensor, cache: TemporalCache) -> list[torch.Tensor]:
        height = frame.size(2)
        qkv = self.block.to_qkv(*self.norm(frame, cache))
        q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3).contiguous()
        del qkv
        # No fused kernel takes fp32 heads this wide everywhere. Each row is its own softmax, so pieces are exact.
        pieces = q.split(attention_rows(k.size(2)), dim=2)
        out = torch.cat([F.scaled_dot_product_attention(piece, k, v) for piece in pieces], dim=2)
        del q, k, v, pieces
        return [frame + self.block.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=height))]


def attention_rows(positions: int) -> int:
    """Rows of the score matrix that attention over `positions` positions computes at a time."""
    return min(positions, max(1, ATTENTION_SCORES // positions))


class Passes(NamedTuple):
    """The operations of one direction, in three groups that a video goes through one after another.

    A decoder runs them in this order, an encoder in the reverse.
    """

    whole: list  # at the size of the latents: attention over the whole frame, and the layers around it
    small: list  # at the size of the latents: convolutions
    large: list  # convolutions at larger sizes, and the layers that change the size


def decoder_passes(model: nn.Module) -> Passes:
    """The Passes from latents, in the decoder's own units, to frames in [-1, 1].

    Args:
        model: the VAE's modules; its decoder and `conv2` are used.

    Raises:
        TypeError: a layer that is not one of this VAE's.
    """
    decoder = model.decoder
    first, upsampling = _operations(model.conv2), _of_layers(decoder.upsamples)
    split = next(i for i, operation in enumerate(upsampling) if _resamples(operation))
    return Passes(
        whole=first + _of_layers([decoder.conv1, *decoder.middle]),
        small=upsampling[:split],
        large=[*upsampling[split:], *_of_layers(decoder.head), InPlace(lambda frame: frame.clamp_(-1, 1))],
    )


def encoder_passes(model: nn.Module) -> Passes:
    """The Passes, the last one first, from frames to the moments of the latents' distribution, mean first.

    Args:
        model: the VAE's modules; its encoder and `conv1` are used.

    Raises:
        TypeError: a layer that is not one of this VAE's.
    """
    encoder = model.encoder
    downsampling = _of_layers([encoder.conv1, *encoder.downsamples])
    split = 1 + max(i for i, operation in enumerate(downsampling) if _resamples(operation))
    return Passes(
        whole=_of_layers([*encoder.middle, *encoder.head, model.conv1]),
        small=downsampling[split:],
        large=downsampling[:split],
    )


def _resamples(operation: Operation) -> bool:
    return operation.scale != 1 or operation.rate != 1


def _of_layers(layers: Iterable[nn.Module]) -> list[Operation]:
    return [operation for layer in layers for operation in _operations(layer)]


def _operations(layer: nn.Module) -> list[Operation]:
    """The operations of one layer, in order: two of a resampling that changes the rate too, none of an identity."""
    if hasattr(layer, "residual"):
        return [Residual(_of_layers(layer.residual), *_of_layers([layer.shortcut]))]
    if hasattr(layer, "to_qkv"):
        return [Attention(layer)]
    if hasattr(layer, "resample"):
        resize = Resize(layer.resample)
        if not hasattr(layer, "time_conv"):
            return [resize]
        return [Double(layer.time_conv), resize] if resize.scale > 1 else [resize, Halve(layer.time_conv)]
    if hasattr(layer, "gamma"):
        return [Norm(layer)]
    if isinstance(layer, nn.Conv3d) and layer.kernel_size in ((1, 1, 1), (3, 3, 3)):
        return [Convolution(layer)]
    if isinstance(layer, nn.SiLU):
        return [InPlace(lambda frame: F.silu(frame, inplace=True))]
    if isinstance(layer, nn.Identity | nn.Dropout):
        return []
    raise TypeError(
        f"{type(layer).__name__} is not a layer of Wan2.1's VAE, whose layers alone can be run by tiles"
    )
