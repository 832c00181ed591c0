"""From a request to a file: what the command line, a page or a script calls."""

from typing import TYPE_CHECKING, Any

from .request import Request

if TYPE_CHECKING:
    from .runner import run

__all__ = ["Request", "run"]


def __getattr__(name: str) -> Any:
    """Imports `run`, with the libraries that it needs, when it is first named."""
    if name == "run":
        from .runner import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
