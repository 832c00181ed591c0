"""Memory options put on built models: one function for each kind of component, each with its undo.

The pipelines of `wan` and `attach` both call them. A `Component` is a model's visits to the device; `leave` ends one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .activations import apply_activation_offload
from .dit.chunks import apply_chunking
from .encoder_layers import image_encoder_groups, image_tower, not_called, text_encoder_groups, token_table
from .methods import Undo
from .options import MemoryOptions
from .residency import Attachable, Component, visit_by_halves
from .streaming import Streamer
from .vae.tiles import OnFrame, Share, apply_tiling


def place_dit(
    model: nn.Module, device: torch.device | str, options: MemoryOptions, dtype: torch.dtype = torch.float32
) -> Undo:
    """Applies chunking and then activation offload to a built DiT, as the options say; nothing else.

    dtype: the compute type of a model of another tree.

    Returns the undo. Raises as apply_chunking and apply_activation_offload.
    """
    with ExitStack() as undo:
        undo.callback(apply_chunking(model, chunk_of(options), dtype))
        if options.activation_offload:
            undo.callback(apply_activation_offload(model, device, chunk_of(options)))
        return undo.pop_all().close


def chunk_of(options: MemoryOptions) -> int:
    """Tokens of a chunk. Activation offload needs the chunked forward pass; without dit_chunk all are one chunk."""
    return options.dit_chunk or (sys.maxsize if options.activation_offload else 0)


def place_text_encoder(
    model: nn.Module,
    device: torch.device | str,
    options: MemoryOptions,
    share: Callable[[Sequence[nn.Module]], Attachable] | None = None,
) -> Component:
    """A text encoder as it visits the device: whole, or its layers in turn, while its table of tokens stays home.

    share: makes what brings the layer groups, instead of a Streamer, where ranks shard the weights.
    """
    if not options.t5_stream and share is None:
        return Component([model], "cpu" if options.t5_cpu else device)
    groups = text_encoder_groups(model)
    brought = share(groups) if share else Streamer(groups, device, buffers=options.stream_buffers)
    return Component([model], device, [token_table(model), *groups], brought)


def place_image_encoder(model: nn.Module, device: torch.device | str, options: MemoryOptions) -> Component:
    """An image encoder as it visits the device: whole, or its layers in turn.

    `t5_stream` streams it too: a card that is too small for the text encoder is too small for this one.
    """
    tower = image_tower(model)
    if not options.t5_stream:
        return Component([tower], device)
    groups = image_encoder_groups(model)
    streamer = Streamer(groups, device, buffers=options.stream_buffers)
    return Component([tower], device, [*groups, *not_called(model)], streamer)


def place_vae(
    vae: Any,
    device: torch.device | str,
    tile: int | str | None,
    halves: bool = True,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
) -> Undo:
    """Applies tiling to a built VAE, and then visits of the half that a call needs.

    Args:
        tile, on_frame, share: as apply_tiling's; no tiling if tile is None.
        halves: whether encoder or decoder comes to the device for each call that needs it, and leaves again.

    Returns the undo. Raises as apply_tiling and visit_by_halves.
    """
    with ExitStack() as undo:
        if tile is not None:
            undo.callback(apply_tiling(vae, tile, on_frame=on_frame, share=share))
        if halves:
            undo.callback(visit_by_halves(vae, device))
        return undo.pop_all().close
