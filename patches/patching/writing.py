"""Files written all or none, also when a signal or a full disk comes between."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from typing import NamedTuple

from . import Refused, read

NEW, OLD = ".wan-patch-new", ".wan-patch-old"  # endings of temporary files, beside the file that they replace
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Change(NamedTuple):
    """A file's content before and after; None where it does not exist."""

    file: str
    old: bytes | None
    new: bytes | None


def check_writable(change):
    """A file or folder that its owner made read-only stays as it is, also for root."""
    folder = os.path.dirname(change.file)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    for name in (folder, change.file):
        if os.path.exists(name) and not os.stat(name).st_mode & stat.S_IWUSR:
            raise Refused(f"nothing was changed: {name} is read-only; make it writable (chmod u+w) first")


def clean(tree, files):
    """Remove temporary files, and folders that nothing is left in."""
    for file in files:
        for name in (file + NEW, file + OLD):
            if os.path.exists(name):
                os.remove(name)
        folder = os.path.dirname(file)
        while os.path.isdir(folder) and not os.listdir(folder) and folder != os.path.realpath(tree):
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def put_back(changes):
    """Give the files their old content again, from the copies beside them."""
    failed = []
    for change in changes:
        try:
            if change.old is not None:
                os.replace(change.file + OLD, change.file)
            elif os.path.exists(change.file):
                os.remove(change.file)
        except OSError as error:
            failed.append(f"{change.file} ({error.strerror})")
    if failed:
        raise Refused(f"could not put back {', '.join(failed)}; the old content is beside it, in *{OLD}")


def write(tree, changes):
    """Give every file its new content; if that fails, leave all as they were and raise.

    Everything that needs room on the disk is written under temporary names first; after that there are only renames.
    """
    begun = []
    try:
        for change in changes:
            if change.old is not None:
                shutil.copy2(change.file, change.file + OLD)
            if change.new is not None:
                os.makedirs(os.path.dirname(change.file), exist_ok=True)
                with open(change.file + NEW, "wb") as stream:
                    stream.write(change.new)
                    stream.flush()
                    os.fsync(stream.fileno())
                if change.old is not None:
                    shutil.copymode(change.file, change.file + NEW)
        for change in changes:
            begun.append(change)
            if change.new is None:
                os.remove(change.file)
            else:
                os.replace(change.file + NEW, change.file)
        for change in changes:
            if read(change.file) != change.new:
                raise Refused(f"nothing was changed: {change.file} did not keep what was written to it")
        ignore_signals()
    except BaseException:
        put_back(begun)
        clean(tree, [change.file for change in changes])
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
