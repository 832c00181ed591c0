"""What apply.py is made of: patches that only insert, trees that have their lines, files written all or none.

Standard library only, Python 3.8 or newer.
"""

from __future__ import annotations


class Refused(Exception):
    """The tree can't be patched; the message is the line that tells the user why."""


def read(file):
    """The file's bytes, or None if it does not exist."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
