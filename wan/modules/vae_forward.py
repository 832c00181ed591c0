"""The causal VAE's passes, one frame at a time.

Written over the attribute names that the checkpoint fixes, so that they run any module tree that carries
them. All layers are causal in time, so a video goes through them frame by frame, each causal layer
remembering the two frames before; what a frame becomes at a temporal upsampling goes all the way down before
the next frame starts. No layer ever holds more than a frame's activations and its memory of the past.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

ATTENTION_SCORES = 2**24  # entries of the score matrix that attention may materialise at a time


class TemporalCache:
    """What causal layers remember of the frames before the current one, for one pass over one video.

    `past[layer]` is a list of frames [B, C, 1, H, W], oldest first. A layer that has not run has no entry.
    """

    def __init__(self):
        self.past = {}

    def window(self, layer, frame, memory):
        """What `layer` remembers, then `frame`, which joins it: [B, C, up to memory + 1, H, W]."""
        frames = [*self.past.get(layer, ()), frame]
        self.past[layer] = frames[-memory:]
        return torch.cat(frames, dim=2) if len(frames) > 1 else frame

    def __contains__(self, layer):
        return layer in self.past


def operations(layers):
    """The layers in order, resamplings taken apart into `resample`, for the size, and `time_conv`, for the rate.

    What comes out is a residual block, an attention block, a causal nn.Conv3d, a `resample` nn.Sequential
    that `upsamples` or halves the size, a `time_conv` that changes the rate, or a pointwise layer.
    """
    parts = []
    for layer in layers:
        if not hasattr(layer, "resample"):
            parts.append(layer)
            continue
        rate = [layer.time_conv] if hasattr(layer, "time_conv") else []
        parts += [*rate, layer.resample] if upsamples(layer.resample) else [layer.resample, *rate]
    return parts


def upsamples(resample):
    """Whether this `resample` doubles the height and width; else it halves them."""
    return isinstance(resample[0], nn.Upsample)


def changes_rate(operation):
    """Whether it is a `time_conv`, which halves the frames if its stride is 2 and else doubles them."""
    return isinstance(operation, nn.Conv3d) and operation.kernel_size == (3, 1, 1)


def run(operations, frame, cache, sink, crops=None):
    """Pushes one frame through `operations`; calls `sink` with each frame that comes out, in order.

    Args:
        operations: list of modules, see `operations`.
        frame: [B, C, 1, H, W].
        cache: TemporalCache of this pass.
        sink: function of a frame.
        crops: for each operation the (rows, columns) slices that its input is cropped to, and those of the
            last one's output; None to crop nothing.
    """
    for i, operation in enumerate(operations):
        if crops is not None:
            frame = frame[(..., *crops[i])]
        frames = step(operation, frame, cache)
        if len(frames) != 1:
            rest = None if crops is None else crops[i + 1 :]
            for single in frames:
                run(operations[i + 1 :], single, cache, sink, rest)
            return
        (frame,) = frames
    sink(frame if crops is None else frame[(..., *crops[-1])])


def step(operation, frame, cache):
    """One operation on one frame. Returns the list of its frames, 0 to 2 of them, [B, C', 1, H', W'] each."""
    if changes_rate(operation):
        return (
            _halve(operation, frame, cache) if operation.stride[0] == 2 else _double(operation, frame, cache)
        )
    if hasattr(operation, "residual"):
        return [_residual(operation, frame, cache)]
    if hasattr(operation, "to_qkv"):
        return [_attention(operation, frame)]
    if isinstance(operation, nn.Sequential):
        return [operation(frame.squeeze(2)).unsqueeze(2)]
    return [_local(operation, frame, cache)]


def _local(layer, frame, cache):
    """A convolution, norm or activation. An activation overwrites its input, which a norm has just made."""
    if isinstance(layer, nn.Conv3d):
        return _causal(layer, frame, cache)
    if hasattr(layer, "gamma"):
        return _norm(layer, frame)
    if isinstance(layer, nn.SiLU):
        return F.silu(frame, inplace=True)
    return layer(frame)


def _norm(layer, x):
    """L2 norm over the channels, scaled by sqrt(channels): each position for itself."""
    return F.normalize(x, dim=1).mul_(x.size(1) ** 0.5).mul_(layer.gamma)


def _causal(conv, frame, cache):
    """A causal convolution with stride 1: zeros before the video, whose share of the kernel is left out."""
    time, height, width = conv.kernel_size
    window = cache.window(conv, frame, memory=time - 1) if time > 1 else frame
    weight = conv.weight[:, :, time - window.size(2) :]
    return F.conv3d(window, weight, conv.bias, padding=(0, height // 2, width // 2))


def _residual(block, frame, cache):
    out = frame
    for layer in block.residual:
        out = _local(layer, out, cache)
    return out.add_(_local(block.shortcut, frame, cache))


def _attention(block, frame):
    """Single-head self attention over the positions of one frame, its rows in pieces of bounded scores."""
    height = frame.size(3)
    qkv = block.to_qkv(_norm(block.norm, frame.squeeze(2)))
    q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3).contiguous()
    del qkv
    # No fused kernel takes fp32 heads this wide everywhere. Each row is its own softmax, so pieces are exact.
    pieces = q.split(attention_rows(k.size(2)), dim=2)
    out = torch.cat([F.scaled_dot_product_attention(piece, k, v) for piece in pieces], dim=2)
    del q, k, v, pieces
    return frame + block.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=height)).unsqueeze(2)


