"""Reads JSON that is not trusted: its depth, numbers and values may be anything."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# The exceptions that reading values of such data may raise.
MISREAD = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
_DIGITS = 20  # of a 64-bit integer, with its sign


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, which says why in a few words, for text that is not JSON or is nested too deep, and for numbers
    that are infinite, NaN, or integers of more than 64 bits.
    """
    try:
        return json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=_refused)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _DIGITS else _refused(digits)


def _real(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refused(digits)


def _refused(digits: str) -> NoReturn:
    raise ValueError(f"{digits[:_DIGITS]} is no number that can be used")
