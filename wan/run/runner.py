"""A request carried out: check, load, encode, denoise, decode, save."""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from leanwan.accelerator import (
    choose_device,
    configure_allocator,
    exact_arithmetic,
    hold_to,
    hold_to_free,
    is_out_of_memory,
    release_memory,
    require_accelerator,
)
from leanwan.errors import InputError

from ..kernels import check_able
from ..planning.plan import Plan
from ..sampling import OnStep, Solver
from ..utils.events import Event, Expected, Finished, Listener, Planned
from ..utils.prompt_extend import extend_prompt
from ..utils.video import EightBitFrames, save_image, save_video
from ..weights.fingerprints import file_fingerprint
from ..weights.hub import find_checkpoint
from ..weights.lora import lora_identity
from ..weights.prompts import PromptCache
from .forecast import Forecast
from .interrupts import Interrupts
from .keeper import Keeper, check_finite, not_finite
from .outputs import check_outputs, save_result
from .plan_request import context_bytes, planner_for, room_on
from .preview import Preview, fit_colours
from .ram_check import check_ram
from .request import Request
from .settings import settings_text
from .state import State, read_state

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

log = logging.getLogger(__name__)

DECODING = "decoding"
MERGED = "merged LoRAs"  # beside the names of files


def run(request: Request, on_event: Listener | None = None, interrupts: Interrupts | None = None) -> Path:
    """Makes what a request asks for, or goes on with it from its state or its latents, and saves it.

    The state of the run is kept in a file beside the result until that is saved; if the run fails, the log names the
    command that goes on from it.

    Args:
        request: what to make.
        on_event: is told of stages, steps, memory and the finished file, see wan.utils.events; default: nobody.
        interrupts: asked after each step whether to stop.

    Returns:
        The path of the result.

    Raises:
        InputError: files that cannot be used; before any long work where that can be known.
        Interrupted: as asked.
        torch.OutOfMemoryError, OSError: as they come.
    """
    return Runner(on_event, interrupts).run(request)


