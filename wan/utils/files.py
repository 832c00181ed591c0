"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


def check_target(path: str | os.PathLike, field: str) -> None:
    """Fail now rather than after hours of work if `path` cannot become a file.

    Raises InputError, naming `field`, if it is a directory or its folder is missing or refuses a new file.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError("is a directory; add a file name", field, path)
    if not os.path.isdir(path.parent):
        raise InputError(f"no folder {path.parent}; create it or choose another place", field, path)
    try:
        with suppress(FileNotFoundError):
            os.stat(path)  # raises OSError if the name itself is impossible, too long for example
        with replacing(path, keep=False) as temporary:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{error.strerror}; choose another place", field, path) from error


@contextmanager
def replacing(
    path: str | os.PathLike, keep: bool = True, temporary: str | os.PathLike | None = None
) -> Iterator[Path]:
    """Context that yields a temporary name with `path`'s folder and suffix, and renames it to `path` at its end.

    If the body raises, KeyboardInterrupt included, or `keep` is false, the temporary file is removed instead. The body
    closes it, and nobody has `path` open or mapped: Windows renames neither from nor over such a file.

    Args:
        temporary: a name in the same folder to use instead, where no other process does; what a killed process left
            there is overwritten.
    """
    path = Path(path).absolute()
    temporary = Path(temporary or path.with_name(f".wan-{secrets.token_hex(4)}{path.suffix}"))
    try:
        yield temporary
        if keep:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
