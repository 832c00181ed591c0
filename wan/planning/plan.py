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
    """What was chosen.

    Attributes:
        options: the memory options.
        stages: by name, in order.
        room: bytes that the allocator may reserve.
        ram_bytes, disk_bytes: RAM that the run takes beside what it maps from the disk, and that.
        rates: what the seconds are modelled with.
    """

    options: MemoryOptions
    stages: Mapping[str, Stage]
    room: float
    ram_bytes: int = 0
    disk_bytes: int = 0
    rates: str = field(default="", compare=False)

    @property
    def peak_bytes(self) -> int:
        """Most that the allocator reserves."""
        return max(stage.reserved for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.room

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """JSON's values."""
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
        """What is told of it."""
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
