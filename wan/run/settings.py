"""The settings that decide a result, in the metadata of its file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .. import __version__
from ..utils.errors import InputError
from ..utils.flags import is_option
from ..utils.outside import MISREAD, parse_json
from ..utils.video import read_comment
from .request import GPUS, KEEPING, PLANNED, PLANNING, PROMPT_EXTENSION, Request

PROGRAM = "wan-low-memory"
# Where it is computed and kept changes nothing; an extended prompt stands among the settings itself.
_APART = (KEEPING, PLANNING, PROMPT_EXTENSION, GPUS)
_NAMES = [
    field.name
    for field in fields(Request)
    if is_option(field)
    and field.metadata["group"] not in _APART
    and field.name not in ("save_file", "device")
]


def settings(request: Request) -> dict[str, Any]:
    """The fields that decide the result of a request, as they come back from JSON; paths are absolute."""
    values = request.to_json()
    return json.loads(json.dumps({name: values[name] for name in _NAMES if values[name] is not None}))


def settings_text(request: Request, planned: bool = False) -> str:
    """The settings as ASCII text, for a file's metadata; with the memory options that were planned, if they were."""
    told = {"program": PROGRAM, "version": __version__, "settings": settings(request)}
    if planned:
        told["memory"] = {name: getattr(request.memory, name) for name in request.planned}
    return json.dumps(told)


def read_settings(path: str | os.PathLike, field: str = "like") -> dict[str, Any]:
    """The fields of the Request that a file was made by.

    Raises InputError, naming `field`, for a file that cannot be read or has no settings in it.
    """
    return _read(path, field, "settings", _NAMES)


def read_plan(path: str | os.PathLike, field: str = "like") -> dict[str, Any]:
    """The memory options that were planned for a file, by name; none if they were not. Raises as read_settings."""
    return _read(path, field, "memory", PLANNED)


def _read(path: str | os.PathLike, field: str, part: str, names: Sequence[str]) -> dict[str, Any]:
    comment = read_comment(path, field)
    with contextlib.suppress(*MISREAD):
        found = parse_json(comment or "{}")
        if found["program"] == PROGRAM:
            values = found["settings"] if part == "settings" else found.get(part, {})
            return {name: value for name, value in values.items() if name in names}
    raise InputError("has no settings in it; give an .mp4 or .png that this program made", field, path)