class Runner:
    """Runs requests one after the other. Those that follow each other with the same models share the loaded ones.

    Args:
        on_event, interrupts: as run()'s.
        ranks: the processes that it shares the work with, each of which has a Runner; the others `follow` the first.
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
        self._prompts: dict[Path | None, PromptCache] = {}  # by their folders
        self._interrupts = interrupts or Interrupts()
        self._pipeline: Any = None
        self._built: Any = None  # what the pipeline was built from

    def run(self, request: Request) -> Path:
        """As run()."""
        if self._ranks or request.over_ranks:
            from .over_ranks import check_sizes

            check_sizes(request, self._ranks)
        check_outputs(request)
        request, plan = self._planned(request)
        state = _start(request)
        with (
            exact_arithmetic() if request.exact else contextlib.nullcontext(),
            self._ranks.session("run", request) if self._ranks else contextlib.nullcontext(),
        ):
            pipeline = self._pipeline_for(request)
            self._check_weights(request, pipeline)
            if not state.finished:
                check_ram(state.request, pipeline, self._ranks)
            remembers = plan is not None or self._ranks is not None
            keeper = Keeper(_identified(state, pipeline), self._interrupts, remembers)
            self._forecast = Forecast(request, pipeline)
            with keeper.told():
                while True:
                    try:
                        video = _made(pipeline, keeper, self._tell)
                        break
                    except Exception as error:
                        if self._ranks:
                            # They have lost step: they end, and what goes on has less to plan with.
                            keeper.go_on(**self._less_room(request, plan, error))
                            keeper.save()
                            raise
                        plan = self._leaner(request, plan, error)
                        if plan is None:
                            raise
                    # Outside of the except clause, which keeps what failed alive.
                    del pipeline
                    request = replace(request, memory=plan.options)
                    keeper.go_on(memory=plan.options)
                    self._forget(choose_device(request.device))
                    pipeline = self._pipeline_for(request)
                path = _save(video, keeper.state.request, pipeline, plan is not None)
                keeper.remove()
        self._tell(Finished(path))
        return path

    def follow(self, ranks: Ranks) -> None:
        """Does this rank's share of all that the first one runs, until that has no more."""
        ranks.serve({"run": self._followed, "room": self._least_room})

    def _followed(self, request: Request) -> None:
        with exact_arithmetic() if request.exact else contextlib.nullcontext():
            pipeline = self._pipeline_for(request)
            self._check_weights(request, pipeline)
            pipeline.follow()

    def _check_weights(self, request: Request, pipeline: Any) -> None:
        """Raises InputError unless all ranks have the same weights."""
        if self._ranks:
            from .over_ranks import check_weights

            found = _digests(pipeline, "text" if request.t5_fsdp else "denoise")
            check_weights(self._ranks, found | {MERGED: lora_identity(request.loras)})

    def _device(self, request: Request) -> torch.device:
        return self._ranks.use(request.device) if self._ranks else choose_device(request.device)

    def _planned(self, request: Request) -> tuple[Request, Plan | None]:
        """The request with its memory options planned for the device, and the plan; None where nothing is planned."""
        device = self._device(request)
        limited = request.vram_limit != "auto"
        if limited and device.type == "cpu":
            raise InputError("limits an accelerator, there is none", "vram_limit", request.vram_limit)
        if device.type == "cpu" or not hasattr(torch.get_device_module(device), "mem_get_info"):
            return request, None
        if not request.planned:
            if limited or request.vram_fraction < 1:
                room, steady = room_on(request, device)
                hold_to(device, steady if limited else room)
            return request, None
        hold_to_free(device)
        ranks = self._ranks.size if self._ranks else None
        planner, room, steady = planner_for(request, device, self._activation_ram(request), ranks)
        if self._ranks:
            with self._ranks.step("room", request):
                room, steady = self._least_room(request)
        plan = planner.plan(room, steady)
        if not plan.fits:
            if limited:
                least = (plan.peak_bytes / request.vram_fraction + context_bytes(device)) / 2**30
                raise InputError(
                    f"{request.task} needs {least:.2f}, give that or more", "vram_limit", request.vram_limit
                )
            log.warning(
                f"Memory: nothing fits the {room / 2**30:.2f} GiB that are free, {plan.peak_bytes / 2**30:.2f} would; "
                "ending other programs on the card may help; going on with the leanest"
            )
        elif limited:
            hold_to(device, room)
        log.info(f"Memory: {plan.line()}")
        self._listener(_told(plan))
        return replace(request, memory=plan.options), plan

    def _leaner(self, request: Request, plan: Plan | None, error: Exception) -> Plan | None:
        """The next plan when memory ran out all the same; None if it was something else, or there is none."""
        if plan is None or not is_out_of_memory(error):
            return None
        planner, *_ = planner_for(request, choose_device(request.device))
        leaner = planner.leaner(plan)
        if leaner is not None:
            log.warning(f"Memory ran out; going on from the last step with: {leaner.line()}")
            self._listener(_told(leaner))
        return leaner

    def _least_room(self, request: Request) -> tuple[float, float]:
        """On all ranks: what planner_for has for the plan where that is least, what the ranks' connections take not
        among it."""
        assert self._ranks
        device = self._device(request)
        configure_allocator(device)
        hold_to_free(device)
        self._ranks.connect()
        rooms, steadies = zip(*self._ranks.gather(room_on(request, device)))
        return min(rooms), min(steadies)

    def _activation_ram(self, request: Request) -> float | None:
        if not self._ranks:
            return None
        from .over_ranks import activation_ram

        return activation_ram(request, self._ranks)

    @staticmethod
    def _less_room(request: Request, plan: Plan | None, error: Exception) -> dict[str, Any]:
        from .over_ranks import less_room

        return less_room(request, plan, error)

    def _forget(self, device: torch.device) -> None:
        """Drops the loaded models, and gives their memory back."""
        self._pipeline = self._built = self._forecast = None
        gc.collect()
        release_memory(device)

    def encode_ahead(self, request: Request) -> None:
        """Encodes the prompt of a request that is to be run later: the text encoder need not come again for it."""
        if request.use_prompt_extend or request.decode_latents or request.resume:
            return
        if self._ranks and request.t5_fsdp:  # they encode together, in a run
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
        """The pipeline that a request needs: the last one, if it was built from the same."""
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
            self._pipeline = self._built = self._forecast = None  # its room is needed
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
    """What a listener is told of a plan."""
    return Planned(plan.line(), {name: stage.reserved for name, stage in plan.stages.items()}, plan.room)


def _start(request: Request) -> State:
    """Where a run starts: at the beginning, or where a file says."""
    if request.resume:
        return read_state(request.resume, **vars(request))
    if not request.decode_latents:
        return State(request)
    own = (
        "save_file",
        "save_latents",
        "overwrite",
        "ckpt_dir",
        "device",
        "memory",
        "decode_latents",
        "resume",
    )
    changes = {name: getattr(request, name) for name in own}
    state = read_state(request.decode_latents, "decode_latents", **changes)
    if not state.finished:
        raise InputError("is a run on its way; give it to --resume", "decode_latents", request.decode_latents)
    for name in ("task", "size"):
        made, asked = getattr(state.request, name), getattr(request, name)
        if made != asked:
            raise InputError(
                f"was made with --{name} {made}, not {asked}; give --{name} {made}",
                "decode_latents",
                request.decode_latents,
            )
    return state


def _identified(state: State, pipeline: Any) -> State:
    """The state with the identity of the weights.

    Raises InputError if they are others than those that it started with.
    """
    folder = pipeline.checkpoint_dir
    found = _digests(pipeline, state.stage)
    if state.stage != "decode":
        merged = lora_identity(state.request.loras)
        if state.weights.get(MERGED, merged) != merged:
            raise InputError("is not what the run started with; give the same files and strengths", "lora")
        found[MERGED] = merged
    for name, digest in found.items():
        if state.weights.get(name, digest) != digest:
            raise InputError(
                f"{folder / name} is not the file that the run started with; give the folder that has it",
                "ckpt_dir",
            )
    return replace(state, weights=found | dict(state.weights))


