"""The program as the user started it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

INSTALLED = "wan-generate"  # the command of the installed package
SCRIPT = "generate.py"  # that of a checkout


def program_name() -> str:
    """What the program is called in messages."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else SCRIPT


def command() -> list[str]:
    """The words that start it again, in any folder; by torchrun if that started it."""
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
