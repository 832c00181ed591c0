"""A GPU made of CPU memory, for tests and benchmarks; see virtual_gpu.device."""

from .backend import DEVICE
from .device import Record, VirtualGPU
from .replay import least_capacity
from .streams import RaceError
from .tensor import VirtualTensor

__all__ = ["DEVICE", "RaceError", "Record", "VirtualGPU", "VirtualTensor", "least_capacity"]
