"""Methods replaced on one object, with their undo."""

from collections.abc import Callable
from typing import Any

Undo = Callable[[], None]


class _Layered:
    """Replaces a method of one object: calls the method's own function inside the layers put around it."""

    def __init__(self, function: Callable[..., Any], replaced: tuple[Any, ...]):
        self.function = function
        self.replaced = (
            replaced  # what the instance held under the name before, as (value,), or () for nothing
        )
        self.layers: list[tuple[str, Callable]] = []  # (option, function of a function), the innermost first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.function
        for _, around in self.layers:
            function = around(function)
        return function(*args, **kwargs)


def layer_methods(
    owner: object, option: str, innermost: bool = False, **around: Callable[[Callable], Callable]
) -> Undo:
    """Puts functions around methods of one object, not of its class.

    Layers of several options can be put on and taken off in any order.

    Args:
        owner: the object.
        option: name of the option that does it, for messages.
        innermost: whether to put the layers inside those that are there, instead of around them.
        around: for a method's name the function that makes the new method from the old one.

    Returns:
        Function that takes the layers off; with the last one the object is as it was before. Calling it again
        does nothing.

    Raises:
        RuntimeError: the option is applied already, or, for an innermost layer, a method is replaced by something
            else than such layers, which the new layer would bypass.
    """
    for name in around:
        held = vars(owner).get(name)
        if isinstance(held, _Layered):
            if option in dict(held.layers):
                raise RuntimeError(f"{option} is applied already, undo it first")
        elif innermost and held is not None:
            raise RuntimeError(f"{option}: {name} is replaced already by {held!r}, undo that first")
    mine = {name: (option, function) for name, function in around.items()}
    for name, layer in mine.items():
        held = vars(owner).get(name)
        if not isinstance(held, _Layered):
            replaced = (held,) if name in vars(owner) else ()
            held = _Layered(getattr(owner, name, None), replaced)
            setattr(owner, name, held)
        held.layers.insert(0 if innermost else len(held.layers), layer)

    def undo() -> None:
        for name, layer in list(mine.items()):
            del mine[name]
            held = vars(owner)[name]
            held.layers.remove(layer)
            if held.layers:
                continue
            delattr(owner, name)
            if held.replaced:
                setattr(owner, name, *held.replaced)

    return undo


def is_layered(owner: object, name: str) -> bool:
    """Whether the object's method of that name has layers of `layer_methods`, which come off in any order."""
    return isinstance(vars(owner).get(name), _Layered)
