"""Brings components to the device to compute, and sends them home.

Weights never change, so a visit copies them to the device, and going home drops that copy and puts the parameters that
stayed at home back into the modules.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from .accelerator import release_memory
from .methods import Undo, layer_methods
from .vae.tiles import vae_modules


class Attachable(Protocol):
    """Brings parameters to the device while it is attached."""

    def attach(self) -> None: ...

    def detach(self) -> None: ...


class Component:
    """Modules that visit a device together.

    Home is wherever their parameters are when the visit starts; parameters that are on the device already stay.

    Args:
        modules: the modules to move.
        device: where they compute.
        apart: modules inside them whose parameters stay home.
        streamer: a Streamer, or another Attachable, that brings parameters of `apart` in turn during the visit.
        release: give the allocator's unused memory back to the device after a visit, so that other users of it
            find it. That takes time: leave it where visits are short and frequent.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device | str,
        apart: Iterable[nn.Module] = (),
        streamer: Attachable | None = None,
        release: bool = True,
    ):
        self.modules = list(modules)
        self.device = torch.device(device)
        self._apart = {id(inner) for module in apart for inner in module.modules()}
        self._streamer = streamer
        self._release = release
        # (a module's dict of parameters or buffers, a name in it, the tensor at home)
        self._home: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._here = False

    def arrive(self) -> None:
        """Brings everything to the device; if that fails, as for lack of memory, everything goes home again."""
        if self._here:
            return
        self._here = True
        try:
            for entries, name, tensor in self._tensors():
                if tensor.device != self.device:
                    copy = tensor.detach().to(self.device)
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=False)
                    self._home.append((entries, name, tensor))
                    entries[name] = copy
            if self._streamer:
                self._streamer.attach()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Sends everything home."""
        if not self._here:
            return
        self._here = False
        if self._streamer:
            self._streamer.detach()
        for entries, name, tensor in self._home:
            entries[name] = tensor
        self._home.clear()
        if self._release:
            release_memory(self.device)

    @contextlib.contextmanager
    def on_device(self, stay: bool = False) -> Iterator[None]:
        """Inside, the component is on the device; outside, it is home, unless `stay` keeps it there.

        An exception sends it home whatever `stay` says.
        """
        self.arrive()
        try:
            yield
        except BaseException:
            self.leave()
            raise
        if not stay:
            self.leave()

    @contextlib.contextmanager
    def visiting(self, *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        """Inside, the component is on the device, and it stays there. Yields no arguments to add to the call."""
        with self.on_device(stay=True):
            yield {}

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the component on the device while it runs."""

        @functools.wraps(function)
        def visiting(*args: Any, **kwargs: Any) -> Any:
            with self.on_device():
                return function(*args, **kwargs)

        return visiting

    def _tensors(self) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
        for root in self.modules:
            for module in root.modules():
                if id(module) in self._apart:
                    continue
                for entries in (module._parameters, module._buffers):
                    for name, tensor in list(entries.items()):
                        if tensor is not None:
                            yield entries, name, tensor


def visit_by_halves(vae: Any, device: torch.device | str) -> Undo:
    """Makes a VAE bring to the device only the half that a call needs: the encoder to encode, the decoder to decode.

    vae: has the module tree as its `model`, or is the bare tree.

    Returns the undo. Raises InputError for another VAE than Wan2.1's, RuntimeError if it is applied already.
    """
    model = vae_modules(vae, "vae_cpu")
    encoder = Component([model.encoder, model.conv1], device)
    decoder = Component([model.conv2, model.decoder], device)
    return layer_methods(vae, "visit_by_halves", encode=encoder.around, decode=decoder.around)


def visit_when_called(module: nn.Module, device: torch.device | str) -> Undo:
    """Makes a module bring its parameters to the device for each call, and send them home after it.

    Returns the undo. Raises RuntimeError if it is applied already.
    """
    visit = Component([module], device, release=False)
    return layer_methods(module, "visit_when_called", forward=visit.around)
