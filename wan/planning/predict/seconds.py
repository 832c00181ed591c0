"""Models how long the stages take, from a machine's rates: the larger of computing and copying, layer group by group.

Beside products, attention and convolutions, every tensor costs a write to the device's memory and a read. Every weight
is copied once from pageable RAM, whether it stays or streams; from then on streamed weights are copied at the rate of
page-locked RAM. Each further chunk of a sequence costs one more read of its layers' weights from the device's memory.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from leanwan.dit.forward import layer_groups
from leanwan.dit.tokens import spans
from leanwan.record.ledger import Ledger
from leanwan.streaming import spread
from leanwan.vae.geometry import STRIDE, needed_intervals, split
from leanwan.vae.operations import (
    Attention,
    Convolution,
    Operation,
    Residual,
    Resize,
    decoder_passes,
    encoder_passes,
)
from leanwan.vae.passes import decoded_frames, encoded_frames
from leanwan.vae.requests import decode_stage, encode_stage

from ...configs.encoders import IMAGE_TOKENS
from ..rates import Rates
from . import prompt_encoder
from .blocks import Shape, Way, made_by_a_block, tokens_of

KINDS = ("keys", "self_attn", "cross_attn", "ffn")  # of a block's layer groups, in order
COMING = 28  # bytes per token and channel that activation offload copies to the device in a block, in 16 bits
Group = tuple[str, int]  # kind of a layer group, its bytes


def text_seconds(
    config: Mapping[str, Any],
    tokens: int,
    itemsize: int,
    prompts: int,
    rates: Rates,
    streamed: bool,
    on_cpu: bool,
) -> float:
    _, groups, _ = prompt_encoder.weight_sizes(config, itemsize)
    nbytes = sum(map(sum, groups))
    computing = 2 * nbytes / itemsize * tokens * prompts
    if on_cpu:
        return computing / rates.host
    if streamed:
        again = max(computing / rates.products, (prompts - 1) * nbytes / rates.pinned)
        return again + nbytes / rates.pageable
    return computing / rates.products + nbytes / rates.pageable


def image_seconds(weight_bytes: int, itemsize: int, pictures: int, rates: Rates) -> float:
    computing = 2 * weight_bytes / itemsize * IMAGE_TOKENS * pictures
    return weight_bytes / rates.pageable + computing / rates.products


def denoise_seconds(model: nn.Module, shape: Shape, way: Way, itemsize: int, rates: Rates) -> float:
    """Seconds of all steps, copies of the weights to the device included."""
    length, (_, _, model_bytes) = tokens_of(model, shape), _groups(model)
    visits = 1 if way.together else shape.passes
    computing, copying = _group_seconds(model, shape, len(spans(length, way.chunk)), itemsize, rates)
    stay, visit = _stays(model, None if way.stream is None else int(way.stream * 2**30))
    moved = {group: visits * seconds for group, seconds in copying.items()}
    step = sum(n * computing[group] for group, n in stay.items())
    step += sum(n * max(computing[group], moved[group]) for group, n in visit.items())
    if way.offload:
        blocks = len(model.blocks) + len(getattr(model, "vace_blocks", ()))
        activations = shape.passes * blocks * COMING * itemsize / 2 * length * model.dim / rates.pinned
        step = max(step, activations + sum(n * moved[group] for group, n in visit.items()))
    return round(model_bytes / rates.pageable + shape.steps * step, 6)  # so that equal sums compare equal


@functools.lru_cache(maxsize=64)
def _group_seconds(
    model: nn.Module, shape: Shape, chunks: int, itemsize: int, rates: Rates
) -> tuple[dict[Group, float], dict[Group, float]]:
    """Seconds that each layer group computes in a step, and seconds that copying it once takes."""
    length, dim = tokens_of(model, shape), model.dim
    kept = model.text_len * dim * itemsize * 2 * shape.passes
    made = dict(zip(KINDS, made_by_a_block(model, shape, itemsize)))
    computing, copying = {}, {}
    for kind, size in set(zip(*_groups(model)[:2])):
        products, attention, copied = 2 * length * size / itemsize, 0.0, size
        if kind == "cross_attn":
            products, attention = 4 * length * dim**2, 4 * length * model.text_len * dim
            copied = size // 2 + kept  # keys and values of the context in place of the context layers
        elif kind == "self_attn":
            attention = 4 * length**2 * dim
        reading = ((chunks - 1) * size + 2 * made.get(kind, 0)) / rates.memory
        computing[kind, size] = shape.passes * (
            products / rates.products + attention / rates.attention + reading
        )
        copying[kind, size] = copied / rates.pinned
    return computing, copying


@functools.lru_cache(maxsize=4)
def _groups(model: nn.Module) -> tuple[list[str], list[int], int]:
    """The kind of each layer group, the bytes of each, and the bytes of the whole model."""
    kinds: dict[nn.Module, str] = {}
    for block in (*model.blocks, *getattr(model, "vace_blocks", ())):
        attention = block.self_attn
        kinds |= dict(zip([attention.k, attention.q, block.cross_attn, block.ffn], KINDS))
    groups = layer_groups(model)
    sizes = [sum(p.nbytes for p in group.parameters()) for group in groups]
    of_groups = [
        next((kinds[one] for one in (group, *group.children()) if one in kinds), "") for group in groups
    ]
    return of_groups, sizes, sum(p.nbytes for p in model.parameters())


@functools.lru_cache(maxsize=64)
def _stays(model: nn.Module, room: int | None) -> tuple[Counter[Group], Counter[Group]]:
    """How many groups of each kind stay on the device, and how many stream; room: bytes that may stay, None: all."""
    kinds, sizes, _ = _groups(model)
    stays = [True] * len(sizes) if room is None else spread(sizes, room)
    groups = list(zip(kinds, sizes))
    stay = Counter(group for group, there in zip(groups, stays) if there)
    return stay, Counter(groups) - stay


def group_bytes(model: nn.Module) -> list[int]:
    """Bytes of each of a DiT's layer groups."""
    return _groups(model)[1]


