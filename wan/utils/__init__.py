"""What is needed everywhere; the names that programs written for Wan2.1 import from here are imported when used."""

import importlib
from typing import Any

_HOMES = {
    "FlowDPMSolverMultistepScheduler": "fm_solvers",
    "get_sampling_sigmas": "fm_solvers",
    "retrieve_timesteps": "fm_solvers",
    "FlowUniPCMultistepScheduler": "fm_solvers_unipc",
    "VaceVideoProcessor": "vace_processor",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
