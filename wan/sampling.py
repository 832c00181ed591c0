"""From noise to a latent video: the sampling loop, classifier-free guidance, and the solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.overrides import TorchFunctionMode

from .configs.shared_config import SOLVER_PIECES
from .utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas
from .utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

SOLVERS = ("unipc", "dpm++", "euler")

# (latent [C, F, H, W], index of the timestep among those left at the start) -> flow [C, F, H, W] fp32.
Flow = Callable[[torch.Tensor, int], torch.Tensor]
Flows = Callable[[torch.Tensor, int], list[torch.Tensor]]  # the same, with one flow per prompt
OnStep = Callable[[torch.Tensor, "Solver"], None]


def guided(flow: Flow, unconditional: Flow, scale: float) -> Flow:
    """The flow under classifier-free guidance (Ho and Salimans, 2022): unconditional + scale (flow - unconditional).

    At a scale of 1 the result is `flow` itself: `unconditional` is not called, which halves the passes. The formula
    would give the same up to rounding of the last bits.
    """
    if scale == 1:
        return flow

    return guided_together(lambda latent, step: [flow(latent, step), unconditional(latent, step)], scale)


def guided_together(flows: Flows, scale: float) -> Flow:
    """As `guided`, for a function that returns [flow, unconditional flow] in one call, or at a scale of 1 [flow]."""
    if scale == 1:
        return lambda latent, step: flows(latent, step)[0]

    def flow_at(latent: torch.Tensor, step: int) -> torch.Tensor:
        conditional, away_from = flows(latent, step)
        return away_from + scale * (conditional - away_from)

    return flow_at


def denoise(
    flow: Flow,
    solver: Solver,
    latent: torch.Tensor,
    steps: Callable[[Iterable[torch.Tensor], int, int], Iterable[torch.Tensor]] = lambda times, total, done: (
        times
    ),
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Takes a noisy latent to a clean one.

    Args:
        flow: predicts the flow.
        solver: takes all steps that it has left.
        latent: [C, F, H, W] fp32, at the solver's current step.
        steps: of (timesteps left, number of all steps, number done) returns the timesteps left, to watch them pass.
        on_step: called with the latent and the solver after every step.

    Returns:
        [C, F, H, W] fp32.
    """
    with torch.no_grad():
        for step, t in enumerate(steps(solver.timesteps, solver.steps, solver.done)):
            latent = solver.step(flow(latent, step), t, latent)
            if on_step:
                on_step(latent, solver)
    return latent


