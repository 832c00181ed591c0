"""Reading what others wrote: JSON whose depth, numbers and values nobody vouches for."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# What picking values out of such data may raise.
MISREAD = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
_DIGITS = 20  # of a number of 64 bits, with its sign


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, which says why in a few words, for what is no JSON or nested too deep, and for numbers that are
    infinite, none, or of more than 64 bits.
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
