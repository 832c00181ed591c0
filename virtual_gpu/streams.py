"""Streams, events and pinned memory of the virtual GPU: which accesses to memory they order, and which they do not.

The virtual GPU runs every operator at once, in the order of submission; a real one only promises the order that
streams and events establish. So each stream, each event and the host keep a vector clock, each storage keeps its
latest accesses by range of bytes, and an access that nothing orders after a conflicting earlier one raises
RaceError, although its values happen to be right here. A tensor's birth counts as a write by the stream that made
it, since its memory may have been in use there just before; likewise a tensor must not be freed while a stream that
did not make it may still use it, unless record_stream told so.

Host memory that an asynchronous copy reads is compared, once the host knows that the copy is done, with what it was
when the copy was submitted; host memory that one writes gets its values only then, or when a later copy that streams
and events order after it touches that memory. Copies that touch the same pinned memory must be so ordered if one of
them writes it.

The host is one actor: threads are expected to order themselves.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple, Protocol

import torch

Clock = dict["Stream", int]  # per stream, the last work that happens before
Fields = tuple["Stream", int, int, int, bool, str, str | None]  # of an Access


class DeviceTensor(Protocol):
    """A tensor on the device: it covers the bytes `span` of a storage, whose `accesses` `allocation` keeps."""

    allocation: Any

    @property
    def span(self) -> tuple[int, int]: ...


class RaceError(RuntimeError):
    """Two accesses to the same memory, one of them a write, that no stream, event or synchronisation orders."""


def _exclusive(method: Callable) -> Callable:
    """One thread at a time: clocks and the list of copies under way are shared by all."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class Record(NamedTuple):
    """One thing that happened on the device.

    kind: "alloc", "free", "copy_in" (host to device), "copy_out", "op", "record_event", "wait_event", "record_stream"
        or "pin". name: the operator or event; of a copy_out, the operator whose result the host had to know, without
        bytes. allocation: number of the storage, in order of allocation.
    """

    kind: str
    name: str
    nbytes: int
    stream: str
    label: str | None
    allocation: int | None


class Access(NamedTuple):
    """Work number `tick` of `stream` touched bytes `begin` to `end` of a storage."""

    stream: Stream
    tick: int
    begin: int
    end: int
    writes: bool
    name: str
    label: str | None

    def __str__(self) -> str:
        label = f" ({self.label})" if self.label else ""
        verb = "writes" if self.writes else "reads"
        return f"{self.name}{label} on {self.stream}, which {verb} {self.end - self.begin} bytes"


