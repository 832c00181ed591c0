"""When and where a run saves its state."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leanwan.errors import InputError

from ..sampling import Solver
from ..utils.files import other_folders
from ..utils.program import command
from .interrupts import Interrupts
from .state import State, write_state

log = logging.getLogger(__name__)


class Keeper:
    """Saves the state of a run in a file beside its result.

    Attributes:
        state: the run's state, without the steps of denoising taken since `save` or `go_on` set it.
        path: of the state file; saving changes it if the folder takes no more.
        kept: whether the state file exists.
        interrupts: tells after each step whether the run is to stop.

    Args:
        state: in which the run starts.
        interrupts: see above.
        remembers: whether to copy the result of each step to RAM, for `go_on`.
    """

    def __init__(self, state: State, interrupts: Interrupts, remembers: bool = False):
        request = state.request
        self.state = state
        self._remembers = remembers
        self._reached: dict[str, Any] = {}
        self.kept = request.resume is not None
        self.path = Path(request.resume or state_path(request.save_file)).absolute()
        self.interrupts = interrupts
        self._seconds = request.save_every * 60
        self._saved_at = time.monotonic()

    def save(self, **changes: Any) -> None:
        """Applies the changes to the state and writes it; with a warning to another folder if its own takes no more."""
        self._write(replace(self.state, **changes))
        self.state = replace(self.state, **changes)

    def after_step(self, latent: torch.Tensor, solver: Solver) -> None:
        """Writes the state every `save_every` minutes, and when the run is to stop.

        Raises:
            InputError: the latent is not finite.
            Interrupted: the run is to stop.
        """
        check_finite(latent, f"denoising, step {solver.done}")
        if self._remembers:
            self._reached = {"latent": latent.cpu(), "solver": solver.state_dict("cpu")}
        asked = self.interrupts.asked
        if asked or time.monotonic() - self._saved_at >= self._seconds:
            # Not assigned to self.state, which would keep tensors alive that the solver drops in its next steps.
            self._write(replace(self.state, latent=latent, solver=solver.state_dict()))
        if asked:
            self.interrupts.check()

    def go_on(self, **changes: Any) -> None:
        """Moves the state on to the last step in RAM, and applies the changes to its request."""
        request = replace(self.state.request, **changes)
        reached = {} if self.state.finished else self._reached
        self.state = replace(self.state, request=request, **reached)

    def finish(self, latent: torch.Tensor) -> None:
        """Writes the finished latents to the state file and, if save_latents names one, to a file of their own.

        Raises Interrupted if the run is to stop.
        """
        changes = {"conditioning": None, "latent": latent, "solver": None, "finished": True}
        self.save(**changes)
        wanted = self.state.request.save_latents
        if wanted:
            try:
                write_state(wanted, self.state)
            except OSError as error:
                log.warning(f"The latents could not be saved: {error}")
        self.interrupts.check()

    def remove(self) -> None:
        """Deletes the state file, which is not needed once the result is saved."""
        self.path.unlink(missing_ok=True)
        self.kept = False

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """If the body fails, logs the command that resumes the run.

        If a new run is refused with an InputError before its prompt is encoded, its state file is deleted instead.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, InputError) and self.state.stage == "text" and not self.state.request.resume:
                self.remove()
            if self.kept:
                log.error(f"Nothing is lost; go on with: {way_back(self.path)}")
            raise

    def _write(self, state: State) -> None:
        places = [self.path, *(folder / self.path.name for folder in other_folders(self.path.parent))]
        for place in places:
            try:
                write_state(place, state)
            except OSError as error:
                log.warning(f"The state could not be kept in {place.parent}: {error}")
                continue
            if place != self.path:
                log.warning(f"The state is kept in {place}")
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
                self.path = place
            self.kept = True
            break
        self._saved_at = time.monotonic()


def state_path(save_file: str) -> Path:
    """A new path for the state of a run, beside its result."""
    return Path(f"{save_file}.{secrets.token_hex(4)}.state")


def way_back(path: Path) -> str:
    """The command that resumes a run from its state file, from any working directory."""
    words = [*command(), "--resume", str(path)]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def check_finite(values: torch.Tensor, stage: str) -> None:
    """Raises InputError, naming the stage, if a value is infinite or not a number."""
    if not torch.isfinite(values).all():
        raise not_finite(stage)


def not_finite(stage: str) -> InputError:
    """The error for a stage whose result has values that are infinite or not a number."""
    return InputError(
        f"{stage} gave values that are infinite or not numbers: weights are damaged, or a setting is extreme"
    )
