"""Memory options for pipelines that move their models by hand: other trees, and the original code through the patches.

Such a pipeline calls `model.to(device)` wherever it needs a model next and `model.cpu()` where it has to make room.
A streamed model comes to the device when it is called, so `to(device)` does nothing; `cpu()` or `to("cpu")` sends it
home.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .accelerator import release_memory
from .dit.ahead import OnCall
from .dit.forward import embedding_layers, storage_dtype
from .dit.known import check_known
from .encoder_layers import image_tower, token_table
from .errors import InputError
from .methods import Undo, layer_methods
from .options import MemoryOptions
from .placement import chunk_of, place_dit, place_image_encoder, place_text_encoder, place_vae
from .residency import Component, visit_when_called
from .streaming import Streamer
from .vae.tiles import check_layers, vae_modules

ENCODERS = ("text_encoder", "clip")
DITS = (
    "model",
    "low_noise_model",
    "high_noise_model",
)  # one, or two experts of which each takes some of the steps

STACKS = ("blocks", "transformer")  # children that must be iterable
_TAKERS: dict[str, Sequence[str]] = {
    "vae_tile": ("vae",),
    "vae_cpu": ("vae",),
    "t5_stream": ENCODERS,
    "dit_stream": DITS,
    "dit_chunk": DITS,
    "activation_offload": DITS,
}


def attach(
    pipeline: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    vae_tile: int | str | None = None,
    vae_cpu: bool = False,
    t5_stream: bool = False,
    dit_stream: float | None = None,
    dit_chunk: int = 0,
    activation_offload: bool = False,
) -> Undo:
    """Makes a built pipeline need less memory; its own code runs as before.

    Args:
        pipeline: an object with some of these attributes, or a mapping of their names: `vae` (with the module tree as
            its `model`, and `scale`; or the bare tree), `text_encoder` and `clip` (with `model`), and `model`, or
            `low_noise_model` and `high_noise_model`. Modules are named as the checkpoints name them. Or a VAE alone.
        device: where to compute; default: the pipeline's. Tiles alone need none.
        dtype: the type that the DiT's autocast computes in; default: the pipeline's `param_dtype`, or fp32.
        vae_tile: decode and encode by tiles: see MemoryOptions; None for the VAE's own encode and decode.
        vae_cpu: keep the VAE on the CPU; encoder or decoder comes to the device for each call that needs it.
        t5_stream, dit_stream, dit_chunk, activation_offload: see MemoryOptions. CLIP is streamed with T5. A DiT is
            streamed if it has `blocks`, whatever they are; chunks and activation offload are refused for one that is
            not Wan2.1's, see leanwan.dit.known.

    Returns:
        A function that undoes all of it; modules return to where they were. A streamed or chunked DiT of Wan2.1's
        stays in the types that it computes in.

    Raises:
        InputError: options that cannot work, or that apply to no part of the pipeline; a part with other modules than
            Wan2.1's. Nothing is changed then.
        RuntimeError: an option that is applied already. Nothing is changed then.
    """
    options = MemoryOptions(
        t5_stream=t5_stream,
        dit_stream=dit_stream,
        dit_chunk=dit_chunk,
        activation_offload=activation_offload,
    )
    wanted = {
        "vae_tile": vae_tile is not None,
        "vae_cpu": vae_cpu,
        "t5_stream": t5_stream,
        "dit_stream": dit_stream is not None,
        "dit_chunk": dit_chunk,
        "activation_offload": activation_offload,
    }
    parts = _parts_of(pipeline, [option for option, given in wanted.items() if given])
    given = _held(pipeline, "device") if device is None else device
    place = torch.device("cpu") if given is None else _checked_device(given)
    needing = [option for option, value in wanted.items() if value and option != "vae_tile"]
    if given is None and needing:
        raise InputError("the pipeline has none: say where to compute", "device")
    dtype = dtype or _held(pipeline, "param_dtype") or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise InputError("give a torch.dtype, such as torch.bfloat16", "dtype", dtype)
    with ExitStack() as undo:
        if vae_tile is not None or vae_cpu:
            undo.callback(place_vae(parts.vae, place, vae_tile, halves=vae_cpu))
        if vae_cpu:
            undo.callback(_send_to_cpu(vae_modules(parts.vae, "vae_cpu"), place))
        streamed = [getattr(parts, name).model for name in ENCODERS if t5_stream and hasattr(parts, name)]
        streamed += [getattr(parts, name) for name in DITS if dit_stream is not None and hasattr(parts, name)]
        for model in streamed:
            undo.callback(_send_to_cpu(model, place))
        undo.callback(_stream_and_chunk(parts, place, dtype, options))
        return undo.pop_all().close


def _parts_of(pipeline: Any, options: Sequence[str]) -> SimpleNamespace:
    """The parts of a pipeline that the options apply to, under the names that `attach` lists.

    Raises InputError, naming what is missing or unknown, if an option applies to no part, or a part lacks modules that
    its option needs.
    """
    if pipeline is None or isinstance(pipeline, str | bytes | int | float | Sequence):
        kind = type(pipeline).__name__
        raise InputError(f"give a pipeline, a mapping of its parts or a VAE, not {kind}", "pipeline")
    names = {name for option in options for name in _TAKERS[option]}
    given = {name: _held(pipeline, name) for name in names}
    told = f" in {type(pipeline).__name__}"
    if isinstance(pipeline, Mapping):
        told = f", but {', '.join(map(str, pipeline))}" if pipeline else ""
    elif "vae" in names and given["vae"] is None and hasattr(_held(pipeline, "model") or pipeline, "decoder"):
        given["vae"] = pipeline
    found = SimpleNamespace()
    for option in options:
        there = {name: given[name] for name in _TAKERS[option] if given.get(name) is not None}
        if not there:
            raise InputError(f"there is no {' or '.join(_TAKERS[option])}{told}", option)
        for name, part in there.items():
            _check(name, part, option)
        vars(found).update(there)
    return found


def _held(pipeline: Any, name: str) -> Any:
    """The attribute of a pipeline, or the value of a mapping in its place, with that name; None if there is none."""
    return pipeline.get(name) if isinstance(pipeline, Mapping) else getattr(pipeline, name, None)


def _checked_device(device: Any) -> torch.device:
    """The device of that name. Raises InputError if there is none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError("no such device, give one such as cuda:0", "device", device) from error


