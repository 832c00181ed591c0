"""A DiT's tensors over all tokens in RAM: pieces of them visit the device in turn.

Residual streams, queries, keys, values and attention output are in RAM. For what is per token, spans of tokens visit.
For attention groups of heads visit, with the keys and values of all tokens, so that each row's softmax is whole.
Every row's arithmetic is that of the pass on the device.

Who orders what:

- The main thread enqueues everything and waits for nothing, if the RAM is page-locked: what runs ahead of the device
  is bounded by the slots, a few device buffers that every piece passes through.
- Copies in and out have a stream each. A copy in waits until its slot is free and until what it reads has been
  written; computing waits for the arrival. A copy out waits for the computing, and so for every copy in that was
  enqueued before; behind it the slot is free.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from .accelerator import page_locked
from .dit.tokens import Attention, Piece, Place, Tokens, spans
from .methods import Undo, layer_methods

SLOTS = 4  # of a chunk each: two pieces of a loop, what goes out, and one to come
ATTENTION_BYTES = 192 << 20  # at most, of two groups' keys and values; one head's are there in any case

log = logging.getLogger(__name__)


def apply_activation_offload(
    model: nn.Module, device: torch.device | str, chunk: int, heads: int | None = None
) -> Undo:
    """Makes a DiT keep its tensors over all tokens in RAM. On a CPU that changes nothing.

    Args:
        model: its forward takes `place`.
        chunk: tokens that it works on at a time, as apply_chunking is given them; 0 for all.
        heads: of a group that visits for attention; default: what ATTENTION_BYTES hold.

    Returns:
        What undoes it; the RAM is kept until then.

    Raises:
        RuntimeError: applied already.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return lambda: None
    place = ActivationOffload(device, chunk, heads)

    def offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with place:
                return forward(*args, place=place, **kwargs)

        return call

    return layer_methods(model, "activation_offload", forward=offloaded)


