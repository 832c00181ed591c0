"""The device memory that the image encoder takes: transformers' CLIP vision model, its norms computing in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leanwan.record.ledger import Ledger

from ...configs.encoders import IMAGE_TOKENS
from ...modules.attention import FUSED
from .buffers import Sizes, attach, few
from .card import NOT_CUDA, Card, beside_attention


def image_stage(
    ledger: Ledger,
    config: Mapping[str, Any],
    pictures: Sequence[tuple[int, int]],
    itemsize: int,
    streamed: bool = False,
    buffers: int = 2,
    stays: bool = False,
    card: Card = NOT_CUDA,
) -> None:
    """Records the encoding of pictures of (width, height) pixels; their features stay.

    Args:
        config: fields of CLIPVisionConfig; the last of its layers is not built.
        itemsize: bytes of a number of the weights and activations.
        streamed: whether the layers pass through `buffers` buffers.
        stays: whether the weights stay on the device.
        card: the card that computes.
    """
    embeddings, groups = weight_sizes(config, itemsize)
    weights = ledger.arrive(embeddings)
    if streamed:
        weights += attach(ledger, groups, buffers)
    else:
        weights += ledger.arrive([size for group in groups for size in group])
    whole = [ledger.take(4 * 3 * width * height) for width, height in pictures]
    _encode(ledger, config, len(pictures), itemsize, card)
    ledger.drop(*whole)
    if not stays:
        ledger.drop(*weights)
        ledger.release()


def weight_sizes(config: Mapping[str, Any], itemsize: int) -> tuple[Sizes, list[Sizes]]:
    """Bytes of the tensors before the layers, position ids included, and of each layer group's parameters."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    patch = width * 3 * config["patch_size"] ** 2
    before = [width * itemsize, 8 * IMAGE_TOKENS]
    before += [n * itemsize for n in (patch, IMAGE_TOKENS * width, width, width)]
    layer = [*[width * width, width] * 4, width, width, width * hidden, hidden, hidden * width, width]
    layer = [*layer, width, width]
    groups: list[Sizes] = [[n * itemsize for n in layer] for _ in range(config["num_hidden_layers"] - 1)]
    return before, groups


def _encode(ledger: Ledger, config: Mapping[str, Any], pictures: int, itemsize: int, card: Card) -> int:
    pixels = 4 * 3 * config["image_size"] ** 2
    scaled = [ledger.take(pixels) for _ in range(pictures)]
    images = ledger.become(pictures * pixels, *scaled)
    statistics = ledger.take(12), ledger.take(12)
    normed = ledger.take(pictures * pixels)
    for _ in range(3):
        normed = ledger.become(pictures * pixels, normed)
    ledger.drop(images)

    tokens, width = pictures * IMAGE_TOKENS, config["hidden_size"]
    cast = ledger.take(pictures * pixels // 4 * itemsize) if itemsize < 4 else None
    patches = ledger.become((tokens - pictures) * width * itemsize, cast)
    joined = ledger.take(tokens * width * itemsize)
    positions = ledger.take(IMAGE_TOKENS * width * itemsize)
    x = ledger.become(tokens * width * itemsize, positions, joined, patches)
    first = _norm(ledger, tokens, width, itemsize)
    ledger.drop(x)
    x = first
    for _ in range(few(config["num_hidden_layers"] - 1)):
        before, x = x, _layer(ledger, config, tokens, itemsize, card)
        ledger.drop(before if before != first else None)
    ledger.drop(first if first != x else None, normed, *statistics)
    return x


def _layer(ledger: Ledger, config: Mapping[str, Any], tokens: int, itemsize: int, card: Card) -> int:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    row = width * itemsize
    normed = _norm(ledger, tokens, width, itemsize)
    query, key, value = (ledger.take(tokens * row) for _ in range(3))
    attended = ledger.take(tokens * row)
    heads, fused = (
        config["num_attention_heads"],
        card._replace(kernel=FUSED),
    )  # always PyTorch's kernel, in fp16 or fp32
    ledger.drop(
        *ledger.arrive(beside_attention(fused, heads, tokens, IMAGE_TOKENS, width // heads, itemsize))
    )
    if itemsize == 4:  # the result comes head by head
        attended = ledger.become(tokens * row, attended)
    out = ledger.become(tokens * row, attended, query, key, value, normed)
    x = ledger.become(tokens * row, out)
    normed = _norm(ledger, tokens, width, itemsize)
    inner = ledger.take(tokens * hidden * itemsize)
    inner = ledger.become(tokens * hidden * itemsize, inner)
    out = ledger.become(tokens * row, inner, normed)
    return ledger.become(tokens * row, out, x)


def _norm(ledger: Ledger, tokens: int, width: int, itemsize: int) -> int:
    """Layer normalization in fp32 and back, in a type of `itemsize` bytes."""
    narrow = itemsize < 4
    weights = [ledger.take(4 * width) for _ in range(2 * narrow)]
    wide = ledger.take(4 * tokens * width) if narrow else None
    out = layer_norm(ledger, tokens, width)
    ledger.drop(wide)
    if narrow:
        out = ledger.become(tokens * width * itemsize, out)
    ledger.drop(*weights)
    return out


def layer_norm(ledger: Ledger, tokens: int, width: int) -> int:
    """PyTorch's layer norm in fp32: beside the result it makes the mean and the deviation of each row."""
    out = ledger.take(4 * tokens * width)
    ledger.drop(*[ledger.take(4 * tokens) for _ in range(2)])
    return out
