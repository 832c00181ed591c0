"""Predicts the device memory of a DiT's forward pass, by recording leanwan/dit/forward.py in a Ledger.

Each function records what its namesake there makes and drops. Blocks after the third, and chunks between the third and
the last, repeat earlier requests and are left out, but for the head: its output of every chunk stays until all are
joined.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from leanwan.activations import ATTENTION_BYTES, SLOTS
from leanwan.dit.tokens import spans
from leanwan.record.ledger import Ledger

from .card import NOT_CUDA, Card, beside_attention
from .embeddings import IMAGE_TOKENS, ContextRequests
from .image_encoder import layer_norm
from .shards import Gathered, shards_of

FEW = 3  # blocks, frames, groups of heads and spans of rows to record at most
SPANS = 4  # chunks to record at most, the last one among them
# Pieces of tokens in an exchange between ranks. Not counted with tokens on the device: cutting these saves more there.
EXCHANGED = 3


@dataclass(frozen=True)
class Shape:
    """What a DiT is called with.

    Attributes:
        latent: (channels, frames, height, width).
        joined: channels of the tensor on the device that is joined with the latent; 0 for none.
        source: channels of VACE's source, in RAM; 0 for none.
        pictures: number of pictures that CLIP encodes.
        passes: 2 with guidance, else 1.
        steps, solver: number of steps, and the solver's name.
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
    """How the DiT runs: its memory options, as MemoryOptions has them, its ranks and its card."""

    stream: float | None = None  # GiB of the weights that stay; None for all
    buffers: int = 2
    chunk: int = 0
    offload: bool = False
    together: bool = False
    ranks: int = 1  # number of ranks that shard the weights
    exchanges: bool = False  # whether ranks exchange tokens for heads
    card: Card = NOT_CUDA


def forward_pass(model: nn.Module, shape: Shape, way: Way, itemsize: int, samples: int) -> Ledger:
    """The requests of a pass over `samples` samples, to be played; the flows stay."""
    way = replace(way, stream=None if way.stream is None else 0.0, buffers=2)
    return _recorded(model, replace(shape, steps=0, solver=""), way, itemsize, samples)


@functools.lru_cache(maxsize=256)
def _recorded(model: nn.Module, shape: Shape, way: Way, itemsize: int, samples: int) -> Ledger:
    walk = _Walk(model, shape, way, itemsize)
    walk.passed(samples)
    return walk.ledger


@functools.lru_cache(maxsize=64)
def made_by_a_block(model: nn.Module, shape: Shape, itemsize: int) -> tuple[int, ...]:
    """Bytes of the tensors that a block makes for a sample, by its layer groups: keys and values, the rest of self
    attention, cross attention, FFN."""
    walk = _Walk(model, shape, Way(stream=0.0), itemsize)
    so_far = [walk.ledger.made for _ in walk._run(first=False, visit=lambda: None)]
    return tuple(after - before for before, after in zip([0, *so_far], so_far))


