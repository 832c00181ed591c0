"""Options as dataclass fields, which are checked when they are set and become flags of a command line.

@dataclass(frozen=True)
class Options:
    steps: int = option(50, "Solver steps.", at_least=1)

    def __post_init__(self):
        check_options(self)

add_flags(parser, Options)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

from .errors import InputError


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    bare: Any = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    repeat: bool = False,
    also: Sequence[str] = (),
    group: str | None = None,
    shown_default: Any = None,
    empty: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its value unless given.
        help: one sentence for the command line.
        choices: the values that it may have, read anew at every check.
        at_least, above, at_most: the range of a number.
        bare: the value of a flag that is given without a value.
        metavar: what stands for the value in the help text.
        parse: converts the flag's text to the value; the default is the annotated type.
        repeat: whether the flag may be given several times, each adding to a tuple.
        also: further names of the flag.
        group: title of the flag's group in the help text.
        shown_default: the flag's default, if the field's default is None because other options decide the value.
        empty: whether text may be empty.
    """
    known = locals().copy()
    metadata = {name: known[name] for name in known if name != "default"}
    return dataclasses.field(default=default, metadata=metadata)


def is_option(field: dataclasses.Field) -> bool:
    """Whether a dataclass field was made by `option`."""
    return "help" in field.metadata


def check_options(options: Any, paths: Collection[str] = ()) -> None:
    """Checks the values in a dataclass of options, and turns PathLike values into text.

    Args:
        options: the dataclass.
        paths: options that name a file, which may be any bytes; all other text must be UTF-8.

    Raises:
        InputError: a value that is not of the annotated type, is outside its range or none of the choices.
    """
    hints = _hints(options.__class__)
    for field in filter(is_option, dataclasses.fields(options)):
        value, facts = getattr(options, field.name), field.metadata
        kinds = _kinds(hints[field.name])
        if value is None and type(None) in kinds:
            continue
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
            object.__setattr__(options, field.name, value)
        if not any(_is_a(kind, value) for kind in kinds):
            wanted = _range(facts) if float in kinds and _has_range(facts) else _words(kinds, field.default)
            raise InputError(f"give {wanted}", field.name, value)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str):
                _check_text(text, field, field.name in paths)
        if facts["choices"] is not None and value not in facts["choices"]:
            raise InputError(f"choose one of {', '.join(facts['choices'])}", field.name, value)
        if _has_range(facts) and not _in_range(value, facts):
            raise InputError(f"give {_range(facts)}", field.name, value)


def _check_text(text: str, field: dataclasses.Field, any_bytes: bool) -> None:
    """Raises InputError for empty text, and for text that cannot be a program's argument or a file's name."""
    if not text and not field.metadata["empty"]:
        raise InputError("is empty, give a value or leave it out", field.name)
    if "\0" in text:
        raise InputError("has a zero byte in it", field.name)
    try:
        os.fsencode(text) if any_bytes else text.encode()
    except UnicodeEncodeError:
        raise InputError("is not UTF-8 text", field.name) from None


def add_flags(parser: argparse.ArgumentParser, options: type, only: Sequence[str] | None = None) -> None:
    """Adds a flag for each option of a dataclass, or for those named by `only`, to a parser."""
    hints = _hints(options)
    groups: dict[str | None, Any] = {None: parser}
    for field in filter(is_option, dataclasses.fields(options)):
        if only is not None and field.name not in only:
            continue
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = [f"--{name}" for name in (field.name, *field.metadata["also"])]
        groups[title].add_argument(*names, **_flag(field, hints[field.name]))


def boolean(text: str) -> bool:
    """A flag's text to True or False."""
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    try:
        return words[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None


def _flag(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The arguments of argparse's `add_argument` for an option."""
    facts = field.metadata
    text = facts["help"].replace("%", "%%")
    if hint is bool and facts["parse"] is None:
        return {"action": "store_true", "help": text}
    if facts["repeat"]:
        (hint, _) = typing.get_args(hint)
        return {"action": "append", "help": text, "metavar": facts["metavar"], "type": facts["parse"] or hint}
    default = field.default if facts["shown_default"] is None else facts["shown_default"]
    flag = {"default": default, "help": text, "type": facts["parse"] or _plain_type(hint)}
    if facts["choices"] is not None:
        flag["choices"] = list(facts["choices"])
    if facts["metavar"] is not None:
        flag["metavar"] = facts["metavar"]
    if facts["bare"] is not None:
        flag |= {"nargs": "?", "const": facts["bare"]}
    return flag


def _plain_type(hint: Any) -> Callable[[str], Any]:
    """The one type beside None that an annotation allows."""
    return next(kind for kind in _kinds(hint) if kind is not type(None))


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


_WORDS = {
    **{bool: "true or false", int: "a whole number of at most 64 bits", float: "a number", str: "text"},
    tuple[str, ...]: "a list of texts",
}


def _words(kinds: Sequence[Any], default: Any) -> str:
    """What may be given, in words; where a word is allowed beside numbers, it is the default."""
    words = {**_WORDS, str: default} if isinstance(default, str) and len(kinds) > 1 else _WORDS
    return " or ".join(words[kind] for kind in kinds if kind in words)


@functools.cache
def _hints(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options)


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type, whatever its range; numbers must be finite."""
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind == tuple[str, ...]:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return kind is not type(None) and isinstance(value, kind)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _has_range(facts: Any) -> bool:
    return any(facts[name] is not None for name in ("at_least", "above", "at_most"))


def _in_range(value: Any, facts: Any) -> bool:
    return (
        (facts["at_least"] is None or value >= facts["at_least"])
        and (facts["above"] is None or value > facts["above"])
        and (facts["at_most"] is None or value <= facts["at_most"])
    )


def _range(facts: Any) -> str:
    if facts["at_least"] is not None and facts["at_most"] is not None:
        return f"{facts['at_least']} to {facts['at_most']}"
    parts = [
        f"{words} {facts[name]}"
        for name, words in (("above", "above"), ("at_least", "at least"), ("at_most", "at most"))
        if facts[name] is not None
    ]
    return "a number " + ", ".join(parts)
