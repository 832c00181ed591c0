"""The command line: flags to a Request, events to progress bars, errors to one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from leanwan.accelerator import NO_PAGE_LOCKED, is_out_of_memory, lacks_page_locked
from leanwan.errors import LINE_LENGTH, InputError, shown
from leanwan.flags import add_flags, is_option
from leanwan.options import MemoryOptions, add_low_vram, set_low_vram

from .distributed import started_as_one_of_several
from .run.interrupts import Interrupted, Interrupts
from .run.request import ANY_CHECKPOINT, GPUS, KEEPING, PLANNED, PLANNING, Request, tell_examples
from .utils.program import log_to, program_name
from .utils.progress import ProgressBars

if TYPE_CHECKING:
    from .distributed.ranks import Ranks
    from .run.batch import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns the exit code: 0; 2 for bad input and 1 for a device, disk or program that fails, each told in one line;
    130 for Ctrl-C and 143 for SIGTERM.
    """
    logging.raiseExceptions = False  # a log message that cannot be written must not stop the run
    log_to(sys.stdout)
    _tell_crashes()
    try:
        with Interrupts() as interrupts:
            if not started_as_one_of_several():
                return _work(argv, interrupts)
            from .run.over_ranks import over_ranks

            return over_ranks(argv, lambda ranks: _work(argv, interrupts, ranks), _follow)
    except InputError as error:
        return _complain(error.told("--"), 2)
    except OSError as error:
        return _complain(error, 1)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        return _complain(str(error) or "interrupted", 128 + number)
    except Exception as error:
        if lacks_page_locked(error):
            return _complain(NO_PAGE_LOCKED, 1)
        if not is_out_of_memory(error):
            raise
        return _complain(f"out of memory, try --low_vram ({str(error).splitlines()[0]})", 1)


def _work(argv: Sequence[str] | None, interrupts: Interrupts, ranks: Ranks | None = None) -> int:
    """Carries out a command line, in this process or as the first of several ranks; returns the exit code."""
    jobs = _parse(argv)
    if isinstance(jobs, _Query):
        return jobs.answer()
    from .run import Runner  # takes seconds to import PyTorch: only once the arguments are good

    runner = Runner(ProgressBars(), interrupts, ranks)
    if isinstance(jobs, Request):
        runner.run(jobs)
        return 0
    from .run.batch import run_entries

    return 1 if run_entries(jobs, runner) else 0


def _follow(ranks: Ranks) -> None:
    """Computes this rank's share of what the first rank runs, until the first rank is done."""
    from .run import Runner

    Runner(ranks=ranks).follow(ranks)


def build_parser() -> argparse.ArgumentParser:
    """The argument parser: upstream's flags under their names, types and defaults, and the memory flags."""
    parser = argparse.ArgumentParser(
        prog=program_name(), description="Makes videos and images with Wan2.1 in less memory."
    )
    parser.error = _fail  # type: ignore[method-assign]
    add_flags(parser, Request)
    parser.add_argument(
        "--like",
        metavar="FILE",
        help="Take the settings from an .mp4 or .png that this program made; flags override.",
    )
    add_flags(parser, MemoryOptions)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="Make many: a prompt in each line or, in a .jsonl, an object of settings. What is there is skipped.",
    )
    add_low_vram(parser)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="Say how the run would fit --vram_limit, and how long it would take by model, and stop; needs no "
        "checkpoint. Exit code 1 if nothing fits.",
    )
    parser.add_argument("--json", action="store_true", help="With --plan: one JSON object.")
    parser.set_defaults(offload_model=None)  # None, as upstream's flag; MemoryOptions has its own default
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Request:
    """The Request that a command line describes.

    Raises InputError for arguments that cannot work, or that ask for a plan or for many requests.
    """
    request = _parse(argv)
    if isinstance(request, _Query):
        raise InputError("asks for a plan", "plan")
    if not isinstance(request, Request):
        raise InputError("makes many requests", "prompts")
    return request


class _Query(NamedTuple):
    """A --plan of a request."""

    request: Request
    as_json: bool

    def answer(self) -> int:
        """Prints the plan; returns the exit code: 0 if it fits, else 1."""
        from .run.plan_request import plan_text, report

        chosen, told = report(self.request)
        print(json.dumps(told) if self.as_json else plan_text(chosen, told))
        return 0 if chosen.fits else 1


def _parse(argv: Sequence[str] | None) -> Request | list[Entry] | _Query:
    """What a command line asks for: one Request, the entries of --prompts, or the plan of a request."""
    parser = build_parser()
    # Every flag defaults to None, so that only given flags override the values of the request, a state or --like.
    parser.set_defaults(**dict.fromkeys([*_OPTIONS, *_MEMORY]))
    set_low_vram(parser, argv)
    args = vars(parser.parse_args(argv))
    given = {name: args[name] for name in _OPTIONS if args[name] is not None}
    memory = {name: args[name] for name in _MEMORY if args[name] is not None}
    if args["json"] and not args["plan"]:
        raise InputError("belongs to --plan", "json")
    if "resume" in given:
        if args["plan"]:
            raise InputError("is of a run that has not begun, leave it out with --resume", "plan")
        if args["like"] is not None or args["prompts"] is not None:
            raise InputError("settled by the state that --resume names, leave them out", ("like", "prompts"))
        return _resumed(given, memory)
    if args["like"] is not None:
        from .run.settings import read_plan, read_settings

        given = read_settings(args["like"]) | given
        if not any(name in given for name in _BUDGET):
            memory = read_plan(args["like"]) | memory
    if not args["low_vram"]:
        given["planned"] = tuple(name for name in PLANNED if name not in memory)
    if args["plan"]:
        if args["prompts"] is not None:
            raise InputError("plans one run, leave out --prompts", "plan")
        given.setdefault("ckpt_dir", ANY_CHECKPOINT)
    if args["prompts"] is not None:
        from .run.batch import read_entries

        return read_entries(args["prompts"], given, memory)
    request = Request(**given, memory=MemoryOptions(**memory))
    if not args["json"]:
        tell_examples(request, given)
    return _Query(request, args["json"]) if args["plan"] else request


_BUDGET = [field.name for field in fields(Request) if field.metadata.get("group") == PLANNING]
_OPTIONS = [field.name for field in fields(Request) if is_option(field)]
_MEMORY = [field.name for field in fields(MemoryOptions)]
# Fields of the Request that may be given beside --resume: none of them changes the picture.
_ANEW = [field.name for field in fields(Request) if field.metadata.get("group") in (KEEPING, GPUS)]
_ANEW += ["save_file", "ckpt_dir", "device", *_BUDGET]


def _resumed(given: dict[str, Any], memory: dict[str, Any]) -> Request:
    """The Request that continues from the state that --resume names."""
    settled = tuple(name for name in given if name not in _ANEW or name == "decode_latents")
    if settled:
        raise InputError("settled by the state that --resume names, leave it out", settled)
    from .run.state import resumed_request

    return resumed_request(given.pop("resume"), given, memory)


def _tell_crashes() -> None:
    """Prints the stack on signals that raise no exception, such as SIGBUS after a mapped file was cut short."""
    if hasattr(signal, "SIGBUS") and not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # no standard error
            faulthandler.enable(all_threads=False)


def _complain(message: object, code: int) -> int:
    print(f"{program_name()}: {shown(' '.join(str(message).split()), LINE_LENGTH)}", file=sys.stderr)
    return code


def _fail(message: str) -> None:
    """Replaces argparse's error(): raises the message as an InputError, which is told in one line."""
    raise InputError(message)


if __name__ == "__main__":
    sys.exit(main())
