"""The stages of a run: how long each took, and how much device memory it needed."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One stage. Bytes are peaks on the device, None where it counts none: in tensors, and taken from the driver."""

    name: str
    seconds: float = 0.0
    allocated: int | None = None
    reserved: int | None = None


class Stages:
    """Measures and logs stages on a device that is initialised (wan.utils.accelerator.initialise).

    `history` has them in order, the unfinished one too; `current` is its name.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.history: list[Stage] = []
        self.current: str | None = None
        self._backend = None if self.device.type == "cpu" else torch.get_device_module(self.device)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the stage `name`. Its memory is measured also if it fails."""
        self._ask("reset_peak_memory_stats")
        stage = Stage(name)
        self.history.append(stage)
        self.current = name
        start = time.perf_counter()
        try:
            yield
            if self._backend:
                self._backend.synchronize(self.device)
            self.current = None
        finally:
            stage.seconds = time.perf_counter() - start
            stage.allocated = self._ask("max_memory_allocated")
            stage.reserved = self._ask("max_memory_reserved")
        peak = "" if stage.allocated is None else f", peak {stage.allocated / 2**30:.2f} GiB on {self.device}"
        log.info(f"Stage {name}: {stage.seconds:.1f} s{peak}")

    def _ask(self, statistic: str) -> int | None:
        """What the backend's function of that name says of the device; None if it has none."""
        function = getattr(self._backend, statistic, None)
        return function(self.device) if function else None
