"""The conditioning of a DiT, computed once, before its layers stream.

It stays in RAM. A cross attention's keys and values of the context visit the device with its layer group, as weights
do, in place of the layers that compute them: in a 14B model 0.84 GB per pass instead of 4.2 GB. Nor does the time
projection stay on the device, 0.59 GiB of fp32 in that model: more than anything else there but the streamer's ring.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
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
    image_layers,
    project_time,
    text_keys_and_values,
    text_layers,
)
from .forward import cross_attentions, embedding_layers, layer_groups

PROMPTS = 4  # whose keys and values OnCall keeps

MakeStreamer = Callable[[Sequence[nn.Module], torch.device], Streamer]


@contextlib.contextmanager
def streamed_ahead(
    model: nn.Module,
    device: torch.device,
    times: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    clip_fea: torch.Tensor | None,
    dtype: torch.dtype,
    make_streamer: MakeStreamer = Streamer,
) -> Iterator[Ahead]:
    """Computes the conditioning of all passes; inside, the model's layer groups stream and it can be called.

    While it computes, one embedding layer is on the device, or the context layers of two blocks' cross attentions.

    Args:
        model: a DiT, not on the device. Inside, its embedding layers and its context layers are not called.
        times: the timesteps of all calls, [1] each.
        prompts: the embedded prompts of all calls, [L, text_dim] each.
        clip_fea: the image features of all calls, or None.
        dtype: the model's compute type.
        make_streamer: makes the streamer of the layer groups.

    Yields:
        The Ahead that gives the model's argument `conditions` for each call.
    """
    ahead = Ahead(model, device, dtype, clip_fea)
    ahead.add_times(times)
    ahead.add_prompts(prompts)
    with ahead.streamed(make_streamer).on_device():
        yield ahead


class Ahead:
    """Computes the conditioning of passes before they run, and keeps it in RAM.

    The model's layer groups must not be on the device while it computes.

    Args:
        model: a DiT, not on the device.
        device: where it computes.
        dtype: its compute type.
        clip_fea: the image features of all passes, or None.

    Attributes:
        groups: the modules to stream in place of the model's `layer_groups`.
    """

    @torch.inference_mode(False)  # what streams are normal tensors, whatever mode the caller is in
    @torch.no_grad()
    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, clip_fea: torch.Tensor | None
    ):
        self._model, self._device, self._dtype = model, device, dtype
        self._embedded: list[torch.Tensor] = []
        self._modulations: list[torch.Tensor] = []
        image = None
        if clip_fea is not None and hasattr(model, "img_emb"):
            with Component([model.img_emb], device).on_device():
                image = model.img_emb(clip_fea.to(device))
        self._kept = {attention: _Kept() for attention in cross_attentions(model)}
        if image is not None:
            self._keep(
                image_layers,
                lambda attention: [image_keys_and_values(attention, image, dtype)],
                _Kept.set_image,
            )
        self.groups = [self._group(group) for group in layer_groups(model)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_times(self, times: Sequence[torch.Tensor]) -> None:
        """Computes more timesteps, [1] each; their indices follow those of the timesteps before."""
        model, device = self._model, self._device
        with Component([model.time_embedding], device).on_device():
            embedded = [embed_time(model, t.to(device)).cpu() for t in times]
        with Component([model.time_projection], device).on_device():
            modulations = [project_time(model, time.to(device)).cpu() for time in embedded]
        self._embedded += embedded
        self._modulations += modulations

    def forget_times(self) -> None:
        self._embedded.clear()
        self._modulations.clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_prompts(self, prompts: Sequence[torch.Tensor]) -> None:
        """Computes more prompts, [L, text_dim] each; their indices follow those of the prompts before."""
        model, device, dtype = self._model, self._device, self._dtype
        with Component([model.text_embedding], device).on_device():
            texts = [embed_text(model, prompt, device, dtype) for prompt in prompts]
        self._keep(
            text_layers,
            lambda attention: [text_keys_and_values(attention, text, dtype) for text in texts],
            _Kept.add_texts,
        )

    def streamed(self, make_streamer: MakeStreamer) -> Component:
        """The model as it visits the device for passes with this conditioning: `groups` stream, the rest is small."""
        not_moved = [*layer_groups(self._model), *embedding_layers(self._model)]
        streamer = make_streamer(self.groups, self._device)
        return Component([self._model], self._device, not_moved, streamer)

    def __call__(self, time: int, prompt: int) -> Conditions:
        """The Conditions of a call, by the indices of its timestep and its prompt."""
        embedded, modulation = (
            kept[time].to(self._device, non_blocking=True) for kept in (self._embedded, self._modulations)
        )
        return Conditions(embedded, modulation, _KeptContext(self._kept, prompt))

    def _keep(
        self,
        layers: Callable[[nn.Module], list[nn.Module]],
        make: Callable[[nn.Module], list[KeysAndValues]],
        keep: Callable[[_Kept, list[KeysAndValues]], None],
    ) -> None:
        """Keeps the keys and values that `make` computes with `layers` of each cross attention, which stream."""
        groups = [nn.ModuleList(layers(attention)) for attention in self._kept]
        with Streamer(groups, self._device):
            for attention, kept in self._kept.items():
                keep(kept, make(attention))

    def _group(self, group: nn.Module) -> nn.Module:
        """A layer group as it streams: a cross attention's has the kept keys and values in place of context layers."""
        if group not in self._kept:
            return group
        not_called = context_layers(group)
        called = [layer for layer in group.children() if layer not in not_called]
        return nn.ModuleList([*called, self._kept[group]])