class Solver:
    """A solver of the flow's differential equation: diffusers' own, on the published sigma schedule.

    Args:
        name: "unipc" (Zhao et al., UniPC, 2023), "dpm++" (Lu et al., DPM-Solver++, 2022) or "euler", the first-order
            step that models distilled to few steps are made for.
        steps: number of steps.
        shift: how far the schedule is shifted towards noise; sigma becomes shift s / (1 + (shift - 1) s).
        device: of the samples.
        num_train_timesteps: length of the training schedule.
        dtype: the model's compute type. Steps run under autocast to it, as the published ones do, which rounds UniPC's
            einsum on CUDA; the rest of a step is fp32 whatever the type.
        offload: keep the solver's history in RAM, and take each step on some latent frames at a time. The bits are the
            same, since each number of the result depends only on the numbers at its own place.

    Raises ValueError for an unknown name.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        shift: float,
        device: torch.device | str,
        num_train_timesteps: int = 1000,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ):
        if name not in SOLVERS:
            raise ValueError(f"unknown solver {name!r}, choose one of {', '.join(SOLVERS)}")
        make = {"unipc": _unipc, "dpm++": _dpm, "euler": _euler}[name]
        self.name, self.steps = name, steps
        self._device, self._dtype = device, dtype
        self._offload = offload
        self._scheduler = make(steps, shift, device, num_train_timesteps)
        # Else the scheduler reads its times back from the device to find the first, and takes the second of equal ones.
        self._scheduler.set_begin_index(0)
        self._flow: torch.Tensor | None = None  # the last step's, for a scheduler without `model_outputs`

    @property
    def timesteps(self) -> torch.Tensor:
        """The timesteps left, [steps left] in [0, num_train_timesteps], in the order of the steps."""
        return self._scheduler.timesteps[self.done :]

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._scheduler.step_index or 0

    def step(self, flow: torch.Tensor, t: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The latent after one step. flow, latent: [C, F, H, W] fp32; t: the timestep that the flow is at."""
        if not hasattr(self._scheduler, "model_outputs"):
            self._flow = flow.cpu() if self._offload else flow
        solved: list[torch.Tensor] = []
        if not self._offload:
            return self._stepped(flow, t, latent, solved)
        before, states = self.state_dict(), []
        out = torch.empty_like(latent)
        for frames in torch.arange(latent.size(1)).chunk(SOLVER_PIECES):
            piece = slice(int(frames[0]), int(frames[-1]) + 1)
            self.load_state_dict(_each(before, partial(_frames, piece)))
            out[:, piece] = self._stepped(flow[:, piece], t, latent[:, piece], solved)
            states.append(_each(self.state_dict(), torch.Tensor.cpu))
        for name, value in _joined(states).items():
            setattr(self._scheduler, name, value)
        return out

    def _stepped(
        self, flow: torch.Tensor, t: torch.Tensor, latent: torch.Tensor, solved: list[torch.Tensor]
    ) -> torch.Tensor:
        narrow = self._dtype is not torch.float32
        autocast = torch.autocast(latent.device.type, self._dtype if narrow else None, enabled=narrow)
        with autocast, _SolvedOnce(solved):
            return self._scheduler.step(flow[None], t, latent[None], return_dict=False)[0][0]

    def clean(self, latent: torch.Tensor) -> torch.Tensor:
        """The clean latent that the last step predicted, [C, F, H, W] fp32 on the CPU: the latent less all its noise.

        latent: the result of that step.
        """
        if self._flow is None:  # then `model_outputs` holds the clean latents that the steps predicted
            return self._scheduler.model_outputs[-1][0].float().cpu()
        sigma = self._scheduler.sigmas[self.done].item()
        return latent.cpu() - sigma * self._flow.cpu()

    def state_dict(self, device: torch.device | str | None = None) -> dict[str, Any]:
        """The solver's history: tensors, copied to `device` if one is given, numbers, and lists of both."""
        return {
            name: _copy(getattr(self._scheduler, name), device)
            for name in _MEMORY
            if hasattr(self._scheduler, name)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the state of a solver made with the same arguments; its tensors may be on any device."""
        for name, value in state.items():
            setattr(self._scheduler, name, _copy(value, self._device))


class _SolvedOnce(TorchFunctionMode):
    """Inside, torch.linalg.solve solves each linear system of a step once, and gives later pieces the same solutions.

    All pieces of a step solve the same systems in the same order. They are solved on the device, where UniPC's own step
    solves them, so that the bits are the same whatever the library does. `solve_ex` does not make the host wait for
    the check that a system is regular, as a system of distinct steps always is.

    Args:
        solved: the solutions of this step so far; new ones are appended.
    """

    def __init__(self, solved: list[torch.Tensor]):
        super().__init__()
        self._solved, self._asked = solved, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.linalg.solve:
            return func(*args, **(kwargs or {}))
        if self._asked == len(self._solved):
            self._solved.append(torch.linalg.solve_ex(*args, **(kwargs or {})).result)
        self._asked += 1
        return self._solved[self._asked - 1]


# Attributes that diffusers' schedulers change while they step; each has some of them.
_MEMORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index")


def _each(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a state with `function` applied to each latent [1, C, F, H, W] in it."""
    if isinstance(value, dict):
        return {name: _each(item, function) for name, item in value.items()}
    if isinstance(value, list):
        return [_each(item, function) for item in value]
    return function(value) if isinstance(value, torch.Tensor) and value.dim() == 5 else value


def _frames(piece: slice, latent: torch.Tensor) -> torch.Tensor:
    return latent[:, :, piece]


def _joined(states: Sequence[Any]) -> Any:
    """The state whose latents are those of `states`, concatenated along the frames."""
    first = states[0]
    if isinstance(first, dict):
        return {name: _joined([state[name] for state in states]) for name in first}
    if isinstance(first, list):
        return [_joined(items) for items in zip(*states)]
    return torch.cat(states, 2) if isinstance(first, torch.Tensor) and first.dim() == 5 else first


def _copy(value: Any, device: torch.device | str | None = None) -> Any:
    """A value with its lists copied and, if a device is given, its tensors moved there."""
    if isinstance(value, list):
        return [_copy(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) and device is not None else value


def _unipc(steps: int, shift: float, device: torch.device | str, num_train_timesteps: int) -> Any:
    scheduler = FlowUniPCMultistepScheduler(num_train_timesteps)
    scheduler.set_timesteps(steps, device=device, shift=shift)
    return scheduler


def _dpm(steps: int, shift: float, device: torch.device | str, num_train_timesteps: int) -> Any:
    scheduler = FlowDPMSolverMultistepScheduler(num_train_timesteps)
    scheduler.set_timesteps(device=device, sigmas=get_sampling_sigmas(steps, shift))
    return scheduler


def _euler(steps: int, shift: float, device: torch.device | str, num_train_timesteps: int) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    scheduler.set_timesteps(steps, device=device, sigmas=np.linspace(1, 0, steps + 1)[:steps])
    return scheduler
