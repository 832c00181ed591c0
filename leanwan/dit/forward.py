"""The DiT's forward pass, for every model type, by chunks of tokens; the whole sequence is one chunk.

It uses the attribute names that the checkpoints fix, so it runs any module tree that has them. A pass is a list of
visits, one for each layer group: a visit runs the group's layers for one sample, or for several in turn, while the
group's weights are on the device.

Only the residual stream (fp32) and a layer's own keys and values span the whole sequence; the caller decides where they
live, see tokens.py. Everything else is computed for one chunk of tokens at a time and added in place. A chunk attends
to all keys at once, so each row is computed as in a pass over the whole sequence.

Precision is that of the published model: norms, modulation, time embedding, head and the residual stream are in fp32,
the rotary embedding in fp64, linear and convolution layers and attention in the compute type. The caller gives the
compute type and the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import nn

from .conditioning import Conditions, Context, embed, full_precision, heads_of
from .tokens import ON_DEVICE, Attention, Piece, Place, Tokens

# Parameters that compute in fp32 whatever the model's compute type, by the module that owns them.
_FP32_OWNERS = (
    "norm1", "norm2", "norm3", "norm_q", "norm_k", "norm_k_img", "modulation", "emb_pos",
    "time_embedding", "time_projection", "head",
)  # fmt: skip
_FP32_PREFIXES = ("img_emb.proj.0.", "img_emb.proj.4.")


def storage_dtype(name: str, compute_dtype: torch.dtype) -> torch.dtype:
    """The type in which the DiT parameter `name` can be kept without changing a bit of the output.

    The published weights are fp32. Linear and convolution layers cast theirs to the compute type at each use, so
    casting them once loses nothing; what computes in fp32 stays fp32.
    """
    fp32 = name.startswith(_FP32_PREFIXES) or any(part in _FP32_OWNERS for part in name.split("."))
    return torch.float32 if fp32 else compute_dtype


def layer_groups(model: nn.Module) -> list[nn.Module]:
    """The layer groups of a DiT in the order in which a pass visits them. Of each block: the layers of self attention
    that make keys and values, its other layers, cross attention, FFN.

    A layer in no group is small (norms, modulation, patch embeddings, head), or called once a pass: `embedding_layers`.
    """
    return [visit.group for visit in visits(model)]


def embedding_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a DiT calls once a pass, before the blocks: some hundred MB of the 14B model."""
    names = ("time_embedding", "time_projection", "text_embedding", "img_emb")
    return [getattr(model, name) for name in names if hasattr(model, name)]


def cross_attentions(model: nn.Module) -> list[nn.Module]:
    """The cross attentions of all blocks; `context_layers` in conditioning.py lists what they call on the context."""
    return [block.cross_attn for block in (*model.blocks, *getattr(model, "vace_blocks", ()))]


