"""Is it right on this machine, does it fit, how fast is it? One command, no checkpoint, a report to pass on.

    python -m benchmarks.verdict --minutes 10 --out DIR

Needs a CUDA device. Every check runs in a process of its own, within a limit of time, what matters most first; what it
finds is in DIR/report.md and DIR/report.json at once, its whole output in DIR/NAME.log. Exit code: 0 all passed or
skipped; 1 a check failed; 2 some are incomplete (out of time, killed, interrupted), or bad input.

--rehearse runs every check in toy size on a virtual GPU, which needs none, and shows that the checks work.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from leanwan.errors import InputError
from virtual_gpu import LACK

from .bounded_runs import run
from .checks import CHECKS, Check
from .report import INCOMPLETE, Report, Result

LEAST = 5  # seconds; with less left, a check is not started


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    try:
        args = parse_arguments(argv)
    except InputError as error:
        print(f"benchmarks.verdict: {error.told('--')}", file=sys.stderr)
        return 2
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    about = {"minutes": args.minutes, "rehearsal": args.rehearse, "tree": args.tree or ""}
    report = Report(args.out, [check.name for check in chosen], about)
    try:
        judge(chosen, report, args)
    except KeyboardInterrupt as interrupt:
        if hasattr(interrupt, "result"):
            report.add(interrupt.result)
    print(f"{report.verdict}: see {args.out / 'report.md'}", file=sys.stderr)
    return report.exit_code


def judge(checks: Sequence[Check], report: Report, args: argparse.Namespace) -> None:
    """Runs the checks in order as far as the time goes, a line on stderr for each."""
    seconds = args.minutes * 60
    end = time.monotonic() + seconds
    for number, check in enumerate(checks, 1):
        left = end - time.monotonic()
        print(f"[{number}/{len(checks)}] {check.name} ... ", end="", file=sys.stderr, flush=True)
        if left < LEAST:
            result = Result(check.name, INCOMPLETE, faults=["no time was left, give more --minutes"])
        else:
            limit = min(left, max(LEAST, check.share * seconds))
            result = run(check, limit, report.folder, rehearse=args.rehearse, tree=args.tree)
        report.add(result)
        first = f": {result.faults[0]}" if result.faults else ""
        print(f"{result.status}, {result.seconds:.0f} s{first}", file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; makes the folder. Raises InputError."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verdict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="all of it may take so long (10)")
    add("--out", type=Path, default=Path("verdict"), metavar="DIR", help="the report's folder (verdict)")
    add("--only", nargs="+", metavar="NAME", help="only these checks")
    add("--tree", metavar="PATH", help="also run this checkout of upstream, beside ours")
    add("--rehearse", action="store_true", help="toy sizes on a virtual GPU")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < float("inf"):
        raise InputError(f"--minutes {args.minutes}: give a number above 0")
    names = [check.name for check in CHECKS]
    for name in args.only or ():
        if name not in names:
            raise InputError(f"--only {name}: no such check, there are: {', '.join(names)}")
    if args.tree is not None:
        if not (Path(args.tree) / "wan" / "text2video.py").is_file():
            raise InputError(f"--tree {args.tree}: no checkout of upstream is there")
        args.tree = str(Path(args.tree).resolve())
    if args.rehearse and LACK:
        raise InputError(f"--rehearse: {LACK}")
    if not args.rehearse and not torch.cuda.is_available():
        raise InputError(
            f"there is no CUDA device for torch {torch.__version__}, and this is about one (--rehearse needs none)"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.out = args.out.resolve()
        (args.out / "report.json").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror}), choose another") from error
    return args


if __name__ == "__main__":
    sys.exit(main())
