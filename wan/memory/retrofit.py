"""Streaming and chunking for pipelines that move their models by hand: the original code, through the patches.

Such a pipeline says `model.to(device)` wherever a model is needed next and `model.cpu()` where it has to make room.
A streamed model comes by itself, when it is called, so that `to` has nothing to do; `cpu` sends it home.
"""

import os

from ..modules.forward import storage_dtype
from ..utils.errors import InputError
from .chunking import apply_chunking
from .options import MemoryOptions
from .residency import Component, visit_when_called
from .streaming import Streamer, transformer_embeddings, transformer_pieces


def check_memory_options(*, t5_cpu=False, t5_stream=False, dit_stream=None, dit_chunk=0):
    """Returns the options as MemoryOptions; raises InputError for those that cannot work."""
    options = MemoryOptions(t5_cpu=t5_cpu, t5_stream=t5_stream, dit_stream=dit_stream, dit_chunk=dit_chunk)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (t5_stream or dit_stream is not None or dit_chunk):
        raise InputError(
            "--t5_stream, --dit_stream, --dit_chunk: for one GPU only, leave them out on several"
        )
    return options


def save_memory(pipeline, **options):
    """Makes a built pipeline stream and chunk, its models still in CPU memory.

    Args:
        pipeline: has `device`, `t5_cpu`, `param_dtype` (the type that the DiT's autocast computes in),
            `text_encoder.model`, `model` and, if it takes images, `clip.model`, made of modules that are named as
            the checkpoints name them.
        options: t5_stream, dit_stream, dit_chunk, see MemoryOptions. CLIP is streamed with T5.

    Raises:
        InputError: options that cannot work.
    """
    options = check_memory_options(t5_cpu=pipeline.t5_cpu, **options)
    device = pipeline.device
    if options.t5_stream:
        _stream_text_encoder(pipeline.text_encoder.model, device)
        if hasattr(pipeline, "clip"):
            _stream_image_encoder(pipeline.clip.model, device)
    if options.dit_chunk or options.dit_stream is not None:
        _keep_in_lossless_types(pipeline.model, pipeline.param_dtype)
    if options.dit_chunk:
        apply_chunking(pipeline.model, options.dit_chunk)
    if options.dit_stream is not None:
        pieces = transformer_pieces(pipeline.model) if options.dit_chunk else _stack_by_stack(pipeline.model)
        _stream_dit(pipeline.model, pieces, device, int(options.dit_stream * 2**30))


def _stream_text_encoder(model, device):
    pieces = [part for block in model.blocks for part in (block.attn, block.ffn)]
    _look_up_at_home(model.token_embedding)
    visit = Component([model], device, [model.token_embedding, *pieces], Streamer(pieces, device))
    _come_when_called(model, model, visit)


def _stream_image_encoder(model, device):
    """Of CLIP only the image tower is called, and of its blocks all but the last."""
    tower = model.visual
    pieces = list(tower.transformer)[:-1]
    visit = Component([tower], device, [*tower.transformer, tower.post_norm], Streamer(pieces, device))
    _come_when_called(model, tower, visit)


def _stream_dit(model, pieces, device, resident_bytes):
    embeddings = transformer_embeddings(model)
    for embedding in embeddings:
        visit_when_called(embedding, device)
    streamer = Streamer(pieces, device, resident_bytes=resident_bytes)
    _come_when_called(model, model, Component([model], device, [*pieces, *embeddings], streamer))


def _stack_by_stack(model):
    """The pieces of a DiT in the order of the original forward pass: all VACE blocks come before the others."""
    names = ("before_proj", "self_attn", "cross_attn", "ffn", "after_proj")
    blocks = [*getattr(model, "vace_blocks", ()), *model.blocks]
    return [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]


def _keep_in_lossless_types(model, compute_dtype):
    """Casts once what autocast would cast at each use."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, compute_dtype))


def _look_up_at_home(table):
    """Makes an embedding look up where its weights are, and send only the rows found to where the ids are."""
    look_up = table.forward
    table.forward = lambda ids: look_up(ids.to(table.weight.device)).to(ids.device)


def _come_when_called(model, called, visit):
    """`called`, a part of the model, brings the visiting Component; `model.cpu()` sends it home."""
    forward = called.forward

    def with_weights(*args, **kwargs):
        with visit.on_device(stay=True):
            return forward(*args, **kwargs)

    def stay(*args, **kwargs):
        return model

    def go_home():
        visit.leave()
        return model

    called.forward, model.to, model.cpu = with_weights, stay, go_home
