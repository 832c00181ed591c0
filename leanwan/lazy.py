"""Imports the names of a package when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package; `homes` maps each name to the module below the package that defines it.

    A name that is itself a module is mapped to "".
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not homes[name]:
            return importlib.import_module(f".{name}", package)
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return load
