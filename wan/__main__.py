"""The command line, as `python -m wan` and as the installed command."""

import sys

from .utils.program import program_name


def main() -> int:
    """Runs it; returns the exit code, see wan.cli."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:  # imports take seconds
        print(f"{program_name()}: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
