"""The environment of a process that runs on the stand-in driver. Processes that it starts run on it too."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .build import LIBRARY, cached

GIB = 2**30
INSIDE = Path(__file__).parent / "inside"
LARGEST_COPY = (
    8 << 20
)  # without values: bytes; larger copies between RAM and card would only take time and RAM


@dataclass(frozen=True)
class Card:
    """What the driver claims to be; see __main__.py.

    Attributes:
        capacity, context: GiB; the second is taken by CUDA itself and its libraries.
        capability: ten times the compute capability.
    """

    capacity: float = 24
    context: float = 0.41
    capability: int = 86
    fixed_segments: bool = False
    no_values: bool = False
    late: str = "copies"

    def told(self) -> str:
        major, minor = divmod(self.capability, 10)
        parts = [f"{self.capacity:g} GiB, {self.context:g} of them CUDA's own", f"capability {major}.{minor}"]
        parts += ["segments cannot grow"] * self.fixed_segments
        parts += ["no values" if self.no_values else f"values of the CPU, late: {self.late}"]
        return f"a card of {', '.join(parts)}"


def environment(card: Card, report: Path) -> dict[str, str]:
    """Variables for a process in which PyTorch finds `card`.

    report: a file to which processes append lines: what was asked for and not done.

    Raises UnavailableError where the driver can't be built.
    """
    folder = cached()
    variables = {
        "STAND_IN_CAPACITY": int(card.capacity * GIB),
        "STAND_IN_CONTEXT": int(card.context * GIB),
        "STAND_IN_CAPABILITY": card.capability,
        "STAND_IN_GROWING": int(not card.fixed_segments),
        "STAND_IN_LATE": card.late,
        "STAND_IN_VALUES": int(not card.no_values),
        "STAND_IN_REPORT": report.resolve(),
        "LD_PRELOAD": folder / LIBRARY,
    }
    if card.no_values:
        variables["STAND_IN_LARGEST_COPY"] = LARGEST_COPY
    paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": INSIDE, "PATH": Path(sys.executable).parent}
    for name, first in paths.items():
        rest = os.environ.get(name)
        variables[name] = f"{first}{os.pathsep}{rest}" if rest else first
    return os.environ | {name: str(value) for name, value in variables.items()}
