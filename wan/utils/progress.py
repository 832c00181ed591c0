"""A run's events as progress bars and log lines."""

from __future__ import annotations

import contextlib
import logging
from datetime import datetime

from tqdm import tqdm

from leanwan.errors import shown

from .events import Event, Expected, Finished, StageDone, StageStarted, Step

log = logging.getLogger(__name__)


class ProgressBars:
    """A listener that draws a bar for all work with steps, and logs what each stage took and when the run will end.

    A bar that cannot be drawn, as on a full disk, is left out and does not stop the run.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._of = ""  # the work that the bar shows
        self._stage = ""  # the current stage
        self._expected: datetime | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._close()
            self._stage = event.name
        elif isinstance(event, Step):
            with contextlib.suppress(OSError):
                self._draw(event)
        elif isinstance(event, Expected):
            self._tell_end(event.end)
        elif isinstance(event, StageDone):
            self._close()
            self._stage = ""
            peak = (
                "" if event.allocated is None else f", peak {event.allocated / 2**30:.2f} GiB on the device"
            )
            log.info(f"Stage {event.name}: {event.seconds:.1f} s{peak}")
        elif isinstance(event, Finished):
            self._close()
            self._expected = None
            log.info(f"Saved {event.path}")

    def _draw(self, step: Step) -> None:
        if (
            self._bar is None
            or self._of != step.stage
            or step.total != self._bar.total
            or step.done <= self._bar.n
        ):
            self._close()
            # Steps before the first reported one were taken by an earlier run. Bars of stages stay on the screen.
            title, stays = shown(step.stage[:1].upper() + step.stage[1:]), step.stage == self._stage
            self._bar = tqdm(total=step.total, desc=title, initial=step.done - 1, leave=stays)
            self._of = step.stage
        self._bar.update(step.done - self._bar.n)
        if step.done == step.total:
            self._close()

    def _tell_end(self, end: datetime) -> None:
        """Logs the end once, and again when it has moved by more than a minute and a quarter of the time left."""
        left = (end - datetime.now()).total_seconds()
        if self._expected is None or abs((end - self._expected).total_seconds()) > max(60, left / 4):
            self._expected = end
            if self._bar is not None:
                with contextlib.suppress(OSError):
                    self._bar.clear()
            log.info(f"The run will end at about {end:%H:%M:%S}, in {_told(left)}")

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.close()


def _told(seconds: float) -> str:
    """A length of time: 3 h 20 min, 5 min, 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{max(0, round(seconds))} s"
