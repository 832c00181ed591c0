"""The DiT during denoising: its conditioning, the placement of its weights, its forward passes."""

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
    """The output of encoding: all that denoising needs beside its settings and the noise.

    Attributes:
        shape: (C, F, H, W) of the latents, reference frames included.
        context, context_null: [L, text_dim], the embeddings of the prompt and of the negative prompt.
        inputs: other keyword arguments of the model, tensors and lists of tensors: on the device while it computes.
        host_inputs: keyword arguments that stay on the CPU: tensors, lists of tensors, numbers.
        references: number of latent frames at the front that code reference images and are not part of the video.
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
    """Yields the function that computes the flows of a denoising run.

    Inside the context the DiT's weights are on the device or, if they stream, visit it group by group.

    Args:
        component: the DiT.
        options: whether the weights stream, and whether the passes of all prompts share each visit of a group.
        conditioning: its tensors may be on any device.
        timesteps: [steps], all timesteps of the run; the flow function takes an index into them.
        prompts: the prompts that each step computes flows for, in this order: PROMPT, NEGATIVE_PROMPT.
        stay: whether weights that do not stream stay on the device afterwards.
        check: called before each forward pass.
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
    """Brings the DiT's weights to the device inside; yields the conditions computed ahead if it streams, else None."""
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
    """A tensor, or a dict or list of tensors, moved to a device."""
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value.to(device)


def _repeated(value: Any, count: int) -> Any:
    """A model input for `count` equal samples: lists and tensors are repeated along their first axis."""
    if isinstance(value, list):
        return value * count
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, torch.Tensor) else value
