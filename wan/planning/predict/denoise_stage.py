"""The device memory that denoising takes: weights, embeddings, forward passes and the solver's steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from leanwan.dit.conditioning import context_layers, image_layers, text_layers
from leanwan.dit.forward import cross_attentions
from leanwan.record.ledger import Ledger

from .blocks import Shape, Way, forward_pass
from .buffers import Sizes, attach
from .embeddings import IMAGE_TOKENS, ContextRequests
from .shards import Gathered, shards_of
from .solver_steps import SolverRequests, schedule

STEPS = 3  # after which a solver remembers as much as it ever will


def denoise_stage(
    ledger: Ledger, model: nn.Module, shape: Shape, way: Way, dtype: torch.dtype, stays: bool = False
) -> None:
    """Records denoising; the finished latent stays.

    Args:
        ledger: already holds what is on the device, with the prompts and the tensors that join the latent.
        model: a DiT, its weights anywhere, meta tensors too.
        dtype: its compute type.
        stays: whether weights that do not stream stay on the device.
    """
    latent, itemsize = 4 * math.prod(shape.latent), dtype.itemsize
    times = schedule(ledger, shape.solver, shape.steps)
    if way.stream is not None:
        ledger.play(_conditions_ahead(model, shape.passes, shape.pictures, itemsize))
    weights = ledger.play(weights_of(model, shape, way, dtype))
    x = ledger.take(latent)
    solver = SolverRequests(
        ledger, shape.solver, latent, itemsize < 4, shape.latent[1] if way.offload else None
    )
    samples = shape.passes if way.together else 1
    gathered: Gathered | None = None
    for step in range(min(shape.steps, STEPS)):
        part = forward_pass(model, shape, way, itemsize, samples)
        flows = []
        for _ in range(shape.passes // samples):
            if gathered:
                gathered.drop()
            flows += ledger.play(part)
            if way.ranks > 1:
                gathered = Gathered(ledger, shards_of(model, way.ranks))
        if len(flows) > 1:
            away = ledger.become(latent, ledger.take(latent))
            flows = [ledger.become(latent, away, *flows)]
        (flow,) = flows
        x = solver.step(flow, x, last=step == shape.steps - 1)
    if not stays or way.stream is not None:
        if gathered:
            gathered.leave()
        ledger.drop(*weights)
        ledger.release()
    solver.drop()
    ledger.drop(*times)


def weights_of(model: nn.Module, shape: Shape, way: Way, dtype: torch.dtype) -> Ledger:
    """The DiT's weights: all of them; or those that do not stream, and a streamer's buffers; or those not sharded."""
    if way.ranks > 1:
        return _arriving(model)
    return _weights(model, way.stream, way.buffers, shape.passes, shape.pictures, dtype.itemsize)


@functools.lru_cache(maxsize=64)
def _conditions_ahead(model: nn.Module, samples: int, pictures: int, itemsize: int) -> Ledger:
    """What leanwan/dit/ahead.py makes: embedded time, prompts and image, every block's keys and values, all to RAM."""
    ledger = Ledger()
    walk, dim = ContextRequests(ledger, model, pictures, itemsize), model.dim
    attentions = cross_attentions(model)

    def kept(layers: Callable[[nn.Module], list[nn.Module]], pairs: Callable[[], Sequence[tuple]]) -> None:
        ring = attach(
            ledger, [[size for layer in layers(one) for size in _sizes(layer)] for one in attentions], 2
        )
        for _ in range(min(2, len(attentions))):
            ledger.drop(*[tensor for pair in pairs() for tensor in pair])
        ledger.drop(*ring)

    if walk.image:
        visit = ledger.arrive(_sizes(model.img_emb))
        image = walk.embed_image()
        ledger.drop(*visit)
        ledger.release()
        kept(image_layers, lambda: [walk.image_context()])
        ledger.drop(image)
    visit = ledger.arrive(_sizes(model.time_embedding))
    ledger.drop(walk.embed_time(), *visit)
    ledger.release()
    visit = ledger.arrive(_sizes(model.time_projection))
    time = ledger.take(4 * dim)
    ledger.drop(ledger.become(24 * dim, ledger.take(4 * dim)), time, *visit)
    ledger.release()
    visit = ledger.arrive(_sizes(model.text_embedding))
    texts = [walk.embed_text() for _ in range(samples)]
    ledger.drop(*visit)
    ledger.release()
    kept(text_layers, lambda: walk.text_context(samples))
    ledger.drop(*texts)
    return ledger


@functools.lru_cache(maxsize=256)
def _weights(
    model: nn.Module, stays: float | None, buffers: int, samples: int, pictures: int, itemsize: int
) -> Ledger:
    ledger = Ledger()
    if stays is None:
        ledger.arrive(_sizes(model))
        return ledger
    of_context = [model.text_len * model.dim * itemsize] * 2 * samples
    if hasattr(model, "img_emb"):
        of_context += [pictures * IMAGE_TOKENS * model.dim * itemsize] * 2
    ledger.arrive(_apart(model))
    attach(ledger, _streamed(model, tuple(of_context)), buffers, int(stays * 2**30))
    return ledger


@functools.lru_cache(maxsize=8)
def _arriving(model: nn.Module) -> Ledger:
    ledger = Ledger()
    ledger.arrive(not_shared(model))
    return ledger


def not_shared(model: nn.Module) -> Sizes:
    """Bytes of the parameters that each rank holds whole when a DiT's layer groups are sharded."""
    shared = {id(p) for group in model.layer_groups() for p in group.parameters()}
    return [p.nbytes for p in model.parameters() if id(p) not in shared]


@functools.lru_cache(maxsize=64)
def _streamed(model: nn.Module, of_context: tuple[int, ...]) -> list[Sizes]:
    """Bytes of each layer group's parameters, with the context's keys and values in place of the context layers."""
    crossing = set(cross_attentions(model))
    groups: list[Sizes] = []
    for group in model.layer_groups():
        not_called = context_layers(group) if group in crossing else []
        called = [layer for layer in group.children() if layer not in not_called]
        sizes = [size for layer in called for size in _sizes(layer)] if not_called else _sizes(group)
        groups.append([*sizes, *(of_context if not_called else ())])
    return groups


def _sizes(module: nn.Module) -> Sizes:
    return [p.nbytes for p in module.parameters()]


@functools.lru_cache(maxsize=8)
def _apart(model: nn.Module) -> Sizes:
    """Bytes of the parameters that do not stream and arrive with the DiT."""
    streamed = {id(p) for one in (*model.layer_groups(), *model.embedding_layers()) for p in one.parameters()}
    return [p.nbytes for p in model.parameters() if id(p) not in streamed]
