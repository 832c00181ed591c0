"""The stages of a run: how long each took, how much device memory it needed, how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from .events import Listener, MemorySample, StageDone, StageStarted, Step

T = TypeVar("T")


class Stages:
    """Measures stages, and tells a listener of them.

    Attributes:
        history: a StageDone for each stage in order, the failed one too.
        current: the name of the stage that is under way, or that failed; else None.

    Args:
        device: whose memory counts. Its statistics must be readable: see accelerator.initialise.
        listener: told of every event.
    """

    def __init__(self, device: torch.device | str, listener: Listener):
        self.device = torch.device(device)
        self.history: list[StageDone] = []
        self.current: str | None = None
        self._tell = listener

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the stage `name`. Its memory is measured also if it fails."""
        backend = self._backend()
        if backend:
            backend.reset_peak_memory_stats(self.device)
        self.current = name
        self._tell(StageStarted(name))
        start, failed = time.perf_counter(), True
        try:
            yield
            if backend:
                backend.synchronize(self.device)
            self.current, failed = None, False
        finally:
            done = StageDone(name, time.perf_counter() - start, *self._peaks(), failed)
            self.history.append(done)
            self._tell(done)

    def steps(self, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, one after the other; tells when each is done with."""
        stage = self.current or ""
        for done, item in enumerate(items, 1):
            yield item
            self._tell(Step(stage, done, total))
            backend = self._backend()
            if backend:
                allocated = backend.memory_allocated(self.device)
                self._tell(MemorySample(stage, allocated, _reserved(backend, "memory_reserved", self.device)))

    def _backend(self) -> Any:
        return None if self.device.type == "cpu" else torch.get_device_module(self.device)

    def _peaks(self) -> tuple[int | None, int | None]:
        backend = self._backend()
        if not backend:
            return None, None
        reserved = _reserved(backend, "max_memory_reserved", self.device)
        return backend.max_memory_allocated(self.device), reserved


def _reserved(backend: Any, name: str, device: torch.device) -> int:
    """A statistic that not every backend has."""
    return getattr(backend, name)(device) if hasattr(backend, name) else 0
