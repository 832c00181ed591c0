"""Errors that the user can mend."""

import re


class InputError(ValueError):
    """Bad input, told in one line: what was given, what is wrong with it and what to do.

    Args:
        problem: what is wrong and what to do; options in it are written as flags, --name.
        field: the option that it is about, or several, by the names that they have in Python; the command line writes
            them as flags.
        value: what was given, if that says something.
    """

    def __init__(self, problem: str, field: str | tuple[str, ...] | None = None, value: object = None):
        self.fields = (field,) if isinstance(field, str) else tuple(field or ())
        self.problem = problem
        self.value = value
        super().__init__(self.told())

    def told(self, prefix: str = "") -> str:
        """The line, the names of options written with `prefix`."""
        problem = re.sub(r"--(?=[a-z])", prefix, self.problem)
        names = [prefix + name for name in self.fields]
        subject = (" and " if len(names) == 2 else ", ").join(names)
        if subject and self.value is not None:
            subject += f" {self.value}"
        return f"{subject}: {problem}" if subject else problem
