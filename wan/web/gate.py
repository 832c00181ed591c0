"""Checks what an event of the page carries: values of its fields' own types, and only files that were uploaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gradio as gr

from ..utils.files import is_plain_file

_TYPES: dict[str, Any] = {"string": str, "boolean": bool, "integer": (int, float), "number": (int, float)}


class GatedBlocks(gr.Blocks):
    """Gradio's Blocks, for mounting, with every value of every event checked.

    A value passes `checked` before Gradio sees it: Gradio would copy files that a value names into its cache, and
    fetch addresses.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.has_launched = True  # as launch() sets it; before, Gradio takes every path

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *others: Any, **named: Any) -> Any:
        """The arguments of an event's function. Raises gr.Error for a value that its field cannot hold."""
        values = [checked(field, value) for field, value in zip(block_fn.inputs, inputs)]
        return await super().preprocess_data(block_fn, values, *others, **named)


def checked(field: Any, value: Any) -> Any:
    """The value of a field, reduced to paths if it is files; None is an empty field.

    Raises gr.Error for a value that the field cannot hold.
    """
    if isinstance(field, gr.File):
        several = field.file_count == "multiple"
        if value is None or (several and isinstance(value, list)):
            return value and [_uploaded(field, one) for one in value]
        return _uploaded(field, value)
    closed = isinstance(field, gr.Dropdown) and not field.allow_custom_value
    if value is None and not closed and not isinstance(field, gr.Slider):
        return None
    kind = field.api_info()["type"]
    fits = isinstance(value, _TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")
    if not fits or (closed and value not in [choice for _, choice in field.choices]):
        raise _refused(field, "of the wrong kind")
    if not isinstance(value, str) and not math.isfinite(value):
        raise _refused(field, "not a finite number")
    return value


def _uploaded(field: Any, value: Any) -> dict[str, Any]:
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise _refused(field, "of the wrong kind")
    folder = Path(field.GRADIO_CACHE).resolve()
    if not is_plain_file(path) or not Path(path).resolve().is_relative_to(folder):
        raise _refused(field, "not a file that was uploaded; upload it again")
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _refused(field: Any, problem: str) -> gr.Error:
    return gr.Error(f"{field.label}: {problem}", print_exception=False)
