"""Wan2.1 video generation in less memory, with the same picture."""

from . import configs as configs
from .first_last_frame2video import WanFLF2V
from .image2video import WanI2V
from .text2video import WanT2V
from .vace import WanVace

__all__ = ["WanFLF2V", "WanI2V", "WanT2V", "WanVace", "configs"]