class Stream:
    """Work in order of submission, unordered against other streams but for events. As torch.cuda.Stream."""

    def __init__(self, timeline: Timeline, name: str):
        self.timeline = timeline
        self.name = name
        # per stream, the last work that happens before what this stream does next
        self.clock: Clock = {self: 0}

    def __repr__(self) -> str:
        return self.name

    def wait_event(self, event: Event) -> None:
        with self.timeline.lock:
            self.timeline.note("wait_event", name=event.name, stream=self)
            merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(self.timeline) if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.timeline.host_learns(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True


class Event:
    """A point in a stream's work. As torch.cuda.Event, without timing. A query finds the work done."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self.clock: Clock = {}
        timeline.events += 1
        self.name = f"event {timeline.events}"

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.timeline.current
        with self.timeline.lock:
            self.timeline.initialized = True
            self.clock = dict(stream.clock)
            self.timeline.note("record_event", name=self.name, stream=stream)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.timeline.current).wait_event(self)

    def synchronize(self) -> None:
        self.timeline.host_learns(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True


class HostCopy:
    """A copy between pinned host memory and the device that the host does not know yet to be done."""

    def __init__(
        self,
        access: Access,
        source: torch.Tensor | None = None,
        destination: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ):
        self.access = access
        self.source, self.digest = source, None if source is None else digest(source)
        self.destination, self.values = destination, values

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether the copy's host memory shares bytes with a tensor on the host."""
        mine = self.source if self.destination is None else self.destination
        if mine.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
            return False
        (begin, end), (other_begin, other_end) = _bytes(mine), _bytes(tensor)
        return begin < other_end and other_begin < end

    @property
    def disturbed(self) -> bool:
        return self.source is not None and digest(self.source) != self.digest

    def finish(self) -> None:
        if self.destination is not None:
            with torch.no_grad():
                self.destination.copy_(self.values)


class _Here(threading.local):
    """The stream to which a thread submits its work, and the label of that work."""

    stream: Stream | None = None  # None is the default stream
    label: str | None = None


class Timeline:
    """The record and the clocks of one virtual GPU, and the check of every access against them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.initialized = False  # whether the device was used yet
        self.record: list[tuple] = []  # the fields of a Record each
        self.default = Stream(self, "default stream")
        self.streams = [self.default]
        self.events = 0  # made so far
        self.host: Clock = {}  # the clock of what the host knows to be done
        self.copies: list[HostCopy] = []  # every HostCopy under way, oldest first
        # a race found where nothing can be raised; the next call that can raises it
        self.fault: str | None = None
        self.here = _Here()

    @property
    def current(self) -> Stream:
        return self.here.stream or self.default

    def new_stream(self) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    def note(
        self,
        kind: str,
        name: str = "",
        nbytes: int = 0,
        stream: Stream | None = None,
        allocation: int | None = None,
    ) -> None:
        here = self.here
        stream = stream or here.stream or self.default
        self.record.append((kind, name, nbytes, stream.name, here.label, allocation))

    def submit(
        self, name: str, reads: Iterable[DeviceTensor] = (), writes: Iterable[DeviceTensor] = ()
    ) -> None:
        """Put work on the current stream; `reads` and `writes` are tensors on the device.

        Raises RaceError when a conflicting access does not happen before it.
        """
        if self.fault is not None:
            self.raise_fault()
        stream = self.here.stream or self.default
        clock = stream.clock
        if self.host:
            merge(clock, self.host)
        clock[stream] = tick = clock[stream] + 1
        label = self.here.label
        for tensor in reads:
            begin, end = tensor.span
            allocation = tensor.allocation
            allocation.accesses = _checked(
                allocation.accesses, (stream, tick, begin, end, False, name, label), clock
            )
        for tensor in writes:
            begin, end = tensor.span
            allocation = tensor.allocation
            allocation.accesses = _checked(
                allocation.accesses, (stream, tick, begin, end, True, name, label), clock
            )

    def birth(self, nbytes: int) -> Fields:
        """The first access to a new storage of that many bytes."""
        stream = self.here.stream or self.default
        return stream, stream.clock[stream], 0, nbytes, True, "allocation", self.here.label

    def freed(self, accesses: Iterable[Fields], owner: Stream, recorded: Container[Stream]) -> None:
        """A storage made on stream `owner` is gone; `recorded` are the streams named by record_stream."""
        for access in accesses:
            stream, tick = access[:2]
            if stream is owner or stream in recorded:
                continue
            if tick > owner.clock.get(stream, 0) and tick > self.host.get(stream, 0):
                self.fault = f"memory of {owner} was freed while nothing orders it after {Access(*access)}"

    def when_known(self, streams: Iterable[Stream]) -> Callable[[], bool]:
        """A function that tells whether the host knows by now that all work that these streams have is done."""
        ticks = {stream: stream.clock[stream] for stream in streams}
        return lambda: all(tick <= self.host.get(stream, 0) for stream, tick in ticks.items())

    @_exclusive
    def touch_host(self, name: str, tensor: torch.Tensor, writes: bool) -> None:
        """The current stream is about to copy from or to pinned memory: finishes the copies that come before.

        Raises RaceError if nothing orders the new copy after one of them.
        """
        stream = self.current
        for copy in [c for c in self.copies if c.touches(tensor) and (writes or c.destination is not None)]:
            if copy.access.tick > stream.clock.get(copy.access.stream, 0):
                access = self._now(name, tensor.nbytes, writes)
                raise RaceError(f"nothing orders {access}, after {copy.access}, in pinned memory")
            self._check([copy])
            self.copies.remove(copy)
            copy.finish()

    @_exclusive
    def reads_host(self, name: str, source: torch.Tensor) -> None:
        """An asynchronous copy from pinned memory was just submitted."""
        same = [c for c in self.copies if c.source is not None and c.source.data_ptr() == source.data_ptr()]
        self._check(same)
        for old in same:
            if old.access.stream is self.current and old.source.nbytes <= source.nbytes:
                self.copies.remove(old)  # the new one watches the same memory for longer
        self.copies.append(HostCopy(self._now(name, source.nbytes, False), source))

    @_exclusive
    def writes_host(self, name: str, destination: torch.Tensor, values: torch.Tensor) -> None:
        """An asynchronous copy of `values` to pinned memory was just submitted."""
        access = self._now(name, destination.nbytes, True)
        self.copies.append(HostCopy(access, destination=destination, values=values))

    def _check(self, copies: Iterable[HostCopy]) -> None:
        for copy in copies:
            if copy.disturbed:
                self.copies.remove(copy)  # said once
                raise RaceError(f"the host overwrote pinned memory still being read by {copy.access}")

    def _now(self, name: str, nbytes: int, writes: bool) -> Access:
        stream = self.current
        return Access(stream, stream.clock[stream], 0, nbytes, writes, name, self.here.label)

    @_exclusive
    def host_learns(self, clock: Clock) -> None:
        """The host waited for everything in `clock`."""
        self._check(self.copies)
        merge(self.host, clock)
        done = [c for c in self.copies if c.access.tick <= self.host.get(c.access.stream, 0)]
        self.copies = [c for c in self.copies if c not in done]
        for copy in done:
            copy.finish()

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()
        self.raise_fault()

    def raise_fault(self) -> None:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise RaceError(fault)


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor on the host begins and ends in its storage."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def merge(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        if tick > clock.get(stream, 0):
            clock[stream] = tick


def digest(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _checked(earlier: Iterable[Fields], access: Fields, clock: Clock) -> list[Fields]:
    """The accesses to remember of a storage, `access` among them, without those that need no more checking."""
    stream, _, begin, end, writing, _, _ = access
    kept = []
    for old in earlier:
        old_stream, old_tick, old_begin, old_end, old_writing, _, _ = old
        same = old_stream is stream
        if (
            not same
            and old_begin < end
            and begin < old_end
            and (writing or old_writing)
            and old_tick > clock.get(old_stream, 0)
        ):
            raise RaceError(f"nothing orders {Access(*access)}, after {Access(*old)}")
        if not (begin <= old_begin and old_end <= end and (writing or (same and not old_writing))):
            kept.append(old)
    kept.append(access)
    return kept
