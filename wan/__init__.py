"""Wan2.1 video generation in less memory, with the same picture."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from . import configs as configs
    from . import distributed as distributed
    from . import modules as modules
    from .first_last_frame2video import WanFLF2V
    from .image2video import WanI2V
    from .text2video import WanT2V
    from .vace import WanVace, WanVaceMP

__all__ = [
    "WanFLF2V",
    "WanI2V",
    "WanT2V",
    "WanVace",
    "WanVaceMP",
    "configs",
    "distributed",
    "modules",
    "plan",
]

_HOMES = {
    "WanFLF2V": "first_last_frame2video",
    "WanI2V": "image2video",
    "WanT2V": "text2video",
    "WanVace": "vace",
    "WanVaceMP": "vace",
    "plan": "run.planning",
}


def __getattr__(name: str) -> Any:
    """Imports a pipeline, with the libraries that it needs, or a package when it is first named."""
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in ("configs", "distributed", "modules"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
