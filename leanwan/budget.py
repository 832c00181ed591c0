"""How much of a device's memory tensors may take: the arithmetic of a limit, and PyTorch's allocator held to it."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass

import torch

from .accelerator import EXACT_WORKSPACE, LIBRARY_BYTES, WORKSPACE_VARIABLE, initialise, spills_to_ram

CONTEXT = int(0.45 * 2**30)  # bytes that CUDA and its libraries take beside all tensors
STEADY = 0.75  # share of a card that a desktop and other programs leave free

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """The part of a device's memory that a process may use; by default of a card with CUDA that nobody else uses.

    Attributes:
        limit: bytes of the device for this process, CUDA's own among them; None for what is free.
        fraction: share to use of the bytes that are left for tensors.
        free: bytes that PyTorch's allocator has or could get from the driver now; CUDA's libraries may still take
            some of them.
        total: bytes of the device.
        cuda: whether CUDA's context and libraries are on the device.
    """

    limit: float | None
    fraction: float = 1.0
    free: float = math.inf
    total: float = math.inf
    cuda: bool = True

    @classmethod
    def on(cls, device: torch.device, limit: float | None = None, fraction: float = 1.0) -> Budget:
        """The budget on a device now. Raises InputError if the device cannot be initialised."""
        initialise(device)
        backend = torch.get_device_module(device)
        free, total = backend.mem_get_info(device)
        return cls(limit, fraction, free + backend.memory_reserved(device), total, device.type == "cuda")

    @property
    def context(self) -> int:
        """Bytes that CUDA and its libraries take beside all tensors."""
        return CONTEXT if self.cuda else 0

    @property
    def room(self) -> float:
        """Bytes for PyTorch's allocator now; 0 if less is free than CUDA's libraries may still load."""
        free = self.free - (LIBRARY_BYTES if self.cuda else 0)
        return self._usable(free if self.limit is None else min(free, self.limit - self.context))

    @property
    def steady(self) -> float:
        """Bytes for PyTorch's allocator whatever other programs take: of the limit, or else of STEADY of the device."""
        if self.limit is None:
            return self._usable(STEADY * (self.total - self.context))
        return self._usable(self.limit - self.context)

    def limit_for(self, nbytes: float) -> float:
        """The least limit that leaves `nbytes` for PyTorch's allocator."""
        return nbytes / self.fraction + self.context

    def _usable(self, nbytes: float) -> float:
        return self.fraction * max(0.0, nbytes)


def hold_to(device: torch.device | str, nbytes: float) -> bool:
    """Limits the bytes that PyTorch's allocator takes from a device, if the backend can; returns whether it can."""
    backend = torch.get_device_module(device)
    limit = getattr(backend, "set_per_process_memory_fraction", None)
    if limit is not None:
        _, total = backend.mem_get_info(device)
        limit(min(1.0, nbytes / total), device)
    return limit is not None


def hold_to_free(device: torch.device | str) -> int | None:
    """On Windows and WSL, limits this process to the memory that is free now.

    Their drivers move what does not fit to RAM, many times slower, and report nothing; held to what is free,
    PyTorch's allocator runs out of memory in time for smaller tiles. What other programs free later stays unused.
    Elsewhere the driver itself refuses, so nothing is limited.

    Returns:
        The limit in bytes, None for none.
    """
    device = torch.device(device)
    if device.type == "cpu" or not spills_to_ram():
        return None
    if not hasattr(torch.get_device_module(device), "mem_get_info"):
        return None
    held = int(max(0, Budget.on(device).free - LIBRARY_BYTES))
    if not hold_to(device, held):
        return None
    log.info(f"Held to the {held / 2**30:.2f} GiB that are free on {device}")
    return held


def workspace_bytes(capability: tuple[int, int], exact: bool = False) -> tuple[int, int]:
    """Bytes of the workspaces that cuBLAS and cublasLt keep in PyTorch's allocator from their first matrix products on.

    cublasLt computes products with a bias, and in exact_arithmetic all. Each has a workspace for every stream on which
    a thread multiplies; only one thread does, on one stream. The sizes are those that ATen/cuda/CublasHandlePool.cpp
    chooses, in the version of PyTorch that takes most: versions after 2.10 give capability 10 and 12 what 9 has, and
    cublasLt nothing of its own.

    Args:
        capability: of the card.
        exact: whether the products are in exact_arithmetic.
    """
    config = os.environ.get(WORKSPACE_VARIABLE, EXACT_WORKSPACE if exact else "")
    by_default = [(4096, 8)] if capability >= (9, 0) else [(4096, 2), (16, 8)]
    buffers = re.findall(r":(\d+):(\d+)", config) or by_default
    return sum(int(size) * int(count) for size, count in buffers) * 2**10, 2**20
