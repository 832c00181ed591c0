"""The device memory that the text encoder takes: transformers' UMT5 encoder, its attention eager, prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from leanwan.record.ledger import Ledger

from .buffers import Sizes, attach, few
from .shards import Gathered, Rows, Shards, rows_of


def text_stage(
    ledger: Ledger,
    config: Mapping[str, Any],
    tokens: int,
    itemsize: int,
    prompts: int = 2,
    streamed: bool = False,
    buffers: int = 2,
    stays: bool = False,
    shards: Shards | None = None,
) -> None:
    """Records the encoding of prompts; their embeddings stay.

    Args:
        config: fields of UMT5Config.
        tokens: number of tokens that each prompt is padded to.
        itemsize: bytes of a number of the weights and activations.
        streamed: whether the layers pass through `buffers` buffers, and the table of embeddings stays on the CPU.
        stays: whether the weights stay on the device.
        shards: the layers' weights, if ranks shard them; this rank's shards are on the device already.
    """
    table, groups, norm = weight_sizes(config, itemsize)
    gathered = None
    if shards:
        weights = ledger.arrive(norm)
        gathered = Gathered(ledger, shards)
    elif streamed:
        weights = ledger.arrive(norm) + attach(ledger, groups, buffers)
    else:
        weights = ledger.arrive([table, *(size for group in groups for size in group), *norm])
    for _ in range(prompts):
        _prompt(ledger, config, tokens, itemsize, streamed or shards is not None, gathered)
    if not stays:
        if gathered:
            gathered.leave()
        ledger.drop(*weights)
        ledger.release()


def weight_sizes(config: Mapping[str, Any], itemsize: int) -> tuple[int, list[Sizes], Sizes]:
    """Bytes of the table of embeddings, of each layer group's parameters, and of the final norm's."""
    width = config["d_model"]
    groups: list[Sizes] = [[rows * row for rows, row in group] for group in weight_rows(config, itemsize)]
    return config["vocab_size"] * width * itemsize, groups, [width * itemsize]


def weight_rows(config: Mapping[str, Any], itemsize: int) -> list[list[Rows]]:
    """The Rows of each layer group's parameters."""
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    norm, table = (width,), (config["relative_attention_num_buckets"], config["num_heads"])
    layers = [[norm, (inner, width), (inner, width)], [(inner, width), table, (width, inner)]]
    layers += [[norm, (hidden, width)], [(hidden, width)], [(width, hidden)]]
    return [
        [rows_of(shape, itemsize) for shape in layer] for _ in range(config["num_layers"]) for layer in layers
    ]


def _prompt(
    ledger: Ledger,
    config: Mapping[str, Any],
    tokens: int,
    itemsize: int,
    table_apart: bool,
    weights: Gathered | None,
) -> None:
    row = config["d_model"] * itemsize
    ids = None if table_apart else ledger.take(8 * tokens)
    embeddings = ledger.become(tokens * row, ids)
    padding = ledger.take(tokens * itemsize)
    x = embeddings
    numbers = itertools.count()

    def visit() -> None:
        if weights:
            weights.visit(next(numbers))

    for _ in range(few(config["num_layers"])):
        out = _block(ledger, config, tokens, itemsize, visit)
        ledger.drop(x if x != embeddings else None)
        x = out
    _norm(ledger, config, tokens, itemsize)
    ledger.drop(x, embeddings, padding)


def _block(
    ledger: Ledger, config: Mapping[str, Any], tokens: int, itemsize: int, visit: Callable[[], None]
) -> int:
    """Records a block; returns its output. visit: records that the next layer group is called."""
    row, hidden = config["d_model"] * itemsize, tokens * config["d_ff"] * itemsize
    inner = tokens * config["num_heads"] * config["d_kv"] * itemsize
    scores = config["num_heads"] * tokens * tokens * itemsize
    visit()
    normed = _norm(ledger, config, tokens, itemsize)
    query, key = (ledger.take(inner) for _ in range(2))
    visit()
    value = ledger.take(inner)
    bias = _position_bias(ledger, tokens, scores)
    product = ledger.take(scores)
    for _ in range(4):  # scaled, biased, masked, softmax
        product = ledger.become(scores, product)
    out = ledger.become(inner, ledger.take(inner))
    out = ledger.become(tokens * row, out)
    ledger.drop(query, key, value, bias)
    x = ledger.become(tokens * row, normed, out)

    visit()
    normed = _norm(ledger, config, tokens, itemsize)
    gate = ledger.take(hidden)
    half = ledger.take(hidden)
    inside = ledger.take(hidden)  # of GELU's tanh
    for _ in range(5):
        inside = ledger.become(hidden, inside)
    gelu = ledger.become(hidden, half, inside, gate)
    visit()
    linear = ledger.take(hidden)
    gated = ledger.take(hidden)
    visit()
    out = ledger.become(tokens * row, gated, gelu, linear)
    ledger.drop(normed)
    result = ledger.become(tokens * row, out, x)
    ledger.drop(product)  # the weights of the attention, which a block returns
    return result


def _norm(ledger: Ledger, config: Mapping[str, Any], tokens: int, itemsize: int) -> int:
    numel = tokens * config["d_model"]
    wide = ledger.take(4 * numel) if itemsize < 4 else None
    squares = ledger.become(4 * numel, wide)
    mean = ledger.become(4 * tokens, squares)
    scale = ledger.become(4 * tokens, ledger.take(4 * tokens))
    scaled = ledger.become(4 * numel, scale)
    if itemsize < 4:
        scaled = ledger.become(itemsize * numel, scaled)
    out = ledger.become(itemsize * numel, scaled)
    ledger.drop(mean)
    return out


def _position_bias(ledger: Ledger, tokens: int, scores: int) -> int:
    """Records the buckets of all pairs' relative positions; returns the layer's biases for them."""
    numbers, narrow, flags = 8 * tokens**2, 4 * tokens**2, tokens**2
    rows = ledger.become(8 * tokens, ledger.take(8 * tokens))
    columns = ledger.take(8 * tokens)
    relative = ledger.take(numbers)
    buckets = ledger.become(numbers, ledger.take(flags))
    for _ in range(2):
        buckets = ledger.become(numbers, buckets)
    distance, near = ledger.take(numbers), ledger.take(flags)
    logarithm = ledger.take(narrow)
    for _ in range(4):
        logarithm = ledger.become(narrow, logarithm)
    far = ledger.become(numbers, ledger.take(numbers))
    most = ledger.take(numbers)
    far = ledger.become(numbers, most, far)
    ledger.drop(ledger.take(numbers), distance, near, logarithm, far)
    return ledger.become(scores, rows, columns, relative, buckets)
