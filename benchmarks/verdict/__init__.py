"""Does it work on this machine, and is it right? See __main__.py for the command, checks.py for what is checked."""
