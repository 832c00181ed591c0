"""Memory plans of requests: a request's work and budget for the planner, and the report of its plan."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image, UnidentifiedImageError

from leanwan.accelerator import choose_device, configure_allocator, exact_arithmetic
from leanwan.budget import Budget
from leanwan.errors import InputError

from ..configs.encoders import UMT5_XXL, VIT_H_14
from ..kernels import needed_options
from ..modules.attention import check_attention, choose_kernel, fused_on, kernel_of
from ..modules.model import WanModel
from ..modules.vace_model import VaceWanModel
from ..modules.vae import VAE
from ..planning.plan import GIB, Plan, options_text, time_text
from ..planning.planner import Planner
from ..planning.predict.blocks import Shape
from ..planning.predict.card import NOT_CUDA, Card
from ..planning.predict.stages_predicted import Predictor
from ..planning.predict.work import Work, meta_model
from ..planning.rates import Rates, rates_of, usual, usual_capability
from ..utils.vace_processor import processor_of
from ..utils.video import fitted_size
from .request import PLANNED, Request

RATES_FILE = Path("~/.cache/wan-low-memory/rates.json")

log = logging.getLogger(__name__)


def plan(request: Request, vram: float | None = None, ram: float | None = None) -> Plan:
    """The plan with which a request finishes soonest in a device's memory.

    Args:
        request: the options in its `planned` are chosen, or all of PLANNED if that is empty; the others are kept.
        vram: bytes of the card for this process, CUDA's own included; None for the request's limit or, if it has
            none, for what is free on its device.
        ram: bytes for activations in RAM; None for half of what is available.

    Raises:
        InputError: there is neither a limit nor an accelerator.
    """
    planner, budget = _planner_and_budget(request, vram, ram)
    return planner.plan(budget.room, budget.steady)


def planner_of(
    request: Request,
    rates: Rates,
    ram: float | None = None,
    expandable: bool = True,
    ranks: int | None = None,
    card: Card = NOT_CUDA,
) -> Planner:
    """The Planner of a request. ram: as plan's; ranks: their number, None for as many as the request asks for."""
    planned = request.planned or PLANNED
    kept = {name: value for name, value in vars(request.memory).items() if name not in planned}
    kept |= needed_options(request.attention, request.compile)
    kept |= {"dit_stream": None} if request.dit_fsdp else {}
    kept |= {"t5_stream": False, "t5_cpu": False} if request.t5_fsdp else {}
    check_mode(request.memory_mode, kept)
    ram = psutil.virtual_memory().available / 2 if ram is None else ram
    return Planner(work_of(request, ranks), rates, kept, request.memory_mode, ram, expandable, card)


def planner_within(request: Request, limit: float, ram: float | None = None) -> Planner:
    """The Planner of a request for a typical card of `limit` bytes, without flash-attn."""
    capability, dtype = usual_capability(limit), request.facts.config.param_dtype
    kernel = choose_kernel(dtype, _head_width(request), capability, (), fused_on(capability, dtype))
    return planner_of(request, usual(limit), ram, card=Card(capability, kernel, request.exact))


def planner_for(
    request: Request, device: torch.device, ram: float | None = None, ranks: int | None = None
) -> tuple[Planner, Budget]:
    """The Planner of a request on a device, and its Budget there. ram, ranks: as planner_of's.

    Raises InputError for a limit above the device's memory.
    """
    budget = budget_on(request, device)
    expandable, card, rates = configure_allocator(device), card_of(request, device), usual(budget.total)
    if card.capability:
        # The first matrix product of a process fixes the size of cuBLAS's workspace: measure with the run's arithmetic.
        with exact_arithmetic() if request.exact else contextlib.nullcontext():
            rates = rates_of(device, RATES_FILE.expanduser(), card, request.attention)
    return planner_of(request, rates, ram, expandable, ranks, card), budget


def card_of(request: Request, device: torch.device) -> Card:
    """A device's capability and the attention kernel that a request runs there; raises InputError if it cannot."""
    if device.type != "cuda":
        return NOT_CUDA
    kernel = _kernel_on(device, request.facts.config.param_dtype, _head_width(request), request.attention)
    return Card(torch.cuda.get_device_capability(device), kernel, request.exact)


@functools.cache  # planned anew after memory ran out, the device is not asked again
def _kernel_on(device: torch.device, dtype: torch.dtype, width: int, choice: str) -> str:
    check_attention(choice, device, dtype)
    row = torch.empty(1, 1, 1, width, device=device, dtype=dtype)
    return kernel_of(row, row, row, choice=choice)


