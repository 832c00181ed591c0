"""A GPU made of CPU memory, for tests and benchmarks; see virtual_gpu.device."""

from .backend import register
from .device import VirtualGPU
from .hardware import DEVICE
from .replay import least_capacity
from .streams import RaceError, Record
from .support import LACK, UnsupportedError, require
from .tensor import VirtualTensor

__all__ = [
    "DEVICE",
    "LACK",
    "RaceError",
    "Record",
    "UnsupportedError",
    "VirtualGPU",
    "VirtualTensor",
    "least_capacity",
    "register",
    "require",
]