def dit_forward(
    model: nn.Module,
    x: Sequence[torch.Tensor],
    t: torch.Tensor,
    context: Sequence[torch.Tensor],
    seq_len: int,
    *,
    attention: Attention,
    dtype: torch.dtype,
    image: Callable[[int], torch.Tensor] | None = None,
    y: Sequence[torch.Tensor] | None = None,
    vace_context: Sequence[torch.Tensor] | None = None,
    vace_context_scale: float = 1.0,
    chunk: int = 0,
    place: Place = ON_DEVICE,
    together: bool = False,
    conditions: Sequence[Conditions] | None = None,
    run_block: RunBlock | None = None,
) -> list[torch.Tensor]:
    """Predicts the flow of a list of noisy latents; arguments as WanModel.forward's and VaceWanModel.forward's.

    Args:
        attention: softmax(q k^T) v for every head, of q, k and v [1, L, heads, head_dim].
        dtype: the compute type; linear and convolution layers are kept in it, or an autocast to it is on.
        image: maps a sample's index to its images as embedded by the model's `img_emb`, [1, 257 or 514, dim].
        chunk: tokens per chunk, 0 for all.
        place: where tensors over all tokens live.
        together: whether each layer group serves all samples, one after the other, before the next is visited. Each
            sample's arithmetic is its own either way.
        conditions: each sample's conditioning, computed before, on the device of x; t, context and image are not read.
        run_block: runs a whole block in one visit, in place of a visit for each of its layer groups.

    Returns:
        list of [out_dim, F, H, W] fp32.

    Raises:
        ValueError: more tokens than seq_len, a longer prompt than text_len, image inputs missing.
    """
    if hasattr(model, "img_emb") and (image is None or y is None):
        raise ValueError(f"a {model.model_type} model needs clip_fea and y")
    device = x[0].device

    def sample(i: int) -> Sample:
        if conditions:
            known = conditions[i]
        else:
            of_sample = None if image is None else partial(image, i)
            known = embed(model, t[i : i + 1].to(device), context[i], of_sample, dtype)
        joined = [x[i]] if y is None else [x[i], y[i]]
        name = f"{i} " if together else ""
        tokens, grid = embed_patches(model.patch_embedding, joined, device, dtype, place, name + "tokens")
        if tokens.length > seq_len:
            raise ValueError(f"{tokens.length} tokens do not fit seq_len {seq_len}")
        rope, spans = Rope(model.freqs.to(device), grid), place.spans(tokens.length, chunk)
        layers = Layers(known.modulation, known.context, rope, attention, dtype, spans, place, name)
        hints = None
        if vace_context is not None:
            embedding, source = model.vace_patch_embedding, [vace_context[i]]
            hints, _ = embed_patches(embedding, source, device, dtype, place, name + "hints")
        return Sample(layers, known.time, grid, tokens, hints, vace_context_scale)

    flows = []
    for turn in [range(len(x))] if together else [[i] for i in range(len(x))]:
        samples = [sample(i) for i in turn]
        for visit in visits(model, run_block):
            visit.serve(samples)
        while samples:
            flows.append(predict(model, samples.pop(0)))
    return flows


