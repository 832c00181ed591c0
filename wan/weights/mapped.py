"""Files of tensors that are memory-mapped, read-only, in pages that runs share.

The weights take no RAM that the system cannot reclaim. Files are in safetensors format
(https://huggingface.co/docs/safetensors), with a checksum of all their bytes at a fixed place in the header.
"""

import errno
import json
import math
import mmap
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from leanwan.errors import InputError

from ..utils.events import counted
from ..utils.outside import MISREAD, parse_json
from .reading import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**26  # bytes that are written and checked at a time
_BEFORE = b'{"__metadata__": {"checksum": "'  # how the header's text starts
_BLANK = b"0" * 10  # stands in the checksum's place while it is computed
_AT = 8 + len(_BEFORE)


class MappedFile:
    """An open file that write_mapped made: `names`, and `read(name)` for a tensor that lies in the file's pages.

    The tensors must not be written to.

    Args:
        path: of the file.
        fingerprint: the one that the file was written with.
        checked: whether the file's checksum is known to be right; else the whole file is read to check it.

    Raises:
        InputError: a file that is damaged, or not what `fingerprint` says.
    """

    def __init__(self, path: Path, fingerprint: str, checked: bool = False):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._start = 8 + int.from_bytes(self._map[:8], "little")
            whole = checked or self._map[_AT : _AT + len(_BLANK)] == self._checksum()
            self._entries = parse_json(self._map[8 : self._start]) if whole else {"__metadata__": {}}
            whole = self._entries.pop("__metadata__").get("fingerprint") == fingerprint
            self.names = list(self._entries)
            end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
            whole = whole and self._start + end == len(self._map)
        except (OSError, *MISREAD):
            whole = False
        if not whole:
            raise InputError(f"{path} is damaged, delete it and run again", "offload_folder")

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped."""
        entry = self._entries[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._map, dtype=dtype, count=math.prod(shape), offset=self._start + entry["data_offsets"][0]
            )
        return flat.view(shape)

    def _checksum(self) -> bytes:
        """The digits of the CRC-32 of all bytes, with _BLANK in the checksum's place."""
        data = memoryview(self._map)[_AT + len(_BLANK) :]
        checksum, starts = zlib.crc32(self._map[:_AT] + _BLANK), range(0, len(data), _PIECE)
        for start in counted(starts, len(starts), f"Checking {self.path.name}"):
            checksum = zlib.crc32(data[start : start + _PIECE], checksum)
        return _digits(checksum)


def write_mapped(
    path: Path,
    tensors: Iterable[tuple[str, Callable[[], torch.Tensor]]],
    dtype: Callable[[str], torch.dtype],
    fingerprint: str,
    title: str,
    merge: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Writes a file for MappedFile, one tensor in RAM at a time.

    Args:
        tensors: (name, function that reads it); each is read twice.
        dtype: maps a tensor's name to the type to keep it in.
        fingerprint: to be given when the file is opened.
        title: of the progress that is shown.
        merge: called with a name and a tensor; returns the tensor to write, of the same shape.

    Raises OSError: no room, which is found before anything is written, or no right to write.
    """
    tensors, entries, offset = list(tensors), {}, 0
    for name, read in tensors:
        shape, kept = tuple(read().shape), dtype(name)
        size = math.prod(shape) * kept.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[kept],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    free = shutil.disk_usage(path.parent).free
    if offset > free:
        told = f"{offset / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free"
        raise OSError(errno.ENOSPC, told)
    with open(path, "wb") as file:
        header = _header(entries, fingerprint)
        file.write(header)
        checksum = zlib.crc32(header)
        for name, read in counted(tensors, len(tensors), title):
            tensor = merge(name, read()) if merge else read()
            data = tensor.to(dtype(name)).contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, data.size, _PIECE):
                piece = data[start : start + _PIECE]
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
        file.seek(_AT)
        file.write(_digits(checksum))


def _header(entries: dict, fingerprint: str) -> bytes:
    """The head of a safetensors file, without its checksum; it aligns the data to 64 bytes."""
    metadata = {"checksum": _BLANK.decode(), "format": "pt", "fingerprint": fingerprint}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _digits(checksum: int) -> bytes:
    return b"%010d" % checksum
