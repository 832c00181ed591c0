"""The stages of a run: how long each took, and how much device memory it needed."""

import contextlib
import logging
import time
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One stage. Bytes are peaks on the device, None on a CPU: in tensors, and taken from the driver for them."""

    name: str
    seconds: float = 0.0
    allocated: int | None = None
    reserved: int | None = None


class Stages:
    """Measures and logs stages. `history` has them in order, the unfinished one too; `current` is its name."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.history = []
        self.current = None

    @contextlib.contextmanager
    def __call__(self, name):
        """Everything inside belongs to the stage `name`. Its memory is measured also if it fails."""
        backend = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        if backend:
            backend.reset_peak_memory_stats(self.device)
        stage = Stage(name)
        self.history.append(stage)
        self.current = name
        start = time.perf_counter()
        try:
            yield
            if backend:
                backend.synchronize(self.device)
            self.current = None
        finally:
            stage.seconds = time.perf_counter() - start
            if backend:
                stage.allocated = backend.max_memory_allocated(self.device)
                reserved = getattr(backend, "max_memory_reserved", None)
                stage.reserved = reserved(self.device) if reserved else None
        peak = "" if stage.allocated is None else f", peak {stage.allocated / 2**30:.2f} GiB on {self.device}"
        log.info(f"Stage {name}: {stage.seconds:.1f} s{peak}")
