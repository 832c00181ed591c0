"""What a run tells while it goes on. A listener is a function of one event."""

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
    """How memory will be used: in a line, as bytes that each stage reserves on the device, and of how many."""

    line: str
    stages: Mapping[str, int]
    room: float


@dataclass(frozen=True)
class StageStarted:
    """A stage has begun: text, image, encode, denoise, decode or save."""

    name: str


@dataclass(frozen=True)
class Step:
    """So many of the steps of a stage are done, or of other work that takes time, such as converting a file.

    `seconds_left` is for the rest of them at the pace so far, None where that is not known.
    """

    stage: str
    done: int
    total: int
    seconds_left: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Expected:
    """When the whole run will be done: about then."""

    end: datetime


@dataclass(frozen=True)
class Previewed:
    """A picture of what denoising is about to show is in a file, which the next one replaces."""

    path: Path
    step: int


@dataclass(frozen=True)
class MemorySample:
    """Device memory now, in bytes: in tensors, and taken from the driver for them, None where that is not counted."""

    stage: str
    allocated: int
    reserved: int | None


@dataclass(frozen=True)
class StageDone:
    """A stage has ended, or failed. Bytes are its peaks on the device, None on a CPU."""

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
    """The items; whoever listens is told when each is done with, as a Step of `title`."""
    tell, pace = _listener.get(), Pace()
    for done, item in enumerate(items, 1):
        yield item
        if tell:
            tell(Step(title, done, total, pace.left(done, total)))


class Pace:
    """How fast work goes that starts now, or has `start` of its steps done by now."""

    def __init__(self, start: int = 0):
        self._start, self._since = start, time.monotonic()

    def left(self, done: int, total: int) -> float | None:
        """Seconds that the rest takes at the pace so far."""
        if done <= self._start:
            return None
        return (time.monotonic() - self._since) / (done - self._start) * (total - done)
