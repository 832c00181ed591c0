"""The settings that decide a result, as the metadata of its file keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from leanwan.errors import InputError
from leanwan.flags import is_option
from leanwan.options import MemoryOptions

from .. import __version__
from ..utils.outside import MISREAD, parse_json
from ..utils.video import read_comment
from ..weights.lora import parse_lora
from .request import (
    ANY_CHECKPOINT,
    GPUS,
    KEEPING,
    PLANNED,
    PLANNING,
    PROMPT_EXTENSION,
    Request,
)

PROGRAM = "wan-low-memory"
LONGEST_TEXT = 2**20  # characters in a file's metadata; a .png can hold no more
# Groups of fields that do not decide a result; an extended prompt is itself among the settings, as the prompt.
_APART = (KEEPING, PLANNING, PROMPT_EXTENSION, GPUS)
_NAMES = [
    field.name
    for field in fields(Request)
    if is_option(field)
    and field.metadata["group"] not in _APART
    and field.name not in ("save_file", "device")
]

_DEFAULTS = {field.name: field.default for field in fields(Request)}


def settings(request: Request) -> dict[str, Any]:
    """The fields of a request that decide its result, as JSON gives them back; paths are absolute."""
    values = request.to_json()
    return json.loads(json.dumps({name: values[name] for name in _NAMES if values[name] is not None}))


def settings_text(request: Request, planned: bool = False) -> str:
    """The settings as ASCII JSON for a file's metadata; with the planned memory options if `planned`."""
    told = {"program": PROGRAM, "version": __version__, "settings": settings(request)}
    if planned:
        told["memory"] = {name: getattr(request.memory, name) for name in request.planned}
    return json.dumps(told)


def memory_options(values: Mapping[str, Any], **own: Any) -> MemoryOptions:
    """MemoryOptions from `values`, which are not trusted, and `own` ones, which are.

    Raises InputError, naming the option, for a value that cannot work or is of the wrong type.
    """
    hints = get_type_hints(MemoryOptions)
    for name, value in values.items():
        accepted = get_args(hints[name]) or (hints[name],)
        fitting = isinstance(value, accepted) or (float in accepted and isinstance(value, int))
        if not fitting or (isinstance(value, bool) and bool not in accepted):
            raise InputError("of the wrong kind", name, value)
    return MemoryOptions(**values, **own)


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks values that are not trusted, and returns them in the form of `settings`. Files that they name need not
    exist; a field may be missing if its default is the same for every request.

    Raises InputError, or one of MISREAD for values of the wrong type, unless they describe a whole Request.
    """
    given = {name: values[name] for name in _NAMES if values.get(name) is not None}
    checkpoint, loras = given.get("ckpt_dir", ""), given.get("lora", [])
    if not isinstance(checkpoint, str) or not isinstance(loras, (list, tuple)):
        raise InputError("of the wrong kind", ("ckpt_dir", "lora"))
    for text in loras:
        parse_lora(text)
    request = Request(**given | {"ckpt_dir": ANY_CHECKPOINT, "lora": ()})
    filled = {name: value for name, value in settings(request).items() if name not in ("ckpt_dir", "lora")}
    varies = [name for name, value in filled.items() if name == "task" or value != _DEFAULTS[name]]
    missing = [name for name in varies if name not in given]
    if missing or given["base_seed"] < 0:
        raise InputError("not there", tuple(missing) or "base_seed")
    return {"lora": []} | filled | given


def read_settings(path: str | os.PathLike, field: str = "like") -> dict[str, Any]:
    """The fields of the Request that made a file, all of them valid.

    Raises InputError, naming `field`, for a file that cannot be read or has no valid settings in it.
    """
    return _read(path, field)[0]


def read_plan(path: str | os.PathLike, field: str = "like") -> dict[str, Any]:
    """The memory options that were planned for the run that made a file, if any, by name. Raises as read_settings."""
    return _read(path, field)[1]


def _read(path: str | os.PathLike, field: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, planned memory options) of a file: the only place that reads its metadata, which is not trusted."""
    comment = read_comment(path, field) or ""
    wrong = "has no settings in it; give an .mp4 or .png that this program made"
    try:
        found = parse_json(comment) if len(comment) <= LONGEST_TEXT else {}
        if found["program"] == PROGRAM:
            memory = {name: value for name, value in found.get("memory", {}).items() if name in PLANNED}
            memory_options(memory)
            return checked(found["settings"]), memory
    except InputError as error:
        why = " ".join(str(error).split())[:200]
        wrong = f"the settings in it cannot be used ({why}); give another file"
    except MISREAD:
        pass  # JSON of another shape than this program's
    raise InputError(wrong, field, path)