def attention_rows(positions):
    """Rows of the score matrix that attention over so many positions takes at a time."""
    return min(positions, max(1, ATTENTION_SCORES // positions))


def _double(time_conv, frame, cache):
    """Two frames for one, but for the first one, which stays single and which the convolution never sees."""
    if time_conv not in cache:
        cache.past[time_conv] = []
        return [frame]
    return _causal(time_conv, frame, cache).chunk(2, dim=1)


def _halve(time_conv, frame, cache):
    """One frame for two, but for the first one, which stays."""
    if time_conv not in cache:
        cache.past[time_conv] = [frame]
        return [frame]
    frames = [*cache.past[time_conv], frame]
    if len(frames) < 3:
        cache.past[time_conv] = frames
        return []
    cache.past[time_conv] = [frame]
    return [F.conv3d(torch.cat(frames, dim=2), time_conv.weight, time_conv.bias, time_conv.stride)]


def decoded_frames(latent_frames):
    """Frames that a latent video decodes to."""
    return 1 + 4 * (latent_frames - 1)


def encoded_frames(frames):
    """Latent frames of a video; as in the published encoder, frames after the last full four are left out."""
    return 1 + (frames - 1) // 4


def decode(model, z, scale):
    """Decodes one latent video on the device of the weights.

    Args:
        model: the VAE's modules; its decoder and `conv2` are used.
        z: [z_dim, F, h, w].
        scale: [mean, 1 / std] of the latent channels.

    Returns:
        [3, 4 F - 3, 8 h, 8 w] fp32 in [-1, 1] on the CPU.
    """
    decoder = model.decoder
    layers = operations([decoder.conv1, *decoder.middle, *decoder.upsamples, *decoder.head])
    _, frames, height, width = z.shape
    video = torch.empty(3, decoded_frames(frames), 8 * height, 8 * width)
    write, cache = FrameWriter(video), TemporalCache()
    for frame in denormalized(model, z, scale):
        run(layers, frame, cache, lambda out: write(out.clamp_(-1, 1)))
    return video


def encode(model, video, scale):
    """Encodes one video on the device of the weights.

    Args:
        model: the VAE's modules; its encoder and `conv1` are used.
        video: [3, F, H, W] in [-1, 1], on any device; its frames are taken one at a time.
        scale: [mean, 1 / std] of the latent channels.

    Returns:
        [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] fp32 on the device of the weights, the mean of the
        distribution.
    """
    encoder = model.encoder
    layers = operations([encoder.conv1, *encoder.downsamples, *encoder.middle, *encoder.head])
    latents = empty_latents(model, video)
    write, cache = FrameWriter(latents), TemporalCache()
    for frame in video_frames(model, video):
        run(layers, frame, cache, lambda moments: write(normalized_mean(model, moments, scale)))
    return latents


class FrameWriter:
    """Writes frames [1, C, 1, H, W], in order, into a region of a preallocated video [C, F, H, W]."""

    def __init__(self, video):
        self.video = video
        self.next = 0

    def __call__(self, frame):
        self.video[:, self.next] = frame[0, :, 0].to(self.video.device)
        self.next += 1


def video_frames(model, video):
    """The frames [1, 3, 1, H, W] that count of a video [3, F, H, W], each brought to the encoder in turn."""
    weight = model.conv1.weight
    for t in range(decoded_frames(encoded_frames(video.size(1)))):
        yield video[None, :, t : t + 1].to(weight.device, weight.dtype)


def empty_latents(model, video):
    """Room for what a video [3, F, H, W] encodes to, [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] fp32."""
    weight = model.conv1.weight
    _, frames, height, width = video.shape
    return torch.empty(
        weight.size(0) // 2, encoded_frames(frames), height // 8, width // 8, device=weight.device
    )


def denormalized(model, z, scale):
    """The latent frames [1, z_dim, 1, h, w] of z in the decoder's own units."""
    conv = model.conv2
    mean, inverse_std = (per_channel.to(conv.weight).view(1, -1, 1, 1, 1) for per_channel in scale)
    for frame in z.unsqueeze(0).split(1, dim=2):
        yield _causal(conv, frame.to(conv.weight) / inverse_std + mean, None)


def normalized_mean(model, moments, scale):
    """The mean of the coded distribution, [1, z_dim, 1, h, w] in units of `scale`, from encoder output."""
    mean, inverse_std = (per_channel.to(moments).view(1, -1, 1, 1, 1) for per_channel in scale)
    mu, _ = _causal(model.conv1, moments, None).chunk(2, dim=1)
    return (mu - mean) * inverse_std
