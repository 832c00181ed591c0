"""Wan2.1 in less memory: makes videos and images from text, images and videos."""

import sys

try:
    from wan.cli import build_parser, main, parse_arguments
except KeyboardInterrupt:  # imports take seconds
    print("generate.py: interrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["build_parser", "main", "parse_arguments"]

if __name__ == "__main__":
    sys.exit(main())
