"""The program as the user started it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

INSTALLED = "wan-generate"  # the command of the installed package
SCRIPT = "generate.py"  # that of a checkout


def program_name() -> str:
    """What the program is called in messages."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else SCRIPT


def command() -> list[str]:
    """The words that start it again, in any folder."""
    if program_name() == INSTALLED:
        return [str(Path(shutil.which(sys.argv[0]) or sys.argv[0]).absolute())]
    script = Path(__file__).resolve().parents[2] / SCRIPT
    return [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "wan"]
