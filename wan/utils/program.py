"""How the user started the program, and the log that it writes to the terminal."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

from leanwan.errors import LINE_LENGTH, shown

INSTALLED = "wan-generate"  # the command of the installed package
SCRIPT = "generate.py"  # the command of a checkout


def program_name() -> str:
    """The program's name in messages."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else SCRIPT


def command() -> list[str]:
    """The words of a command that starts the program again from any folder, by torchrun if that started it."""
    installed = program_name() == INSTALLED
    script = Path(__file__).resolve().parents[2] / SCRIPT
    if installed:
        words = [str(Path(shutil.which(sys.argv[0]) or sys.argv[0]).absolute())]
    else:
        words = [str(script)] if script.is_file() else ["-m", "wan"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = ["-m", "torch.distributed.run", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        return [sys.executable, *ranks, *(["--no-python"] if installed else []), *words]
    return words if installed else [sys.executable, *words]


def log_to(stream: TextIO) -> None:
    """Has log messages written to a stream, unless logging is configured already."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines("[%(asctime)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Lines(logging.Formatter):
    """Each message is one line, as `shown`: file names and settings in it may come from anyone."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message, LINE_LENGTH)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(shown(line, LINE_LENGTH) for line in super().formatException(ei).split("\n"))