@dataclass
class Sample:
    """A sample on its way through the blocks.

    Attributes:
        layers: what runs layers over its tokens.
        time: [1, dim] fp32, the embedded time.
        grid: (frames, rows, columns) of its tokens.
        tokens: its residual stream.
        hints: the residual stream of a VACE model's second stack; None for other models.
        strength: the factor that the hints are added with.
    """

    layers: Layers
    time: torch.Tensor
    grid: tuple[int, int, int]
    tokens: Tokens
    hints: Tokens | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Visit:
    """A layer group's turn in a pass: `run` calls its layers for a sample."""

    group: nn.Module
    run: Callable[[Sample], None]

    def serve(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.run(sample)


def visits(model: nn.Module, run_block: RunBlock | None = None) -> list[Visit]:
    """The visits of a DiT's pass, from the embedded patches to the head.

    In a VACE model, a block that takes a hint comes between the VACE block that makes the hint and that VACE block's
    `after_proj`.

    run_block: as dit_forward's.
    """
    hinting = dict(zip(getattr(model, "vace_layers", ()), getattr(model, "vace_blocks", ())))
    found = [_first_hints(hinting[0].before_proj)] if hinting else []
    for i, block in enumerate(model.blocks):
        if i in hinting:
            found += _block_visits(hinting[i], "hints", i == 0, run_block)
        found += _block_visits(block, "tokens", i == 0, run_block)
        if i in hinting:
            found.append(_add_hints(hinting[i].after_proj))
    return found


def _block_visits(block: nn.Module, stream: str, first: bool, run_block: RunBlock | None) -> list[Visit]:
    """The visits of one block; stream: the sample's "tokens" or "hints"; first: whether it is first in its stack."""

    def visit(group: nn.Module, run: Callable[..., None], *args: bool) -> Visit:
        return Visit(group, lambda sample: run(sample.layers, block, getattr(sample, stream), *args))

    if run_block:
        return [visit(block, run_block, first)]
    attention = block.self_attn
    return [
        visit(nn.ModuleList([attention.k, attention.norm_k, attention.v]), Layers.keys_and_values, first),
        visit(nn.ModuleList([attention.q, attention.norm_q, attention.o]), Layers.self_attention),
        visit(block.cross_attn, Layers.cross_attention),
        visit(block.ffn, Layers.ffn),
    ]


def _first_hints(before: nn.Module) -> Visit:
    def run(sample: Sample) -> None:
        layers, hints, tokens = sample.layers, sample.hints, sample.tokens
        for (span, hint), (_, part) in zip(hints.read(layers.spans), tokens.read(layers.spans), strict=True):
            hints.write(span, layers.linear(before, hint) + part.to(layers.dtype))

    return Visit(before, run)


def _add_hints(after: nn.Module) -> Visit:
    def run(sample: Sample) -> None:
        layers = sample.layers
        for span, hint in sample.hints.read(layers.spans):
            sample.tokens.add(span, layers.linear(after, hint) * sample.strength)

    return Visit(after, run)


@dataclass
class _Between:
    """What the visits of one block pass on to the next.

    Attributes:
        modulation: shift, scale and gate of self attention, then of the FFN, [1, 1, dim] fp32 each.
        norm_dtype: the type of the result of the norm before self attention.
        keys, values: of self attention, over all tokens.
    """

    modulation: tuple[torch.Tensor, ...]
    norm_dtype: torch.dtype
    keys: Tokens | None
    values: Tokens | None


class Layers:
    """Runs the layers of blocks over one sample's residual stream, in place."""

    def __init__(
        self,
        modulation: torch.Tensor,
        context: Context,
        rope: Rope,
        attention: Attention,
        dtype: torch.dtype,
        spans: list[slice],
        place: Place,
        name: str = "",
    ):
        self.modulation = modulation  # [1, 6, dim] fp32
        self.context = context
        self.rope = rope
        self.attention = attention
        self.dtype = dtype
        self.spans = spans
        self.place = place
        self.name = name  # prefix of the names under which `place` keeps its keys and values
        self._between: _Between | None = None

    def run(self, block: nn.Module, x: Tokens, first: bool) -> None:
        """A whole block; first: whether it is the first of its stack."""
        self.keys_and_values(block, x, first)
        self.self_attention(block, x)
        self.cross_attention(block, x)
        self.ffn(block, x)

    def keys_and_values(self, block: nn.Module, x: Tokens, first: bool) -> None:
        """Begins a block: computes keys and values of its self attention.

        The residual stream is fp32, but patches are embedded in the compute type, and so the first block's norm gives
        its result in that type.
        """
        attention = block.self_attn
        modulation = (block.modulation + self.modulation).chunk(6, dim=1)
        shape = attention.num_heads, attention.q.out_features // attention.num_heads
        keys, values = (
            self.place.heads(self.name + name, x.length, shape, self.dtype) for name in ("keys", "values")
        )
        self._between = _Between(modulation, self.dtype if first else torch.float32, keys, values)
        for span, part in x.read(self.spans):
            hidden = self._modulated(block, part)
            values.write(span, heads_of(attention, attention.v(hidden)))
            hidden = attention.k(hidden)
            hidden = attention.norm_k(hidden)
            keys.write(span, self.rope(heads_of(attention, hidden).float(), span))
            del hidden

    def self_attention(self, block: nn.Module, x: Tokens) -> None:
        attention, between = block.self_attn, self._between
        gate = between.modulation[2]

        def turned(part: torch.Tensor, span: slice) -> torch.Tensor:
            query = attention.norm_q(attention.q(self._modulated(block, part)))
            query = heads_of(attention, query).float()
            return self.rope(query, span).to(self.dtype)

        def queries() -> Iterator[Piece]:
            for span, part in x.read(self.spans):
                yield span, turned(part, span)

        for span, out in self.place.attended(self.attention, queries(), between.keys, between.values):
            x.add(span, self.linear(attention.o, out.flatten(2)) * gate)
            del out
        between.keys = between.values = None

    def cross_attention(self, block: nn.Module, x: Tokens) -> None:
        attention = block.cross_attn
        contents = self.context.keys_and_values(attention)
        for span, part in x.read(self.spans):
            query = heads_of(attention, attention.norm_q(self.linear(attention.q, block.norm3(part))))
            query = query.to(contents[0][1].dtype)
            out = self.attention(query, *contents[0])
            for key, value in contents[1:]:
                out = out + self.attention(query, key, value)
            x.add(span, self.linear(attention.o, out.flatten(2)))
            del query, out

    def ffn(self, block: nn.Module, x: Tokens) -> None:
        """Computes the FFN, which ends a block."""
        *_, shift, scale, gate = self._between.modulation
        for span, part in x.read(self.spans):
            hidden = block.norm2(part).mul_(1 + scale).add_(shift)
            x.add(span, self.linear(block.ffn, hidden) * gate)
            del hidden
        self._between = None

    def linear(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Calls the layer in the compute type."""
        return layer(x.to(self.dtype))

    def _modulated(self, block: nn.Module, part: torch.Tensor) -> torch.Tensor:
        """Tokens as self attention reads them: normed, scaled and shifted."""
        shift, scale, *_ = self._between.modulation
        norm_dtype = self._between.norm_dtype
        hidden = block.norm1(part.to(norm_dtype).float()).to(norm_dtype).float()
        return hidden.mul_(1 + scale).add_(shift).to(self.dtype)


RunBlock = Callable[[Layers, nn.Module, Tokens, bool], None]  # called as Layers.run is


def embed_patches(
    embedding: nn.Module,
    latents: Sequence[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    place: Place,
    name: str,
) -> tuple[Tokens, tuple[int, int, int]]:
    """Joins latents [C, F, H, W], on any device, along the channels and embeds them as F' H' W' tokens.

    Returns the residual stream and its grid (F', H', W').
    """
    step = embedding.kernel_size[0]
    stream = None
    frames = latents[0].size(1) // step
    for frame in range(frames):  # one at a time, whatever the chunk: the same bits, and little memory
        of_frame = slice(frame * step, (frame + 1) * step)
        part = torch.cat([latent[:, of_frame].to(device, dtype) for latent in latents])
        patch = embedding(part[None])
        if stream is None:
            grid = (frames, *patch.shape[3:])
            area = math.prod(patch.shape[3:])
            stream = place.stream(name, frames * area, patch.size(1))
        stream.write(slice(frame * area, (frame + 1) * area), patch.flatten(2).transpose(1, 2))
    return stream, grid


def predict(model: nn.Module, sample: Sample) -> torch.Tensor:
    """Runs the head over a sample's residual stream; returns a latent video [out_dim, F, H, W] fp32."""
    layers, x = sample.layers, sample.tokens
    pieces = head_patches(model.head, x, sample.time, layers.spans)
    patches = layers.place.joined(pieces, x.length, model.head.head.out_features)
    video = patches_to_video(patches[0], sample.grid, model.patch_size)
    del pieces, patches
    # In the published model autocast rounds the latent video in this way.
    return video.to(layers.dtype).float()


def head_patches(head: nn.Module, x: Tokens, time: torch.Tensor, spans: list[slice]) -> list[torch.Tensor]:
    """The head's output [1, n, values] fp32 for each span of the residual stream; time: [1, dim], embedded."""
    with full_precision(time.device):
        shift, scale = (head.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return [head.head(head.norm(part) * (1 + scale) + shift) for _, part in x.read(spans)]


def patches_to_video(
    patches: torch.Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """Arranges patches [L, values] as a latent video [out_dim, F, H, W]; patches after the grid's are left out."""
    (f, h, w), (p, q, r) = grid, patch_size
    return rearrange(
        patches[: f * h * w], "(f h w) (p q r c) -> c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r
    )


class Rope:
    """Rotary position embedding over frame, row and column, in fp64, for any span of the tokens."""

    def __init__(self, freqs: torch.Tensor, grid: tuple[int, int, int]):
        """freqs: [positions, head_dim / 2] complex128 as rope_frequencies gives; grid: (frames, rows, columns)."""
        half = freqs.size(1)
        self.tables = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
        self.grid = grid

    def __call__(self, x: torch.Tensor, span: slice) -> torch.Tensor:
        """x: [1, n, heads, head_dim] fp32, the tokens of `span`. Turns it in place and returns it."""
        _, rows, columns = self.grid
        index = torch.arange(span.start, span.stop, device=x.device)
        positions = (index // (rows * columns), index // columns % rows, index % columns)
        turn = torch.cat([table[position] for table, position in zip(self.tables, positions)], dim=1)
        for heads in x.chunk(2, dim=2):  # fp64 of half the heads at a time
            pairs = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2)))
            pairs *= turn.unsqueeze(1)
            heads.copy_(torch.view_as_real(pairs).flatten(3))
            del pairs
        return x
