"""Weights converted once to the types they compute in, and mapped from disk from then on.

The mapping is shared and read-only: the weights take no RAM that the system cannot take back, and several runs use
the same pages. Files are in safetensors format (https://huggingface.co/docs/safetensors).
"""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..utils.checkpoint import checkpoint_files, read_tensors
from ..utils.errors import InputError

FORMAT = "1"  # raise it when the meaning of the files changes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_EDGE = 2**20  # bytes at both ends of a source file that its fingerprint covers
_PIECE = 2**26  # bytes that are written and checked at a time


class OffloadFolder:
    """A folder of converted checkpoints, which runs may share.

    Args:
        path: made if it is missing.

    Raises:
        InputError: it cannot be made or written to.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def converted(self, source, dtype):
        """The tensors of a checkpoint in the types that `dtype` names, mapped from the folder.

        Converts them if no run has done so before; an interrupted conversion leaves nothing behind that counts.

        Args:
            source: a .safetensors, .pth or index .json file.
            dtype: maps a tensor's name to the type to keep it in.

        Returns:
            MappedFile

        Raises:
            InputError: a folder that is full or read-only, a missing or damaged source, a damaged file in the folder.
        """
        source = Path(source)
        fingerprint = _fingerprint(source, dtype)
        target = self.path / f"{source.name.split('.')[0]}-{fingerprint[:16]}.safetensors"
        try:
            with self._locked(target):
                if not target.exists():
                    self._convert(source, dtype, target, fingerprint)
        except OSError as error:
            raise self._error(error) from error
        return MappedFile(target, fingerprint)

    @contextmanager
    def _locked(self, target):
        """Only one process at a time converts to `target`; the others find it done."""
        if target.exists():
            yield
            return
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _convert(self, source, dtype, target, fingerprint):
        entries, offset = {}, 0
        for name, read in read_tensors(source):
            shape, kept = tuple(read().shape), dtype(name)
            size = math.prod(shape) * kept.itemsize
            entries[name] = {
                "dtype": _DTYPE_NAMES[kept],
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
        partial = target.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                file.write(_header(entries, fingerprint, checksum=0))
                checksum = 0
                for name, read in tqdm(list(read_tensors(source)), desc=f"Converting {source.name}"):
                    data = read().to(dtype(name)).contiguous().view(-1).view(torch.uint8).numpy()
                    for start in range(0, data.size, _PIECE):
                        piece = data[start : start + _PIECE]
                        checksum = zlib.crc32(piece, checksum)
                        file.write(piece)
                file.seek(0)
                file.write(_header(entries, fingerprint, checksum))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _error(self, error):
        if error.errno == errno.ENOSPC:
            return InputError(
                f"--offload_folder {self.path}: the disk is full, free space or choose another folder"
            )
        return InputError(
            f"--offload_folder {self.path}: cannot be used ({error.strerror}), choose another folder"
        )


class MappedFile:
    """A converted checkpoint: `names`, and `read(name)` for a tensor that lies in the file's pages.

    The tensors must not be written to.

    Raises:
        InputError: a file that is damaged, or not what `fingerprint` says.
    """

    def __init__(self, path, fingerprint):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._map[:8], "little")
            self._entries = json.loads(self._map[8 : 8 + length])
            metadata = self._entries.pop("__metadata__")
            self._start = 8 + length
            self.names = list(self._entries)
            whole = metadata["fingerprint"] == fingerprint and int(metadata["checksum"]) == self._checksum()
        except (OSError, ValueError, KeyError, OverflowError):
            whole = False
        if not whole:
            raise InputError(f"--offload_folder: {path} is damaged, delete it and run again")

    def read(self, name):
        """The tensor `name`, mapped."""
        entry = self._entries[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._map, dtype=dtype, count=math.prod(shape), offset=self._start + entry["data_offsets"][0]
            )
        return flat.view(shape)

    def _checksum(self):
        data = memoryview(self._map)[self._start :]
        checksum = 0
        for start in tqdm(range(0, len(data), _PIECE), desc=f"Checking {self.path.name}", leave=False):
            checksum = zlib.crc32(data[start : start + _PIECE], checksum)
        return checksum


def _header(entries, fingerprint, checksum):
    """The head of a safetensors file; its length depends on the entries alone, and aligns the data to 64 bytes."""
    metadata = {"format": "pt", "fingerprint": fingerprint, "checksum": f"{checksum:010}"}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _fingerprint(source, dtype):
    """Tells checkpoints, and what is kept of them, apart: names, sizes, times and ends of the files, and the types."""
    digest = hashlib.sha256(FORMAT.encode())
    for path in checkpoint_files(source):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:{path.stat().st_mtime_ns}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    for name, _ in read_tensors(source):
        digest.update(f"{name}:{dtype(name)}".encode())
    return digest.hexdigest()
