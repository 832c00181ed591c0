"""Checks that leanwan/dit/forward.py knows every layer of a DiT: it calls the layers itself and would skip others."""

from __future__ import annotations

import inspect

from torch import nn

from ..errors import InputError
from ..methods import is_layered

_ATTENTION = {"q", "k", "v", "o", "norm_q", "norm_k"}
_MODEL = {
    "patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "blocks", "head",
    "vace_blocks", "vace_patch_embedding",
}  # fmt: skip
_BLOCK = {"norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn", "before_proj", "after_proj"}

# By kind of module: the children and the other attributes that it must have. A norm may be an nn.Identity.
_NEEDED = {
    "model": (
        {"patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head"},
        {"freqs", "freq_dim", "text_len", "patch_size"},
    ),
    "block": ({"self_attn", "cross_attn", "ffn", "norm1", "norm2"}, {"norm3", "modulation"}),
    "self attention": ({"q", "k", "v", "o"}, {"norm_q", "norm_k", "num_heads"}),
    "cross attention": ({"q", "k", "v", "o"}, {"norm_q", "norm_k", "num_heads"}),
    "head": ({"head", "norm"}, {"modulation"}),
}

# By kind of module: the arguments that its forward may take. Only this project's model takes those from chunk on.
_CALLED_WITH = {
    "model": {
        "x", "t", "context", "seq_len", "clip_fea", "y", "vace_context", "vace_context_scale",
        "chunk", "place", "together", "conditions", "attention", "run_block",
    },
    "block": {
        "x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens",
        "c", "hints", "context_scale", "kwargs",  # of blocks in the two stacks of VACE
    },
    "self attention": {"x", "seq_lens", "grid_sizes", "freqs"},
    "cross attention": {"x", "context", "context_lens"},
    "head": {"x", "e"},
}  # fmt: skip


def check_known(model: nn.Module, field: str) -> None:
    """Raises InputError, naming the module, unless leanwan/dit/forward.py runs every layer of a DiT.

    field: the option that needs it, for the error.
    """
    _check(model, "the model", "model", _MODEL, set(), field)
    if not len(model.blocks):
        _refuse("blocks is empty", field)
    for stack in ("blocks", "vace_blocks"):
        for i, block in enumerate(getattr(model, stack, ())):
            name = f"{stack}.{i}"
            _check(block, name, "block", _BLOCK, {"modulation"}, field)
            _check(block.self_attn, f"{name}.self_attn", "self attention", _ATTENTION, set(), field)
            image = {"k_img", "v_img", "norm_k_img"} if hasattr(model, "img_emb") else set()
            _check(
                block.cross_attn, f"{name}.cross_attn", "cross attention", _ATTENTION | image, set(), field
            )
    _check(model.head, "head", "head", {"norm", "head"}, {"modulation"}, field)


def _check(
    module: nn.Module, name: str, kind: str, children: set[str], parameters: set[str], field: str
) -> None:
    prefix = "" if kind == "model" else f"{name}."
    held = {key for key, child in module.named_children() if not isinstance(child, nn.Identity)}
    tensors = {
        key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    for unknown in sorted(held - children | tensors - parameters):
        _refuse(f"{prefix}{unknown} is not a part of Wan2.1's DiT", field)
    modules, attributes = _NEEDED[kind]
    missing = modules - {key for key, _ in module.named_children()}
    missing |= {name for name in attributes if not hasattr(module, name)}
    for part in sorted(missing):
        _refuse(f"{prefix}{part} is missing", field)
    if "forward" in vars(module) and not is_layered(module, "forward"):
        _refuse(f"forward of {name} is replaced", field)
    if type(module).forward is nn.Module.forward:
        return  # the module is never called, only its layers are
    if kind != "model" and (module._forward_hooks or module._forward_pre_hooks):
        _refuse(f"{name} has hooks", field)
    _, *call = inspect.signature(type(module).forward).parameters
    others = [argument for argument in call if argument not in _CALLED_WITH[kind]]
    if others:
        _refuse(f"{name} is called with {', '.join(others)} too", field)


def _refuse(problem: str, field: str) -> None:
    raise InputError(f"{problem}, which chunks of tokens do not know; stream the layers without it", field)
