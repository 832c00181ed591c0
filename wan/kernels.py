"""Faster attention kernels and compiled blocks for the DiT: they round differently, so they are off by default."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from leanwan.accelerator import is_out_of_memory
from leanwan.dit.forward import Layers, RunBlock
from leanwan.dit.tokens import Attention, Tokens
from leanwan.errors import InputError
from leanwan.methods import Undo, layer_methods
from leanwan.options import MemoryOptions

from .modules.attention import check_attention, flash_attention


def check_speed(attention: str, compiled: bool, memory: MemoryOptions, exact: bool = False) -> None:
    """Raises InputError for kernels that contradict each other, `exact` or the memory options.

    SageAttention quantises blocks of tokens, so chunks of tokens would change the picture. A compiled block takes all
    tokens at once and weights that stay on the device; its kernels are chosen by timing, which `exact` rules out.
    """
    if exact and compiled:
        raise InputError("compiled kernels are chosen by timing, leave one out", ("compile", "exact"))
    if exact and attention == "sage":
        raise InputError("sage quantises, leave one out", ("attention", "exact"))
    others = [
        name for name, value in needed_options(attention, compiled).items() if getattr(memory, name) != value
    ]
    if compiled and others:
        problem = "compiled blocks have all weights and tokens on the device, leave it or the others out"
        raise InputError(problem, ("compile", *others))
    if others:
        problem = "sage quantises blocks of tokens, which chunks cut apart, leave it or the others out"
        raise InputError(problem, ("attention", *others))


def needed_options(attention: str, compiled: bool) -> dict[str, Any]:
    """The memory options that these kernels require, with their values."""
    whole = {"dit_chunk": 0, "activation_offload": False}
    if compiled:
        return {"dit_stream": None} | whole
    return whole if attention == "sage" else {}


def check_able(attention: str, compiled: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError, naming what to install, if a device cannot run the kernels in a compute type."""
    check_attention(attention, device, dtype)
    if not compiled:
        return
    if device.type == "cpu":
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise InputError("there is no C++ compiler, install g++, or leave it out", "compile")
    elif not importlib.util.find_spec("triton"):
        install = "`pip install triton`, on Windows triton-windows"
        raise InputError(f"Triton is not installed: {install}, or leave it out", "compile")


def apply_speed(
    model: nn.Module, attention: str = "auto", compiled: bool = False, backend: str | Callable = "inductor"
) -> Undo:
    """Makes a DiT compute with other kernels.

    Args:
        model: its forward takes `attention` and `run_block`.
        attention: one of wan.modules.attention.CHOICES.
        compiled: whether the first pass compiles the blocks; all blocks share the compiled code.
        backend: of torch.compile.

    Returns:
        A function that restores the model.

    Raises:
        RuntimeError: applied already. While the model runs, InputError if the compiler fails.
    """
    if compiled:
        around = partial(partial, attention=_operation(attention), run_block=_compiled_blocks(backend))
    elif attention != "auto":
        around = partial(partial, attention=partial(flash_attention, choice=attention))
    else:
        return lambda: None
    return layer_methods(model, "speed", forward=around)


def _compiled_blocks(backend: str | Callable) -> RunBlock:
    """A `run_block` that calls Layers.run compiled, once for each number of tokens."""

    @functools.cache
    def compiled(length: int) -> Callable[..., None]:
        # A copy for each length: torch.compile gives up on a function that it has compiled too often, for any model.
        run = Layers.run
        copy = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__)
        return torch.compile(copy, backend=backend, dynamic=False)

    def run_block(layers: Layers, block: nn.Module, tokens: Tokens, first: bool) -> None:
        try:
            compiled(tokens.length)(layers, block, tokens, first)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            raise _failed(error) from error

    return run_block


@functools.cache
def _operation(choice: str) -> Attention:
    """flash_attention as one custom operator, opaque to the compiler."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attention(q, k, v, choice=choice).contiguous()

    def shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    operation = torch.library.custom_op(f"wan::attention_{choice}", attend, mutates_args=())
    operation.register_fake(shape)
    return operation


def _failed(error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"torch.compile failed, leave it out ({reason})", "compile")
