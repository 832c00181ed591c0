"""What a run tells while it goes on. A listener is a function of one event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageStarted:
    """A stage has begun: text, image, encode, denoise, decode or save."""

    name: str


@dataclass(frozen=True)
class Step:
    """So many of the steps of a stage are done."""

    stage: str
    done: int
    total: int


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


Event = StageStarted | Step | MemorySample | StageDone | Finished
Listener = Callable[[Event], None]
