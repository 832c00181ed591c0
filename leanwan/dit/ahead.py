"""What a DiT makes of time, prompt and image, computed once per run, before its layers stream.

It stays in RAM. A block's keys and values of the context visit the device with its layer group, as weights do, and the
layers that made them are not copied again: 4.2 GB per pass of a 14B model, against 0.84 GB of keys and values.
Beside the ring of that model the time projection alone, 0.59 GiB of fp32, would be the largest thing there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..residency import Component
from ..streaming import Streamer
from .conditioning import (
    Conditions,
    Context,
    KeysAndValues,
    context_layers,
    embed_text,
    embed_time,
    image_keys_and_values,
    text_keys_and_values,
)
from .forward import cross_attentions, layer_groups


@contextlib.contextmanager
def streamed_ahead(
    model: nn.Module,
    device: torch.device,
    times: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    clip_fea: torch.Tensor | None,
    dtype: torch.dtype,
    make_streamer: Callable[[Sequence[nn.Module], torch.device], Streamer] = Streamer,
) -> Iterator[Ahead]:
    """Computes the conditions of all passes; inside, the model is called with them, and its layer groups stream.

    Meanwhile one embedding layer is on the device, or what the cross attentions of two blocks call on the context.

    Args:
        model: a DiT, not on the device. Its embedding layers, and those layers of its cross attentions, are not called
            inside.
        times: every t of its calls, [1] each.
        prompts: every prompt of its calls, [L, text_dim] each.
        clip_fea: image features that all of them go with, or None.
        dtype: its compute type.
        make_streamer: makes what brings the groups to the device.

    Yields:
        The conditions of each call, to be given to the model as its `conditions`.
    """
    with torch.no_grad():
        ahead = Ahead(model, device, times, prompts, clip_fea, dtype)
    not_moved = [*layer_groups(model), *model.embedding_layers()]
    with Component([model], device, not_moved, make_streamer(ahead.groups, device)).on_device():
        yield ahead


class Ahead:
    """Conditions of all passes. Arguments as above.

    Attributes:
        groups: what streams in place of the model's `layer_groups`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        times: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        clip_fea: torch.Tensor | None,
        dtype: torch.dtype,
    ):
        self._device = device
        with Component([model.time_embedding], device).on_device():
            self._embedded = [embed_time(model, t.to(device)).cpu() for t in times]
        with Component([model.time_projection], device).on_device():
            projected = [model.time_projection(time.to(device)).cpu() for time in self._embedded]
        self._modulations = [modulation.unflatten(1, (6, -1)) for modulation in projected]
        with Component([model.text_embedding], device).on_device():
            texts = [embed_text(model, prompt, device, dtype) for prompt in prompts]
        image = None
        if clip_fea is not None and hasattr(model, "img_emb"):
            with Component([model.img_emb], device).on_device():
                image = model.img_emb(clip_fea.to(device), dtype)
        self._kept: dict[nn.Module, _Kept] = {}
        attentions = cross_attentions(model)
        groups = [nn.ModuleList(context_layers(attention)) for attention in attentions]
        with Streamer(groups, device):
            for attention in attentions:
                of_texts = [text_keys_and_values(attention, text, dtype) for text in texts]
                of_image = [] if image is None else [image_keys_and_values(attention, image, dtype)]
                self._kept[attention] = _Kept(of_texts, of_image)
                del of_texts, of_image
        self.groups = [self._group(group) for group in layer_groups(model)]

    def __call__(self, time: int, prompt: int) -> Conditions:
        """Those of a call, by the numbers of its time and its prompt among all."""
        embedded, modulation = (
            kept[time].to(self._device, non_blocking=True) for kept in (self._embedded, self._modulations)
        )
        return Conditions(embedded, modulation, _KeptContext(self._kept, prompt))

    def _group(self, group: nn.Module) -> nn.Module:
        """A layer group, a cross attention's with what is kept in place of the layers that made it."""
        if group not in self._kept:
            return group
        not_called = context_layers(group)
        called = [layer for layer in group.children() if layer not in not_called]
        return nn.ModuleList([*called, self._kept[group]])


class _Kept(nn.Module):
    """Keys and values of a block's context, of several prompts and an image, as parameters: a Streamer brings them."""

    def __init__(self, of_texts: Sequence[KeysAndValues], of_image: Sequence[KeysAndValues]):
        super().__init__()
        self._texts = len(of_texts)
        for i, pair in enumerate([*of_texts, *of_image]):
            for name, tensor in zip(("key", "value"), pair):
                setattr(self, f"{name}{i}", nn.Parameter(tensor.cpu(), requires_grad=False))
        self._image = [self._texts] if of_image else []

    def forward(self, prompt: int) -> list[KeysAndValues]:
        """Those of a prompt, and of the image."""
        return [(getattr(self, f"key{i}"), getattr(self, f"value{i}")) for i in [prompt, *self._image]]


class _KeptContext(Context):
    """One that was computed before."""

    def __init__(self, kept: dict[nn.Module, _Kept], prompt: int):
        self._kept, self._prompt = kept, prompt

    def keys_and_values(self, attention: nn.Module) -> list[KeysAndValues]:
        return self._kept[attention](self._prompt)
