"""The command line, as `python -m wan` and as the installed command."""

import sys

from .utils.program import program_name


def main() -> int:
    """Runs the command line; returns the exit code of wan.cli."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:  # during the imports, which take seconds
        print(f"{program_name()}: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
