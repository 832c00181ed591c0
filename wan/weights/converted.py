"""Weights converted once to the types they compute in, and mapped from disk from then on."""

import contextlib
import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from leanwan.errors import InputError

from ..utils.files import replacing, sweep
from ..utils.outside import parse_json
from .fingerprints import checkpoint_fingerprint
from .lora import Loras
from .mapped import MappedFile, write_mapped
from .reading import checkpoint_files, read_tensors

log = logging.getLogger(__name__)

FORMAT = "2"  # raise it when the meaning of the files changes
UNUSED_DAYS = 30  # after which a conversion is removed
_CONVERTED = re.compile(r"[^.].*-[0-9a-f]{16}\.safetensors")


class OffloadFolder:
    """A folder of converted checkpoints, which runs may share.

    Beside each conversion a record, `NAME.json`, tells its checkpoint and the version of the file whose checksum was
    found right; the record's time is that of the last use. Conversions of another FORMAT, those whose checkpoint has
    changed or is gone, and those not used for UNUSED_DAYS are removed, which is logged.

    Attributes:
        mapped: the files that `converted` returned.

    Args:
        path: made if it is missing.

    Raises:
        InputError: it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.mapped: list[Path] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def converted(
        self, source: str | Path, dtype: Callable[[str], torch.dtype], loras: Loras | None = None
    ) -> MappedFile:
        """The tensors of a checkpoint in the types that `dtype` names, mapped from the folder.

        Converts them if no run has done so before; an interrupted conversion leaves no file that a run would use.

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
        self._tidy(target)
        try:
            with self._locked(target):
                # Never over a file that is there: a run may have it mapped, and Windows keeps what is mapped.
                if not target.exists():
                    self._convert(source, dtype, loras, target, fingerprint)
        except (OSError, NotImplementedError) as error:  # the latter where the disk's format has no locks
            raise self._error(error) from error
        checked = _version(target)
        file = MappedFile(target, fingerprint, checked=checked == _record(target).get("checked"))
        self.mapped.append(target)
        with contextlib.suppress(OSError):  # without a record the next run takes the checksum again
            _write_record(target, {"format": FORMAT, "source": _versions(source), "checked": checked})
        return file

    @contextlib.contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        """Only one process at a time converts to `target`; the others find it done."""
        if target.exists():
            yield
            return
        lock = target.with_suffix(".lock")
        with FileLock(lock):
            yield
            with contextlib.suppress(OSError):  # on Windows it goes when the next run tidies up
                lock.unlink(missing_ok=True)

    def _convert(
        self,
        source: Path,
        dtype: Callable[[str], torch.dtype],
        loras: Loras | None,
        target: Path,
        fingerprint: str,
    ) -> None:
        merge, title = loras.merge if loras else None, f"Converting {source.name}"
        with replacing(target) as partial:
            write_mapped(partial, read_tensors(source), dtype, fingerprint, title, merge)

    def _tidy(self, current: Path) -> None:
        """Removes files that no run can use any more, or none has used for long, except the file `current`."""
        sweep(self.path)
        with contextlib.suppress(OSError):
            for path in list(self.path.iterdir()):
                if path.suffix == ".lock" and _CONVERTED.fullmatch(path.with_suffix(".safetensors").name):
                    _remove_free_lock(path)
                elif path != current and _CONVERTED.fullmatch(path.name) and _is_old(path):
                    log.info(
                        f"Removing {path}: made of another checkpoint, by another version, or long unused"
                    )
                    for file in (path, path.with_suffix(".json")):
                        with contextlib.suppress(OSError):  # Windows keeps what a run has mapped
                            file.unlink(missing_ok=True)

    def _error(self, error: Exception) -> InputError:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENOSPC:
            return InputError(
                f"the disk is full ({reason}), free space or choose another folder",
                "offload_folder",
                self.path,
            )
        return InputError(f"cannot be used ({reason}), choose another folder", "offload_folder", self.path)


def _version(path: Path) -> list[int]:
    """Size and time of a file, which tell it from earlier files of that name."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _versions(source: Path) -> dict[str, list[int]]:
    return {str(path.absolute()): _version(path) for path in checkpoint_files(source)}


def _record(target: Path) -> dict[str, Any]:
    """What is known of a conversion; empty if nothing is."""
    try:
        record = parse_json(target.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(target: Path, record: dict[str, Any]) -> None:
    with replacing(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record))


def _is_old(target: Path) -> bool:
    """Whether a conversion has another FORMAT, its checkpoint has changed or is gone, or no run used it for long."""
    record, known = target.with_suffix(".json"), _record(target)
    if known and known.get("format") != FORMAT:
        return True
    source = known.get("source")
    used = max(path.stat().st_mtime for path in (target, record) if path.exists())
    if time.time() - used > UNUSED_DAYS * 24 * 3600:
        return True
    try:
        return isinstance(source, dict) and any(
            _version(Path(path)) != version for path, version in source.items()
        )
    except (OSError, ValueError):
        return True


def _remove_free_lock(path: Path) -> None:
    """Removes a lock that no process holds. A process that waits for it just then converts once more than needed."""
    with contextlib.suppress(Timeout, OSError, NotImplementedError), FileLock(path, timeout=0):
        path.unlink()
