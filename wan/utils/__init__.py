"""Helpers for all other packages; names that programs written for Wan2.1 import from here are imported when used."""

from leanwan.lazy import lazily

_HOMES = {
    "FlowDPMSolverMultistepScheduler": "fm_solvers",
    "get_sampling_sigmas": "fm_solvers",
    "retrieve_timesteps": "fm_solvers",
    "FlowUniPCMultistepScheduler": "fm_solvers_unipc",
    "VaceVideoProcessor": "vace_processor",
}

__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
