"""Methods wrapped on an object from outside, each to be unwrapped again.

Several options wrap the same method of the same object, and each can be taken away, whatever came before or after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Undo = Callable[[], None]


def wrap(owner: Any, name: str, option: str, around: Callable[..., Any], *, innermost: bool = False) -> Undo:
    """Makes `owner.name(...)` call `around(method, ...)`, `method` being what it called before.

    Args:
        option: what it is wrapped for; once for each option.
        innermost: go beneath what wraps the method already. For what takes the method's place.

    Returns:
        What puts the method back; calling it again does nothing.

    Raises:
        RuntimeError: wrapped for this option already.
    """
    wrapped = vars(owner).get(name)
    if not isinstance(wrapped, _Wrapped):
        wrapped = _Wrapped(getattr(owner, name), name in vars(owner))
    if any(other == option for other, _ in wrapped.layers):
        raise RuntimeError(f"{option}: applied to this {type(owner).__name__} already, undo it first")
    layer = (option, around)
    wrapped.layers.insert(0 if innermost else len(wrapped.layers), layer)
    vars(owner)[name] = wrapped

    def undo() -> None:
        if layer not in wrapped.layers:
            return
        wrapped.layers.remove(layer)
        if not wrapped.layers and vars(owner).get(name) is wrapped:
            if wrapped.own:
                vars(owner)[name] = wrapped.method
            else:
                del vars(owner)[name]

    return undo


class _Wrapped:
    """A method and what wraps it, innermost first.

    own: whether the method was the object's own, not its class's.
    """

    def __init__(self, method: Callable[..., Any], own: bool):
        functools.update_wrapper(self, method)
        self.method = method
        self.own = own
        self.layers: list[tuple[str, Callable[..., Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self.method
        for _, around in self.layers:
            method = functools.partial(around, method)
        return method(*args, **kwargs)
