"""Names of a package that are imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are found in the modules below it that `homes` has for them.

    A name that is a module has "" for its home.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not homes[name]:
            return importlib.import_module(f".{name}", package)
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return load
