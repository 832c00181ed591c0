"""The flow-matching solvers: diffusers' own on the published schedule of sigmas.

Names and call signatures are those of programs written for Wan2.1.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

__all__ = ["FlowDPMSolverMultistepScheduler", "get_sampling_sigmas", "retrieve_timesteps"]


def get_sampling_sigmas(sampling_steps: int, shift: float) -> np.ndarray:
    """The sigmas of DPM-Solver++: [sampling_steps] falling from 1, shifted, without the final 0."""
    return shifted(np.linspace(1, 0, sampling_steps + 1)[:-1], shift)


def shifted(sigmas: Any, shift: float) -> Any:
    """Sigmas shifted towards noise: shift s / (1 + (shift - 1) s)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: torch.device | str | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, int]:
    """Sets a scheduler's schedule, by its length, its timesteps or its sigmas; returns its timesteps and their number.

    Raises ValueError for timesteps and sigmas at once, or for what the scheduler does not take.
    """
    given = {name: v for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    if len(given) > 1:
        raise ValueError("give timesteps or sigmas, not both")
    for name in given:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__}.set_timesteps takes no {name}")
    given = given or {"num_inference_steps": num_inference_steps}
    scheduler.set_timesteps(**given, device=device, **kwargs)
    return scheduler.timesteps, len(scheduler.timesteps)


class FlowSchedule:
    """A mixin that makes a multistep solver of diffusers one for flow matching on the published schedule."""

    def _start(self, shift: float | None, use_dynamic_shifting: bool, **options: Any) -> None:
        """Initialises the solver; options are those of diffusers' class.

        Raises ValueError for dynamic shifting, or a schedule that does not end in 0.
        """
        if use_dynamic_shifting:
            raise ValueError("use_dynamic_shifting: not supported, give the shift itself")
        if options["final_sigmas_type"] != "zero":
            raise ValueError(f"final_sigmas_type {options['final_sigmas_type']!r}: only 'zero' is supported")
        super().__init__(**options, use_flow_sigmas=True)  # type: ignore[call-arg]
        self.register_to_config(shift=shift)  # type: ignore[attr-defined]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        shift: float | None = None,
    ) -> None:
        """Sets the schedule, and forgets all steps taken.

        Args:
            num_inference_steps: length of a schedule that falls evenly from the largest sigma of training.
            device: where the timesteps go.
            sigmas: another schedule instead, without the final 0.
            mu: must be None.
            shift: of the schedule; default: the solver's own.
        """
        if mu is not None:
            raise ValueError("mu: belongs to dynamic shifting, which is not supported; give the shift itself")
        times, own = self.config.num_train_timesteps, self.config.shift  # type: ignore[attr-defined]
        if sigmas is None:
            largest = shifted(torch.tensor(1 - 1 / times, dtype=torch.float64).float(), own).item()
            sigmas = np.linspace(largest, 0, num_inference_steps + 1)[:-1]
        sigmas = shifted(np.asarray(sigmas), own if shift is None else shift)
        super().set_timesteps(len(sigmas), device=device)  # type: ignore[misc]
        self.timesteps = torch.from_numpy(sigmas * times).to(device, torch.int64)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))


class FlowDPMSolverMultistepScheduler(FlowSchedule, DPMSolverMultistepScheduler):
    """DPM-Solver++ (Lu et al., 2022) for flow matching; arguments as diffusers', `shift` as set_timesteps'.

    Raises ValueError for what FlowSchedule does not support.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: str = "flow_prediction",
        shift: float | None = 1.0,
        use_dynamic_shifting: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str | None = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        invert_sigmas: bool = False,
    ):
        if invert_sigmas:
            raise ValueError("invert_sigmas: not supported")
        self._start(
            shift,
            use_dynamic_shifting,
            num_train_timesteps=num_train_timesteps,
            solver_order=solver_order,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            final_sigmas_type=final_sigmas_type,
            lambda_min_clipped=lambda_min_clipped,
            variance_type=variance_type,
        )
