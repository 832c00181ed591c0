"""Filling a module with the tensors of a checkpoint: strictly, and with no more RAM than what is kept."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from leanwan.errors import InputError, listed

from ..utils.events import counted
from .reading import TensorFile, read_tensors

ALIGNMENT = 64  # bytes, of PyTorch's own allocations


def load_weights(
    module: nn.Module,
    source: str | Path | TensorFile,
    *,
    names: Callable[[str], str | list[str] | None] | None = None,
    dtype: Callable[[str], torch.dtype | None] | None = None,
    merge: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Fills a module that was built on the meta device.

    A tensor that keeps its type stays memory-mapped if the file aligns it. Other tensors are converted one at a time,
    so that peak RAM is the kept tensors plus one.

    Args:
        module: every parameter and persistent buffer is replaced; their shapes are the expected ones.
        source: a .safetensors or .pth file, or the index .json of a sharded one; or an open file.
        names: maps a name in the file to the module's; None skips the tensor; a list splits it along
            dimension 0 into equal parts. Default: the same name.
        dtype: maps the module's name to the type to keep it in, or None for the type in the file.
        merge: called with the module's name and the tensor in the file; returns the tensor to load, of the same shape.

    Raises:
        InputError: missing or damaged file; missing, unexpected or wrongly shaped tensors, which are listed.
    """
    tensors: list[tuple[str, Callable[[], torch.Tensor]]]
    if isinstance(source, (str, Path)):
        path, tensors = Path(source), list(read_tensors(Path(source)))
    else:
        path, tensors = source.path, [(name, partial(source.read, name)) for name in source.names]
    expected = module.state_dict()
    loaded, unexpected, misshaped = {}, [], []
    for stored_name, read in counted(tensors, len(tensors), f"Loading {path.name}"):
        targets = names(stored_name) if names else stored_name
        if targets is None:
            continue
        parts = [targets] if isinstance(targets, str) else targets
        tensor = read()
        if tensor.shape[:1] and tensor.shape[0] % len(parts):
            misshaped.append(f"{stored_name} {tuple(tensor.shape)}")
            continue
        for name, part in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor]):
            if name not in expected:
                unexpected.append(stored_name)
            elif part.shape != expected[name].shape:
                misshaped.append(
                    f"{stored_name} {tuple(part.shape)} instead of {tuple(expected[name].shape)}"
                )
            else:
                part = merge(name, part) if merge else part
                kept = dtype(name) if dtype else None
                loaded[name] = _aligned(part.to(kept or part.dtype))
    missing = [name for name in expected if name not in loaded]
    # A tensor of another shape is missing too; say it once.
    if misshaped:
        raise InputError(f"{path}: tensors of another shape: {listed(misshaped)}; is it for another task?")
    if missing or unexpected:
        found = [f"missing: {listed(missing)}"] if missing else []
        found += [f"unexpected: {listed(unexpected)}"] if unexpected else []
        raise InputError(f"{path}: not the expected tensors ({'; '.join(found)}); is it for another task?")
    module.load_state_dict(loaded, strict=True, assign=True)
    module.eval().requires_grad_(False)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an aligned address, copied if need be: at others CPU kernels round differently."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
