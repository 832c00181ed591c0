"""Runs a command on PyTorch's own CUDA code over the stand-in driver, and says what that can't judge.

python -m stand_in_driver --capacity 8 --no_values python -m benchmarks.memory --device cuda --low_vram
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from .build import UnavailableError
from .environment import Card, environment

UNJUDGED = (
    "It can't judge kernels, cuDNN and its workspaces, cuSOLVER, torch.compile, timing or a card's rounding."
)
MEANINGS = {
    "missing": "asked of CUDA and answered with 'not supported'",
    "refused": "refused by CUDA's rules",
    "value": "has no value of the CPU's",
}


def main(argv: list[str] | None = None) -> int:
    """The command. Returns COMMAND's exit code; 2 if it can't be run here."""
    card, command = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        try:
            variables = environment(card, report)
            done = subprocess.run(command, check=False, env=variables)
        except (UnavailableError, OSError) as error:
            print(f"stand_in_driver: {error}", file=sys.stderr)
            return 2
        lines = report.read_text().splitlines() if report.exists() else []
    print(f"stand_in_driver: {card.told()}. {UNJUDGED}", file=sys.stderr)
    for kind, meaning in MEANINGS.items():
        names = sorted({line.partition(" ")[2] for line in lines if line.startswith(f"{kind} ")})
        if names:
            print(f"stand_in_driver: {meaning}: {', '.join(names)}", file=sys.stderr)
    return done.returncode


def parse_arguments(argv: list[str] | None = None) -> tuple[Card, list[str]]:
    """The card to be, and the command to run on it."""
    card = Card()
    parser = argparse.ArgumentParser(prog="stand_in_driver", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--capacity",
        type=_positive,
        default=card.capacity,
        metavar="GIB",
        help="memory of the card (default 24)",
    )
    add(
        "--context",
        type=_positive,
        default=card.context,
        metavar="GIB",
        help="what CUDA itself takes of it (default 0.41)",
    )
    add("--capability", type=_capability, default=card.capability, metavar="X.Y", help="default 8.6")
    add("--fixed_segments", action="store_true", help="a card on which the allocator's segments cannot grow")
    add(
        "--no_values",
        action="store_true",
        help="compute nothing but what control flow looks at: full size goes in minutes and little memory",
    )
    add(
        "--late",
        choices=("copies", "kernels", "nothing"),
        default=card.late,
        help="what runs as late as events allow, so that a wait that is missing shows (default copies)",
    )
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    if not command:
        parser.error("give the command to run")
    return Card(**args), command


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text}: give GiB, more than 0")
    return number


def _capability(text: str) -> int:
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal() and len(minor) == 1 and int(major) >= 7):
        raise argparse.ArgumentTypeError(f"{text}: give a compute capability from 7.0 on, such as 8.6")
    return 10 * int(major) + int(minor)


if __name__ == "__main__":
    sys.exit(main())
