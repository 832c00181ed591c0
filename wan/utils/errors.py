"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input. The message is one line that names the flag or file, what is wrong and what to do."""
