"""The DiT at work: what it is asked with, its weights where it computes, its passes over the noisy latent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from leanwan.dit.ahead import Ahead, streamed_ahead
from leanwan.options import MemoryOptions
from leanwan.residency import Component
from leanwan.streaming import Streamer

from .modules.model import WanModel
from .sampling import Flows

PROMPT, NEGATIVE_PROMPT = 0, 1


@dataclass(frozen=True)
class Conditioning:
    """What encoding leaves: all that denoising needs beside its settings and the noise.

    Attributes:
        shape: (C, F, H, W) of the latents.
        context, context_null: [L, text_dim], the prompt's embedding and the negative prompt's.
        inputs: other keyword arguments of the model: tensors and lists of them, on the device while it computes.
        host_inputs: more of them, which stay on the CPU: tensors, lists of them, numbers.
        references: latent frames at the front that are not part of the video.
    """

    shape: tuple[int, int, int, int]
    context: torch.Tensor
    context_null: torch.Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)
    host_inputs: Mapping[str, Any] = field(default_factory=dict)
    references: int = 0


@contextlib.contextmanager
def passes(
    component: Component,
    options: MemoryOptions,
    conditioning: Conditioning,
    timesteps: torch.Tensor,
    prompts: Sequence[int],
    stay: bool,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Flows]:
    """Inside, the DiT can be called: its weights are on the device, or come in turn.

    Args:
        component: the DiT.
        options: how its weights come, and whether the prompts share their visits.
        conditioning: its tensors anywhere.
        timesteps: all that it will be called with; flows are asked for by their numbers.
        prompts: which it is asked for, in this order: PROMPT, NEGATIVE_PROMPT.
        stay: whether weights that came whole stay.
        check: called before each pass.
    """
    device: torch.device = component.device
    (model,) = component.modules
    assert isinstance(model, WanModel)
    patch, shape = model.patch_size, conditioning.shape[1:]
    seq_len = (shape[0] // patch[0]) * (shape[1] // patch[1]) * (shape[2] // patch[2])
    inputs = _to(dict(conditioning.inputs), device) | dict(conditioning.host_inputs)
    both = conditioning.context, conditioning.context_null
    contexts = [both[prompt].to(device) for prompt in prompts]
    times = [t[None] for t in timesteps.to(device)]

    def called(
        latent: torch.Tensor, step: int, numbers: Sequence[int], ahead: Ahead | None
    ) -> list[torch.Tensor]:
        check()
        count = len(numbers)
        return model(
            [latent] * count,
            t=times[step].expand(count),
            context=[contexts[number] for number in numbers],
            seq_len=seq_len,
            together=count > 1,
            conditions=[ahead(step, number) for number in numbers] if ahead else None,
            **{name: _repeated(value, count) for name, value in inputs.items()},
        )

    def flows(latent: torch.Tensor, step: int) -> list[torch.Tensor]:
        numbers = range(len(contexts))
        if options.guidance_together:
            return called(latent, step, numbers, ahead)
        return [called(latent, step, [number], ahead)[0] for number in numbers]

    with _weights(component, model, options, times, contexts, inputs.get("clip_fea"), stay) as ahead:
        yield flows


@contextlib.contextmanager
def _weights(
    component: Component,
    model: WanModel,
    options: MemoryOptions,
    times: Sequence[torch.Tensor],
    contexts: Sequence[torch.Tensor],
    clip_fea: torch.Tensor | None,
    stay: bool,
) -> Iterator[Ahead | None]:
    """Inside, the DiT can be called with these: if it streams, with the conditions that are computed ahead."""
    if options.dit_stream is None:
        with component.on_device(stay):
            yield None
        return
    make_streamer = partial(
        Streamer, buffers=options.stream_buffers, resident_bytes=int(options.dit_stream * 2**30)
    )
    device, dtype = component.device, model.compute_dtype
    with streamed_ahead(model, device, times, contexts, clip_fea, dtype, make_streamer) as ahead:
        yield ahead


def _to(value: Any, device: torch.device) -> Any:
    """Dicts and lists of tensors on a device."""
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value.to(device)


def _repeated(value: Any, count: int) -> Any:
    """An input of the model for so many samples alike: lists and tensors have an entry, or several, for each."""
    if isinstance(value, list):
        return value * count
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, torch.Tensor) else value
