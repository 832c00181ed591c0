"""Weights converted once to the types they compute in, and mapped from disk from then on."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock

from ..utils.errors import InputError
from ..utils.files import replacing
from .fingerprints import checkpoint_fingerprint
from .lora import Loras
from .mapped import MappedFile, write_mapped
from .reading import read_tensors

FORMAT = "1"  # raise it when the meaning of the files changes


class OffloadFolder:
    """A folder of converted checkpoints, which runs may share.

    Args:
        path: made if it is missing.

    Raises:
        InputError: it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def converted(
        self, source: str | Path, dtype: Callable[[str], torch.dtype], loras: Loras | None = None
    ) -> MappedFile:
        """The tensors of a checkpoint in the types that `dtype` names, mapped from the folder.

        Converts them if no run has done so before; an interrupted conversion leaves nothing behind that counts.

        Args:
            source: a .safetensors, .pth or index .json file.
            dtype: maps a tensor's name to the type to keep it in.
            loras: to be merged into the tensors before they are converted.

        Raises:
            InputError: a folder that is full or read-only, a missing or damaged source, a damaged file in the folder.
        """
        source = Path(source)
        fingerprint = checkpoint_fingerprint(source, dtype, f"{FORMAT} {loras.identity}" if loras else FORMAT)
        target = self.path / f"{source.name.split('.')[0]}-{fingerprint[:16]}.safetensors"
        try:
            with self._locked(target):
                # Never over a file that is there: a run may have it mapped, and Windows keeps what is mapped.
                if not target.exists():
                    self._convert(source, dtype, loras, target, fingerprint)
        except (OSError, NotImplementedError) as error:  # the latter where the disk's format has no locks
            raise self._error(error) from error
        return MappedFile(target, fingerprint)

    @contextlib.contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        """Only one process at a time converts to `target`; the others find it done."""
        if target.exists():
            yield
            return
        with FileLock(target.with_suffix(".lock")):
            yield

    def _convert(
        self,
        source: Path,
        dtype: Callable[[str], torch.dtype],
        loras: Loras | None,
        target: Path,
        fingerprint: str,
    ) -> None:
        merge, title = loras.merge if loras else None, f"Converting {source.name}"
        with replacing(target, temporary=target.with_suffix(".partial")) as partial:
            write_mapped(partial, read_tensors(source), dtype, fingerprint, title, merge)

    def _error(self, error: Exception) -> InputError:
        if getattr(error, "errno", None) == errno.ENOSPC:
            return InputError(
                "the disk is full, free space or choose another folder", "offload_folder", self.path
            )
        reason = getattr(error, "strerror", None) or error
        return InputError(f"cannot be used ({reason}), choose another folder", "offload_folder", self.path)
