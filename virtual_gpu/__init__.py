"""A GPU made of CPU memory, for tests and benchmarks; see virtual_gpu.device."""

from .backend import register
from .device import Record, VirtualGPU
from .replay import least_capacity
from .streams import RaceError
from .support import LACK, UnsupportedError, require
from .tensor import DEVICE, VirtualTensor

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
