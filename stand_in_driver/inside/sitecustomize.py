"""Python imports this when it starts, where environment.py put it on the path: values come with torch."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


class _Finder:
    """Finds torch as it is, and has values installed when it is imported."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _load_values()

            loader.exec_module = exec_module
        return spec


def _load_values() -> None:
    """The package comes from where it is, whatever the path says: `wan` beside it may be another tree's."""
    where = [str(PACKAGE)]
    spec = importlib.util.spec_from_file_location(
        "stand_in_driver", PACKAGE / "__init__.py", submodule_search_locations=where
    )
    sys.modules.setdefault("stand_in_driver", importlib.util.module_from_spec(spec))
    from stand_in_driver import values

    values.install()


sys.meta_path.insert(0, _Finder())