def _head_width(request: Request) -> int:
    dit, _ = _models(request.task)
    return dit.dim // dit.num_heads


def budget_on(request: Request, device: torch.device) -> Budget:
    """The memory of a device that a request may use. Raises InputError for a limit above the device's memory."""
    budget = Budget.on(device, _limit(request), request.vram_fraction)
    if budget.limit is not None and budget.limit > budget.total:
        raise InputError(f"the card has {budget.total / GIB:.2f} GiB", "vram_limit", request.vram_limit)
    return budget


def _limit(request: Request) -> float | None:
    """Bytes of the card for a request, CUDA's own included; None for what is free."""
    return None if request.vram_limit == "auto" else float(request.vram_limit) * GIB


def _planner_and_budget(request: Request, vram: float | None, ram: float | None) -> tuple[Planner, Budget]:
    """For a typical card of the limit's size or, without a limit, for the request's device. Arguments as plan's."""
    limit = _limit(request) if vram is None else float(vram)
    if limit is None:
        return planner_for(request, device_of(request), ram)
    return planner_within(request, limit, ram), Budget(limit, request.vram_fraction)


def check_mode(mode: str, kept: dict[str, Any]) -> None:
    """Raises InputError if a memory mode contradicts a memory option that is given."""
    streams = [name for name in ("t5_stream", "t5_cpu", "activation_offload") if kept.get(name)]
    streams += ["dit_stream"] if kept.get("dit_stream") is not None else []
    if mode == "gpu_only" and streams:
        raise InputError(f"gpu_only contradicts --{streams[0]}, leave one out", "memory_mode")
    if mode == "cpu_only" and kept.get("offload_model") is False:
        raise InputError("cpu_only contradicts --offload_model False, leave one out", "memory_mode")


def device_of(request: Request) -> torch.device:
    """The accelerator that a request runs on. Raises InputError if there is none."""
    device = choose_device(request.device)
    if device.type == "cpu":
        raise InputError("there is no accelerator here; say what a card has, such as 8", "vram_limit")
    return device


