"""The events that a run reports. A listener is a function of one event."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Planned:
    """The memory plan: in a line, as bytes that each stage will reserve on the device, and the bytes there are."""

    line: str
    stages: Mapping[str, int]
    room: float


@dataclass(frozen=True)
class StageStarted:
    """A stage has begun: text, image, encode, denoise, decode or save."""

    name: str


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps are done: of a stage, or of other work that takes time, such as converting a file.

    `seconds_left` is what the rest takes at the pace so far, None if that is not known.
    """

    stage: str
    done: int
    total: int
    seconds_left: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Expected:
    """The predicted end of the whole run."""

    end: datetime


@dataclass(frozen=True)
class Previewed:
    """A preview of the video has been written to a file, which the next preview replaces."""

    path: Path
    step: int


@dataclass(frozen=True)
class MemorySample:
    """Device memory now, in bytes: in tensors, and reserved from the driver (None if that is not counted)."""

    stage: str
    allocated: int
    reserved: int | None


@dataclass(frozen=True)
class StageDone:
    """A stage has ended, or failed. `allocated` and `reserved` are its peak bytes on the device, None on a CPU."""

    name: str
    seconds: float
    allocated: int | None = None
    reserved: int | None = None
    failed: bool = False


@dataclass(frozen=True)
class Finished:
    """The result is in its file."""

    path: Path


Event = Planned | StageStarted | Step | Expected | Previewed | MemorySample | StageDone | Finished
Listener = Callable[[Event], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `counted` tells this listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def counted(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Yields the items; tells the listener, if there is one, a Step of `title` after each."""
    tell, pace = _listener.get(), Pace()
    for done, item in enumerate(items, 1):
        yield item
        if tell:
            tell(Step(title, done, total, pace.left(done, total)))


class Pace:
    """The pace of work that starts now, `start` of its steps being done already."""

    def __init__(self, start: int = 0):
        self._start, self._since = start, time.monotonic()

    def left(self, done: int, total: int) -> float | None:
        """Seconds that the rest takes at the pace so far; None before the first step."""
        if done <= self._start:
            return None
        return (time.monotonic() - self._since) / (done - self._start) * (total - done)
