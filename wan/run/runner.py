"""A request carried out: check, load, encode, denoise, decode, save."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import tiny
from ..utils.accelerator import (
    choose_device,
    configure_allocator,
    exact_arithmetic,
    hold_to_free,
    require_accelerator,
)
from ..utils.errors import InputError
from ..utils.events import Finished, Listener
from ..utils.files import check_target
from ..utils.latents import load_latents, save_latents
from ..utils.prompt_extend import extend_prompt
from ..utils.video import check_writable, save_image, save_video
from ..weights.fingerprints import vae_fingerprint
from ..weights.hub import find_checkpoint
from ..weights.lora import lora_identity
from .request import Request

log = logging.getLogger(__name__)


def run(request: Request, on_event: Listener | None = None) -> Path:
    """Makes what a request asks for, or finishes it from its latents, and saves it.

    Latents are on disk before they are decoded, so that hours of denoising survive whatever happens then; if it
    fails, the log names the command that goes on from them.

    Args:
        request: what to make.
        on_event: is told of stages, steps, memory and the finished file, see wan.utils.events; default: nobody.

    Returns:
        The path of the result.

    Raises:
        InputError: files that cannot be used; before any long work where that can be known.
        torch.OutOfMemoryError, OSError: as they come.
    """
    listener = on_event or (lambda event: None)
    task = request.facts
    check_writable(request.save_file, image=task.still)
    latents_path = Path(request.save_latents or f"{request.save_file}.latents.safetensors")
    if not request.decode_latents:
        check_target(latents_path, "save_latents")
    device = choose_device(request.device)
    if not task.toy:
        require_accelerator(device, request.device)
    name = request.ckpt_dir
    checkpoint = find_checkpoint(name, task.config) if name else tiny.checkpoint(request.task)
    configure_allocator(device)
    hold_to_free(device)
    with exact_arithmetic() if request.exact else contextlib.nullcontext():
        pipeline = task.pipeline_class(
            task.config,
            checkpoint,
            device=device,
            on_event=listener,
            loras=request.loras,
            lora_skip_unknown=request.lora_skip_unknown,
            **vars(request.memory),
        )
        if request.decode_latents:
            latents, _ = load_latents(request.decode_latents, _identity(request, checkpoint))
            video = pipeline.decode(latents)
            return _save(video, request, listener, pipeline)
        arguments = pipeline.arguments(request)
        log.info(f"Task {request.task}, {request.size}, {request.frame_num} frames, seed {request.base_seed}")
        log.info(f"Prompt: {request.prompt}")
        prompt = _extended(request, arguments) if request.use_prompt_extend else request.prompt
        with _latents_kept(request, prompt, checkpoint, latents_path) as keep:
            video = pipeline.generate(
                prompt,
                **arguments,
                frame_num=request.frame_num,
                shift=request.sample_shift,
                sample_solver=request.sample_solver,
                sampling_steps=request.sample_steps,
                guide_scale=request.sample_guide_scale,
                seed=request.base_seed,
                on_latents=keep,
            )
            return _save(video, request, listener, pipeline)


def _identity(request: Request, checkpoint: Path) -> dict[str, Any]:
    """What latents must have in common with a run that decodes them."""
    vae = vae_fingerprint(checkpoint / request.facts.config.vae_checkpoint)
    return {"task": request.task, "size": request.size, "vae": vae}


@contextlib.contextmanager
def _latents_kept(request: Request, prompt: str, checkpoint: Path, path: Path) -> Iterator[Any]:
    """Yields a function that writes the latents; removes them at the end unless they were asked for or it failed."""
    kept = False

    def keep(latent: torch.Tensor) -> None:
        nonlocal kept
        made_from = {"prompt": prompt, "seed": request.base_seed, "frame_num": request.frame_num}
        made_from["lora"] = lora_identity(request.loras)
        try:
            save_latents(path, latent, _identity(request, checkpoint) | made_from)
            kept = True
        except InputError as error:
            log.warning(f"The latents could not be kept: {error}")

    try:
        yield keep
    except BaseException:
        if kept:
            log.error(f"The latents are safe; finish with: {way_back(request, path)}")
        raise
    if not request.save_latents:
        path.unlink(missing_ok=True)


def way_back(request: Request, latents: Path) -> str:
    """The command that makes the video of latents that are on disk."""
    words = ["python", "generate.py", "--task", request.task, "--size", request.size]
    words += ["--ckpt_dir", str(request.ckpt_dir)] if request.ckpt_dir else []
    words += ["--decode_latents", str(latents), "--save_file", str(request.save_file)]
    return shlex.join(words)


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


def _save(video: torch.Tensor, request: Request, listener: Listener, pipeline: Any) -> Path:
    """Saves a video [3, F, H, W] in [-1, 1], or the one frame of a picture."""
    with pipeline.stages("save"):
        if request.facts.still:
            save_image(video, request.save_file)
        else:
            save_video(video, request.save_file, fps=request.facts.config.sample_fps)
    path = Path(request.save_file)
    listener(Finished(path))
    return path
