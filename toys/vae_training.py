"""The VAE's training: whole clips go through the modules that the pipelines run frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE

from .clips import HEIGHT, WIDTH, random_clip
from .training_steps import set_rates, share_of_rate, steps


def convolved(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution with stride 1 of [B, C, T, H, W]: zeros before the first frame."""
    time, side = conv.kernel_size[0], conv.kernel_size[1] // 2
    if x.size(2) == 1:
        return F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=side).unsqueeze(2)
    return F.conv3d(F.pad(x, (0, 0, 0, 0, time - 1, 0)), conv.weight, conv.bias, padding=(0, side, side))


def by_frames(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a module for [B, C, H, W] to every frame of [B, C, T, H, W]."""
    out = module(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (x.size(0), -1)).transpose(1, 2)


def normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Scaled by `gamma` to a mean square of 1 over the channels."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * norm.gamma


def attended(block: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """Self attention over the positions of each frame, [N, C, H, W]."""
    hidden = normed(block.norm, frames)
    q, k, v = (part.flatten(2).transpose(1, 2) for part in block.to_qkv(hidden).chunk(3, dim=1))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames.shape)
    return frames + block.proj(out)


def passed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One layer of the VAE on [B, C, T, H, W], by its kind."""
    if hasattr(layer, "residual"):
        out = x
        for part in layer.residual:
            out = passed(part, out)
        return out + passed(layer.shortcut, x)
    if hasattr(layer, "to_qkv"):
        return by_frames(lambda frames: attended(layer, frames), x)
    if hasattr(layer, "resample"):
        return resampled(layer, x)
    if hasattr(layer, "gamma"):
        return normed(layer, x)
    if isinstance(layer, nn.Conv3d):
        return convolved(layer, x)
    return F.silu(x) if isinstance(layer, nn.SiLU) else x


def resampled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Resamples in space and, if the layer does so, in time; the first frame stays single."""
    time_conv = getattr(layer, "time_conv", None)
    if isinstance(layer.resample[0], nn.Upsample):
        if time_conv is not None and x.size(2) > 1:
            pairs = convolved(time_conv, x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T - 1, H, W]
            pairs = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([x[:, :, :1], pairs], dim=2)
        return by_frames(layer.resample, x)
    x = by_frames(layer.resample, x)
    if time_conv is not None and x.size(2) > 1:
        x = torch.cat([x[:, :, :1], F.conv3d(x, time_conv.weight, time_conv.bias, stride=(2, 1, 1))], dim=2)
    return x


def encoded(vae: VAE, video: torch.Tensor) -> torch.Tensor:
    """[B, 3, F, H, W] in [-1, 1] to latents in the encoder's own units, [B, 16, 1 + (F - 1) / 4, H / 8, W / 8]."""
    x = video
    for layer in (vae.encoder.conv1, *vae.encoder.downsamples, *vae.encoder.middle, *vae.encoder.head):
        x = passed(layer, x)
    return convolved(vae.conv1, x).chunk(2, dim=1)[0]


def encoded_by_frames(vae: VAE, video: torch.Tensor) -> torch.Tensor:
    """As `encoded`, for an encoder whose weights for past frames are zero: it encodes every fourth frame by itself."""
    frames = video[:, :, ::4]
    stills = frames.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    return encoded(vae, stills).squeeze(2).unflatten(0, (len(video), -1)).transpose(1, 2)


def decoded(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encoded`: latents to a video, not clamped."""
    x = convolved(vae.conv2, latents)
    for layer in (vae.decoder.conv1, *vae.decoder.middle, *vae.decoder.upsamples, *vae.decoder.head):
        x = passed(layer, x)
    return x


def new_vae(dim: int) -> VAE:
    """An untrained VAE that codes each frame by itself: weights for past frames and residual branches are zero."""
    vae = VAE(dim)
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            if name.endswith(
                ("residual.6.weight", "residual.6.bias", "proj.weight", "proj.bias", "time_conv.bias")
            ):
                parameter.zero_()
            elif name.endswith("time_conv.weight"):
                taps = torch.zeros_like(parameter)
                eye = torch.eye(parameter.size(1))
                taps[:, :, -1, 0, 0] = eye.repeat(parameter.size(0) // parameter.size(1), 1)
                parameter.copy_(taps)
            elif parameter.dim() == 5 and parameter.size(2) == 3:
                parameter[:, :, :2] = 0
    return vae


def crops(
    rng: np.random.Generator, batch: int, frames: int, height: int, width: int
) -> tuple[torch.Tensor, ...]:
    """Crops of clips around the shape: [B, 3, frames, height, width] in [-1, 1], and its coverage [B, 1, ...].

    Some are grey as the inputs that pipelines encode: in a rectangle, outside it, or in the frames to be made.
    """
    videos, covers = [], []
    for _ in range(batch):
        clip, start = random_clip(rng), int(rng.integers(0, 18 - frames))
        x, y, _ = clip.at((start + frames // 2) / 16)
        left = int(np.clip(x - width / 2 + rng.uniform(-8, 8), 0, WIDTH - width)) // 8 * 8
        top = int(np.clip(y - height / 2 + rng.uniform(-8, 8), 0, HEIGHT - height)) // 8 * 8
        window = np.s_[..., start : start + frames, top : top + height, left : left + width]
        video, cover = clip.video()[window].copy(), clip.coverage()[window][None]
        kind = rng.random()
        if kind < 0.15:
            x0, y0 = rng.integers(0, width - 16), rng.integers(0, height - 16)
            hole: np.ndarray = np.zeros((frames, height, width), bool)
            hole[:, y0 : y0 + rng.integers(12, 40), x0 : x0 + rng.integers(12, 40)] = True
            video[:, hole if rng.random() < 0.5 else ~hole] = 0
        elif kind < 0.25 and frames > 1:
            video[:, 1 : frames - (rng.random() < 0.5)] = 0
        videos.append(video)
        covers.append(cover)
    return torch.from_numpy(np.stack(videos)), torch.from_numpy(np.stack(covers))


def train_vae(
    vae: VAE,
    count: int,
    batch: int,
    frames: int,
    rate: float,
    seed: int,
    tell: Callable[[int, float, float], None],
    kept: Path,
    decoder_only: bool = False,
) -> None:
    """Trains the VAE to reconstruct crops of clips.

    Args:
        vae: trained in place.
        count, batch, frames: number of steps, of crops per step, and of frames per crop.
        rate: the highest learning rate.
        tell: called every 50 steps with the step, the loss and the squared error.
        kept: the file from which an interrupted training continues, see training_steps.py.
        decoder_only: leave the encoder as it is.
    """
    vae.requires_grad_(True)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.conv1.requires_grad_(False)
    learning = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, rate, betas=(0.9, 0.98), weight_decay=0)
    for step in steps(count, kept, {"vae": vae, "optimizer": optimizer}):
        set_rates([optimizer], share_of_rate(step, count))
        video, cover = crops(np.random.default_rng([seed, frames, step]), batch, frames, 32, 40)
        latents = encoded_by_frames(vae, video)
        noise = torch.Generator().manual_seed(seed + step)
        blurred = latents + 0.1 * torch.randn(latents.shape, generator=noise)
        error = decoded(vae, blurred) - video
        # A grey result has a small error although it lacks colour, so the error of colour counts more.
        felt = error + 2 * (error - error.mean(1, keepdim=True))
        weight = 1 + 2 * cover
        loss = (weight * (felt.abs() + 2 * felt.square())).mean() + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 0.5)
        optimizer.step()
        if step % 50 == 49:
            tell(step + 1, loss.item(), error.square().mean().item())


def standardise(vae: VAE, latents: torch.Tensor) -> None:
    """Scales a VAE so that its latents, given a sample of them, have the statistics that pipelines expect."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    scale = torch.tensor(LATENT_STD) / std
    shift = torch.tensor(LATENT_MEAN) - mean * scale
    into, out = vae.conv1, vae.conv2
    with torch.no_grad():
        into.weight[: vae.z_dim] *= scale.view(-1, 1, 1, 1, 1)
        into.bias[: vae.z_dim].mul_(scale).add_(shift)
        out.weight /= scale.view(1, -1, 1, 1, 1)
        out.bias -= out.weight.flatten(1) @ shift
