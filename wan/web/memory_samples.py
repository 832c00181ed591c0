"""The memory of a run: samples of GPU memory and RAM while it goes on, and the series kept of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

EVERY = 0.5  # seconds between samples
KEPT = 300  # samples of a run; when there are more, every other one is dropped


def device_facts(name: str | None) -> dict[str, Any]:
    """Names, bytes and versions of the device and of the machine. Raises InputError as choose_device."""
    import torch

    from leanwan.accelerator import choose_device, initialise

    device = choose_device(name)
    facts: dict[str, Any] = {
        "device": str(device),
        "torch": str(torch.__version__),
        "ram_bytes": psutil.virtual_memory().total,
        "name": None,
    }
    if device.type == "cpu":
        return facts
    initialise(device)
    backend = torch.get_device_module(device)
    facts["name"] = getattr(backend, "get_device_name", lambda device: device.type)(device)
    if hasattr(backend, "mem_get_info"):
        facts["free_bytes"], facts["total_bytes"] = backend.mem_get_info(device)
    facts["driver"] = _driver()
    return facts


def _driver() -> str | None:
    """The driver's version and CUDA's, where they can be had."""
    import torch

    if not torch.version.cuda:
        return torch.version.hip and f"ROCm {torch.version.hip}"
    try:
        with open("/proc/driver/nvidia/version") as file:
            version = next(word for word in file.readline().split() if word[0].isdigit())
        return f"driver {version}, CUDA {torch.version.cuda}"
    except (OSError, StopIteration):
        return f"CUDA {torch.version.cuda}"


def sample(device: Any = None) -> dict[str, int]:
    """Bytes that this process holds now: "ram", and on a device "allocated", "reserved" and, if it has one, "limit"."""
    import torch

    taken = {"ram": psutil.Process().memory_info().rss}
    if device is None or device.type == "cpu":
        return taken
    backend = torch.get_device_module(device)
    for key, function in (("allocated", "memory_allocated"), ("reserved", "memory_reserved")):
        ask = getattr(backend, function, None)
        if ask:
            taken[key] = int(ask(device))
    share = getattr(backend, "get_per_process_memory_fraction", None)
    if share and hasattr(backend, "mem_get_info"):
        taken["limit"] = int(share(device) * backend.mem_get_info(device)[1])
    return taken


class Sampler:
    """While entered, takes a sample every half second, in a thread of its own.

    Args:
        name: of the device, as choose_device's.
        tell: called with each sample.
    """

    def __init__(self, name: str | None, tell: Callable[[dict[str, int]], None]):
        from leanwan.accelerator import choose_device

        self._device, self._tell = choose_device(name), tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _go(self) -> None:
        while True:
            self._tell(sample(self._device))
            if self._over.wait(EVERY):
                return


@dataclass
class Series:
    """The samples of a run, evenly spaced however long it is.

    Attributes:
        plan: bytes that each stage was planned to reserve, by name.
        room: bytes that the plan was made for.
        points: (seconds since the first sample, stage, sample).
    """

    plan: Mapping[str, int] = field(default_factory=dict)
    room: float | None = None
    points: list[tuple[float, str, Mapping[str, int]]] = field(default_factory=list)
    _start: float | None = None
    _spacing: float = 0.0

    def add(self, stage: str, values: Mapping[str, int]) -> None:
        """Adds a sample taken now, unless it is too close to the last one of its stage."""
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        at = now - self._start
        if self.points and at - self.points[-1][0] < self._spacing and stage == self.points[-1][1]:
            return
        self.points.append((at, stage, values))
        if len(self.points) > KEPT:
            self.points = self.points[::2]
            self._spacing = max(2 * self._spacing, 2 * EVERY)
