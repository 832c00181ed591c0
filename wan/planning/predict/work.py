"""A run, described to the predictors by models without weights and by shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .blocks import Shape


def _published(name: str) -> torch.dtype:
    """The type of every parameter in the published checkpoints."""
    return torch.float32


@dataclass(frozen=True)
class Work:
    """A run, as the predictors need to know it.

    Attributes:
        text, image: fields of the encoders' configs; image is None where none is used.
        text_tokens: number of tokens that a prompt is padded to.
        text_itemsize, image_itemsize: bytes of a number in the encoders.
        pictures: (width, height) of each picture that CLIP encodes.
        dit, vae: modules, meta tensors too; the DiT's parameters have the types that they are kept in.
        dtype: the DiT's compute type.
        shape: what the DiT is called with.
        frames, height, width: of the video.
        strides: of the VAE: frames, rows, columns.
        vae_dim: the VAE's width.
        encoded: number of frames of each video that the VAE encodes.
        stored: maps the name of a DiT's parameter to its type in the file.
        ranks: number of ranks that share the tokens of a pass.
        text_ranks, dit_ranks: number of ranks that shard the text encoder's weights, and the DiT's.
        sources: channels of all source videos together, whose frames are in RAM at once, fp32.
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
