"""Records the tensors that the solvers in wan/sampling.py, diffusers' schedulers, make in a step and keep."""

from __future__ import annotations

import math

from leanwan.record.ledger import Ledger

from ...configs.shared_config import SOLVER_PIECES


def schedule(ledger: Ledger, name: str, steps: int) -> list[int]:
    """Records the tensors of a solver's schedule on the device: its timesteps, and Euler's sigmas."""
    if name != "euler":
        return [ledger.take(8 * steps)]
    sigmas, times = ledger.take(4 * steps), ledger.take(4 * steps)
    zero = ledger.take(4)
    return [times, ledger.become(4 * (steps + 1), zero, sigmas)]


class SolverRequests:
    """Records a solver's steps one after the other.

    Args:
        name: "unipc", "dpm++" or "euler".
        nbytes: of a latent, fp32.
        narrow: whether steps are taken under autocast to a 16-bit type, which rounds UniPC's sums of differences.
        frames: of a latent, if the solver keeps its tensors in RAM and takes steps some frames at a time; else None.
    """

    def __init__(self, ledger: Ledger, name: str, nbytes: int, narrow: bool, frames: int | None = None):
        self._frames, self._rounds = frames, narrow
        self._steps = 0
        self.ledger, self.name, self.nbytes = ledger, name, nbytes
        self.narrow = nbytes // 2 if narrow else nbytes
        self.outputs: list[int] = []  # the model's outputs of the latest steps, two at most
        self.last: int | None = None  # UniPC's previous latent, or Euler's flow

    def step(self, flow: int, x: int, last: bool = False) -> int:
        """Records a step from the latent x to the next one; frees x and the flow. The last step is of first order."""
        take, become, drop, nbytes = self.ledger.take, self.ledger.become, self.ledger.drop, self.nbytes
        if self._frames:
            return self._by_pieces(flow, x, last)
        if self.name == "euler":  # Euler keeps the flow itself
            drop(self.last)
            self.last = flow
            difference = take(4)  # of two sigmas
            out = become(nbytes, take(nbytes))
            drop(difference, x)
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

    def _by_pieces(self, flow: int, x: int, last: bool) -> int:
        """A step by pieces of frames. What the solver kept of a piece arrives before that of the last one is freed."""
        ledger = self.ledger
        out = ledger.take(self.nbytes)
        step = math.ceil(self._frames / SOLVER_PIECES)
        before: list[int | None] = []
        for start in range(0, self._frames, step):
            nbytes = self.nbytes * min(step, self._frames - start) // self._frames
            piece = SolverRequests(ledger, self.name, nbytes, self._rounds)
            if self.name != "euler":
                piece.outputs = [ledger.take(nbytes) for _ in range(min(2, self._steps))]
            if self.name == "unipc" and self._steps:
                piece.last = ledger.take(nbytes)
            ledger.drop(*before)
            ledger.drop(piece.step(ledger.take(0), ledger.take(0), last))
            before = [*piece.outputs, piece.last]
        ledger.drop(*before, flow, x)
        self._steps += 1
        return out

    def drop(self) -> None:
        """Frees all that the solver keeps."""
        self.ledger.drop(*self.outputs, self.last)

    def _keep(self, output: int) -> None:
        self.outputs.append(output)
        if len(self.outputs) > 2:
            self.ledger.drop(self.outputs.pop(0))

    def _linear(self) -> int:
        """a x - b m, of a latent x and a model output m."""
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
