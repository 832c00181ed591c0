"""Ctrl-C and SIGTERM: during denoising they take effect after the current step, so that its work is kept."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. `number` is that of the signal."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number


class Interrupts:
    """A request to stop the run, from a signal or from another thread.

    As a context in the main thread it turns SIGINT and SIGTERM into Interrupted; a signal that was ignored stays so.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def ask(self, number: int = signal.SIGINT) -> None:
        """Asks the run to stop at the next `check`."""
        self._pending = number

    def withdraw(self) -> None:
        """Drops the request to stop, so that it does not stop the next run."""
        self._pending = None

    def check(self) -> None:
        """Raises Interrupted if the run is asked to stop."""
        if self._pending is not None:
            raise Interrupted(self._pending)

    @property
    def asked(self) -> bool:
        """Whether the run is asked to stop."""
        return self._pending is not None

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, the first signal only asks the run to stop; a second one raises Interrupted at once."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._patient or self.asked:
            raise Interrupted(number)
        self.ask(number)
        log.info("Stopping after this step; once more to stop now")