def _check(name: str, part: Any, option: str) -> None:
    if option == "vae_tile":
        check_layers(part)
    elif option == "vae_cpu":
        vae_modules(part, option)
    elif option == "dit_stream":
        _need(part, name, ["blocks"], option)
    elif name in DITS:
        _need(part, name, ["blocks"], option)
        check_known(part, option)
    elif name == "clip":
        _need(getattr(part, "model", None), f"{name}.model", ["visual"], option)
        _need(part.model.visual, f"{name}.model.visual", ["transformer", "post_norm"], option)
    else:
        _need(getattr(part, "model", None), f"{name}.model", ["token_embedding", "blocks"], option)
        for i, block in enumerate(part.model.blocks):
            _need(block, f"{name}.model.blocks.{i}", ["attn", "ffn"], option)


def _need(module: Any, name: str, parts: Sequence[str], option: str) -> None:
    """Raises InputError unless `module` is a module with parameters that has these parts; name: for the error."""
    if not isinstance(module, nn.Module) or next(module.parameters(), None) is None:
        raise InputError(f"{name} is {type(module).__name__}, not a module with parameters", option)
    for part in parts:
        held = getattr(module, part, None)
        if not isinstance(held, nn.Module) or (part in STACKS and not hasattr(held, "__iter__")):
            raise InputError(f"{name}, {type(module).__name__}, has no {part}: it is not Wan2.1's", option)


ONE_GPU = ("t5_stream", "dit_stream", "dit_chunk", "activation_offload")


def check_memory_options(**options: Any) -> MemoryOptions:
    """Returns t5_cpu, t5_stream, dit_stream, dit_chunk, activation_offload as MemoryOptions.

    Raises InputError for options that cannot work.
    """
    checked, unused = MemoryOptions(**options), MemoryOptions()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(
        getattr(checked, name) != getattr(unused, name) for name in ONE_GPU
    ):
        raise InputError("for one GPU only, leave them out on several", ONE_GPU)
    return checked


def save_memory(pipeline: Any, **options: Any) -> Undo:
    """Makes a built pipeline stream and chunk, its models still in CPU memory.

    Args:
        pipeline: has `device`, `t5_cpu`, `param_dtype` (the type that the DiT's autocast computes in),
            `text_encoder.model`, `model` and, if it takes images, `clip.model`, made of modules that are named as
            the checkpoints name them.
        options: t5_stream, dit_stream, dit_chunk, activation_offload, see MemoryOptions. CLIP is streamed with T5.

    Returns:
        A function that undoes it. The DiT's weights stay in their compute types: their fp32 values are not kept.

    Raises:
        InputError: options that cannot work.
        RuntimeError: an option that is applied already. Nothing is changed then.
    """
    chosen = check_memory_options(t5_cpu=pipeline.t5_cpu, **options)
    return _stream_and_chunk(pipeline, pipeline.device, pipeline.param_dtype, chosen)