def _digests(pipeline: Any, stage: str) -> dict[str, str]:
    """Name and digest of each weight file that a run needs from a stage on."""
    folder = pipeline.checkpoint_dir
    return {str(p.relative_to(folder)): file_fingerprint(p) for p in pipeline.weight_files(stage)}


def _made(pipeline: Any, keeper: Keeper, tell: Listener) -> torch.Tensor:
    """What is left of encoding, denoising and decoding: the video."""
    latent = _latents(pipeline, keeper, tell)
    return _decoded(latent, keeper.state.request, pipeline)


def _latents(pipeline: Any, keeper: Keeper, tell: Listener) -> torch.Tensor:
    """Encodes and denoises, as far as that is not done: [C, F, H, W] fp32."""
    state = keeper.state
    if state.finished:
        return state.latent
    if state.conditioning is None:
        _encode(pipeline, keeper)
    else:
        pipeline.load(encoders=False)
    request = state.request
    on_step: OnStep = _previewed(pipeline, keeper, tell) if request.preview else keeper.after_step
    with keeper.interrupts.patience():
        latent = pipeline.denoise(
            keeper.state.conditioning,
            shift=request.sample_shift,
            sample_solver=request.sample_solver,
            sampling_steps=request.sample_steps,
            guide_scale=request.sample_guide_scale,
            seed=request.base_seed,
            start=None if state.latent is None else (state.latent, state.solver),
            on_step=on_step,
        )
    keeper.finish(latent)
    return latent


def _previewed(pipeline: Any, keeper: Keeper, tell: Listener) -> OnStep:
    """What the keeper does after a step, and before that a preview."""
    request = keeper.state.request
    try:
        colours = fit_colours(lambda video: pipeline.vae.encode([video])[0])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        log.warning("No preview: out of memory while its colours were sought")
        return keeper.after_step
    references = keeper.state.conditioning.references
    preview = Preview(request.preview, keeper.path.stem, colours, request.preview_every, references, tell)

    def after_step(latent: torch.Tensor, solver: Solver) -> None:
        preview.after_step(latent, solver)
        keeper.after_step(latent, solver)

    return after_step


def _encode(pipeline: Any, keeper: Keeper) -> None:
    """Reads the inputs, writes the prompt out if that is asked for, and encodes it all."""
    request = keeper.state.request
    arguments = pipeline.arguments(request)
    log.info(f"Task {request.task}, {request.size}, {request.frame_num} frames, seed {request.base_seed}")
    if request.size not in request.facts.sizes:
        log.warning(f"{request.task} was trained at {', '.join(request.facts.sizes)}, not at {request.size}")
    log.info(f"Prompt: {request.prompt}")
    if request.use_prompt_extend:
        request = replace(request, prompt=_extended(request, arguments), use_prompt_extend=False)
    negative = request.negative_prompt or ""
    pipeline.load(prompts=pipeline.prompts(request.prompt, negative))
    keeper.save(request=request)
    arguments |= {"frame_num": request.frame_num, "n_prompt": negative}
    conditioning = pipeline.prepare(request.prompt, **arguments)
    for embedding in (conditioning.context, conditioning.context_null):
        check_finite(embedding, "encoding the prompt")
    keeper.save(conditioning=conditioning)


def _extended(request: Request, arguments: dict[str, Any]) -> str:
    """The prompt as a language model writes it out, or as given if that fails."""
    log.info("Extending the prompt")
    result = extend_prompt(
        request.prompt,
        method=request.prompt_extend_method,
        model=request.prompt_extend_model,
        target_lang=request.prompt_extend_target_lang,
        images=[value for value in arguments.values() if isinstance(value, Image.Image)],
        seed=request.base_seed,
    )
    if result.status:
        log.info(f"Extended prompt: {result.prompt}")
    else:
        log.warning(f"The prompt is used as given, it could not be extended: {result.message}")
    return result.prompt


def _decoded(latent: torch.Tensor, request: Request, pipeline: Any) -> torch.Tensor:
    """The video [3, F, H, W] in 8 bits, or a picture [3, 1, H, W] in [-1, 1], which is rounded otherwise."""
    latent = latent.to(pipeline.device)
    if request.facts.still:
        picture = pipeline.decode(latent)
        check_finite(picture, DECODING)
        return picture
    frames = EightBitFrames()
    video = pipeline.decode(latent, frames)
    if not frames.finite:
        raise not_finite(DECODING)
    return video


def _save(video: torch.Tensor, request: Request, pipeline: Any, planned: bool) -> Path:
    """Saves what `_decoded` gives."""
    comment = settings_text(request, planned)

    def write(path: Path, over: bool) -> None:
        if request.facts.still:
            save_image(video, path, comment, over)
        else:
            save_video(video, path, request.facts.config.sample_fps, comment, over)

    with pipeline.stages("save"):
        return save_result(request, write)
