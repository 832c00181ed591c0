"""A child process that exchanges messages as lines of JSON, and ends when its parent does."""

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
    """`python -m MODULE ARGUMENTS`: standard input and output carry messages, standard error is shared.

    The child's input ends when this process ends in whatever way, which tells the child to end.

    Args:
        module, arguments: of the command.
        on_message: called with each message, in a thread.
        on_exit: called in that thread after the last message, with the exit code.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        on_message: Callable[[Message], None],
        on_exit: Callable[[int], None],
    ):
        root = str(Path(__file__).parents[2])  # where the package is, whatever the working directory
        paths = [root, os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUTF8": "1"},
            encoding="utf-8",
            # Ctrl-C in a terminal reaches this process alone, which then tells the child what to do.
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._sending = threading.Lock()
        self._on_message, self._on_exit = on_message, on_exit
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; does nothing if the child has ended."""
        with self._sending:
            write_message(self._process.stdin, message)

    def kill(self) -> None:
        """Kills the child at once."""
        self._process.kill()

    def finish(self, seconds: float | None = None) -> None:
        """Ends the child's input and waits for its exit; kills it after `seconds`, never if None."""
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
            except Exception:  # one message failed; the next ones are still handled
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
    """Writes a message; does nothing if the reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(json.dumps(message) + "\n")
        stream.flush()
