"""From a request to a file: the interface for the command line, the page and scripts."""

from typing import TYPE_CHECKING, Any

from .request import Request

if TYPE_CHECKING:
    from .runner import Runner, run

__all__ = ["Request", "Runner", "run"]


def __getattr__(name: str) -> Any:
    """Imports the runner, and the libraries that it needs, at its first use."""
    if name in ("Runner", "run"):
        from . import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
