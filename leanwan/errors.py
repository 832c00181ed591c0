"""Errors that the user can mend, and how names and values from outside are shown in them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection

SHOWN_LENGTH = 300  # characters of a value
SHOWN_NAMES = 10  # names of a list
LINE_LENGTH = 4000  # characters of an error


class InputError(ValueError):
    """Bad input, told in one line: what was given, what is wrong with it and what to do.

    Args:
        problem: what is wrong and what to do; options in it are written as flags, --name.
        field: the Python name of the option at fault, or of several; the command line writes them as flags.
        value: what was given, if that says something.
    """

    def __init__(self, problem: str, field: str | tuple[str, ...] | None = None, value: object = None):
        self.fields = (field,) if isinstance(field, str) else tuple(field or ())
        self.problem = problem
        self.value = value
        super().__init__(self.told())

    def told(self, prefix: str = "") -> str:
        """The error in one line, with `prefix` before the names of options."""
        problem = shown(re.sub(r"--(?=[a-z])", prefix, self.problem), LINE_LENGTH)
        names = [prefix + shown(name) for name in self.fields]
        subject = " and ".join(names) if len(names) == 2 else listed(names)
        if subject and self.value is not None:
            subject += f" {shown(self.value)}"
        return f"{subject}: {problem}" if subject else problem


def shown(value: object, length: int = SHOWN_LENGTH) -> str:
    """A value as one line of about `length` characters at most: longer text loses its middle, and characters that do
    not print, such as a terminal's control characters, are escaped."""
    try:
        text = str(value)
    except ValueError:  # Python writes no longer numbers
        text = "a number of thousands of digits"
    if len(text) > length:
        text = f"{text[: length * 2 // 3]} ... {text[-length // 3 :]}"
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def listed(names: Collection[str]) -> str:
    """Names as `shown`: the first SHOWN_NAMES, and the number of the rest."""
    few = ", ".join(map(shown, itertools.islice(names, SHOWN_NAMES)))
    more = len(names) - SHOWN_NAMES
    return few + (f" and {more} more" if more > 0 else "")
