"""A run's events as progress bars and log lines."""

from __future__ import annotations

import logging

from tqdm import tqdm

from .events import Event, Finished, StageDone, StageStarted, Step

log = logging.getLogger(__name__)


class ProgressBars:
    """A listener that draws a bar for each stage that has steps, and logs what each stage took."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._close()
        elif isinstance(event, Step):
            if self._bar is None:  # steps before the first that is told were taken by an earlier run
                initial = event.done - 1
                self._bar = tqdm(total=event.total, desc=event.stage.capitalize(), initial=initial)
            self._bar.update(event.done - self._bar.n)
        elif isinstance(event, StageDone):
            self._close()
            peak = (
                "" if event.allocated is None else f", peak {event.allocated / 2**30:.2f} GiB on the device"
            )
            log.info(f"Stage {event.name}: {event.seconds:.1f} s{peak}")
        elif isinstance(event, Finished):
            log.info(f"Saved {event.path}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