def decode_seconds(model: nn.Module, frames: int, height: int, width: int, tile: int, rates: Rates) -> float:
    """Seconds of decoding; the arguments are those of leanwan.vae.requests.decode_bytes."""
    passes, latent_frames = decoder_passes(model), encoded_frames(frames)
    size, pixels = (height // STRIDE, width // STRIDE), (height, width)
    before = sum(_work(one, latent_frames, *_whole(one, size)) for one in (passes.whole, passes.small))
    large, tiled = (
        _work(passes.large, latent_frames, *_tiled(passes.large, size, pixels, 1, side)) for side in (0, tile)
    )
    ledger = Ledger()
    decode_stage(ledger, model, frames, height, width, 0, arrives=False)
    return _vae_seconds(before + large, before + tiled, ledger, rates)


def encode_seconds(model: nn.Module, frames: int, height: int, width: int, tile: int, rates: Rates) -> float:
    """Seconds of encoding; the arguments are those of leanwan.vae.requests.encode_bytes."""
    passes, latent_frames = encoder_passes(model), encoded_frames(frames)
    size, pixels = (height // STRIDE, width // STRIDE), (height, width)
    after = sum(_work(one, latent_frames, *_whole(one, size)) for one in (passes.whole, passes.small))
    large, tiled = (
        _work(
            passes.large, decoded_frames(latent_frames), *_tiled(passes.large, pixels, pixels, STRIDE, side)
        )
        for side in (0, tile)
    )
    ledger = Ledger()
    encode_stage(ledger, model, frames, height, width, 0, arrives=False)
    return _vae_seconds(large + after, tiled + after, ledger, rates)


def _vae_seconds(whole: float, tiled: float, ledger: Ledger, rates: Rates) -> float:
    """whole, tiled: arithmetic operations on whole frames and by tiles; ledger: of whole frames, scaled for tiles."""
    return tiled / rates.convolutions + tiled / whole * 2 * ledger.made / rates.memory


def _whole(operations: Sequence[Operation], size: Sequence[int]) -> list[list[int]]:
    return [[length] * (len(operations) + 1) for length in size]


def _tiled(
    operations: Sequence[Operation], input_size: Sequence[int], pixels: Sequence[int], unit: int, tile: int
) -> list[list[int]]:
    """Rows and columns of each operation's input, and of the last one's output, summed over all tiles."""
    lengths = []
    for length, input_length in zip(pixels, input_size):
        needed = [
            needed_intervals(operations, low // unit, high // unit, input_length)
            for low, high in split(length, tile)
        ]
        lengths.append([sum(high - low for low, high in position) for position in zip(*needed)])
    return lengths


def _work(operations: Sequence[Operation], frames: int, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Arithmetic operations of a pass over `frames` frames."""
    total = 0.0
    for i, operation in enumerate(operations):
        out = rows[i + 1] * columns[i + 1]
        total += frames * _of(operation, rows[i] * columns[i], out)
        if operation.rate == 2:
            frames = 2 * frames - 1
        elif operation.rate == 0.5:
            frames = 1 + (frames - 1) // 2
    return total


def _of(operation: Operation, area: int, out: int) -> float:
    """Arithmetic operations on one frame; area, out: positions of its input and of its output."""
    if isinstance(operation, Residual):
        parts = [*operation.parts, *([operation.shortcut] if operation.shortcut else [])]
        return sum(_of(part, area, area) for part in parts)
    if isinstance(operation, Convolution):
        return 2 * operation.conv.weight.numel() * area * (0.5 if operation.rate == 0.5 else 1)
    if isinstance(operation, Resize):
        return 2 * operation.resample[-1].weight.numel() * out
    if isinstance(operation, Attention):
        return 4 * area**2 * operation.in_channels + 8 * area * operation.in_channels**2
    return 0.0
