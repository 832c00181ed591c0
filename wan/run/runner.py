"""Carries out requests: checks, plans, loads, encodes, denoises, decodes, saves."""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leanwan.accelerator import (
    choose_device,
    configure_allocator,
    exact_arithmetic,
    is_out_of_memory,
    release_memory,
    require_accelerator,
)
from leanwan.budget import Budget, hold_to, hold_to_free
from leanwan.errors import InputError

from ..kernels import check_able
from ..planning.plan import Plan
from ..utils.events import Event, Expected, Finished, Listener, Planned
from ..weights.hub import find_checkpoint
from ..weights.lora import lora_identity
from ..weights.prompts import PromptCache
from .execute import MERGED, digests, identified, made, save, start
from .forecast import Forecast
from .interrupts import Interrupts
from .keeper import Keeper
from .outputs import check_outputs
from .plan_request import budget_on, planner_for
from .ram_check import check_ram
from .request import Request

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

log = logging.getLogger(__name__)


def run(request: Request, on_event: Listener | None = None, interrupts: Interrupts | None = None) -> Path:
    """Makes and saves what a request asks for: from the start, or from a saved state or saved latents.

    A file beside the result keeps the run's state until the result is saved; if the run fails, the log names the
    command that resumes it.

    Args:
        request: what to make.
        on_event: called with each event (wan.utils.events): stages, steps, memory, the finished file; None for no one.
        interrupts: tells after each step whether to stop.

    Returns:
        The path of the result.

    Raises:
        InputError: a file cannot be used; raised before any long work where possible.
        Interrupted: `interrupts` asked for it.
        torch.OutOfMemoryError, OSError: the device's memory, or a disk, gave out.
    """
    return Runner(on_event, interrupts).run(request)


