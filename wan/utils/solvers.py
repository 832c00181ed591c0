"""The solvers of the flow's differential equation: diffusers' own, on the published sigma schedules."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

SOLVERS = ("unipc", "dpm++")


def make_solver(name, steps, shift, device, num_train_timesteps=1000):
    """A scheduler that is ready to step.

    Args:
        name: "unipc" (Zhao et al., UniPC, 2023) or "dpm++" (Lu et al., DPM-Solver++, 2022).
        steps: number of steps.
        shift: how far the schedule is shifted towards noise; sigma becomes shift s / (1 + (shift - 1) s).
        device: where the samples are.
        num_train_timesteps: of the training schedule.

    Returns:
        A diffusers scheduler whose `timesteps` are to be walked in order.

    Raises:
        ValueError: an unknown name.
    """
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        largest = float(np.float32(1 - 1 / num_train_timesteps))
        scheduler.set_timesteps(steps, device=device, sigmas=np.linspace(largest, 0, steps + 1)[:-1])
    elif name == "dpm++":
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=num_train_timesteps,
            algorithm_type="dpmsolver++",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(steps, device=device)
        sigmas = np.linspace(1, 0, steps + 1)[:steps]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        scheduler.timesteps = torch.from_numpy(sigmas * num_train_timesteps).to(device, torch.int64)
        scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    else:
        raise ValueError(f"unknown solver {name!r}, choose one of {', '.join(SOLVERS)}")
    return scheduler
