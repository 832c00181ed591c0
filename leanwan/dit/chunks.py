"""Makes a built DiT pass its tokens through its layers in chunks, by the forward pass in leanwan/dit/forward.py."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..methods import Undo, layer_methods
from .conditioning import Conditions
from .forward import dit_forward
from .known import check_known
from .tokens import ON_DEVICE, Place

SMALLEST_CHUNK = 64  # tokens: two of the blocks of 32 that chunks consist of, see `spans`


def check_chunk(tokens: int) -> None:
    """Raises InputError unless `tokens` is 0 (whole) or a usable chunk."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or (tokens != 0 and tokens < SMALLEST_CHUNK):
        raise InputError(f"give 0 for all tokens, or a number from {SMALLEST_CHUNK}", "dit_chunk", tokens)


def apply_chunking(model: nn.Module, tokens: int, dtype: torch.dtype = torch.float32) -> Undo:
    """Makes a DiT pass `tokens` tokens at a time through its layers.

    A model of another code tree whose modules have the checkpoints' names gets the forward pass of
    leanwan/dit/forward.py, with its own attention and call signature.

    Args:
        tokens: 0 for all, which leaves the model as it is.
        dtype: the compute type of a model of another tree; this project's models know theirs.

    Returns:
        A function that undoes it.

    Raises:
        InputError: a number of tokens that cannot work, or a model with layers that forward.py does not run.
        RuntimeError: applied already.
    """
    check_chunk(tokens)
    if not tokens:
        return lambda: None
    check_known(model, "dit_chunk")
    signature = inspect.signature(type(model).forward)
    if "chunk" in signature.parameters:
        return layer_methods(model, "dit_chunk", forward=lambda forward: partial(forward, chunk=tokens))
    attention = getattr(sys.modules[type(model.blocks[0].self_attn).__module__], "flash_attention", None)
    missing = [name for name in ("x", "t", "context", "seq_len") if name not in signature.parameters]
    if missing:
        raise InputError(f"the model is not called with {', '.join(missing)}, as Wan2.1's is", "dit_chunk")
    if attention is None:
        raise InputError("the code of its self attention has no flash_attention", "dit_chunk")

    def chunked(
        *args: Any, place: Place = ON_DEVICE, conditions: Sequence[Conditions] | None = None, **kwargs: Any
    ) -> list[torch.Tensor]:
        call = signature.bind(model, *args, **kwargs).arguments
        inputs = {name: call[name] for name in ("x", "t", "context", "seq_len")}
        if inputs["t"].dim() != 1:
            raise InputError("takes one time for each sample; stream the layers without it", "dit_chunk")
        if "vace_context" in call:
            inputs |= {name: call[name] for name in ("vace_context", "vace_context_scale") if name in call}
        else:
            inputs["y"] = call.get("y")
            if call.get("clip_fea") is not None and hasattr(model, "img_emb"):
                image = functools.cache(lambda: model.img_emb(call["clip_fea"]))
                inputs["image"] = lambda i: image()[i : i + 1]
        inputs |= {"chunk": tokens, "place": place, "conditions": conditions}
        return dit_forward(model, **inputs, attention=attention, dtype=dtype)

    return layer_methods(model, "dit_chunk", innermost=True, forward=lambda _: chunked)
