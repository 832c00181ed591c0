"""A CPU tensor over the bytes of one on the stand-in's card."""

from __future__ import annotations

import ctypes

import torch


def on_card(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU's view of a tensor on the card: the same bytes, shape and strides. It does not keep them alive."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if not size:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    view = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch._conj(view) if tensor.is_conj() else view
