"""From a request to a file: what the command line, a page or a script calls."""

from typing import TYPE_CHECKING, Any

from .request import Request

if TYPE_CHECKING:
    from .runner import Runner, run

__all__ = ["Request", "Runner", "run"]


def __getattr__(name: str) -> Any:
    """Imports what runs, with the libraries that it needs, when it is first named."""
    if name in ("Runner", "run"):
        from . import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