class Runner:
    """Runs requests one after the other. Successive requests that use the same models share the loaded ones.

    Args:
        on_event, interrupts: as run()'s.
        ranks: the processes that share the work, each with a Runner: the first one's `run` is called, the others
            `follow`.
    """

    def __init__(
        self,
        on_event: Listener | None = None,
        interrupts: Interrupts | None = None,
        ranks: Ranks | None = None,
    ):
        self._ranks = ranks
        self._listener = on_event or (lambda event: None)
        self._forecast: Forecast | None = None
        self._prompts: dict[Path | None, PromptCache] = {}  # by folder
        self._interrupts = interrupts or Interrupts()
        self._pipeline: Any = None
        self._built: Any = None  # the settings that the loaded pipeline was built from

    def run(self, request: Request) -> Path:
        """As run()."""
        if self._ranks or request.over_ranks:
            from .over_ranks import check_sizes

            check_sizes(request, self._ranks)
        check_outputs(request)
        request, plan = self._planned(request)
        state = start(request)
        with (
            exact_arithmetic() if request.exact else contextlib.nullcontext(),
            self._ranks.session("run", request) if self._ranks else contextlib.nullcontext(),
        ):
            pipeline = self._pipeline_for(request)
            self._check_weights(request, pipeline)
            if not state.finished:
                check_ram(state.request, pipeline, self._ranks)
            remembers = plan is not None or self._ranks is not None
            keeper = Keeper(identified(state, pipeline), self._interrupts, remembers)
            self._forecast = Forecast(request, pipeline)
            with keeper.told():
                while True:
                    try:
                        video = made(pipeline, keeper, self._tell)
                        break
                    except Exception as error:
                        if self._ranks:
                            from .over_ranks import less_room

                            # The ranks are out of step, so the run ends; the resumed one is planned with less memory.
                            keeper.go_on(**less_room(request, plan, error))
                            keeper.save()
                            raise
                        plan = self._leaner(request, plan, error)
                        if plan is None:
                            raise
                    # Outside the except clause, where the traceback keeps the tensors of the failed pass alive.
                    del pipeline
                    request = replace(request, memory=plan.options)
                    keeper.go_on(memory=plan.options)
                    self._forget(choose_device(request.device))
                    pipeline = self._pipeline_for(request)
                path = save(video, keeper.state.request, pipeline, plan is not None)
                keeper.remove()
        self._tell(Finished(path))
        return path

    def follow(self, ranks: Ranks) -> None:
        """On every rank but the first: computes this rank's share of each request, until the first has no more."""
        ranks.serve({"run": self._followed, "room": self._least_budget})

    def _followed(self, request: Request) -> None:
        with exact_arithmetic() if request.exact else contextlib.nullcontext():
            pipeline = self._pipeline_for(request)
            self._check_weights(request, pipeline)
            pipeline.follow()

    def _check_weights(self, request: Request, pipeline: Any) -> None:
        """Raises InputError unless all ranks have the same weights."""
        if self._ranks:
            from .over_ranks import check_weights

            found = digests(pipeline, "text" if request.t5_fsdp else "denoise")
            check_weights(self._ranks, found | {MERGED: lora_identity(request.loras)})

    def _device(self, request: Request) -> torch.device:
        return self._ranks.use(request.device) if self._ranks else choose_device(request.device)

    def _planned(self, request: Request) -> tuple[Request, Plan | None]:
        """The request with planned memory options, and the plan, or None; holds the allocator to the run's budget."""
        device = self._device(request)
        limited = request.vram_limit != "auto"
        if limited and device.type == "cpu":
            raise InputError("limits an accelerator, there is none", "vram_limit", request.vram_limit)
        if device.type == "cpu" or not hasattr(torch.get_device_module(device), "mem_get_info"):
            return request, None
        if not request.planned:
            if limited or request.vram_fraction < 1:
                budget = budget_on(request, device)
                hold_to(device, budget.steady if limited else budget.room)
            return request, None
        hold_to_free(device)
        ranks = self._ranks.size if self._ranks else None
        planner, budget = planner_for(request, device, self._activation_ram(request), ranks)
        if self._ranks:
            with self._ranks.step("room", request):
                budget = self._least_budget(request)
        plan = planner.plan(budget.room, budget.steady)
        if not plan.fits:
            if limited:
                least = budget.limit_for(plan.peak_bytes) / 2**30
                raise InputError(
                    f"{request.task} needs {least:.2f}, give that or more", "vram_limit", request.vram_limit
                )
            log.warning(
                f"Memory: nothing fits the {budget.room / 2**30:.2f} GiB that are free, "
                f"{plan.peak_bytes / 2**30:.2f} would; ending other programs on the card may help; "
                "going on with the leanest"
            )
        elif limited:
            hold_to(device, budget.room)
        log.info(f"Memory: {plan.line()}")
        self._listener(_told(plan))
        return replace(request, memory=plan.options), plan

    def _leaner(self, request: Request, plan: Plan | None, error: Exception) -> Plan | None:
        """The next leaner plan after a planned run ran out of memory; None after other errors, or if there is none."""
        if plan is None or not is_out_of_memory(error):
            return None
        planner, _ = planner_for(request, choose_device(request.device))
        leaner = planner.leaner(plan)
        if leaner is not None:
            log.warning(f"Memory ran out; going on from the last step with: {leaner.line()}")
            self._listener(_told(leaner))
        return leaner

    def _least_budget(self, request: Request) -> Budget:
        from .over_ranks import least_budget

        assert self._ranks
        return least_budget(request, self._device(request), self._ranks)

    def _activation_ram(self, request: Request) -> float | None:
        if not self._ranks:
            return None
        from .over_ranks import activation_ram

        return activation_ram(request, self._ranks)

    def _forget(self, device: torch.device) -> None:
        """Drops the loaded models and gives their device memory back."""
        self._pipeline = self._built = self._forecast = None
        gc.collect()
        release_memory(device)

    def encode_ahead(self, request: Request) -> None:
        """Puts the prompt of a later request, encoded, into the cache: that run will not need the text encoder."""
        if request.use_prompt_extend or request.decode_latents or request.resume:
            return
        if self._ranks and request.t5_fsdp:  # the ranks encode together, which only a run does
            return
        request, _ = self._planned(request)
        with exact_arithmetic() if request.exact else contextlib.nullcontext():
            self._pipeline_for(request).encode_ahead(request.prompt, request.negative_prompt or "")

    def _tell(self, event: Event) -> None:
        self._listener(event)
        end = self._forecast.end_after(event) if self._forecast else None
        if end:
            self._listener(Expected(end))

    def _pipeline_for(self, request: Request) -> Any:
        """The pipeline that a request needs: the loaded one if it was built from the same settings, else a new one."""
        task, name = request.facts, request.ckpt_dir
        built = (
            task.pipeline,
            task.config,
            name,
            request.task if task.toy else None,
            request.device,
            request.memory,
            lora_identity(request.loras),
            request.lora_skip_unknown,
            request.attention,
            request.compile,
            request.prompt_folder,
            request.dit_fsdp,
            request.t5_fsdp,
        )
        if built != self._built:
            self._pipeline = self._built = self._forecast = None  # frees the old models first
            device = self._device(request)
            if not task.toy:
                require_accelerator(device, request.device)
            check_able(request.attention, request.compile, device, task.config.param_dtype)
            checkpoint = find_checkpoint(name, task.config) if name else task.toy_checkpoint(request.task)
            configure_allocator(device)
            hold_to_free(device)
            self._pipeline = task.pipeline_class(
                task.config,
                checkpoint,
                device=device,
                on_event=self._tell,
                loras=request.loras,
                lora_skip_unknown=request.lora_skip_unknown,
                attention=request.attention,
                compile=request.compile,
                prompt_cache=self._prompts.setdefault(
                    request.prompt_folder, PromptCache(request.prompt_folder)
                ),
                ranks=self._ranks,
                dit_fsdp=request.dit_fsdp,
                t5_fsdp=request.t5_fsdp,
                **vars(request.memory),
            )
            self._built = built
        return self._pipeline


def _told(plan: Plan) -> Planned:
    """The event that tells a listener of a plan."""
    return Planned(plan.line(), {name: stage.reserved for name, stage in plan.stages.items()}, plan.room)
