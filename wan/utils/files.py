"""Files that appear whole or not at all."""

import os
import platform
import re
import secrets
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from leanwan.errors import InputError

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(rf"\.wan-{_HOST}-(\d+)-[0-9a-f]{{8}}(\..*)?")


def check_target(path: str | os.PathLike, field: str) -> None:
    """Fail now rather than after hours of work if `path` cannot become a file.

    Raises InputError, naming `field`, if it is a directory, a device or another special file, a link, or its folder is
    missing or refuses a new file.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError("is a directory; add a file name", field, path)
    if os.path.islink(path):
        raise InputError("is a link, which would be replaced; give the file that it points to", field, path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError("is no regular file and would be replaced; choose another place", field, path)
    if not os.path.isdir(path.parent):
        raise InputError(f"no folder {path.parent}; create it or choose another place", field, path)
    try:
        with suppress(FileNotFoundError):
            os.stat(path)  # raises OSError if the name itself is impossible, too long for example
        with replacing(path, keep=False) as temporary:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{error.strerror}; choose another place", field, path) from error


def is_plain_file(path: str | os.PathLike) -> bool:
    """Whether a path is itself a regular file: not a link to one, no folder or pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # no such file; a name that cannot be one
        return False


def user_cache(name: str) -> Path:
    """The user's folder for data that can be made again: `$XDG_CACHE_HOME/NAME`, or `~/.cache/NAME` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


def other_folders(folder: Path) -> Iterator[Path]:
    """Folders for a file that `folder` has no room for: the one for temporary files, and the user's home."""
    for other in (Path(tempfile.gettempdir()), Path.home()):
        if other.is_dir() and other != folder:
            yield other


@contextmanager
def replacing(path: str | os.PathLike, keep: bool = True, over: bool = True) -> Iterator[Path]:
    """Context that yields a temporary name with `path`'s folder and suffix, and renames it to `path` at its end.

    The file is flushed to the disk before it takes the name.

    If the body raises, KeyboardInterrupt included, or `keep` is false, the temporary file is removed instead. The body
    must close it, and nobody may have `path` open or mapped: Windows renames neither from nor over such a file.

    Args:
        keep: see above.
        over: whether a file that is at `path` by then is replaced; if not, FileExistsError is raised.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".wan-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if keep:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            (os.replace if over else _place)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path) -> None:
    """Renames a file. Raises FileExistsError if the name is taken, even if it was taken just now."""
    if os.name == "nt":
        temporary.rename(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if path.exists():
            raise FileExistsError(f"{path} exists") from error
        os.replace(temporary, path)


def sweep(folder: str | os.PathLike) -> None:
    """Removes what killed processes of this machine left in a folder while they were `replacing` a file there."""
    with suppress(OSError):
        for entry in Path(folder).iterdir():
            found = _TEMPORARY.fullmatch(entry.name)
            if found and not psutil.pid_exists(int(found[1])):
                with suppress(OSError):
                    entry.unlink()