class _Walk(ContextRequests):
    def __init__(self, model: nn.Module, shape: Shape, way: Way, itemsize: int):
        super().__init__(Ledger(), model, shape.pictures, itemsize)
        self.shape, self.way = shape, way
        self.heads, self.ffn = model.num_heads, model.blocks[0].ffn[0].out_features
        self.source = hasattr(model, "vace_blocks")
        self.grid = grid_of(model, shape)
        self.length = math.prod(self.grid)
        cut = [span.stop - span.start for span in spans(self.length, way.chunk)]
        self.all_spans = cut
        self.spans = cut if len(cut) <= SPANS else [*cut[: SPANS - 1], cut[-1]]
        self.place = _InRam(self) if way.offload else _OnDevice(self)

    def passed(self, samples: int) -> None:
        """Records a pass over `samples` samples."""
        features = None
        if self.image:
            row = self.model.img_emb.proj[0].normalized_shape[0] * self.itemsize
            features = self.ledger.take(samples * self.pictures * IMAGE_TOKENS * row)
        weights = Gathered(self.ledger, shards_of(self.model, self.way.ranks)) if self.way.ranks > 1 else None
        with self.place:
            flows = [self._flow(weights) for _ in range(samples)]
            for _ in itertools.zip_longest(*flows):  # each visit serves all samples before the next visit
                pass
        if weights:
            weights.drop()
        self.ledger.drop(features)

    def _flow(self, weights: Gathered | None) -> Iterator[None]:
        ledger, blocks = self.ledger, range(min(FEW, len(self.model.blocks)))
        numbers = itertools.count()

        def visit() -> None:
            if weights:
                weights.visit(next(numbers))

        conditions = self._conditions()
        tokens = self._embed_patches([self.shape.latent[0], *[self.shape.joined] * bool(self.shape.joined)])
        freqs = ledger.take(self.model.freqs.nbytes)
        hints = self._embed_patches([self.shape.source], in_ram=True) if self.source else None
        yield
        if not self.source:
            for n in blocks:
                yield from self._run(n == 0, visit)
        else:
            for n, span in enumerate(self.spans):
                self._before(span * self.dim * self.itemsize, visit if n == 0 else None)
            yield
            for n in blocks:
                hinted = n in self.model.vace_layers
                if hinted:
                    yield from self._run(n == 0, visit)
                yield from self._run(n == 0, visit)
                if hinted:
                    for number, span in enumerate(self.spans):
                        self._hint(span * self.dim * self.itemsize, visit if number == 0 else None)
                    yield
        self._predict()
        ledger.drop(*conditions, tokens, freqs, hints)

    def _conditions(self) -> list[int]:
        """Records the conditioning that a pass holds from its start to its end."""
        ledger, dim = self.ledger, self.dim
        if self.way.stream is not None:
            return [ledger.take(4 * dim), ledger.take(24 * dim)]
        time = self.embed_time()
        modulation = ledger.become(24 * dim, ledger.take(4 * dim))
        held = [time, modulation, self.embed_text()]
        if self.image:
            held.append(self.embed_image())
        return held

    # Tokens

    def _embed_patches(self, channels: Sequence[int], in_ram: bool = False) -> int | None:
        ledger, (frames, rows, columns) = self.ledger, self.grid
        _, _, height, width = self.shape.latent
        step, stream, part, patch = self.model.patch_size[0], None, None, None
        for frame in range(min(frames, FEW)):
            sizes = [count * step * height * width * self.itemsize for count in channels]
            alone = [ledger.take(size) for size in sizes] if self.narrow or in_ram else []
            part = ledger.become(sum(sizes), *alone, part)
            patch = ledger.become(rows * columns * self.dim * self.itemsize, patch)
            if frame == 0:
                self.place.stream()
                stream = self.place.whole(4 * self.length * self.dim)
        ledger.drop(part, patch)
        return stream

    def _predict(self) -> int:
        ledger, dim = self.ledger, self.dim
        values = self.model.head.head.out_features
        table = ledger.take(8 * dim)
        pieces = []
        for span in self.all_spans:
            normed = layer_norm(ledger, span, dim)
            scaled = ledger.become(4 * span * dim, normed, ledger.take(4 * dim))
            shifted = ledger.become(4 * span * dim, scaled)
            pieces.append(ledger.become(4 * span * values, shifted))
        ledger.drop(table)
        latent = self.length * values
        patches = ledger.take(4 * latent)
        video = ledger.become(4 * latent, *pieces, patches)
        return self._rounded(video, latent)

    def _rounded(self, tensor: int, numel: int) -> int:
        """Rounds a tensor in fp32 to the compute type and back."""
        if not self.narrow:
            return tensor
        narrow = self.ledger.become(numel * self.itemsize, tensor)
        return self.ledger.become(4 * numel, narrow)

    # A block

    def _run(self, first: bool, visit: Callable[[], None]) -> Iterator[None]:
        """Records a block. visit: records that the next layer group is called."""
        ledger, dim = self.ledger, self.dim
        modulation = ledger.take(24 * dim)
        yield from self._self_attention(first, visit)
        yield
        self._cross_attention(visit)
        yield
        for n, span in enumerate(self.spans):
            hidden = layer_norm(ledger, span, dim)
            ledger.drop(ledger.take(4 * dim))
            cast = ledger.take(span * dim * self.itemsize) if self.narrow else None
            if n == 0:
                visit()
            inner = ledger.take(span * self.ffn * self.itemsize)
            inner = ledger.become(span * self.ffn * self.itemsize, inner)
            out = ledger.become(span * dim * self.itemsize, inner, cast)
            ledger.drop(ledger.become(4 * span * dim, out), hidden)
        ledger.drop(modulation)
        yield

    def _self_attention(self, first: bool, visit: Callable[[], None]) -> Iterator[None]:
        ledger, dim, itemsize = self.ledger, self.dim, self.itemsize
        keys = values = None
        for n, span in enumerate(self.spans):
            hidden = self._modulated(span, first)
            if n == 0:
                visit()
            value = ledger.take(span * dim * itemsize)
            if n == 0:
                values = self.place.whole(self.length * dim * itemsize)
            ledger.drop(value)
            normed = self.rms_norm(span, ledger.become(span * dim * itemsize, hidden))
            self._rope(span)
            if n == 0:
                keys = self.place.whole(self.length * dim * itemsize)
            ledger.drop(normed)
        yield
        called = False

        def query(span: int) -> int:
            nonlocal called
            hidden = self._modulated(span, first)
            if not called:
                visit()
            called = True
            linear = self._linear(span, hidden)
            normed = self.rms_norm(span, linear)
            self._rope(span)
            return ledger.become(span * dim * itemsize, normed) if self.narrow else normed

        for span, out in self.place.attended(query):
            linear = ledger.take(span * dim * itemsize)
            ledger.drop(ledger.become(4 * span * dim, linear))
            ledger.drop(out)
        ledger.drop(keys, values)

    def _cross_attention(self, visit: Callable[[], None]) -> None:
        ledger, dim, itemsize = self.ledger, self.dim, self.itemsize
        visit()
        contents = [] if self.way.stream is not None else self.context(1)
        for span in self.spans:
            row = span * dim * itemsize
            x = layer_norm(ledger, span, dim)
            cast = ledger.take(row) if self.narrow else None
            linear = ledger.become(row, cast)
            ledger.drop(x)
            query = self.rms_norm(span, linear)
            query = ledger.become(row, query) if self.narrow else query
            out = self.attention(span, self.heads, self.model.text_len)
            if self.image:
                of_image = self.attention(span, self.heads, self.pictures * IMAGE_TOKENS)
                out = ledger.become(row, of_image, out)
            ledger.drop(ledger.take(row), query, out)
        ledger.drop(*[tensor for pair in contents for tensor in pair])

    def attention(self, rows: int, heads: int, keys: int) -> int:
        """Records attention; returns its result. What the kernel makes beside it is freed at once."""
        width = self.dim // self.heads
        out = self.ledger.take(rows * heads * width * self.itemsize)
        beside = beside_attention(self.way.card, heads, rows, keys, width, self.itemsize)
        self.ledger.drop(*self.ledger.arrive(beside))
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

    def _before(self, row: int, visit: Callable[[], None] | None) -> None:
        ledger = self.ledger
        cast = ledger.take(row) if self.narrow else None
        if visit:
            visit()
        linear = ledger.become(row, cast)
        cast = ledger.take(row) if self.narrow else None
        ledger.drop(ledger.become(row, linear, cast))

    def _hint(self, row: int, visit: Callable[[], None] | None) -> None:
        ledger = self.ledger
        cast = ledger.take(row) if self.narrow else None
        if visit:
            visit()
        linear = ledger.become(row, cast)
        ledger.drop(ledger.become(row, linear))


class _OnDevice:
    """Records what leanwan/dit/tokens.py's Place makes on the device."""

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
    """Records what leanwan/activations.py makes on the device."""

    exchanged: Sequence[int] = ()

    def __exit__(self, *exception: object) -> None:
        self.walk.ledger.drop(*self.slots, *self.exchanged)
        self.slots: list[int] = []

    def __enter__(self) -> None:
        self.slots = []
        walk = self.walk
        if (
            walk.way.exchanges
        ):  # beside a piece of tokens: the piece that is sent, the one received, and one joined
            piece = walk.spans[0] * walk.dim * walk.itemsize
            self.exchanged = [walk.ledger.take(piece) for _ in range(EXCHANGED)]

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
    """Number of tokens of a latent video."""
    return math.prod(grid_of(model, shape))


def grid_of(model: nn.Module, shape: Shape) -> tuple[int, int, int]:
    (frames, height, width), (step, down, right) = shape.latent[1:], model.patch_size
    return frames // step, height // down, width // right
