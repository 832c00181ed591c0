"""A tree whose files are reached without leaving it, by one program at a time."""

from __future__ import annotations

import os
import re
import stat
from contextlib import contextmanager, suppress

from . import Refused

try:
    import fcntl
except ImportError:  # Windows, where folders have no descriptors either: there they are reached by path
    fcntl = None

LARGEST, LONGEST = 2**20, 20_000  # bytes and lines of a file, many times what BASE's have
LOCK = ".wan-patch-lock"
READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
FOLDER = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)
NAME = re.compile(r"(?!\.\.?$)[\w.-]+")
POINTS_ELSEWHERE = 0x20000000  # bit of Windows' reparse tags that symbolic links and junctions have


def look(name, shown, dir_fd=None):
    """os.lstat of it, None if it does not exist; Refused, by the name `shown`, if it is neither file nor folder."""
    try:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(info.st_mode) or getattr(info, "st_reparse_tag", 0) & POINTS_ELSEWHERE:
        raise Refused(f"nothing was changed: {shown} is a link; put what it leads to in its place first")
    if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
        raise Refused(f"nothing was changed: {shown} is neither a file nor a folder; move it away first")
    return info


def read_regular(name, shown, dir_fd=None):
    """The file's bytes, None if it does not exist; Refused at once if it is a link, a pipe, too large or the like."""
    info = look(name, shown, dir_fd)
    if info is None:
        return None
    if stat.S_ISREG(info.st_mode):
        with open(os.open(name, READ, dir_fd=dir_fd), "rb") as stream:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it may have been exchanged
                content = stream.read(LARGEST + 1)
                if len(content) <= LARGEST and content.count(b"\n") <= LONGEST:
                    return content
                raise Refused(
                    f"nothing was changed: {shown} has more than {LARGEST} bytes or {LONGEST} lines, so it is none of "
                    "Wan2.1's; put that in its place"
                )
    raise Refused(f"nothing was changed: {shown} is not a file; move it away first")


class Rooted:
    """The files below a folder, by their paths with "/"; entered, it has the folder for itself.

    No path leads out: links on it are refused by name. On POSIX each folder is opened in the one above it, so that
    none can be exchanged in between. Every method raises Refused or OSError.
    """

    def __init__(self, folder):
        if not os.path.isdir(folder):
            raise Refused(f"{folder} is not a folder; give the one that holds Wan2.1's wan")
        self.path = os.path.realpath(folder)

    def __enter__(self):
        """Locks the folder, until the program ends at the latest; Refused if another has it."""
        try:
            if fcntl:
                self._root = self._lock = os.open(self.path, FOLDER)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                self._root = self.path
                flags = os.O_CREAT | os.O_EXCL | os.O_TEMPORARY  # Windows removes it when it is closed
                self._lock = os.open(os.path.join(self.path, LOCK), flags)
        except (BlockingIOError, FileExistsError) as error:
            if fcntl:
                os.close(self._lock)
            raise Refused(
                f"nothing was changed: another apply.py is at work on {self.path}; run this one when that has ended"
            ) from error
        return self

    def __exit__(self, *exception):
        os.close(self._lock)

    def shown(self, path):
        return os.path.join(self.path, *path.split("/"))

    @contextmanager
    def _at(self, path, make=False):
        """(name, dir_fd) by which os functions reach the path; FileNotFoundError if it has no folder and make=False."""
        folder, opened = self._root, []
        *above, last = path.split("/")
        try:
            for depth, part in enumerate([*above, last], 1):
                if not NAME.fullmatch(part):
                    raise Refused(
                        f"nothing was changed: {path} is no path in a tree; fetch the patches folder again"
                    )
                name, dir_fd = (part, folder) if fcntl else (os.path.join(folder, part), None)
                if depth > len(above):
                    yield name, dir_fd
                    return
                here = self.shown("/".join(above[:depth]))
                info = look(name, here, dir_fd)
                if info is None and make:
                    os.mkdir(name, dir_fd=dir_fd)
                elif info is not None and not stat.S_ISDIR(info.st_mode):
                    raise Refused(f"nothing was changed: {here} is not a folder; move it away first")
                folder = name
                if fcntl:
                    folder = os.open(name, FOLDER, dir_fd=dir_fd)
                    opened.append(folder)
        except OSError as error:
            error.filename, error.filename2 = self.shown(path), None
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def look(self, path):
        """os.lstat of the file or folder, "" the tree itself; None if it does not exist."""
        if not path:
            return os.stat(self._root)
        with suppress(FileNotFoundError), self._at(path) as (name, dir_fd):
            return look(name, self.shown(path), dir_fd)

    def read(self, path):
        """The file's bytes; None if it does not exist."""
        with suppress(FileNotFoundError), self._at(path) as (name, dir_fd):
            return read_regular(name, self.shown(path), dir_fd)

    def create(self, path, content, mode=None, times=None):
        """Makes the file, and folders that it lacks; FileExistsError if anything has its name.

        mode: permissions, the usual ones of new files without. times: (access, modification) in ns, now without.
        """
        with self._at(path, make=True) as (name, dir_fd):
            with open(os.open(name, CREATE, 0o666 if mode is None else 0o600, dir_fd=dir_fd), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                if fcntl:
                    self._dress(stream.fileno(), mode, times)
            if not fcntl:
                self._dress(name, mode, times)

    @staticmethod
    def _dress(file, mode, times):
        if mode is not None:
            os.chmod(file, mode)
        if times is not None:
            os.utime(file, ns=times)

    def take(self, path, ending):
        """The file whose name is longer by the ending takes the place of `path`."""
        with self._at(path) as (name, dir_fd):
            os.replace(name + ending, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def remove(self, path):
        """Removes the file, if it exists."""
        with suppress(FileNotFoundError), self._at(path) as (name, dir_fd):
            if look(name, self.shown(path), dir_fd) is not None:
                os.remove(name, dir_fd=dir_fd)

    def prune(self, path):
        """Removes the folders above the path that nothing is in."""
        while "/" in path:
            path = path.rsplit("/", 1)[0]
            try:
                with self._at(path) as (name, dir_fd):
                    os.rmdir(name, dir_fd=dir_fd)
            except (OSError, Refused):
                return
