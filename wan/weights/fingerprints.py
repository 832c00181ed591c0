"""Digests that tell one checkpoint from another."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from leanwan.errors import InputError

from .reading import checkpoint_files, read_tensors

EDGE = 2**20  # bytes at both ends of a file that its fingerprint covers
PIECES, PIECE = 64, 2**16  # of a file that its own fingerprint covers, and the bytes of each


def checkpoint_fingerprint(source: Path, dtype: Callable[[str], torch.dtype], version: str) -> str:
    """A digest that tells apart checkpoints, and the conversions of one checkpoint.

    It covers the names, sizes, times and ends of the files, and each tensor's name and type.

    Args:
        source: a .safetensors, .pth or index .json file.
        dtype: maps a tensor's name to the type to keep it in.
        version: text that tells apart other differences between conversions.

    Raises InputError for a missing or damaged file.
    """
    digest = hashlib.sha256(version.encode())
    for path in checkpoint_files(source):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:{path.stat().st_mtime_ns}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    for name, _ in read_tensors(source):
        digest.update(f"{name}:{dtype(name)}".encode())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Digest of a file's size and of PIECES pieces of it, spread evenly: of all of a small one."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(PIECES):
            file.seek(max(0, size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


class FileSizes:
    """Remembers the sizes of mapped files: reading what was cut off one would end the process by a signal."""

    def __init__(self) -> None:
        self._sizes: dict[Path, int] = {}

    def remember(self, paths: Iterable[Path]) -> None:
        """Remembers the present sizes of files, except of those that are known already."""
        for path in paths:
            self._sizes.setdefault(path, path.stat().st_size)

    def check(self) -> None:
        """Raises InputError for a file that has become shorter. A deleted file is still there where it is mapped."""
        for path, size in self._sizes.items():
            with contextlib.suppress(OSError):
                if path.stat().st_size < size:
                    raise InputError(
                        f"{path} was cut short while it was in use, download or convert it again"
                    )
