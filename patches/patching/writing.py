"""Files written all or none, also when a signal or a full disk comes between."""

from __future__ import annotations

import signal
import stat
from contextlib import suppress
from typing import NamedTuple

from . import Refused

NEW, OLD = ".wan-patch-new", ".wan-patch-old"  # endings of temporary files, beside the file that they replace
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Change(NamedTuple):
    """A file's content before and after; None where it does not exist."""

    path: str
    old: bytes | None
    new: bytes | None


def check_writable(tree, path):
    """A file or folder that its owner made read-only stays as it is, also for root."""
    folder = path.rpartition("/")[0]
    while tree.look(folder) is None:
        folder = folder.rpartition("/")[0]
    for name in (folder, path):
        info = tree.look(name)
        if info is not None and not info.st_mode & stat.S_IWUSR:
            raise Refused(
                f"nothing was changed: {tree.shown(name)} is read-only; make it writable (chmod u+w) first"
            )


def check_temporary(tree, path):
    """What has a temporary file's name must be one that an earlier run left: Refused if it is not a file."""
    for ending in (NEW, OLD):
        tree.read(path + ending)


def clean(tree, paths):
    """Remove temporary files, and folders that nothing is left in; what can't be is left."""
    for path in paths:
        for ending in (NEW, OLD):
            with suppress(OSError, Refused):
                tree.remove(path + ending)
        tree.prune(path)


def put_back(tree, changes):
    """Give the files their old content again, from the copies beside them."""
    failed = []
    for change in changes:
        try:
            if change.old is None:
                tree.remove(change.path)
            else:
                tree.take(change.path, OLD)
        except (OSError, Refused) as error:
            failed.append(f"{tree.shown(change.path)} ({getattr(error, 'strerror', None) or error})")
    if failed:
        raise Refused(f"could not put back {', '.join(failed)}; the old content is beside it, in *{OLD}")


def disturbed(tree, change):
    return Refused(
        f"nothing was changed: something else wrote {tree.shown(change.path)} meanwhile; run it again"
    )


def write(tree, changes):
    """Give every file its new content; if that fails, leave all as they were and raise.

    Everything that needs room on the disk is written under temporary names first; after that there are only renames.
    """
    paths = [change.path for change in changes]
    clean(tree, paths)
    begun = []
    try:
        for change in changes:
            info, mode = tree.look(change.path), None
            if (info is None) != (change.old is None):
                raise disturbed(tree, change)
            if info is not None:
                mode = stat.S_IMODE(info.st_mode)
                tree.create(change.path + OLD, change.old, mode, (info.st_atime_ns, info.st_mtime_ns))
            if change.new is not None:
                tree.create(change.path + NEW, change.new, mode)
        for change in changes:
            if tree.read(change.path) != change.old:
                raise disturbed(tree, change)
            begun.append(change)
            if change.new is None:
                tree.remove(change.path)
            else:
                tree.take(change.path, NEW)
        for change in changes:
            if tree.read(change.path) != change.new:
                raise Refused(
                    f"nothing was changed: {tree.shown(change.path)} did not keep what was written to it"
                )
        ignore_signals()
    except BaseException:
        put_back(tree, begun)
        clean(tree, paths)
        raise


def interrupt(number, frame):
    """Signal handler: raises once, nothing disturbs the way back."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals():
    for number in SIGNALS:
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)


def catch_signals():
    """Has signals that end a program raise, but those that nohup or the like wants ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
