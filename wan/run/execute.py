"""The steps of a run: start, encode, denoise, decode, save."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from leanwan.accelerator import is_out_of_memory
from leanwan.errors import InputError

from ..sampling import OnStep, Solver
from ..utils.events import Listener
from ..utils.prompt_extend import extend_prompt
from ..utils.video import EightBitFrames, save_image, save_video
from ..weights.fingerprints import file_fingerprint
from ..weights.lora import lora_identity
from .keeper import Keeper, check_finite, not_finite
from .outputs import save_result
from .preview import Preview, fit_colours
from .request import Request
from .settings import settings_text
from .state import State, read_state

log = logging.getLogger(__name__)

DECODING = "decoding"
MERGED = "merged LoRAs"  # the key of the LoRAs' digest, among the names of weight files


def start(request: Request) -> State:
    """The state in which a run starts: empty, or read from a file. Raises InputError for one that cannot be used."""
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


def identified(state: State, pipeline: Any) -> State:
    """The state with the digests of the run's weight files and LoRAs added.

    Raises InputError if one differs from the digest at the run's start.
    """
    folder = pipeline.checkpoint_dir
    found = digests(pipeline, state.stage)
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


def digests(pipeline: Any, stage: str) -> dict[str, str]:
    """Digest by name of each weight file that a run needs from `stage` on."""
    folder = pipeline.checkpoint_dir
    return {str(p.relative_to(folder)): file_fingerprint(p) for p in pipeline.weight_files(stage)}


def made(pipeline: Any, keeper: Keeper, tell: Listener) -> torch.Tensor:
    """The video: does what the keeper's state has not done yet of encoding and denoising, then decodes."""
    latent = _latents(pipeline, keeper, tell)
    return _decoded(latent, keeper.state.request, pipeline)


def _latents(pipeline: Any, keeper: Keeper, tell: Listener) -> torch.Tensor:
    """The finished latent [C, F, H, W] fp32: encodes and denoises unless the state has done so."""
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
    """The function called after each step: writes a preview, if memory allows, then calls the keeper."""
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
    """Reads the inputs, extends the prompt if asked to, and encodes both; saves the state before and after encoding."""
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
    """The prompt as extended by a language model, or as given if that fails."""
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
    """The video [3, F, H, W] in 8 bits, or a picture [3, 1, H, W] in [-1, 1], which save_image rounds differently."""
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


def save(video: torch.Tensor, request: Request, pipeline: Any, planned: bool) -> Path:
    """Saves the result of `_decoded`; returns its path. planned: whether the memory options were planned."""
    comment = settings_text(request, planned)

    def write(path: Path, over: bool) -> None:
        if request.facts.still:
            save_image(video, path, comment, over)
        else:
            save_video(video, path, request.facts.config.sample_fps, comment, over)

    with pipeline.stages("save"):
        return save_result(request, write)