def work_of(request: Request, ranks: int | None = None) -> Work:
    """The planner's description of a request; tokens and tiles are those of a rank alone, which are the most."""
    ranks = ranks or request.ulysses_size * request.ring_size
    config = request.facts.config
    pictures = _pictures(request) if "clip_checkpoint" in config else []
    (frames, height, width), stride = video_shape(request), config.vae_stride
    dit, vae = _models(request.task)
    references = len(request.references or ()) if hasattr(dit, "vace_blocks") else 0
    joined = dit.patch_embedding.in_channels - vae.z_dim
    source = dit.vace_patch_embedding.in_channels if hasattr(dit, "vace_blocks") else 0
    shape = Shape(
        (vae.z_dim, (frames - 1) // stride[0] + 1 + references, height // stride[1], width // stride[2]),
        joined=joined,
        source=source,
        pictures=len(pictures),
        passes=1 if request.sample_guide_scale == 1 else 2,
        steps=request.sample_steps,
        solver=request.sample_solver,
    )
    encoded = [frames, frames] + [1] * references if source else [frames] if joined else []
    return Work(
        text=UMT5_XXL | dict(config.get("t5_config") or {}),
        text_tokens=config.text_len,
        text_itemsize=config.t5_dtype.itemsize,
        image=VIT_H_14 | dict(config.get("clip_config") or {}) if pictures else None,
        image_itemsize=config.clip_dtype.itemsize if pictures else 0,
        pictures=pictures,
        dit=dit,
        vae=vae,
        dtype=config.param_dtype,
        shape=shape,
        frames=frames,
        height=height,
        width=width,
        strides=stride,
        vae_dim=config.get("vae_dim", 96),
        encoded=encoded,
        sources=source_channels(request),
        ranks=ranks,
        text_ranks=ranks if request.t5_fsdp else 1,
        dit_ranks=ranks if request.dit_fsdp else 1,
    )


@functools.lru_cache(maxsize=4)
def _models(task: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    from ..tasks import TASKS

    facts = TASKS[task]
    sizes = {name: value for name, value in facts.dit_config.items() if not name.startswith("_")}
    kind = VaceWanModel if "vace_layers" in sizes else WanModel
    dit = meta_model(lambda: kind(**sizes), facts.config.param_dtype)
    return dit, meta_model(lambda: VAE(facts.config.get("vae_dim", 96)))


def video_shape(request: Request) -> tuple[int, int, int]:
    """(frames, height, width) of the result. Inputs may set them; without a readable one they are the request's own."""
    task, config, (width, height) = request.facts, request.facts.config, request.pixels
    if task.area_only:
        picture_width, picture_height = _pictures(request)[0]
        step = config.vae_stride[1] * config.patch_size[1]
        return request.frame_num, *fitted_size(picture_height, picture_width, width * height, step)
    if request.src_video:
        processor = processor_of(config)
        processor.set_size(request.pixels, request.frame_num)
        with contextlib.suppress(InputError):
            return processor.shape_of(request.src_video)
    return request.frame_num, height, width


def source_channels(request: Request) -> int:
    """Channels of the videos that are whole in RAM while encoded: known frames, or VACE's source and mask; else 0."""
    task = request.facts
    return 3 if task.all_inputs else 4 + 3 * bool(request.src_mask) if "src_video" in task.inputs else 0


def _pictures(request: Request) -> list[tuple[int, int]]:
    """(width, height) of each input picture; one that cannot be read is taken to be as large as the video."""
    sizes = []
    for name in request.facts.inputs:
        try:
            with Image.open(getattr(request, name)) as picture:
                sizes.append(picture.size)
        except (OSError, UnidentifiedImageError, AttributeError, TypeError, ValueError):
            sizes.append(request.pixels)
    return sizes


# Reports


def report(request: Request, ram: float | None = None) -> tuple[Plan, dict[str, Any]]:
    """The plan of a request, and its report as JSON values, which adds what more and less memory would bring."""
    planner, budget = _planner_and_budget(request, None, ram)
    room = budget.room
    chosen = planner.plan(room, budget.steady)
    limit = budget.limit_for(room) if budget.limit is None else budget.limit
    beside: dict[str, Any] = chosen.to_json() | {"limit_bytes": int(limit)}
    beside["least_bytes"] = None if chosen.fits else int(budget.limit_for(planner.least()))
    more = planner.plan(room + GIB)
    beside["seconds_with_one_gib_more"] = more.seconds if more.fits else None
    beside["longest_frame_num"] = longest(request, planner, room) if chosen.fits else None
    return chosen, beside


def longest(request: Request, planner: Planner, room: float) -> int:
    """The most frames that fit `room` bytes with the leanest options; 1 for pictures, a source video's own frames."""
    if request.facts.still:
        return 1
    if request.src_video:
        return planner.work.frames  # the source's
    options = planner.leanest_options()

    def fits(number: int, surely: bool) -> bool:
        work = work_of(replace(request, frame_num=4 * number + 1))
        predictor = Predictor(work, planner.rates, planner.expandable, planner.card)
        if surely:
            return all(predictor.surely_fits(name, options, room) for name in predictor.names)
        return all(predictor.live(name, options) <= room for name in predictor.names)

    (most,) = (item.metadata["at_most"] for item in fields(Request) if item.name == "frame_num")
    low, high = (request.frame_num - 1) // 4, (most - 1) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle, surely=False):
            low = middle
        else:
            high = middle - 1
    while low and not fits(low, surely=True):  # the search compared live bytes; reserved ones are more
        low = low * 31 // 32
    return 4 * low + 1


def plan_text(chosen: Plan, beside: dict[str, Any]) -> str:
    """The report of a plan as text. beside: the values from `report`."""
    fits = "fits" if chosen.fits else f"does not fit, {beside['least_bytes'] / GIB:.2f} GiB would"
    lines = [
        f"{options_text(chosen.options) or 'all on the device'}",
        f"{fits}: {chosen.peak_bytes / GIB:.2f} of {chosen.room / GIB:.2f} GiB, beside CUDA's own",
        "",
        f"{'stage':8}{'GiB':>8}{'reserved':>10}{'time':>10}",
    ]
    for name, stage in chosen.stages.items():
        size = f"{stage.bytes / GIB:8.2f}{stage.reserved / GIB:10.2f}"
        lines.append(f"{name:8}{size}{time_text(stage.seconds):>10}")
    lines.append(f"{'all':8}{'':8}{chosen.peak_bytes / GIB:10.2f}{time_text(chosen.seconds):>10}")
    lines.append(f"RAM {chosen.ram_bytes / GIB:.1f} GiB, mapped from disk {chosen.disk_bytes / GIB:.1f} GiB")
    more = beside["seconds_with_one_gib_more"]
    if chosen.fits and more is not None:
        lines.append(
            f"with one GiB more: {time_text(more)}; longest video that fits: {beside['longest_frame_num']} frames"
        )
    lines.append(f"times are modelled, rates of {chosen.rates}")
    return "\n".join(lines)
