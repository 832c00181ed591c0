"""Streaming and chunking for pipelines that move their models by hand: the original code, through the patches.

Such a pipeline says `model.to(device)` wherever a model is needed next and `model.cpu()` where it has to make room.
A streamed model comes by itself, when it is called, so that `to` has nothing to do; `cpu` sends it home.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..modules.forward import embedding_layers, layer_groups, storage_dtype
from ..utils.errors import InputError
from .chunking import apply_chunking
from .methods import Undo, layer_methods
from .options import MemoryOptions
from .residency import Component, visit_when_called
from .streaming import Streamer


def check_memory_options(
    *, t5_cpu: bool = False, t5_stream: bool = False, dit_stream: float | None = None, dit_chunk: int = 0
) -> MemoryOptions:
    """Returns the options as MemoryOptions; raises InputError for those that cannot work."""
    options = MemoryOptions(t5_cpu=t5_cpu, t5_stream=t5_stream, dit_stream=dit_stream, dit_chunk=dit_chunk)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (t5_stream or dit_stream is not None or dit_chunk):
        raise InputError(
            "for one GPU only, leave them out on several", ("t5_stream", "dit_stream", "dit_chunk")
        )
    return options


def save_memory(pipeline: Any, **options: Any) -> Undo:
    """Makes a built pipeline stream and chunk, its models still in CPU memory.

    Args:
        pipeline: has `device`, `t5_cpu`, `param_dtype` (the type that the DiT's autocast computes in),
            `text_encoder.model`, `model` and, if it takes images, `clip.model`, made of modules that are named as
            the checkpoints name them.
        options: t5_stream, dit_stream, dit_chunk, see MemoryOptions. CLIP is streamed with T5.

    Returns:
        What undoes it. The DiT's weights stay in the types that they compute in: their fp32 values are not kept.

    Raises:
        InputError: options that cannot work.
        RuntimeError: an option that is applied already. Nothing is changed then.
    """
    chosen = check_memory_options(t5_cpu=pipeline.t5_cpu, **options)
    device = pipeline.device
    with ExitStack() as undo:
        if chosen.t5_stream:
            _stream_text_encoder(undo, pipeline.text_encoder.model, device)
            if hasattr(pipeline, "clip"):
                _stream_image_encoder(undo, pipeline.clip.model, device)
        if chosen.dit_chunk:
            undo.callback(apply_chunking(pipeline.model, chosen.dit_chunk, pipeline.param_dtype))
        if chosen.dit_stream is not None:
            groups = layer_groups(pipeline.model) if chosen.dit_chunk else _stack_by_stack(pipeline.model)
            _stream_dit(undo, pipeline.model, groups, device, int(chosen.dit_stream * 2**30))
        if chosen.dit_chunk or chosen.dit_stream is not None:
            _keep_in_lossless_types(pipeline.model, pipeline.param_dtype)
        return undo.pop_all().close


def _stream_text_encoder(undo: ExitStack, model: nn.Module, device: torch.device) -> None:
    table = model.token_embedding
    groups = [part for block in model.blocks for part in (block.attn, block.ffn)]

    def visit() -> Component:
        return Component([model], device, [table, *groups], Streamer(groups, device))

    _come_when_called(undo, "t5_stream", model, model, visit)

    def at_home(look_up: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Looks up where the table is, so that only the rows found go to where the ids are."""
        return lambda ids: look_up(ids.to(table.weight.device)).to(ids.device)

    undo.callback(layer_methods(table, "t5_stream", forward=at_home))


def _stream_image_encoder(undo: ExitStack, model: nn.Module, device: torch.device) -> None:
    """Of CLIP only the image tower is called, and of its blocks all but the last."""
    tower = model.visual
    groups = list(tower.transformer)[:-1]

    def visit() -> Component:
        return Component([tower], device, [*tower.transformer, tower.post_norm], Streamer(groups, device))

    _come_when_called(undo, "t5_stream", model, tower, visit)


def _stream_dit(
    undo: ExitStack, model: nn.Module, groups: Sequence[nn.Module], device: torch.device, resident_bytes: int
) -> None:
    embeddings = embedding_layers(model)

    def visit() -> Component:
        streamer = Streamer(groups, device, resident_bytes=resident_bytes)
        return Component([model], device, [*groups, *embeddings], streamer)

    _come_when_called(undo, "dit_stream", model, model, visit)
    for embedding in embeddings:
        undo.callback(visit_when_called(embedding, device))


def _stack_by_stack(model: nn.Module) -> list[nn.Module]:
    """The groups of a DiT in the order of the original forward pass: all VACE blocks come before the others."""
    names = ("before_proj", "self_attn", "cross_attn", "ffn", "after_proj")
    blocks = [*getattr(model, "vace_blocks", ()), *model.blocks]
    return [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]


def _keep_in_lossless_types(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Casts once what autocast would cast at each use."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, compute_dtype))


def _come_when_called(
    undo: ExitStack, option: str, model: nn.Module, called: nn.Module, make_visit: Callable[[], Component]
) -> None:
    """`called`, a part of the model, brings the visiting Component; `model.cpu()` sends it home."""

    def with_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with visit.on_device(stay=True):
                return forward(*args, **kwargs)

        return call

    def stay(*args: Any, **kwargs: Any) -> nn.Module:
        return model

    def go_home() -> nn.Module:
        visit.leave()
        return model

    undo.callback(layer_methods(called, option, forward=with_weights))
    undo.callback(layer_methods(model, option, to=lambda _: stay, cpu=lambda _: go_home))
    visit = make_visit()  # refused above if it is there already
    undo.callback(visit.leave)
