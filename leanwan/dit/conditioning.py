"""The conditioning of a DiT's blocks: made from the timestep, the prompt and the image, never from the tokens.

The timestep gives the modulation of every block and of the head. Prompt and image give the context: the keys and values
of every block's cross attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # [1, n, heads, head_dim] each


@dataclass(frozen=True)
class Conditions:
    """The conditioning of one sample.

    Attributes:
        time: [1, dim] fp32, the embedded timestep, which the head reads.
        modulation: [1, 6, dim] fp32, the projected timestep, which the blocks read.
        context: gives the keys and values of the cross attentions.
    """

    time: torch.Tensor
    modulation: torch.Tensor
    context: Context


class Context:
    """The embedded text and image of one sample, of which each cross attention computes keys and values.

    Args:
        text: [1, text_len, dim].
        image: [1, 257 or 514, dim], or None.
        dtype: the compute type.
    """

    def __init__(self, text: torch.Tensor, image: torch.Tensor | None, dtype: torch.dtype):
        self.text, self.image, self.dtype = text, image, dtype

    def keys_and_values(self, attention: nn.Module) -> list[KeysAndValues]:
        """The keys and values of one block's cross attention: the text's, then the image's if there is an image."""
        found = [text_keys_and_values(attention, self.text, self.dtype)]
        if self.image is not None:
            found.append(image_keys_and_values(attention, self.image, self.dtype))
        return found


def embed(
    model: nn.Module,
    t: torch.Tensor,
    prompt: torch.Tensor,
    image: Callable[[], torch.Tensor] | None,
    dtype: torch.dtype,
) -> Conditions:
    """Computes the Conditions of one sample.

    Args:
        model: a DiT whose embedding layers are on the device of t.
        t: [1], the timestep.
        prompt: [L, text_dim], L at most the model's text_len, on any device.
        image: returns the embedded image; None if the sample has no image.
        dtype: the compute type.

    Raises ValueError for a longer prompt.
    """
    time = embed_time(model, t)
    modulation = project_time(model, time)
    text = embed_text(model, prompt, t.device, dtype)
    return Conditions(time, modulation, Context(text, None if image is None else image(), dtype))


def embed_time(model: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """Embeds a timestep [1] as [1, dim] fp32."""
    with full_precision(t.device):
        return model.time_embedding(sinusoidal_embedding(model.freq_dim, t))


def project_time(model: nn.Module, time: torch.Tensor) -> torch.Tensor:
    """Projects an embedded timestep [1, dim] to the modulation [1, 6, dim] fp32."""
    with full_precision(time.device):
        return model.time_projection(time).unflatten(1, (6, -1))


def embed_text(
    model: nn.Module, prompt: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Pads a prompt's embedding [L, text_dim] with zeros to text_len tokens and projects it to [1, text_len, dim]."""
    length, width = prompt.shape
    if length > model.text_len:
        raise ValueError(f"a prompt of {length} tokens is longer than {model.text_len}")
    padded = torch.zeros(1, model.text_len, width, dtype=dtype, device=device)
    padded[0, :length] = prompt
    return model.text_embedding(padded)


def context_layers(attention: nn.Module) -> list[nn.Module]:
    """The layers that a cross attention calls on the context, not on the tokens."""
    return text_layers(attention) + image_layers(attention)


def text_layers(attention: nn.Module) -> list[nn.Module]:
    """The layers that a cross attention calls on embedded text."""
    return [attention.k, attention.v, attention.norm_k]


def image_layers(attention: nn.Module) -> list[nn.Module]:
    """The layers that a cross attention calls on an embedded image; none in a model without one."""
    if not hasattr(attention, "k_img"):
        return []
    return [attention.k_img, attention.v_img, attention.norm_k_img]


def text_keys_and_values(attention: nn.Module, text: torch.Tensor, dtype: torch.dtype) -> KeysAndValues:
    """A cross attention's keys and values of embedded text."""
    return _keys_and_values(attention, attention.k, attention.norm_k, attention.v, text.to(dtype))


def image_keys_and_values(attention: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> KeysAndValues:
    """A cross attention's keys and values of an embedded image."""
    return _keys_and_values(
        attention, attention.k_img, attention.norm_k_img, attention.v_img, image.to(dtype)
    )


def _keys_and_values(
    attention: nn.Module, k: nn.Module, norm: nn.Module, v: nn.Module, context: torch.Tensor
) -> KeysAndValues:
    value = heads_of(attention, v(context))
    return heads_of(attention, norm(k(context))).to(value.dtype), value


def heads_of(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[1, n, dim] to [1, n, heads, head_dim]."""
    return x.unflatten(2, (attention.num_heads, -1))


def sinusoidal_embedding(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Timesteps [B] to [B, dim] fp32: cosines, then sines, of geometrically falling rates, in fp64."""
    half = dim // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angles = torch.outer(position.double(), rates)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, for the layers that must compute in fp32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
