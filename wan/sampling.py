"""From noise to a latent video: the walk along the flow, guidance, and the solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas
from .utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

SOLVERS = ("unipc", "dpm++")

Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def guided(flow: Flow, unconditional: Flow, scale: float) -> Flow:
    """The flow under classifier-free guidance (Ho and Salimans, 2022): unconditional + scale (flow - unconditional).

    Flows are functions of a latent [C, F, H, W] and a timestep [1], and return [C, F, H, W] fp32.
    """

    def flow_at(latent: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = flow(latent, t)
        away_from = unconditional(latent, t)
        return away_from + scale * (conditional - away_from)

    return flow_at


def denoise(
    flow: Flow,
    solver: Solver,
    latent: torch.Tensor,
    steps: Callable[[Iterable[torch.Tensor], int], Iterable[torch.Tensor]] = lambda times, total: times,
) -> torch.Tensor:
    """Walks from a noisy latent to a clean one.

    Args:
        flow: predicts the flow of a latent [C, F, H, W] at a timestep [1].
        solver: takes the steps that it has left.
        latent: [C, F, H, W] fp32, where the solver is.
        steps: goes through the timesteps, their number being the second argument; a place to watch them.

    Returns:
        [C, F, H, W] fp32.
    """
    with torch.no_grad():
        times = solver.timesteps
        for t in steps(times, len(times)):
            latent = solver.step(flow(latent, t[None]), t, latent)
    return latent


class Solver:
    """A solver of the flow's differential equation: diffusers' own, on the published sigma schedule.

    Args:
        name: "unipc" (Zhao et al., UniPC, 2023) or "dpm++" (Lu et al., DPM-Solver++, 2022).
        steps: number of steps.
        shift: how far the schedule is shifted towards noise; sigma becomes shift s / (1 + (shift - 1) s).
        device: where the samples are.
        num_train_timesteps: of the training schedule.
        dtype: the model's compute type. Steps are taken under autocast to it, as the published ones are, which rounds
            UniPC's einsum on CUDA; everything else of a step is fp32 whatever it is.

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
    ):
        if name not in SOLVERS:
            raise ValueError(f"unknown solver {name!r}, choose one of {', '.join(SOLVERS)}")
        make = _unipc if name == "unipc" else _dpm
        self.name = name
        self._dtype = dtype
        self._scheduler = make(steps, shift, device, num_train_timesteps)

    @property
    def timesteps(self) -> torch.Tensor:
        """[steps left], in [0, num_train_timesteps], in the order in which they are to be walked."""
        return self._scheduler.timesteps[self._scheduler.step_index or 0 :]

    def step(self, flow: torch.Tensor, t: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The latent one step further on. flow, latent: [C, F, H, W] fp32; t: the timestep that the flow is at."""
        narrow = self._dtype is not torch.float32
        with torch.autocast(latent.device.type, self._dtype if narrow else None, enabled=narrow):
            return self._scheduler.step(flow[None], t, latent[None], return_dict=False)[0][0]

    def state_dict(self) -> dict[str, Any]:
        """What the steps so far have left behind: tensors, numbers, and lists of them and of None."""
        return {
            name: _copy(getattr(self._scheduler, name)) for name in _MEMORY if hasattr(self._scheduler, name)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another solver, made with the same arguments, gave this state."""
        for name, value in state.items():
            setattr(self._scheduler, name, _copy(value))


# What diffusers' multistep solvers change while they step.
_MEMORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index")


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _unipc(steps: int, shift: float, device: torch.device | str, num_train_timesteps: int) -> Any:
    scheduler = FlowUniPCMultistepScheduler(num_train_timesteps)
    scheduler.set_timesteps(steps, device=device, shift=shift)
    return scheduler


def _dpm(steps: int, shift: float, device: torch.device | str, num_train_timesteps: int) -> Any:
    scheduler = FlowDPMSolverMultistepScheduler(num_train_timesteps)
    scheduler.set_timesteps(device=device, sigmas=get_sampling_sigmas(steps, shift))
    return scheduler
