"""The command line: flags to a Request, events to progress bars, errors to one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from .memory.options import MemoryOptions, add_low_vram, set_low_vram
from .run.request import Request
from .utils.accelerator import is_out_of_memory
from .utils.errors import InputError
from .utils.flags import add_flags, is_option
from .utils.progress import ProgressBars

PROGRAM = "generate.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns the exit code: 0; 2 for bad input and 1 for a device, disk or program that fails, each told in one line;
    130 for an interrupt.
    """
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", stream=sys.stdout)
    try:
        request = parse_arguments(argv)
        from .run import run  # with the libraries, which good arguments alone are worth waiting for

        run(request, ProgressBars())
    except InputError as error:
        return _complain(error.told("--"), 2)
    except OSError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _complain(f"out of memory, try --low_vram ({str(error).splitlines()[0]})", 1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The argument parser: upstream's flags under their names, types and defaults, and the memory flags."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Makes videos and images with Wan2.1 in less memory."
    )
    parser.error = _fail  # type: ignore[method-assign]
    add_flags(parser, Request)
    add_flags(parser, MemoryOptions)
    add_low_vram(parser)
    parser.set_defaults(offload_model=None)  # upstream's default; the option has its own
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Request:
    """The Request that a command line makes.

    Raises InputError for one that cannot work.
    """
    parser = build_parser()
    names = [field.name for field in fields(Request) if is_option(field)]
    parser.set_defaults(**dict.fromkeys(names))  # None is what is not given: the request has its own defaults
    set_low_vram(parser, argv)
    args = vars(parser.parse_args(argv))
    given = {name: value for name, value in args.items() if value is not None}
    memory = {field.name: given[field.name] for field in fields(MemoryOptions) if field.name in given}
    return Request(**{name: given[name] for name in names if name in given}, memory=MemoryOptions(**memory))


def _complain(message: object, code: int) -> int:
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _fail(message: str) -> None:
    """argparse's complaint, as one line."""
    raise InputError(message)
