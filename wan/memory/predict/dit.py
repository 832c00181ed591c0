"""The device memory that denoising takes: the forward pass of modules/forward.py, request by request.

Each function writes down what its namesake there makes and drops. Blocks after the third, and chunks between the third
and the last, ask for what was asked for before them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...modules.conditions import context_layers
from ...modules.forward import cross_attentions, finished
from ...modules.tokens import spans
from ..activation_offload import ATTENTION_BYTES, SLOTS
from .image import layer_norm
from .ledger import Ledger
from .solver import Solver
from .weights import Sizes, attach

FEW = 3  # blocks, and chunks before the last


@dataclass(frozen=True)
class Shape:
    """What a DiT is called with.

    Attributes:
        latent: (channels, frames, height, width).
        joined: channels of what joins the latent, on the device.
        source: channels of VACE's source, in RAM; 0 for none.
        pictures: encoded by CLIP.
        passes: 2 with guidance, else 1.
        steps: of the solver, and which.
    """

    latent: tuple[int, int, int, int]
    joined: int = 0
    source: int = 0
    pictures: int = 0
    passes: int = 2
    steps: int = 50
    solver: str = "unipc"


@dataclass(frozen=True)
class Way:
    """How the DiT works: memory options as MemoryOptions has them."""

    stream: float | None = None  # GiB that stay
    buffers: int = 2
    chunk: int = 0
    offload: bool = False
    together: bool = False


def denoise_stage(ledger: Ledger, model: nn.Module, shape: Shape, way: Way, dtype: torch.dtype) -> None:
    """Denoises; the finished latent stays.

    Args:
        ledger: with what is on the device before, prompts and what joins the latent among it.
        model: a DiT, its weights anywhere, meta tensors too.
        dtype: its compute type.
    """
    _Walk(ledger, model, shape, way, dtype.itemsize).stage()


class _Walk:
    def __init__(self, ledger: Ledger, model: nn.Module, shape: Shape, way: Way, itemsize: int):
        self.ledger, self.model, self.shape, self.way, self.itemsize = ledger, model, shape, way, itemsize
        self.narrow = itemsize < 4
        block = model.blocks[0]
        self.dim, self.heads = model.dim, model.num_heads
        self.ffn = block.ffn[0].out_features
        self.image = hasattr(model, "img_emb")
        self.source = hasattr(model, "vace_blocks")
        self.grid = _grid(model, shape)
        self.length = math.prod(self.grid)
        cut = spans(self.length, way.chunk)
        cut = cut if len(cut) <= FEW + 1 else [*cut[:FEW], cut[-1]]
        self.spans = [span.stop - span.start for span in cut]
        self.place = _InRam(self) if way.offload else _OnDevice(self)

    # The stage

    def stage(self) -> None:
        ledger, shape = self.ledger, self.shape
        latent = 4 * math.prod(shape.latent)
        weights = ledger.arrive(_sizes(self.model)) if self.way.stream is None else self._ahead()
        x = ledger.take(latent)
        frames = shape.latent[1] if self.way.offload else None
        solver = Solver(ledger, shape.solver, latent, self.narrow, frames)
        for step in range(min(shape.steps, FEW)):
            x = solver.step(self._guided(), x, last=step == shape.steps - 1)
        ledger.drop(*weights)
        ledger.release()
        solver.drop()

    def _guided(self) -> int:
        """The flow, with or without guidance."""
        passes, flow = self.shape.passes, 4 * math.prod(self.shape.latent)
        if self.way.together or passes == 1:
            flows = self._forward(passes)
        else:
            flows = [self._forward(1)[0] for _ in range(passes)]
        if passes == 1:
            return flows[0]
        ledger = self.ledger
        away = ledger.become(flow, ledger.take(flow))
        return ledger.become(flow, away, *flows)

    def _forward(self, samples: int) -> list[int]:
        features = None
        if self.image:
            features = self.ledger.take(samples * self.shape.pictures * self._image_row())
        with self.place:
            flows = finished([self._flow(samples > 1) for _ in range(samples)], samples > 1)
        self.ledger.drop(features)
        return flows

    def _flow(self, together: bool) -> Generator[None, None, int]:
        ledger, blocks = self.ledger, range(min(FEW, len(self.model.blocks)))
        conditions = self._conditions()
        tokens = self._embed_patches([self.shape.latent[0], *[self.shape.joined] * bool(self.shape.joined)])
        freqs = ledger.take(self.model.freqs.nbytes)
        if not self.source:
            for n in blocks:
                yield from self._run(first=n == 0)
        else:
            hints = self._embed_patches([self.shape.source], in_ram=True)
            for span in self.spans:
                row = span * self.dim * self.itemsize
                ledger.drop(ledger.take(row) if self.narrow else None)
                self._before(row)
            yield
            for n in blocks:
                hinted = n in self.model.vace_layers
                if hinted:
                    yield from self._run(first=n == 0)
                yield from self._run(first=n == 0)
                if hinted:
                    for span in self.spans:
                        self._hint(span * self.dim * self.itemsize)
                    yield
            ledger.drop(hints)
        out = self._predict()
        ledger.drop(*conditions, tokens, freqs)
        return out

    # What depends on time, prompt and image

    def _conditions(self) -> list[int]:
        """What a pass holds of them from its start to its end."""
        ledger, dim = self.ledger, self.dim
        if self.way.stream is not None:
            return [ledger.take(4 * dim), ledger.take(24 * dim)]
        time = self._embed_time()
        modulation = ledger.become(24 * dim, ledger.take(4 * dim))
        held = [time, modulation, self._embed_text()]
        if self.image:
            held.append(self._embed_image())
        return held

    def _embed_time(self) -> int:
        ledger, row = self.ledger, 4 * self.dim
        position = ledger.take(4 * self.model.freq_dim)
        hidden = ledger.take(row)
        hidden = ledger.become(row, hidden)
        return ledger.become(row, hidden, position)

    def _embed_text(self) -> int:
        ledger, model = self.ledger, self.model
        row = model.text_len * self.dim * self.itemsize
        padded = ledger.take(model.text_len * model.text_embedding[0].in_features * self.itemsize)
        hidden = ledger.become(row, ledger.take(row))
        return ledger.become(row, hidden, padded)

    def _embed_image(self) -> int:
        """The image features of a sample, embedded in fp32: MLPProj."""
        ledger, proj = self.ledger, self.model.img_emb.proj
        tokens, width, itemsize = (
            self.shape.pictures * self._image_tokens(),
            proj[0].normalized_shape[0],
            self.itemsize,
        )
        x = ledger.take(4 * tokens * width) if self.narrow else None
        if hasattr(self.model.img_emb, "emb_pos"):
            x = ledger.become(4 * tokens * width, x)
        normed = layer_norm(ledger, tokens, width)
        cast = ledger.become(tokens * width * itemsize, normed) if self.narrow else normed
        x = ledger.become(tokens * width * itemsize, cast, x)
        hidden = ledger.take(tokens * width * itemsize)
        x = ledger.become(tokens * self.dim * itemsize, hidden, x)
        wide = ledger.take(4 * tokens * self.dim) if self.narrow else None
        out = layer_norm(ledger, tokens, self.dim)
        ledger.drop(wide, x)
        return out

    def _image_tokens(self) -> int:
        return 257

    def _image_row(self) -> int:
        return self._image_tokens() * self.model.img_emb.proj[0].normalized_shape[0] * self.itemsize

    def _ahead(self) -> list[int]:
        """memory/conditions.py, then the streamer; returns what drops the weights."""
        ledger, model, dim = self.ledger, self.model, self.dim
        samples = self.shape.passes
        visit = ledger.arrive(_sizes(model.time_embedding))
        ledger.drop(self._embed_time(), *visit)
        ledger.release()
        visit = ledger.arrive(_sizes(model.time_projection))
        time = ledger.take(4 * dim)
        ledger.drop(ledger.become(24 * dim, ledger.take(4 * dim)), time, *visit)
        ledger.release()
        visit = ledger.arrive(_sizes(model.text_embedding))
        held = [self._embed_text() for _ in range(samples)]
        ledger.drop(*visit)
        ledger.release()
        if self.image:
            visit = ledger.arrive(_sizes(model.img_emb))
            held.append(self._embed_image())
            ledger.drop(*visit)
            ledger.release()
        attentions = cross_attentions(model)
        ring = attach(ledger, _context_groups(model), 2)
        for _ in range(min(2, len(attentions))):
            ledger.drop(*[tensor for pair in self._context(samples) for tensor in pair])
        ledger.drop(*ring, *held)

        apart = {
            id(p) for one in (*model.layer_groups(), *model.embedding_layers()) for p in one.parameters()
        }
        weights = ledger.arrive([p.nbytes for p in model.parameters() if id(p) not in apart])
        of_context = [model.text_len * dim * self.itemsize] * 2 * samples
        if self.image:
            of_context += [self.shape.pictures * self._image_tokens() * dim * self.itemsize] * 2
        kept = set(attentions)
        groups = [self._group(group, of_context if group in kept else None) for group in _streamed(model)]
        resident = int((self.way.stream or 0) * 2**30)
        return weights + attach(ledger, groups, self.way.buffers, resident)

    def _group(self, group: nn.Module, of_context: list[int] | None) -> Sizes:
        """Of a layer group's parameters, with the keys and values of the context in place of what makes them."""
        if of_context is None:
            return _sizes(group)
        not_called = context_layers(group)
        called = [layer for layer in group.children() if layer not in not_called]
        return [size for layer in called for size in _sizes(layer)] + of_context

    def _context(self, prompts: int) -> list[tuple[int, int]]:
        """Keys and values of prompts, and of the image if there is one."""
        found = [self._keys_and_values(self.model.text_len) for _ in range(prompts)]
        if self.image:
            tokens = self.shape.pictures * self._image_tokens()
            cast = self.ledger.take(tokens * self.dim * self.itemsize) if self.narrow else None
            found.append(self._keys_and_values(tokens))
            self.ledger.drop(cast)
        return found

    def _keys_and_values(self, tokens: int) -> tuple[int, int]:
        ledger, row = self.ledger, tokens * self.dim * self.itemsize
        value = ledger.take(row)
        key = ledger.take(row)
        normed = self._rms_norm(tokens, key)
        return (ledger.become(row, normed) if self.narrow else normed), value

    # Tokens

    def _embed_patches(self, channels: Sequence[int], in_ram: bool = False) -> int | None:
        ledger, (frames, rows, columns) = self.ledger, self.grid
        _, _, height, width = self.shape.latent
        step, stream, part, patch = self.model.patch_size[0], None, None, None
        self.place.stream()
        for frame in range(min(frames, FEW)):
            sizes = [count * step * height * width * self.itemsize for count in channels]
            alone = [ledger.take(size) for size in sizes] if self.narrow or in_ram else []
            part = ledger.become(sum(sizes), *alone, part)
            patch = ledger.become(rows * columns * self.dim * self.itemsize, patch)
            if frame == 0:
                stream = self.place.whole(4 * self.length * self.dim)
        ledger.drop(part, patch)
        return stream

    def _predict(self) -> int:
        ledger, dim = self.ledger, self.dim
        values = self.model.head.head.out_features
        table = ledger.take(8 * dim)
        pieces = []
        for span in self.spans:
            normed = layer_norm(ledger, span, dim)
            scaled = ledger.become(4 * span * dim, normed, ledger.take(4 * dim))
            shifted = ledger.become(4 * span * dim, scaled)
            pieces.append(ledger.become(4 * span * values, shifted))
        ledger.drop(*pieces[FEW:], *pieces[: FEW - 1])
        pieces = pieces[FEW - 1 : FEW]
        latent = self.length * values
        patches = ledger.become(4 * latent, *pieces, table)
        video = ledger.become(4 * latent, patches)
        return self._rounded(video, latent)

    def _rounded(self, tensor: int, numel: int) -> int:
        """A tensor in fp32 to the compute type and back."""
        if not self.narrow:
            return tensor
        narrow = self.ledger.become(numel * self.itemsize, tensor)
        return self.ledger.become(4 * numel, narrow)

    # A block

    def _run(self, first: bool) -> Iterator[None]:
        ledger, dim = self.ledger, self.dim
        modulation = ledger.take(24 * dim)
        yield from self._self_attention(first)
        yield
        self._cross_attention()
        yield
        for span in self.spans:
            hidden = layer_norm(ledger, span, dim)
            ledger.drop(ledger.take(4 * dim))
            cast = ledger.take(span * dim * self.itemsize) if self.narrow else None
            inner = ledger.take(span * self.ffn * self.itemsize)
            inner = ledger.become(span * self.ffn * self.itemsize, inner)
            out = ledger.become(span * dim * self.itemsize, inner, cast)
            ledger.drop(ledger.become(4 * span * dim, out), hidden)
        yield
        ledger.drop(modulation)

    def _self_attention(self, first: bool) -> Iterator[None]:
        ledger, dim, itemsize = self.ledger, self.dim, self.itemsize
        keys = values = None
        for n, span in enumerate(self.spans):
            hidden = self._modulated(span, first)
            value = ledger.take(span * dim * itemsize)
            if n == 0:
                values = self.place.whole(self.length * dim * itemsize)
            ledger.drop(value)
            normed = self._rms_norm(span, ledger.become(span * dim * itemsize, hidden))
            self._rope(span)
            if n == 0:
                keys = self.place.whole(self.length * dim * itemsize)
            ledger.drop(normed)
        yield

        def query(span: int) -> int:
            linear = self._linear(span, self._modulated(span, first))
            normed = self._rms_norm(span, linear)
            self._rope(span)
            return ledger.become(span * dim * itemsize, normed) if self.narrow else normed

        for span, out in self.place.attended(query):
            linear = ledger.take(span * dim * itemsize)
            ledger.drop(ledger.become(4 * span * dim, linear))
            ledger.drop(out)
        ledger.drop(keys, values)

    def _cross_attention(self) -> None:
        ledger, dim, itemsize = self.ledger, self.dim, self.itemsize
        contents = [] if self.way.stream is not None else self._context(1)
        for span in self.spans:
            row = span * dim * itemsize
            x = layer_norm(ledger, span, dim)
            cast = ledger.take(row) if self.narrow else None
            linear = ledger.become(row, cast)
            ledger.drop(x)
            query = self._rms_norm(span, linear)
            query = ledger.become(row, query) if self.narrow else query
            out = self.attention(span, self.heads, self.model.text_len)
            if self.image:
                of_image = self.attention(span, self.heads, self.shape.pictures * self._image_tokens())
                out = ledger.become(row, of_image, out)
            ledger.drop(ledger.take(row), query, out)
        ledger.drop(*[tensor for pair in contents for tensor in pair])

    def attention(self, rows: int, heads: int, keys: int) -> int:
        """The result; in fp32, for which there is no fused kernel, the scores are there for a moment."""
        out = self.ledger.take(rows * heads * self.dim // self.heads * self.itemsize)
        if not self.narrow:
            self.ledger.drop(self.ledger.take(4 * heads * rows * keys))
        return out

    def _modulated(self, span: int, first: bool) -> int:
        ledger, numel = self.ledger, span * self.dim
        wide = None
        if first and self.narrow:
            wide = ledger.become(4 * numel, ledger.take(numel * self.itemsize))
        hidden = layer_norm(ledger, span, self.dim)
        ledger.drop(wide)
        if first and self.narrow:
            hidden = ledger.become(4 * numel, ledger.become(numel * self.itemsize, hidden))
        ledger.drop(ledger.take(4 * self.dim))
        return ledger.become(numel * self.itemsize, hidden) if self.narrow else hidden

    def _rms_norm(self, tokens: int, x: int) -> int:
        """WanRMSNorm of x, which is dropped: fp32, as its weight is."""
        ledger, row = self.ledger, 4 * tokens * self.dim
        mean = ledger.become(4 * tokens, ledger.take(row))
        scale = ledger.become(4 * tokens, ledger.take(4 * tokens))
        normed = ledger.take(row)
        if self.narrow:
            normed = ledger.become(tokens * self.dim * self.itemsize, normed)
        out = ledger.become(row, normed)
        ledger.drop(mean, scale, x)
        return out

    def _linear(self, tokens: int, x: int) -> int:
        return self.ledger.become(tokens * self.dim * self.itemsize, x)

    def _rope(self, span: int) -> None:
        ledger, half = self.ledger, self.dim // self.heads // 2
        index = ledger.take(8 * span)
        frame = ledger.take(8 * span)
        row = ledger.become(8 * span, ledger.take(8 * span))
        column = ledger.take(8 * span)
        parts = [ledger.take(16 * span * part) for part in (half - 2 * (half // 3), half // 3, half // 3)]
        turn = ledger.become(16 * span * half, *parts)
        for heads in (self.heads - self.heads // 2, self.heads // 2):
            ledger.drop(ledger.take(8 * span * heads * 2 * half))
        ledger.drop(index, frame, row, column, turn)

    # VACE

    def _before(self, row: int) -> None:
        ledger = self.ledger
        linear = ledger.take(row)
        cast = ledger.take(row) if self.narrow else None
        ledger.drop(ledger.become(row, linear, cast))

    def _hint(self, row: int) -> None:
        ledger = self.ledger
        cast = ledger.take(row) if self.narrow else None
        linear = ledger.become(row, cast)
        ledger.drop(ledger.become(row, linear))


class _OnDevice:
    """modules/tokens.py's Place."""

    def __init__(self, walk: _Walk):
        self.walk = walk

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def stream(self) -> None:
        pass

    def whole(self, nbytes: int) -> int | None:
        return self.walk.ledger.take(nbytes)

    def attended(self, query: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        walk = self.walk
        for span in walk.spans:
            one = query(span)
            out = walk.attention(span, walk.heads, walk.length)
            walk.ledger.drop(one)
            yield span, out


class _InRam(_OnDevice):
    """memory/activation_offload.py."""

    def __exit__(self, *exception: object) -> None:
        self.walk.ledger.drop(*self.slots)
        self.slots: list[int] = []

    def __enter__(self) -> None:
        self.slots = []

    def stream(self) -> None:
        walk = self.walk
        if not self.slots:
            rows = min(walk.way.chunk or walk.length, walk.length)
            self.slots = [walk.ledger.take(4 * rows * walk.dim) for _ in range(SLOTS)]

    def whole(self, nbytes: int) -> int | None:
        return None

    def attended(self, query: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        walk, ledger = self.walk, self.walk.ledger
        length, width = walk.length, walk.dim // walk.heads
        for span in walk.spans:
            ledger.drop(query(span))
        most = ATTENTION_BYTES // (4 * length * width * walk.itemsize)
        per_visit = min(walk.heads, max(1, most))
        rows = spans(length, (walk.way.chunk or length) * (walk.heads // per_visit))
        large = [ledger.take(2 * length * per_visit * width * walk.itemsize) for _ in range(2)]
        groups = [min(per_visit, walk.heads - first) for first in range(0, walk.heads, per_visit)]
        for heads in groups if len(groups) <= FEW else [*groups[: FEW - 1], groups[-1]]:
            for span in rows if len(rows) <= FEW else [*rows[: FEW - 1], rows[-1]]:
                ledger.drop(walk.attention(span.stop - span.start, heads, length))
        ledger.drop(*large)
        for span in walk.spans:
            yield span, ledger.take(span * walk.dim * walk.itemsize)


def tokens_of(model: nn.Module, shape: Shape) -> int:
    """How many a latent video has."""
    return math.prod(_grid(model, shape))


def _grid(model: nn.Module, shape: Shape) -> tuple[int, int, int]:
    (frames, height, width), (step, down, right) = shape.latent[1:], model.patch_size
    return frames // step, height // down, width // right


@functools.lru_cache(maxsize=4096)
def _sizes(module: nn.Module) -> Sizes:
    return [p.nbytes for p in module.parameters()]


@functools.lru_cache(maxsize=8)
def _streamed(model: nn.Module) -> list[nn.Module]:
    return model.layer_groups()


@functools.lru_cache(maxsize=8)
def _apart(model: nn.Module) -> Sizes:
    """What is not streamed, and arrives with the DiT."""
    streamed = {id(p) for one in (*model.layer_groups(), *model.embedding_layers()) for p in one.parameters()}
    return [p.nbytes for p in model.parameters() if id(p) not in streamed]


@functools.lru_cache(maxsize=8)
def _context_groups(model: nn.Module) -> list[Sizes]:
    """Parameters of what each cross attention calls on its context."""
    return [
        [size for layer in context_layers(one) for size in _sizes(layer)] for one in cross_attentions(model)
    ]