def _stream_and_chunk(
    pipeline: Any, device: torch.device, dtype: torch.dtype, options: MemoryOptions
) -> Undo:
    with ExitStack() as undo:
        if options.t5_stream and hasattr(pipeline, "text_encoder"):
            encoder = pipeline.text_encoder.model
            visit = partial(place_text_encoder, encoder, device, options)
            undo.callback(_come_when_called("t5_stream", encoder, encoder, visit))
            undo.callback(_looked_up_at_home(token_table(encoder)))
        if options.t5_stream and hasattr(pipeline, "clip"):
            encoder = pipeline.clip.model
            visit = partial(place_image_encoder, encoder, device, options)
            undo.callback(_come_when_called("t5_stream", encoder, image_tower(encoder), visit))
        for model in (getattr(pipeline, name) for name in DITS if hasattr(pipeline, name)):
            undo.callback(place_dit(model, device, options, dtype))
            if options.dit_stream is not None:
                undo.callback(_stream_dit(model, device, options, dtype))
            if (chunk_of(options) or options.dit_stream is not None) and _is_known(model):
                _keep_in_lossless_types(model, dtype)
        return undo.pop_all().close


def _send_to_cpu(model: nn.Module, device: torch.device) -> Undo:
    """Moves a model to the CPU; the undo moves it back."""
    before = next(model.parameters()).device
    model.cpu()
    release_memory(device)
    return lambda: model.to(before)


def _is_known(model: nn.Module) -> bool:
    """Whether a DiT is Wan2.1's, so that the compute type of every parameter is known."""
    try:
        check_known(model, "dit_stream")
    except InputError:
        return False
    return True


def _looked_up_at_home(table: nn.Module) -> Undo:
    """Makes the table of tokens look ids up on its own device, so that only the rows found go to that of the ids."""

    def at_home(look_up: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda ids: look_up(ids.to(table.weight.device)).to(ids.device)

    return layer_methods(table, "t5_stream", forward=at_home)


def _stream_dit(model: nn.Module, device: torch.device, options: MemoryOptions, dtype: torch.dtype) -> Undo:
    """Streams the layers of a DiT: with leanwan's forward pass without those of the conditioning, else all of them."""
    make_streamer = partial(
        Streamer, buffers=options.stream_buffers, resident_bytes=int(options.dit_stream * 2**30)
    )
    if chunk_of(options):
        on_call = partial(OnCall, model, device, dtype, make_streamer)
        return _come_when_called("dit_stream", model, model, on_call)
    groups, embeddings = _stack_by_stack(model), embedding_layers(model)

    def visit() -> Component:
        return Component([model], device, [*groups, *embeddings], make_streamer(groups, device))

    with ExitStack() as undo:
        undo.callback(_come_when_called("dit_stream", model, model, visit))
        for embedding in embeddings:
            undo.callback(visit_when_called(embedding, device))
        return undo.pop_all().close


def _stack_by_stack(model: nn.Module) -> list[nn.Module]:
    """The layer groups of a DiT in the order of the original forward pass: all VACE blocks come before the others.

    Further parts of another tree's block do not stream; a block that has none of these parts streams whole.
    """
    names = ("before_proj", "self_attn", "cross_attn", "ffn", "after_proj")
    groups = []
    for block in (*getattr(model, "vace_blocks", ()), *model.blocks):
        groups += [getattr(block, name) for name in names if hasattr(block, name)] or [block]
    return groups


def _keep_in_lossless_types(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Casts once the fp32 parameters that autocast would cast at each use; narrower ones stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(storage_dtype(name, compute_dtype))


def _come_when_called(
    option: str, model: nn.Module, called: nn.Module, make_visit: Callable[[], Component | OnCall]
) -> Undo:
    """Makes `called`, a part of the model, bring the weights when called; `cpu()` or `to("cpu")` sends them home."""

    def with_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with visit.visiting(*args, **kwargs) as more:
                return forward(*args, **kwargs, **more)

        return call

    def move(*args: Any, **kwargs: Any) -> nn.Module:
        target = torch._C._nn._parse_to(*args, **kwargs)[0]
        return go_home() if target is not None and target.type == "cpu" else model

    def go_home() -> nn.Module:
        visit.leave()
        return model

    with ExitStack() as undo:
        undo.callback(layer_methods(called, option, forward=with_weights))
        undo.callback(layer_methods(model, option, to=lambda _: move, cpu=lambda _: go_home))
        visit = make_visit()  # an option that is applied already was refused above
        undo.callback(visit.leave)
        return undo.pop_all().close
