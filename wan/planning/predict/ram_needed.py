"""RAM that a run takes beside what mapped files share with the system's cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from leanwan.options import MemoryOptions

from ...configs.encoders import IMAGE_TOKENS

FEATURES = 4  # channels between the VAE's passes, in units of its width


@dataclass(frozen=True)
class Ram:
    """Bytes, by what they hold.

    Attributes:
        weights: the DiT's weights that are converted, and so not mapped; all weights of other models are mapped.
        activations: tensors over all tokens, if activation offload keeps them in RAM.
        context: keys and values of prompts and images, for all blocks, if layers stream.
        video: the larger of two sums: the sources' frames; the result's frames and the VAE's features of them.
    """

    weights: int
    activations: int
    context: int
    video: int

    @property
    def peak(self) -> int:
        """The most at a time: the context is freed before the video is made."""
        return self.weights + self.activations + max(self.context, self.video)


def ram_needed(
    model: nn.Module,
    options: MemoryOptions,
    video: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    stored: Callable[[str], torch.dtype],
    *,
    vae_dim: int = 96,
    prompts: int = 2,
    source_channels: int = 0,
) -> Ram:
    """The Ram of a run.

    Args:
        model: the DiT, its weights anywhere, meta tensors too.
        options: memory options.
        video: (frames, height, width).
        strides: of the VAE.
        dtype: the DiT's compute type.
        stored: maps a parameter's name to its type in the file.
        vae_dim: the VAE's width.
        prompts: number of prompts that the DiT is called with: 2 with guidance, else 1.
        source_channels: channels of all source videos together, kept in fp32.
    """
    frames, height, width = video
    latent = (-(-(frames - 1) // strides[0]) + 1, height // strides[1], width // strides[2])
    tokens = math.prod(side // step for side, step in zip(latent, model.patch_size))
    weights = 0
    if not options.offload_folder:
        for name, parameter in model.named_parameters():
            kept = model.storage_dtype(name, dtype)
            weights += parameter.numel() * kept.itemsize if kept is not stored(name) else 0
    activations = 0
    if options.activation_offload:
        activations = activation_bytes(model, tokens, dtype.itemsize, options.guidance_together, prompts)
    context = 0
    if options.dit_stream is not None:
        blocks = len(model.blocks) + len(getattr(model, "vace_blocks", ()))
        image = model.img_emb.emb_pos.size(1) if hasattr(getattr(model, "img_emb", None), "emb_pos") else 0
        image = image or (IMAGE_TOKENS if hasattr(model, "img_emb") else 0)
        context = 2 * blocks * (prompts * model.text_len + image) * model.dim * dtype.itemsize
    features = FEATURES * vae_dim * math.prod(latent) * 4
    sources = source_channels * frames * height * width * 4
    return Ram(weights, activations, context, max(sources, 3 * frames * height * width + features))


def activation_bytes(model: nn.Module, tokens: int, itemsize: int, together: bool, prompts: int = 2) -> int:
    """Bytes of the tensors over all tokens that activation offload keeps in RAM.

    itemsize: bytes of a number of the compute type. together: whether all prompts pass through a layer in turn.
    """
    stacks = 2 if hasattr(model, "vace_blocks") else 1
    samples = prompts if together else 1
    narrow = 2 * samples + 2  # keys and values of each sample; queries and attention output
    return tokens * model.dim * (4 * stacks * samples + narrow * itemsize)
