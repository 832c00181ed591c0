"""Reading checkpoint files: lazily, one tensor at a time."""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch

from leanwan.errors import InputError, shown

from ..utils.outside import MISREAD, parse_json

LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file
# Names of types in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile(Protocol):
    """An open file of tensors."""

    path: Path
    names: list[str]

    def read(self, name: str) -> torch.Tensor: ...


class _SafetensorsFile:
    """One safetensors file. Each read maps the file anew, so that its pages are freed with the tensor."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self.names = list(file.keys())

    def _open(self) -> Any:
        try:
            return safetensors.safe_open(self.path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error

    def read(self, name: str) -> torch.Tensor:
        with self._open() as file:
            return read_numbers(file, name)


class _PickleFile:
    """One `torch.save` file, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            try:
                self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # the old format cannot be mapped
                if "mmap" not in str(error):
                    raise
                self._tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(self._tensors, dict):
                raise TypeError(f"it holds a {type(self._tensors).__name__}, not named tensors")
            for name, tensor in self._tensors.items():
                dense = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
                if not isinstance(name, str) or not dense:
                    raise TypeError(f"{name} in it is no dense tensor")
            self.names = list(self._tensors)
        except (RuntimeError, OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise _damaged(path, error) from error

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def read_numbers(file: Any, name: str) -> torch.Tensor:
    """A tensor of an open safetensors file.

    Raises InputError, which names the tensor, if its type is not one of real numbers, or PyTorch cannot convert it.
    """
    try:
        tensor = file.get_tensor(name)
        if not tensor.is_complex():
            tensor.flatten()[:1].float()
            return tensor
    except (RuntimeError, safetensors.SafetensorError):
        pass
    kind = file.get_slice(name).get_dtype()
    raise InputError(f"{shown(name)} is of type {kind}, which cannot be read; get the file in another type")


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:160]
    return InputError(f"{path}: cannot be read as a checkpoint, download it again ({reason})")


def checkpoint_files(path: Path) -> list[Path]:
    """The file itself, or the shards that an index names. Raises InputError for a missing or damaged one."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file, see --ckpt_dir")
    if path.suffix != ".json":
        return [path]
    try:
        shards = sorted(set(parse_json(path.read_text())["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("it names files that are not beside it")
    except MISREAD as error:
        raise _damaged(path, error) from error
    for shard in shards:
        if not (path.parent / shard).is_file():
            raise InputError(f"{path.parent / shard}: no such checkpoint file, although {path.name} names it")
    return [path.parent / shard for shard in shards]


def stored_types(path: Path) -> dict[str, torch.dtype]:
    """The types of the tensors in a .safetensors file, or in the shards of an index; damaged files are skipped."""
    types: dict[str, torch.dtype] = {}
    for file in checkpoint_files(path):
        try:
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                entries = parse_json(stream.read(min(length, LONGEST_HEADER)))
            types |= {
                name: DTYPES[entry["dtype"]] for name, entry in entries.items() if name != "__metadata__"
            }
        except (OSError, MemoryError, *MISREAD):
            continue  # loading the file raises the error
    return types


def read_tensors(path: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yields (tensor name, function that reads it) for a .safetensors, .pth or index .json file.

    Raises InputError for a missing or damaged file.
    """
    for file_path in checkpoint_files(Path(path)):
        file = _SafetensorsFile(file_path) if file_path.suffix == ".safetensors" else _PickleFile(file_path)
        for name in file.names:
            yield name, partial(file.read, name)
