"""The memory options that were chosen for a run, with what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from leanwan.options import MemoryOptions

from .predict.stages_predicted import Stage

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The memory options chosen for a run, and what the run takes with them.

    Attributes:
        options: the memory options.
        stages: what each stage takes, by name, in order.
        room: bytes that the allocator may reserve.
        ram_bytes: RAM that the run takes beside the files that it maps.
        disk_bytes: bytes of the files that it maps.
        rates: source of the rates that the seconds are modelled with.
    """

    options: MemoryOptions
    stages: Mapping[str, Stage]
    room: float
    ram_bytes: int = 0
    disk_bytes: int = 0
    rates: str = field(default="", compare=False)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the allocator reserves in any stage."""
        return max(stage.reserved for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.room

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as values that JSON has."""
        return {
            "options": asdict(self.options),
            "stages": {name: stage._asdict() for name, stage in self.stages.items()},
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "ram_bytes": self.ram_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "rates": self.rates,
        }

    def line(self) -> str:
        """The plan in one line, for the user."""
        chosen = options_text(self.options) or "all on the device"
        return (
            f"{chosen}; {self.peak_bytes / GIB:.2f} GiB of {self.room / GIB:.2f}, {time_text(self.seconds)}"
        )


def options_text(options: MemoryOptions) -> str:
    """The options that differ from the defaults, as flags."""
    words = []
    for item in fields(options):
        value = getattr(options, item.name)
        if value == item.default or item.name == "vae_tile" and value == 0:
            continue
        if value is True:
            words.append(f"--{item.name}")
        else:
            words.append(f"--{item.name} {value:g}" if isinstance(value, float) else f"--{item.name} {value}")
    return " ".join(words)


def time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
