"""Prefetches pages of mapped weights from disk while the device computes."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch

WILL_NEED = 3  # MADV_WILLNEED on Linux, macOS and the BSDs


def read_ahead(tensor: torch.Tensor) -> bool:
    """Prefetches the pages of a tensor in CPU memory that are not in RAM.

    With madvise the system reads them in the background; without it this reads them, and returns when they are in RAM.

    Returns False if the system refused.
    """
    address, size = tensor.data_ptr(), tensor.nbytes
    advise = _advise()
    if advise is None:
        tensor.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
        return True
    before = address % mmap.PAGESIZE
    return advise(address - before, before + size, WILL_NEED) == 0


@functools.lru_cache
def _advise() -> Callable[..., Any] | None:
    """madvise(address, length, advice), or None where the system has none."""
    try:
        advise = ctypes.CDLL(None).madvise
    except (TypeError, OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
