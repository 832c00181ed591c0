"""The causal 3D VAE: its modules, named as the checkpoint names them, and the coder built on them.

What they compute is in leanwan/vae/operations.py and leanwan/vae/passes.py, which use these names.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from leanwan.vae.passes import Stored, decode, encode

from ..weights.filling import load_weights

# Statistics of the latent channels, published with the model.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WIDTHS = (1, 2, 4, 4)  # channels at each resolution, in units of `dim`, from the frames down to the latents
TEMPORAL = (False, True, True)  # which of the encoder's downsamplings halve the frame rate too


class RMSNorm(nn.Module):
    """The weight of an L2 norm over the channels of each position, scaled by sqrt(channels)."""

    def __init__(self, dim: int, extra_dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * extra_dims))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim, 3),
            nn.SiLU(inplace=True),
            nn.Conv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim, 3),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the checkpoint's numbering counts a dropout here
            nn.Conv3d(out_dim, out_dim, 3, padding=1),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()


class AttentionBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)


class Upsample(nn.Module):
    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim * 2, (3, 1, 1))


class Downsample(nn.Module):
    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))


class Encoder(nn.Module):
    def __init__(self, dim: int, z_dim: int):
        super().__init__()
        widths = [dim * width for width in WIDTHS]
        self.conv1 = nn.Conv3d(3, widths[0], 3, padding=1)
        layers, before = [], widths[0]
        for i, width in enumerate(widths):
            layers += [ResidualBlock(before, width), ResidualBlock(width, width)]
            if i < len(TEMPORAL):
                layers.append(Downsample(width, TEMPORAL[i]))
            before = width
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(width)
        self.head = _head(width, z_dim)


class Decoder(nn.Module):
    def __init__(self, dim: int, z_dim: int):
        super().__init__()
        widths = [dim * width for width in reversed(WIDTHS)]
        self.conv1 = nn.Conv3d(z_dim, widths[0], 3, padding=1)
        self.middle = _middle(widths[0])
        layers, before = [], widths[0]
        for i, width in enumerate(widths):
            layers += [ResidualBlock(before, width), ResidualBlock(width, width), ResidualBlock(width, width)]
            if i < len(TEMPORAL):
                layers.append(Upsample(width, TEMPORAL[-1 - i]))
                before = width // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(width, 3)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim, 3), nn.SiLU(inplace=True), nn.Conv3d(dim, out_dim, 3, padding=1))


class VAE(nn.Module):
    """Encoder and decoder with the pointwise convolutions between them and the latents."""

    def __init__(self, dim: int = 96, z_dim: int = 16):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(dim, z_dim * 2)
        self.conv1 = nn.Conv3d(z_dim * 2, z_dim * 2, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim)

    def encode(self, x: torch.Tensor, scale: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, 3, F, H, W] to latents [B, z_dim, 1 + (F - 1) // 4, H / 8, W / 8]; scale: [mean, 1 / std]."""
        return torch.stack([encode(self, video, scale) for video in x])

    def decode(self, z: torch.Tensor, scale: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, z_dim, F, H, W] to videos [B, 3, 4 F - 3, 8 H, 8 W] in [-1, 1], on the CPU; scale: [mean, 1 / std]."""
        return torch.stack([decode(self, latent, scale) for latent in z])


class WanVAE:
    """The VAE with its latent statistics. Computes where `mean` and `std` are, in fp32."""

    def __init__(
        self,
        z_dim: int = 16,
        vae_pth: str | Path = "cache/vae_step_411000.pth",
        dtype: torch.dtype = torch.float,
        device: torch.device | str = "cuda",
        *,
        dim: int = 96,
    ):
        """
        Args:
            z_dim: latent channels.
            vae_pth: checkpoint file.
            dtype: type of the weights and the arithmetic.
            device: where to keep it.
            dim: channels at full resolution, 96 in the published model.

        Raises:
            InputError: missing or damaged file, or one of another shape.
        """
        self.dtype = dtype
        self.device = torch.device(device)
        self.mean = torch.tensor(LATENT_MEAN, dtype=dtype, device=device)
        self.std = torch.tensor(LATENT_STD, dtype=dtype, device=device)
        self.scale = [self.mean, 1.0 / self.std]
        with torch.device("meta"):
            self.model = VAE(dim, z_dim)
        load_weights(self.model, vae_pth, dtype=lambda name: dtype)
        self.model.to(device)

    def encode(self, videos: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encodes each video, [3, F, H, W] in [-1, 1], to its latent mean, [z_dim, 1 + (F - 1) // 4, H / 8, W / 8]."""
        return [encode(self.model, video, self.scale) for video in videos]

    def decode(self, zs: Sequence[torch.Tensor], *, stored: Stored | None = None) -> list[torch.Tensor]:
        """Decodes each latent, [z_dim, F, H, W], to a video, [3, 4 F - 3, 8 H, 8 W] fp32 in [-1, 1].

        stored: converts decoded frames to what is returned of them; see Stored in leanwan/vae/passes.py.
        """
        return [decode(self.model, z, self.scale, stored=stored) for z in zs]
