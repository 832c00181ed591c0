"""The causal VAE's passes, one frame at a time.

Written over the attribute names that the checkpoint fixes, so that they run any module tree that carries them.
All layers are causal in time, so a video goes through them frame by frame, each causal layer remembering the two
frames before; what a frame becomes at a temporal upsampling goes all the way down before the next frame starts.
No layer ever holds more than a frame's activations and its memory of the past.
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


def run(layers, frame, cache, sink, crops=None):
    """Pushes one frame through `layers`; calls `sink` with each frame that comes out, in order.

    Args:
        layers: list of modules.
        frame: [B, C, 1, H, W].
        cache: TemporalCache of this pass.
        sink: function of a frame. A temporal upsampling gives two frames for one, a downsampling one for two.
        crops: for each layer the (rows, columns) slices that its input is cropped to, or None.
    """
    for i, layer in enumerate(layers):
        if crops is not None:
            frame = frame[..., crops[i][0], crops[i][1]]
        frame = step(layer, frame, cache)
        if frame is None:
            return
        if frame.size(2) > 1:
            rest = None if crops is None else crops[i + 1 :]
            for single in frame.split(1, dim=2):
                run(layers[i + 1 :], single, cache, sink, rest)
            return
    sink(frame)


def step(layer, frame, cache):
    """One layer on one frame. Returns its frames [B, C', 0 to 2, H', W'], None for a frame that must wait."""
    if hasattr(layer, "residual"):
        return _residual(layer, frame, cache)
    if hasattr(layer, "resample"):
        return _upsample(layer, frame, cache) if _is_upsampling(layer) else _downsample(layer, frame, cache)
    if hasattr(layer, "to_qkv"):
        return _attention(layer, frame)
    if isinstance(layer, nn.Conv3d):
        return _causal(layer, frame, cache)
    return layer(frame)


def _is_upsampling(layer):
    return isinstance(layer.resample[0], nn.Upsample)


def _causal(conv, frame, cache):
    """A causal convolution with stride 1: zeros before the video, whose share of the kernel is left out."""
    time, height, width = conv.kernel_size
    window = cache.window(conv, frame, memory=time - 1) if time > 1 else frame
    weight = conv.weight[:, :, time - window.size(2) :]
    return F.conv3d(window, weight, conv.bias, padding=(0, height // 2, width // 2))


def _residual(block, frame, cache):
    out = frame
    for layer in block.residual:
        out = step(layer, out, cache)
    return out.add_(block.shortcut(frame))


def _attention(block, frame):
    """Single-head self attention over the positions of one frame, its rows in pieces of bounded scores."""
    height = frame.size(3)
    qkv = block.to_qkv(block.norm(frame.squeeze(2)))
    q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3).contiguous()
    del qkv
    # No fused kernel takes fp32 heads this wide everywhere. Each row is its own softmax, so pieces are exact.
    rows = max(1, ATTENTION_SCORES // (k.size(0) * k.size(2)))
    out = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)], dim=2)
    return frame + block.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=height)).unsqueeze(2)


def _upsample(layer, frame, cache):
    """Twice the height and width; twice the frames with a `time_conv`, but for the first one."""
    if not hasattr(layer, "time_conv"):
        return layer.resample(frame.squeeze(2)).unsqueeze(2)
    if layer in cache:
        frame = _causal(layer.time_conv, frame, cache)
        frame = rearrange(frame, "b (two c) t h w -> b c (t two) h w", two=2)
    else:
        cache.past[layer] = []  # the first frame stays single, and the time convolution never sees it
    return torch.stack([layer.resample(single) for single in frame.unbind(2)], dim=2)


def _downsample(layer, frame, cache):
    """Half the height and width; half the frames with a `time_conv`, but for the first one."""
    frame = layer.resample(frame.squeeze(2)).unsqueeze(2)
    if not hasattr(layer, "time_conv"):
        return frame
    first = layer.time_conv not in cache
    window = cache.window(layer.time_conv, frame, memory=3)
    if first:
        return frame
    if window.size(2) < 3:
        return None
    cache.past[layer.time_conv] = [frame]
    return layer.time_conv(window)


def decoded_frames(latent_frames):
    """Frames that a latent video decodes to."""
    return 1 + 4 * (latent_frames - 1)


def encoded_frames(frames):
    """Latent frames of a video; frames after the last full four are left out, as the published encoder does."""
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
    layers = [decoder.conv1, *decoder.middle, *decoder.upsamples, *decoder.head]
    _, frames, height, width = z.shape
    video = torch.empty(3, decoded_frames(frames), 8 * height, 8 * width)
    write = FrameWriter(video)
    cache = TemporalCache()
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
        [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] on the device of the weights, the mean of the distribution.
    """
    encoder = model.encoder
    layers = [encoder.conv1, *encoder.downsamples, *encoder.middle, *encoder.head]
    cache, latents = TemporalCache(), []
    for frame in video_frames(model, video):
        run(layers, frame, cache, latents.append)
    return normalized_mean(model, latents, scale)


class FrameWriter:
    """Writes frames [1, C, 1, H, W], in order, into a region of a preallocated video [C, F, H, W]."""

    def __init__(self, video):
        self.video = video
        self.next = 0

    def __call__(self, frame):
        self.video[:, self.next] = frame[0, :, 0].to(self.video.device)
        self.next += 1


def video_frames(model, video):
    """The frames [1, 3, 1, H, W] that count of a video [3, F, H, W], each brought to the encoder when asked for."""
    weight = model.conv1.weight
    for t in range(4 * encoded_frames(video.size(1)) - 3):
        yield video[None, :, t : t + 1].to(weight.device, weight.dtype)


def denormalized(model, z, scale):
    """The latent frames [1, z_dim, 1, h, w] of z in the decoder's own units."""
    mean, inverse_std = (per_channel.view(1, -1, 1, 1, 1) for per_channel in scale)
    weight = model.conv2.weight
    for frame in z.unsqueeze(0).split(1, dim=2):
        yield model.conv2(frame.to(weight.device, weight.dtype) / inverse_std + mean)


def normalized_mean(model, moments, scale):
    """The mean of the coded distribution, [z_dim, F, h, w] in units of `scale`, from the encoder's frames."""
    mean, inverse_std = (per_channel.view(1, -1, 1, 1, 1) for per_channel in scale)
    mu, _ = model.conv1(torch.cat(moments, dim=2)).chunk(2, dim=1)
    return ((mu - mean) * inverse_std).float().squeeze(0)
