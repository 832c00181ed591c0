"""The stages of a run: how long each took, how much device memory it needed, how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from .events import Listener, MemorySample, Pace, StageDone, StageStarted, Step, listening

T = TypeVar("T")


class Stages:
    """Measures stages, and tells a listener of them.

    Attributes:
        history: a StageDone for each stage in order, the failed one too.
        current: the name of the stage that is under way, or that failed; else None.

    Args:
        device: whose memory counts. Its statistics must be readable: see accelerator.initialise.
        listener: called with every event.
    """

    def __init__(self, device: torch.device | str, listener: Listener):
        self.device = torch.device(device)
        self.history: list[StageDone] = []
        self.current: str | None = None
        self._tell = listener
        self._backend = None if self.device.type == "cpu" else torch.get_device_module(self.device)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures the body as the stage `name`, also if it fails."""
        self._ask("reset_peak_memory_stats")
        self.current = name
        self._tell(StageStarted(name))
        start, failed = time.perf_counter(), True
        try:
            with listening(self._tell):
                yield
            self._ask("synchronize")
            self.current, failed = None, False
        finally:
            seconds = time.perf_counter() - start
            peaks = self._ask("max_memory_allocated"), self._ask("max_memory_reserved")
            done = StageDone(name, seconds, *peaks, failed)
            self.history.append(done)
            self._tell(done)

    def steps(self, items: Iterable[T], total: int, start: int = 0) -> Iterator[T]:
        """Yields the items, which are left of `total` after `start`; tells a Step and a MemorySample after each."""
        stage, pace = self.current or "", Pace(start)
        for done, item in enumerate(items, start + 1):
            yield item
            self._tell(Step(stage, done, total, pace.left(done, total)))
            allocated, reserved = self._ask("memory_allocated"), self._ask("memory_reserved")
            if allocated is not None:
                self._tell(MemorySample(stage, allocated, reserved))

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, reading, converting and checking files tells the listener its steps."""
        return listening(self._tell)

    def counter(self) -> Callable[[int, int], None]:
        """A function to call after each step of the current stage, with the number of steps done and their total.

        If fewer are done than before, or the total differs, work has started anew. Outside of stages it tells nothing.
        """
        pace, before = Pace(), (0, 0)

        def count(done: int, total: int) -> None:
            nonlocal pace, before
            if done <= before[0] or total != before[1]:
                pace = Pace(done)
            before = done, total
            if self.current:
                self._tell(Step(self.current, done, total, pace.left(done, total)))

        return count

    @contextlib.contextmanager
    def calls(self, modules: Sequence[nn.Module], rounds: int) -> Iterator[None]:
        """Inside, each call of a module counts as a step of the stage; each module is called `rounds` times."""
        count, done = self.counter(), 0

        def called(*_: object) -> None:
            nonlocal done
            done += 1
            count(done, len(modules) * rounds)

        handles = [module.register_forward_hook(called) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ask(self, function: str) -> int | None:
        """The result of the backend's function of that name for the device; None if there is no such function."""
        ask = getattr(self._backend, function, None)
        return ask(self.device) if ask else None
