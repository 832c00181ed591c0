"""A GPU made of CPU memory, for tests and benchmarks; see virtual_gpu.device."""

from .device import DEVICE, RaceError, Record, VirtualGPU, VirtualTensor

__all__ = ["DEVICE", "RaceError", "Record", "VirtualGPU", "VirtualTensor"]
