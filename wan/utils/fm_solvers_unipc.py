"""UniPC for flow matching: diffusers' own on the published schedule of sigmas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from .fm_solvers import FlowSchedule

__all__ = ["FlowUniPCMultistepScheduler"]


class FlowUniPCMultistepScheduler(FlowSchedule, UniPCMultistepScheduler):
    """UniPC (Zhao et al., 2023) for flow matching; arguments as diffusers', `shift` as set_timesteps'.

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: Any = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str | None = "zero",
    ):
        self._start(
            shift,
            use_dynamic_shifting,
            num_train_timesteps=num_train_timesteps,
            solver_order=solver_order,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            predict_x0=predict_x0,
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            disable_corrector=list(disable_corrector),
            solver_p=solver_p,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            final_sigmas_type=final_sigmas_type,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """One step, as diffusers'; the generator has no effect, since the step draws no noise."""
        return super().step(model_output, timestep, sample, return_dict)
