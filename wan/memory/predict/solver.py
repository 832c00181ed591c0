"""What a step of sampling.py's solvers makes, and what they keep: diffusers' schedulers, tensor by tensor."""

from __future__ import annotations

from .ledger import Ledger


class Solver:
    """A solver on its way.

    Args:
        name: "unipc", "dpm++" or "euler".
        nbytes: of a latent, fp32.
        narrow: whether steps are taken under autocast to a 16-bit type, which rounds UniPC's sums of differences.
    """

    def __init__(self, ledger: Ledger, name: str, nbytes: int, narrow: bool):
        self.ledger, self.name, self.nbytes = ledger, name, nbytes
        self.narrow = nbytes // 2 if narrow else nbytes
        self.outputs: list[int] = []  # what the model said of the latest steps, two at most
        self.last: int | None = None  # UniPC's latent before this one

    def step(self, flow: int, x: int, last: bool = False) -> int:
        """Takes the latent x a step on; it and the flow are dropped. The last step is one of first order."""
        take, become, drop, nbytes = self.ledger.take, self.ledger.become, self.ledger.drop, self.nbytes
        if self.name == "euler":
            out = become(nbytes, take(nbytes))
            drop(flow, x)
            return out
        output = become(nbytes, take(nbytes))
        if self.name == "dpm++":
            self._keep(output)
            out = self._linear() if last or len(self.outputs) == 1 else self._second_order()
            drop(flow, x)
            return out
        corrected = self._corrected() if self.outputs else x
        self._keep(output)
        drop(self.last)
        self.last = corrected
        out = self._predicted(last or len(self.outputs) == 1)
        drop(flow, x if x != self.last else None)
        return out

    def drop(self) -> None:
        """The run is over."""
        self.ledger.drop(*self.outputs, self.last)

    def _keep(self, output: int) -> None:
        self.outputs.append(output)
        if len(self.outputs) > 2:
            self.ledger.drop(self.outputs.pop(0))

    def _linear(self) -> int:
        """a x - b m."""
        scaled = [self.ledger.take(self.nbytes) for _ in range(2)]
        return self.ledger.become(self.nbytes, *scaled)

    def _difference(self) -> int:
        return self.ledger.become(self.nbytes, self.ledger.take(self.nbytes))

    def _second_order(self) -> int:
        difference, out = self._difference(), self._linear()
        return self.ledger.become(self.nbytes, out, self.ledger.take(self.nbytes), difference)

    def _summed(self) -> int:
        cast = self.ledger.take(self.narrow) if self.narrow < self.nbytes else None
        return self.ledger.become(self.narrow, cast)

    def _corrected(self) -> int:
        take, become, nbytes = self.ledger.take, self.ledger.become, self.nbytes
        second = len(self.outputs) > 1
        stack = become(nbytes, self._difference()) if second else None
        x = self._linear()
        total = self._summed() if second else None
        change = take(nbytes)
        scaled = become(nbytes, become(nbytes, take(nbytes)))
        return become(nbytes, scaled, stack, x, total, change)

    def _predicted(self, first_order: bool) -> int:
        nbytes = self.nbytes
        if first_order:
            return self.ledger.become(nbytes, self._linear())
        stack = self.ledger.become(nbytes, self._difference())
        x = self._linear()
        total = self._summed()
        scaled = self.ledger.take(self.narrow)
        return self.ledger.become(nbytes, scaled, stack, x, total)
