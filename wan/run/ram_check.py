"""Checks before a run whether the machine has the RAM for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil

from leanwan.errors import InputError

from ..modules.model import weights_path
from ..planning.predict.ram_needed import Ram, ram_needed
from ..weights.reading import stored_types
from .plan_request import source_channels, video_shape
from .request import Request

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

GIB = 2**30

log = logging.getLogger(__name__)


def check_ram(request: Request, pipeline: Any, ranks: Ranks | None = None) -> None:
    """Logs the RAM that a run needs and that is available, as a warning if it is too little.

    Ranks of one machine count together. Nothing is checked if the DiT is loaded already, or computes on the CPU, where
    everything is in RAM.

    Raises InputError if all RAM and swap space together are too little.
    """
    if pipeline.device.type == "cpu" or "model" in vars(pipeline):
        return
    types = stored_types(weights_path(pipeline.checkpoint_dir))
    need = ram_needed(
        pipeline.model_class.from_config(pipeline.checkpoint_dir),
        pipeline.options,
        video_shape(request),
        pipeline.vae_stride,
        pipeline.param_dtype,
        types.get,
        vae_dim=pipeline.config.get("vae_dim", 96),
        prompts=1 if request.sample_guide_scale == 1 else 2,
        source_channels=source_channels(request),
    )
    if ranks:
        need = _of_ranks(need, request, ranks)
    memory, swap = psutil.virtual_memory(), psutil.swap_memory().total
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(need).items())
    line = f"needs {need.peak / GIB:.1f} GiB of RAM ({parts}), there are {memory.total / GIB:.1f}"
    if need.peak > memory.total + swap:
        spare = "fewer frames" if pipeline.options.offload_folder else "--offload_folder, or fewer frames"
        raise InputError(f"{line}; give {spare}", "frame_num", request.frame_num)
    level = logging.WARNING if need.peak > memory.available else logging.INFO
    log.log(level, f"The run {line}, {memory.available / GIB:.1f} of them free")


def _of_ranks(need: Ram, request: Request, ranks: Ranks) -> Ram:
    """The RAM that all ranks of this machine need: as much for each, except that they share a pass's activations."""
    from .over_ranks import sharing

    each = replace(need, activations=need.activations // sharing(request, ranks))
    return Ram(**{name: ranks.local_size * size for name, size in vars(each).items()})
