"""A process of its own that is spoken to in lines of JSON, and ends when whoever started it does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

Message = dict[str, Any]


class Child:
    """`python -m MODULE ARGUMENTS`, its standard input and output for messages, its standard error shared.

    The end of its input is how it learns that this process is gone, however that went.

    Args:
        module, arguments: what runs.
        on_message: is called with each message, in a thread.
        on_exit: is called there after the last one, with the exit code.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        on_message: Callable[[Message], None],
        on_exit: Callable[[int], None],
    ):
        root = str(Path(__file__).parents[2])  # of the package, wherever this was started
        paths = [root, os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUTF8": "1"},
            encoding="utf-8",
            # Ctrl-C in a terminal is for this process, which then says what to do.
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._sending = threading.Lock()
        self._on_message, self._on_exit = on_message, on_exit
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; to a process that has ended, nothing."""
        with self._sending:
            write_message(self._process.stdin, message)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def finish(self, seconds: float | None = None) -> None:
        """Tells it that no more will come, and waits; kills it after so many seconds."""
        with self._sending, contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        for message in read_messages(self._process.stdout):
            try:
                self._on_message(message)
            except Exception:  # of one message; those that follow are heard
                log.exception("What the child process said could not be dealt with")
        self._on_exit(self._process.wait())


def read_messages(stream: IO[str]) -> Iterator[Message]:
    """The messages of a stream, until it ends."""
    for line in stream:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # cut short: its writer was killed
            return


def write_message(stream: IO[str], message: Mapping[str, Any]) -> None:
    """Writes a message; to a reader that is gone, nothing."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(json.dumps(message) + "\n")
        stream.flush()
