"""Weights that live in CPU memory and visit the device in turn.

A model is cut into layer groups, modules whose order of use is known. As many as there is room for stay on the
device; the others pass through a small ring of device memory: while one computes, the next is copied. A ring of two
is one buffer, which groups enter at its start and at its end by turns: two that follow each other fit it together.
Nothing is copied back, for weights do not change.

    with Streamer(model.layer_groups(), "cuda"):
        model(...)

Who orders what:

- The main thread, which launches the kernels, never waits for the device. When it comes to a group, it makes
  the compute stream wait for the event of the group's arrival; when it leaves the group, it records the event
  that releases the group's buffer.
- A worker thread moves the bytes: from the weights, which may be memory-mapped, to page-locked staging
  buffers of bounded size, and from there with asynchronous copies on a stream of their own, which waits for
  the release.
- Behind its copies the worker asks for the pages of the group after those of the ring, for weights may be mapped from
  a disk that is slower than the device computes.
- The main thread waits for the worker only where it comes to a group whose copy is not yet enqueued.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn

from .accelerator import page_locked
from .errors import InputError
from .read_ahead import read_ahead

ALIGNMENT = 256  # bytes: where a tensor may start in a device buffer
STAGE_BYTES = 32 << 20  # at most, of one staging buffer
PINNED_BYTES = 512 << 20  # at most, of all staging buffers; half of the available memory where that is less

log = logging.getLogger(__name__)


class Streamer:
    """Brings the weights of `groups` to the device while attached; a context manager, usable repeatedly.

    A group arrives when one of its modules that own parameters is called: before that, no more than the
    shapes and dtypes of the parameters may be read. The order of `groups` is taken to repeat without end.
    Calls in another order give the same results, only slower. Weights keep their dtype; the modules' buffers
    stay where they are.

    Detached, also after an exception, every module has its own parameters again, the very objects, and
    nothing of them is left on the device.

    Args:
        groups: disjoint modules in the order of their visits, with weights in CPU memory: plain,
            memory-mapped, or meta tensors where bytes are only counted.
        device: where to compute. On a CPU the streamer does nothing.
        buffers: number of groups on the device beside those that stay; all but one are fetched ahead. Two have room for
            the largest pair of streamed groups that follow each other, more for the largest group each.
        resident_bytes: device memory, beside the buffers', for groups that stay, spread over the sequence.

    Raises:
        InputError: `buffers` is not a whole number of at least 2.
        ValueError: groups overlap, or weights are not in CPU memory.
    """

    def __init__(
        self,
        groups: Sequence[nn.Module],
        device: torch.device | str,
        *,
        buffers: int = 2,
        resident_bytes: int = 0,
    ):
        if not isinstance(buffers, int) or buffers < 2:
            raise InputError("must be a whole number of at least 2", "stream_buffers", buffers)
        self.device = torch.device(device)
        self._groups = [group for group in map(_Group, groups) if group.weights]
        owners = [owner for group in self._groups for owner in group.owners]
        if len(owners) > len(set(owners)):
            raise ValueError("groups to stream overlap")
        stays = spread([group.size for group in self._groups], int(resident_bytes))
        self._resident = [group for group, stay in zip(self._groups, stays) if stay]
        streamed = [group for group, stay in zip(self._groups, stays) if not stay]
        self._ring_size = min(buffers, len(streamed))
        self._ring_buffers = ring_buffers([group.size for group in streamed], buffers)
        for position, group in enumerate(self._groups):
            following = self._groups[position:] + self._groups[:position]
            coming = [other for other in following if other in streamed]
            group.ahead, group.then = coming[: self._ring_size], coming[self._ring_size : self._ring_size + 1]
        self._undo = ExitStack()

    @property
    def device_bytes(self) -> int:
        """Bytes that the streamer holds on the device while it is attached."""
        if self.device.type == "cpu":
            return 0
        return sum(self._ring_buffers) + sum(group.size for group in self._resident)

    def __enter__(self) -> Streamer:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Allocates `device_bytes`, hooks the modules' calls and starts the first copies; anew if attached.

        Raises torch.OutOfMemoryError, with nothing attached, if the device has not enough memory.
        """
        self.detach()
        if self.device.type == "cpu" or not self._groups:
            return
        self._backend = torch.get_device_module(self.device)
        self._copy_stream = self._backend.Stream(self.device)
        self._current: _Group | None = None
        self._ring: list[_Slot] = []
        self._slots: list[_Slot] = []  # of resident groups
        self._stages: deque[_Stage] = deque()
        # Buffers are normal tensors even if the caller is in inference mode, for the worker thread is not.
        with ExitStack() as undo, torch.inference_mode(False):
            undo.callback(self._free)
            self._allocate_ring()
            self._slots = [self._slot(group.size) for group in self._resident]
            self._allocate_stages()
            self._worker = ThreadPoolExecutor(1, "streamer")
            undo.callback(self._worker.shutdown, cancel_futures=True)
            undo.callback(self._leave)
            for group in self._groups:
                for owner in group.owners:
                    undo.callback(owner.register_forward_pre_hook(partial(self._visit, group)).remove)
            self._fetch_ahead(self._groups[0])
            for group, slot in zip(self._resident, self._slots):
                self._fetch(group, slot)
            self._undo = undo.pop_all()

    def detach(self) -> None:
        """Undoes attach(); does nothing if not attached."""
        self._undo.close()

    def _visit(self, group: _Group, *_: Any) -> None:
        """Makes a group the current one, before the call of a module of it."""
        if group is self._current:
            return
        self._leave()
        self._fetch_ahead(group)
        self._compute_stream().wait_event(group.arrival.result())
        self._current = group
        group.place()

    def _leave(self) -> None:
        """Ends the current group's visit: all that reads its buffer has been launched."""
        if self._current is not None:
            self._current.restore()
            self._current.slot.released = self._compute_stream().record_event()
            self._current = None

    def _fetch_ahead(self, group: _Group) -> None:
        """Fills the ring with the streamed groups from `group` on. Those that are there already stay."""
        missing = [coming for coming in group.ahead if coming.slot is None]
        for coming in missing:
            self._fetch(coming, next(slot for slot in self._ring if slot.group not in group.ahead))
        if missing:
            for later in group.then:
                self._worker.submit(later.read_ahead)

    def _fetch(self, group: _Group, slot: _Slot) -> None:
        """Gives the slot to the group, and the copy to the worker, who takes one after the other."""
        if slot.group is not None:
            slot.group.slot = None
        slot.group, group.slot = group, slot
        # Also the events of slots that share the buffer: the groups that they held last may reach into this slot.
        released = [other.released for other in (*self._ring, slot) if other.buffer is slot.buffer]
        group.arrival = self._worker.submit(self._copy, group, slot, released)

    def _copy(self, group: _Group, slot: _Slot, released: list[Any]) -> Any:
        """On the worker thread: enqueues the copy of a group to its slot; returns the event behind it."""
        with self._backend.stream(self._copy_stream):
            for event in released:
                self._copy_stream.wait_event(event)
            for start in range(0, group.size, self._stages[0].buffer.numel()):
                stage = self._stages[0]
                self._stages.rotate(-1)
                stage.copied.synchronize()
                part = stage.buffer[: group.size - start]
                group.read(start, part)
                slot.room(group.size)[start : start + part.numel()].copy_(part, non_blocking=True)
                stage.copied.record(self._copy_stream)
            return self._copy_stream.record_event()

    def _allocate_ring(self) -> None:
        self._ring = [self._slot(size) for size in self._ring_buffers]
        if len(self._ring) < self._ring_size:
            (start,) = self._ring
            self._ring.append(_Slot(start.buffer, start.released, at_end=True))

    def _slot(self, size: int) -> _Slot:
        # The allocator may give memory that earlier work on the compute stream still uses: wait for it.
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        return _Slot(buffer, self._compute_stream().record_event())

    def _allocate_stages(self) -> None:
        """Allocates the staging buffers: page-locked while the system allows it, at least two in any case."""
        home = self._groups[0].weights[0].home.device
        size = min(STAGE_BYTES, max(group.size for group in self._groups))
        count = max(2, min(PINNED_BYTES, psutil.virtual_memory().available // 2) // STAGE_BYTES)
        pinned = home.type == "cpu"
        while len(self._stages) < count:
            try:
                buffer = (
                    page_locked(size, torch.uint8)
                    if pinned
                    else torch.empty(size, dtype=torch.uint8, device=home)
                )
            except RuntimeError as error:
                if not pinned:
                    raise
                reason = str(error).partition("\n")[0]
                log.warning("no more RAM could be page-locked, streaming may be slower: %s", reason)
                pinned, count = False, 2
            else:
                self._stages.append(_Stage(buffer, self._backend.Event(blocking=True)))

    def _free(self) -> None:
        # The memory returns to the compute stream's pool: that stream waits for the last copies into it.
        self._compute_stream().wait_event(self._copy_stream.record_event())
        for slot in (*self._ring, *self._slots):
            slot.buffer = None  # a traceback that still holds the slot must not hold its memory
        for group in self._groups:
            group.slot = group.arrival = None
        self._ring.clear()
        self._slots.clear()
        self._stages.clear()

    def _compute_stream(self) -> Any:
        return self._backend.current_stream(self.device)


@dataclass(eq=False)
class _Weight:
    """A parameter: the module that has it, under which name, and where in its group's buffer it goes."""

    owner: nn.Module
    name: str
    home: nn.Parameter
    offset: int  # bytes


class _Group:
    """Modules that visit the device together, their weights laid out in one buffer.

    Attributes:
        size: bytes of the layout.
        ahead: the streamed groups that the ring should hold during the visit, in visiting order.
        then: the streamed group after them, if there is one: its weights, if they are mapped, are prefetched to RAM.
        slot: where the weights are or will be, None while they are only at home.
        arrival: result of the copy to the slot, the event behind it.
    """

    def __init__(self, module: nn.Module):
        self.weights: list[_Weight] = []
        self.size = 0
        self.ahead: list[_Group] = []
        self.then: list[_Group] = []
        self.slot: _Slot | None = None
        self.arrival: Future | None = None
        for owner in module.modules():
            for name, home in owner.named_parameters(recurse=False, remove_duplicate=False):
                if home.device.type not in ("cpu", "meta"):
                    raise ValueError(f"weights to stream must be in CPU memory, not on {home.device}")
                self.weights.append(_Weight(owner, name, home, self.size))
                self.size += -(-home.nbytes // ALIGNMENT) * ALIGNMENT
        self.owners = {weight.owner for weight in self.weights}

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills `out`, [n] uint8, with the bytes of the layout from `start` on."""
        stop = start + out.numel()
        for weight in self.weights:
            source = weight.home.detach().reshape(-1).view(torch.uint8)
            first, last = max(start, weight.offset), min(stop, weight.offset + source.numel())
            if first < last:
                target = out[first - start : last - start]
                target.copy_(source[first - weight.offset : last - weight.offset])

    def read_ahead(self) -> None:
        """Asks for the weights before they are read."""
        for weight in self.weights:
            if weight.home.device.type == "cpu":
                read_ahead(weight.home)

    @torch.inference_mode(False)
    def place(self) -> None:
        """Replaces the modules' parameters by views of the slot."""
        room = self.slot.room(self.size)
        for weight in self.weights:
            view = room[weight.offset : weight.offset + weight.home.nbytes]
            view = view.view(weight.home.dtype).view(weight.home.shape)
            # Without gradient: autocast would keep its casts of parameters that need one.
            setattr(weight.owner, weight.name, nn.Parameter(view, requires_grad=False))

    def restore(self) -> None:
        """Gives the modules their own parameters again."""
        for weight in self.weights:
            setattr(weight.owner, weight.name, weight.home)


@dataclass(eq=False)
class _Slot:
    """The start or the end of a device buffer, the event behind the last use of what was in it, and its group."""

    buffer: torch.Tensor | None
    released: Any
    group: _Group | None = None
    at_end: bool = False

    @torch.inference_mode(False)
    def room(self, size: int) -> torch.Tensor:
        """The slot's bytes for a group of `size` bytes."""
        return self.buffer[-size:] if self.at_end else self.buffer[:size]


@dataclass(eq=False)
class _Stage:
    """A staging buffer, and the event behind the last copy out of it."""

    buffer: torch.Tensor
    copied: Any


def ring_buffers(sizes: Sequence[int], buffers: int) -> list[int]:
    """Bytes of each device buffer that streamed groups of these sizes pass through, in this order again and again.

    Two that follow each other share one buffer, each at an end of it. More of them have one each.
    """
    count = min(buffers, len(sizes))
    if count == 2:
        return [max(map(sum, zip(sizes, [*sizes[1:], sizes[0]])))]
    return count * [max(sizes, default=0)]


def spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which groups stay on the device: what fits `room` bytes, spread as evenly as Bresenham draws a line."""
    total, credit, stays = sum(sizes), 0, []
    for size in sizes:
        credit += size * room
        stays.append(credit >= size * total)
        if stays[-1]:
            credit -= size * total
    return stays
