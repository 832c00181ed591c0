"""Values of operators on the stand-in's card: each runs on CUDA's host code, and the CPU computes what kernels would.

The card's memory is the process's own, so a CPU tensor over the same bytes sees what a tensor on the card holds. An
operator's computation is put into its stream, behind the copies that were put there before it.

Without values only operators on few elements are computed: those that control flow looks at.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from . import replaced
from .on_card import alias, on_card
from .randomness import RANDOM, generator_on_cpu, with_default_generator

FEW = 1 << 16  # elements
# Give or describe memory and compute nothing; item() copies and waits, as it does on a card.
WITHOUT_VALUES = {
    "_fused_sdp_choice", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_unsafe_view", "alias", "detach",
    "empty", "empty_like", "empty_strided", "is_pinned", "lift", "lift_fresh", "new_empty", "new_empty_strided",
    "record_stream", "resize_", "resize_as_", "set_",
}  # fmt: skip
# CUDA's host code reads values that kernels have computed inside them, such as the number of elements of the result.
BY_VALUES = {
    "_linalg_check_errors", "_unique2", "bincount", "equal", "isin", "masked_select", "multinomial", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
# These too, where an index is a mask.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # fmt: skip
ATTENTION = {
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
}  # fmt: skip
_library = ctypes.CDLL(None)
_library.stand_in_submit.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
_library.stand_in_note.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_numbers = itertools.count()
_modes: list[TorchDispatchMode] = []  # PyTorch's stack of modes does not keep them alive
_waiting: dict[int, Callable[[], None]] = {}  # by number: computations that streams hold


class Values(TorchDispatchMode):
    """Sees every operator of a thread."""

    operators = 0  # that made a tensor on the card, in all threads
    everything = os.environ["STAND_IN_VALUES"] == "1"
    late = os.environ["STAND_IN_LATE"] == "kernels"
    out_of_memory_at = 0  # the operator, counted from 1 on, that runs out of memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        asked = kwargs.get("device")
        on_it = any(map(on_card, tensors)) or (asked is not None and torch.device(asked).type == "cuda")
        strange = any(type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)
        if not on_it or strange or func.namespace != "aten":
            return func(*args, **kwargs)
        name, composite, makes = _facts(func)
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        if makes:
            self.count()
        if name in BY_VALUES or (name in INDEXING and _has_mask(args[1])):
            return _on_cpu_alone(func, args, kwargs)
        large = not self.everything and any(x.numel() > FEW for x in tensors)
        if large or func.is_view or name in WITHOUT_VALUES or _is_plain_copy(name, args):
            return func(*args, **kwargs)
        on_cpu = _on_cpu(func, name, args, kwargs, self.late)
        out = func(*args, **kwargs)
        made = _tensors((out,))
        if self.everything or all(x.numel() <= FEW for x in made):
            _submit(on_cpu, _targets(tensors, out))
            if not all(map(on_card, made)):
                torch.cuda.current_stream().synchronize()  # as copies into the host's memory do
        return out

    def count(self) -> None:
        """One more operator that makes a tensor; it runs out of memory if it is the one that shall."""
        Values.operators += 1
        if Values.operators == Values.out_of_memory_at:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


@functools.cache
def _facts(func: Any) -> tuple[str, bool, bool]:
    """An operator's name, whether PyTorch makes it of others on CUDA as on the CPU, and whether it makes a tensor."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CUDA")
    makes = not func.is_view and not func._schema.is_mutable
    return func._schema.name.removeprefix("aten::"), composite, makes


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those among the values and in lists of them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _is_plain_copy(name: str, args: Any) -> bool:
    """Whether copy_() moves the bytes as they are: then the driver does it, late or not."""
    if name != "copy_":
        return False
    to, source = args[:2]
    alike = to.dtype == source.dtype and to.shape == source.shape
    return alike and to.is_contiguous() and source.is_contiguous()


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _on_cpu(func: Any, name: str, args: Any, kwargs: Any, late: bool) -> Callable[[], Any]:
    """What computes an operator's result on the CPU.

    It holds no tensor of the card, only addresses: where the memory has become another tensor's when it runs, it
    reads that one's, as a kernel would.
    """

    def on_cpu(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return alias(x) if on_card(x) else x.clone() if late else x
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if isinstance(x, torch.Generator):
            return generator_on_cpu(x)
        return x

    args, kwargs = tree_map(on_cpu, args), tree_map(on_cpu, kwargs)
    kwargs.pop("pin_memory", None)
    if name in RANDOM and kwargs.get("generator") is None:
        func = with_default_generator(func)
    if name in ATTENTION:
        func = functools.partial(_attention, name)
    return functools.partial(func, *args, **kwargs)


def _targets(tensors: list[torch.Tensor], out: Any) -> list[torch.Tensor | None]:
    """Where the values of a result go, for each of its leaves: None for what is an argument, changed in place."""
    given = {id(x) for x in tensors}
    return [
        None if not isinstance(x, torch.Tensor) or id(x) in given else alias(x) if on_card(x) else x
        for x in tree_leaves(out)
    ]


def _attention(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **kwargs: Any
) -> torch.Tensor:
    """The CPU's own attention, whichever of CUDA's was chosen. Only the first of their results is computed."""
    flash = name.endswith("flash_attention")
    place = 1 if flash else 3  # of is_causal, if it is given by place
    causal = kwargs.get("is_causal") or rest[place : place + 1] == (True,)
    attend = torch.nn.functional.scaled_dot_product_attention
    bias = None if flash else rest[0]
    return attend(query, key, value, attn_mask=bias, is_causal=causal, scale=kwargs.get("scale"))


def _on_cpu_alone(func: Any, args: Any, kwargs: Any) -> Any:
    """Waits, as CUDA would, and computes without CUDA's host code."""
    torch.cuda.current_stream().synchronize()

    value = _on_cpu(func, "", args, kwargs, False)()
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x, value)


def _submit(on_cpu: Callable[[], Any], targets: list[torch.Tensor | None]) -> None:
    """Puts a computation at the end of the current stream."""

    def compute() -> None:
        for target, value in zip(targets, tree_leaves(on_cpu())):
            if target is not None:
                target.copy_(value)

    number = next(_numbers)
    _waiting[number] = compute
    _library.stand_in_submit(torch.cuda.current_stream().cuda_stream, number)


@ctypes.CFUNCTYPE(None, ctypes.c_uint64)
def _compute(number: int) -> None:
    """Called by the library when a stream comes to a computation, in whatever thread has it do so."""
    computation = _waiting.pop(number)
    try:
        with _disable_current_modes(), torch.no_grad(), torch._C._DisableAutocast():
            computation()
    except Exception as error:
        note("value", f"an operator: {type(error).__name__}: {str(error).splitlines()[0]}")


def note(kind: str, text: str) -> None:
    """A line of the report that __main__.py reads."""
    _library.stand_in_note(kind.encode(), text.encode())


def install() -> None:
    """In this thread and all that start from now on."""
    replaced.install()
    _library.stand_in_compute_with(_compute)
    _modes.append(Values())
    _modes[0].__enter__()
    threads: Any = threading.Thread
    bootstrap = threads._bootstrap_inner

    def with_values(thread: threading.Thread) -> None:
        with Values():
            bootstrap(thread)

    threads._bootstrap_inner = with_values
