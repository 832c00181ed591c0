"""Wan2.1 video generation in less memory, with the same picture."""

from typing import TYPE_CHECKING

from leanwan import __version__
from leanwan.lazy import lazily

if TYPE_CHECKING:
    from . import configs, distributed, modules
    from .first_last_frame2video import WanFLF2V
    from .image2video import WanI2V
    from .text2video import WanT2V
    from .vace import WanVace, WanVaceMP

__all__ = [
    "__version__",
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
    "configs": "",
    "distributed": "",
    "modules": "",
}

__getattr__ = lazily(__name__, _HOMES)
