"""The checks of the verdict, the most important first, and the Bench that a check works with."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

GIB = 2**30
PLACES = 4  # significant digits of a number in the report


@dataclass(frozen=True)
class Check:
    """A check. It runs in a process of its own, which calls `function` with a Bench and `arguments`.

    Attributes:
        function: "module:name".
        share: of the whole time, at most.
    """

    name: str
    function: str
    share: float
    arguments: dict = field(default_factory=dict)


def _check(name: str, function: str, share: float, **arguments: Any) -> Check:
    return Check(name, f"benchmarks.verdict.{function}", share, arguments)


CHECKS = [
    _check("machine", "machine:describe", 0.1),
    _check("toy t2v", "toys:compare", 0.2, task="t2v-tiny"),
    _check("placement 1.3B", "full_width:streamed", 0.2, task="t2v-1.3B"),
    _check("activations 1.3B", "full_width:offloaded", 0.2, task="t2v-1.3B"),
    _check("tiles", "regrouping:tiles", 0.2),
    _check("chunks", "regrouping:chunks", 0.2),
    _check("memory 1.3B", "sizes:counted", 0.3, task="t2v-1.3B", size="832*480"),
    _check("capped 1.3B", "sizes:capped", 0.3, task="t2v-1.3B", size="832*480"),
    _check("toy i2v", "toys:compare", 0.2, task="i2v-tiny"),
    _check("toy vace", "toys:compare", 0.2, task="vace-tiny"),
    _check("placement 14B", "full_width:streamed", 0.2, task="t2v-14B"),
    _check("activations 14B", "full_width:offloaded", 0.2, task="t2v-14B"),
    _check("rates", "machine:rates", 0.1),
    _check("steps 1.3B", "step_times:compare", 0.3, task="t2v-1.3B"),
    _check("memory 14B", "sizes:counted", 0.4, task="t2v-14B", size="1280*720", layers=2),
    _check("capped 14B", "sizes:capped", 0.4, task="t2v-14B", size="1280*720", layers=2),
    _check("steps 14B", "step_times:compare", 0.4, task="t2v-14B", layers=4),
    _check("upstream", "upstream:compare", 0.3),
    _check("memory flf2v", "sizes:counted", 0.4, task="flf2v-14B", size="832*480", layers=2),
    _check("memory whole", "sizes:counted", 0.4, task="t2v-1.3B", size="832*480", whole=True),
    _check("toy flf2v", "toys:compare", 0.2, task="flf2v-tiny"),
    _check("toy t2i", "toys:compare", 0.2, task="t2i-tiny"),
]


class SkippedError(Exception):
    """The check does not apply to this machine or this command line; the message says why."""


@dataclass
class Bench:
    """The settings and the device of a check, and the methods by which it reports its findings.

    Attributes:
        device: the first CUDA device, or in a rehearsal the virtual GPU.
        rehearse: use toy sizes.
        tree: upstream's checkout, or None.
        told: the file to which every finding is written at once, a line of JSON each, or None.
        numbers, faults: what was noted; why the check fails, empty if it passes.
        chance: draws random delays.
    """

    device: torch.device
    rehearse: bool = False
    tree: str | None = None
    told: Path | None = None
    numbers: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    chance: Random = field(default_factory=lambda: Random(0))

    @property
    def backend(self) -> Any:
        return torch.get_device_module(self.device)

    def note(self, name: str, value: Any) -> None:
        """Reports a number, a text, or a dict of them."""
        value = _rounded(value)
        self.numbers[name] = value
        self.tell({"number": name, "value": value})

    def expect(self, holds: bool, otherwise: str) -> None:
        """Unless `holds`, notes that the check fails for the reason `otherwise`; the check goes on."""
        if not holds:
            self.faults.append(otherwise)
            self.tell({"fault": otherwise})

    def needs(self, device_gib: float, ram_gib: float = 0) -> None:
        """Skips the check on a machine that has less memory free; a rehearsal is never skipped.

        Raises SkippedError.
        """
        if self.rehearse:
            return
        free, _ = self.backend.mem_get_info(self.device)
        available = psutil.virtual_memory().available
        for have, need, what in ((free, device_gib, "GPU memory"), (available, ram_gib, "RAM")):
            if have < need * GIB:
                raise SkippedError(f"needs {need} GiB of {what}, {have / GIB:.1f} are free")

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder, gone afterwards."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def tell(self, finding: dict[str, Any]) -> None:
        """Writes a finding to the file that the parent process reads."""
        if self.told is not None:
            with self.told.open("a") as file:
                file.write(json.dumps(finding) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.{PLACES}g}") if isinstance(value, float) else value