class ActivationOffload(Place):
    """Keeps tensors over all tokens in RAM; a context manager, inside which they can be used (chunk 0: all tokens)."""

    def __init__(self, device: torch.device, chunk: int, heads: int | None = None):
        self.device, self.chunk, self.heads_per_visit = device, chunk or sys.maxsize, heads
        self._homes: dict[str, list[_Home]] = {}
        self._page_locked = psutil.virtual_memory().available // 2  # bytes that may still be page-locked

    def __enter__(self) -> ActivationOffload:
        self.backend = torch.get_device_module(self.device)
        self.coming, self.going = (self.backend.Stream(self.device) for _ in range(2))
        self._slots: deque[_Slot] = deque()  # of a chunk each, the least lately used first
        self._large: deque[_Slot] = deque()  # of a group's keys and values each, while there is attention
        return self

    def __exit__(self, *exception: Any) -> None:
        # The memory returns to the compute stream's pool: that stream waits for the last copies.
        for stream in (self.coming, self.going):
            self.compute_stream().wait_event(stream.record_event())
        for slot in (*self._slots, *self._large):
            slot.buffer = None  # a traceback that still holds the slot must not hold its memory
        self._slots.clear()
        self._large.clear()

    def stream(self, name: str, length: int, width: int) -> Tokens:
        self._allocate(self._slots, SLOTS, min(self.chunk, length) * width * 4)
        return _Stream(self, name, length, width)

    def heads(self, name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> _Heads:
        heads, width = shape
        self._allocate(self._slots, SLOTS, min(self.chunk, length) * heads * width * dtype.itemsize)
        per_visit = self.heads_per_visit or ATTENTION_BYTES // max(1, 4 * length * width * dtype.itemsize)
        return _Heads(self, name, length, shape, dtype, min(heads, max(1, per_visit)))

    def attended(  # type: ignore[override]
        self, attention: Attention, queries: Iterable[Piece], keys: _Heads, values: _Heads
    ) -> Iterator[Piece]:
        length, (heads, _), dtype = keys.length, keys.shape, keys.dtype
        waiting, results = (self.heads(name, length, keys.shape, dtype) for name in ("queries", "attended"))
        chunks = []
        for span, query in queries:
            chunks.append(span)
            waiting.write(span, query)
            del query
        rows = spans(
            length, self.chunk * (heads // keys.per_visit)
        )  # as many rows of all heads as in a chunk
        self._allocate(self._large, 2, 2 * keys.groups[0].tensor.nbytes)
        for group in zip(keys.groups, values.groups, waiting.groups, results.groups):
            key_home, value_home, query_home, result_home = group
            slot = self.take(self._large)
            both = [home.tensor for home in (key_home, value_home)]
            key, value = slot.views([tensor.shape for tensor in both], dtype)
            slot.fetch(self, [(key_home, slice(0, length), key), (value_home, slice(0, length), value)])
            for span in rows:
                query = self._visit(query_home, span)
                result = attention(query.part, key, value)
                query.slot.release(self)
                self._leave(result_home, span, result)
                del query, result
            slot.release(self)
            del slot, both, key, value
        self._large.clear()  # what comes next needs the memory; all that was copied to it has been waited for
        yield from results.read(chunks)

    # What the tensors use

    def compute_stream(self) -> Any:
        return self.backend.current_stream(self.device)

    def homes(self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[_Home]:
        """The RAM of that name, made anew if it was for other shapes."""
        homes = self._homes.get(name, [])
        if [(home.tensor.shape, home.tensor.dtype) for home in homes] != [(shape, dtype) for shape in shapes]:
            del homes
            self._homes.pop(name, None)
            sizes = [torch.Size(shape).numel() for shape in shapes]
            parts = self._ram(sum(sizes), dtype).split(sizes)
            self._homes[name] = [_Home(part.view(shape)) for part, shape in zip(parts, shapes)]
        return self._homes[name]

    def take(self, slots: deque[_Slot] | None = None) -> _Slot:
        """A slot that no visit holds, the least lately used; it may have to be waited for."""
        slots = self._slots if slots is None else slots
        slot = next(slot for slot in slots if not slot.held)
        slots.remove(slot)
        slots.append(slot)
        slot.held = True
        return slot

    def _visit(self, home: _Home, span: slice) -> _Visit:
        """Brings a span of what is at home to a slot."""
        slot = self.take()
        shape = (1, span.stop - span.start, *home.tensor.shape[2:])
        (part,) = slot.views([shape], home.tensor.dtype)
        slot.fetch(self, [(home, span, part)])
        return _Visit(span, slot, part)

    def _leave(self, home: _Home, span: slice, value: torch.Tensor) -> None:
        """Sends a value home through a slot."""
        slot = self.take()
        self.compute_stream().wait_event(slot.free)
        (part,) = slot.views([value.shape], home.tensor.dtype)
        part.copy_(value)
        slot.send(self, [(home, span, part)])

    def _allocate(self, slots: deque[_Slot], count: int, nbytes: int) -> None:
        if slots and slots[0].buffer.numel() >= nbytes:
            return
        # Not inference tensors even if the caller is in inference mode. What the allocator gives, earlier work on
        # the compute stream may still use.
        for slot in slots:
            self.compute_stream().wait_event(
                slot.free
            )  # what leaves it has left before its memory is given away
        with torch.inference_mode(False):
            slots.clear()
            for _ in range(count):
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
                slots.append(_Slot(buffer, self.compute_stream().record_event()))

    @torch.inference_mode(False)
    def _ram(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Page-locked while the bound and the system allow it."""
        taken = 1 << (numel * dtype.itemsize - 1).bit_length()  # that allocator gives powers of two
        if taken <= self._page_locked:
            try:
                tensor = page_locked(numel, dtype)
                self._page_locked -= taken
                return tensor
            except RuntimeError as error:
                self._page_locked = 0
                reason = str(error).partition("\n")[0]
                log.warning("no more RAM could be page-locked, offloading is slower: %s", reason)
        return torch.empty(numel, dtype=dtype)


class _Stream(Tokens):
    """A residual stream in RAM."""

    def __init__(self, place: ActivationOffload, name: str, length: int, width: int):
        super().__init__(length, (width,), torch.float32)
        self._place = place
        (self._home,) = place.homes(name, [(1, length, width)], self.dtype)
        self._visit: _Visit | None = None

    def read(self, spans: Iterable[slice]) -> Iterator[Piece]:
        for span in spans:
            self._visit = visit = self._place._visit(self._home, span)
            yield span, visit.part
            if self._visit is visit:
                self._visit = None
                visit.slot.release(self._place)
            del visit

    def write(self, span: slice, value: torch.Tensor) -> None:
        step = min(self._place.chunk, self.length)
        for start in range(span.start, span.stop, step):
            rows = slice(start, min(start + step, span.stop))
            piece = value[:, rows.start - span.start : rows.stop - span.start]
            self._place._leave(self._home, rows, piece)

    def add(self, span: slice, value: torch.Tensor) -> None:
        visit, self._visit = self._visit, None
        if visit is None:
            visit = self._place._visit(self._home, span)
        visit.part.add_(value)
        visit.slot.send(self._place, [(self._home, span, visit.part)])


class _Heads(Tokens):
    """Queries, keys, values or attention output in RAM: one tensor [1, L, heads of the group, head_dim] per group."""

    def __init__(
        self,
        place: ActivationOffload,
        name: str,
        length: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        per_visit: int,
    ):
        super().__init__(length, shape, dtype)
        heads, width = shape
        self._place, self.per_visit = place, per_visit
        self._sizes = [min(per_visit, heads - first) for first in range(0, heads, per_visit)]
        self.groups = place.homes(name, [(1, length, size, width) for size in self._sizes], dtype)

    def read(self, spans: Iterable[slice]) -> Iterator[Piece]:
        for span in spans:
            slot = self._place.take()
            parts = self._parts(slot, span)
            slot.fetch(self._place, [(home, span, part) for home, part in zip(self.groups, parts)])
            whole = torch.cat(parts, dim=2)
            slot.release(self._place)
            del parts
            yield span, whole
            del whole

    def write(self, span: slice, value: torch.Tensor) -> None:
        slot = self._place.take()
        self._place.compute_stream().wait_event(slot.free)
        parts = self._parts(slot, span)
        for part, heads in zip(parts, value.split(self._sizes, dim=2)):
            part.copy_(heads)
        slot.send(self._place, [(home, span, part) for home, part in zip(self.groups, parts)])

    def _parts(self, slot: _Slot, span: slice) -> list[torch.Tensor]:
        return slot.views(
            [(1, span.stop - span.start, size, self.shape[1]) for size in self._sizes], self.dtype
        )


class _Home:
    """A tensor [1, L, ...] in RAM, and the copies to it that have been enqueued."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self._written: list[tuple[slice, Any]] = []  # tokens, the event behind the copy

    def await_written(self, stream: Any, span: slice) -> None:
        """Makes a stream wait for the copies to this span."""
        for written, event in self._written:
            if written.start < span.stop and span.start < written.stop:
                stream.wait_event(event)

    def note_written(self, span: slice, event: Any) -> None:
        """Remembers a copy to this span, behind those that were enqueued before."""
        later = [w for w in self._written if w[0].start < span.start or span.stop < w[0].stop]
        self._written = [*later, (span, event)]


Copies = list[tuple[_Home, slice, torch.Tensor]]


@dataclass(eq=False)
class _Slot:
    """A device buffer, the event behind the last use of what was in it, and whether a visit holds it."""

    buffer: torch.Tensor | None
    free: Any
    held: bool = False

    def views(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Tensors one behind the other in the buffer."""
        views, start = [], 0
        for shape in shapes:
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            views.append(self.buffer[start:stop].view(dtype).view(shape))
            start = stop
        return views

    def fetch(self, place: ActivationOffload, copies: Copies) -> None:
        """Brings spans from their homes into views of this slot; what is enqueued to compute next may use them."""
        place.coming.wait_event(self.free)
        with place.backend.stream(place.coming):
            for home, span, part in copies:
                home.await_written(place.coming, span)
                part.copy_(home.tensor[:, span], non_blocking=True)
            arrival = place.coming.record_event()
        place.compute_stream().wait_event(arrival)

    def send(self, place: ActivationOffload, copies: Copies) -> None:
        """Sends views of this slot home as they have been computed; then it is free."""
        place.going.wait_event(place.compute_stream().record_event())
        with place.backend.stream(place.going):
            for home, span, part in copies:
                home.tensor[:, span].copy_(part, non_blocking=True)
            self.free = place.going.record_event()
        for home, span, _ in copies:
            home.note_written(span, self.free)
        self.held = False

    def release(self, place: ActivationOffload) -> None:
        """Ends a visit of which nothing goes home."""
        self.free = place.compute_stream().record_event()
        self.held = False


@dataclass(eq=False)
class _Visit:
    """A span of tokens in a slot."""

    span: slice
    slot: _Slot
    part: torch.Tensor