class OnCall:
    """Conditioning for a model whose calls are not known beforehand: computed at the first call with a new timestep,
    prompt or image, and kept for the next calls.

    It keeps the timesteps of one call, and PROMPTS prompts, or all of one call's if they are more. The layers that
    compute them visit the device before the layer groups do.

    Args:
        model: a DiT, not on the device, called with t, context and maybe clip_fea as Wan2.1's is.
        device: where it computes.
        dtype: its compute type.
        make_streamer: makes what brings the groups to the device.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        make_streamer: MakeStreamer = Streamer,
    ):
        self._given = model, device, dtype
        self._make_streamer = make_streamer
        self._signature = inspect.signature(type(model).forward)
        self._ahead: Ahead | None = None
        self._visit: Component | None = None
        self._times: _Seen | None = None
        self._features: _Seen | None = None
        self._prompts: list[_Seen] = []

    @contextlib.contextmanager
    def visiting(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Inside, the model can be called with these arguments and the yielded ones.

        Its weights stay on the device afterwards; an exception sends them home.
        """
        model, *_ = self._given
        call = self._signature.bind(model, *args, **kwargs).arguments
        conditions = self._conditions(call["t"], call["context"], call.get("clip_fea"))
        if self._visit is None:
            self._visit = self._ahead.streamed(self._make_streamer)
        with self._visit.on_device(stay=True):
            yield {"conditions": conditions}

    def leave(self) -> None:
        """Sends the weights home."""
        if self._visit:
            self._visit.leave()

    def _conditions(
        self, t: torch.Tensor, context: Sequence[torch.Tensor], clip_fea: torch.Tensor | None
    ) -> list[Conditions]:
        if t.dim() != 1:
            raise InputError("takes one time for each sample; stream the layers without it", "dit_chunk")
        new = [prompt for prompt in context if _number(self._prompts, prompt) is None]
        other_image = self._ahead is None or not _is(self._features, clip_fea)
        if other_image or (new and len(self._prompts) + len(new) > max(PROMPTS, len(context))):
            self.leave()
            self._visit, self._prompts, self._times, new = None, [], None, list(context)
            self._ahead = Ahead(*self._given, clip_fea)
            self._features = None if clip_fea is None else _Seen(clip_fea)
        if new:
            self.leave()
            self._visit = None  # with more prompts the streamer's buffers have other sizes
            for prompt in new:
                if _number(self._prompts, prompt) is None:
                    self._ahead.add_prompts([prompt])
                    self._prompts.append(_Seen(prompt))
        if not _is(self._times, t):
            self.leave()
            self._ahead.forget_times()
            self._ahead.add_times(list(t.split(1)))
            self._times = _Seen(t)
        return [self._ahead(i, _number(self._prompts, prompt)) for i, prompt in enumerate(context)]


class _Seen:
    """Recognises a tensor that a caller gave before, by a copy of its contents; the tensor itself may be gone."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._version = weakref.ref(tensor), _version(tensor)
        self._contents = tensor.detach().to("cpu", copy=True)

    def is_(self, given: torch.Tensor) -> bool:
        """Whether `given` has the same contents. The host waits for the device only if they may differ."""
        if given is self._tensor() and self._version is not None and self._version == _version(given):
            return True
        known = self._contents
        return known.shape == given.shape and known.dtype == given.dtype and torch.equal(known, given.cpu())


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None for inference tensors, whose writes PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def _is(seen: _Seen | None, given: torch.Tensor | None) -> bool:
    return seen is None if given is None else seen is not None and seen.is_(given)


def _number(seen: Sequence[_Seen], given: torch.Tensor) -> int | None:
    return next((number for number, one in enumerate(seen) if one.is_(given)), None)


class _Kept(nn.Module):
    """A cross attention's keys and values of several prompts and an image, as parameters, so that they stream."""

    def __init__(self) -> None:
        super().__init__()
        self._texts = 0

    def set_image(self, pairs: list[KeysAndValues]) -> None:
        """Keeps the image's keys and values, the only pair."""
        self._add("image", pairs[0])

    def add_texts(self, pairs: list[KeysAndValues]) -> None:
        """Keeps the keys and values of more prompts, a pair each."""
        for pair in pairs:
            self._add(self._texts, pair)
            self._texts += 1

    def _add(self, number: int | str, pair: KeysAndValues) -> None:
        for name, tensor in zip(("key", "value"), pair):
            self.register_parameter(f"{name}_{number}", nn.Parameter(tensor.cpu(), requires_grad=False))

    def forward(self, prompt: int) -> list[KeysAndValues]:
        """The keys and values of the prompt with this index, then those of the image if there is one."""
        numbers = [prompt, "image"] if hasattr(self, "key_image") else [prompt]
        return [(getattr(self, f"key_{number}"), getattr(self, f"value_{number}")) for number in numbers]


class _KeptContext(Context):
    """A Context whose keys and values were computed before."""

    def __init__(self, kept: dict[nn.Module, _Kept], prompt: int):
        self._kept, self._prompt = kept, prompt

    def keys_and_values(self, attention: nn.Module) -> list[KeysAndValues]:
        return self._kept[attention](self._prompt)
