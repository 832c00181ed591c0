"""What is to be done, as models without weights and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .blocks import Shape


def _published(name: str) -> torch.dtype:
    """As published checkpoints have every parameter."""
    return torch.float32


@dataclass(frozen=True)
class Work:
    """A run, to those who predict what it takes.

    Attributes:
        text, image: fields of the encoders' configs; image is None where none is used.
        text_tokens: that a prompt is padded to.
        text_itemsize, image_itemsize: bytes of a number in them.
        pictures: (width, height) of what CLIP encodes.
        dit, vae: modules, meta tensors too; the DiT's in the types that it is kept in.
        dtype: the DiT's compute type.
        shape: of denoising.
        frames, height, width: of the video.
        strides: of the VAE: frames, rows, columns.
        vae_dim: its width.
        encoded: frames of each video that the VAE encodes.
        stored: for the name of a parameter of the DiT the type that its file has it in.
        ranks: that share the tokens of a pass.
        text_ranks, dit_ranks: that share the text encoder's weights out, and the DiT's.
        sources: channels of sources, all frames of which are in RAM at once, fp32.
    """

    text: Mapping[str, Any]
    text_tokens: int
    text_itemsize: int
    image: Mapping[str, Any] | None
    image_itemsize: int
    pictures: Sequence[tuple[int, int]]
    dit: nn.Module
    vae: nn.Module
    dtype: torch.dtype
    shape: Shape
    frames: int
    height: int
    width: int
    strides: tuple[int, int, int] = (4, 8, 8)
    vae_dim: int = 96
    encoded: Sequence[int] = ()
    stored: Callable[[str], torch.dtype | None] = _published
    sources: int = 0
    ranks: int = 1
    text_ranks: int = 1
    dit_ranks: int = 1


def meta_model(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """A model without weights, its parameters in the types that they are kept in."""
    with torch.device("meta"):
        model = make().requires_grad_(False)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(model.storage_dtype(name, dtype))
    return model
