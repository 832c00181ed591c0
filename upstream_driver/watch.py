"""Observes a run of upstream's pipeline: its latents, and the memory that each stage takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

STAGES = ("load", "text", "image", "encode", "denoise", "decode")


class Watch:
    """Notes the latents that a pipeline decodes and, on a GPU, the peak memory of each stage.

    A stage begins when its model is called or moved to the device, and lasts until the next begins.
    """

    def __init__(self, gpu: Any = None):
        self.gpu = gpu
        self.stage = "load"
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.latents: torch.Tensor | None = None

    def begin(self, stage: str) -> None:
        self.end()
        self.stage = stage

    def end(self) -> None:
        if self.gpu is not None:
            self.peaks[self.stage] = max(self.gpu.peak, self.peaks.get(self.stage, 0))
            self.reserved[self.stage] = max(self.gpu.peak_reserved, self.reserved.get(self.stage, 0))
            self.gpu.reset_peak()

    def attach(self, pipeline: Any, meta: bool = False) -> None:
        denoised = False

        def latent_stage() -> str:
            return "decode" if denoised else "encode"

        def on_move(module: Any, stage: str | Callable[[], str]) -> None:
            for name in ("to", "cuda"):
                move = getattr(module, name)

                def moved(*args: Any, move: Callable = move, **options: Any) -> Any:
                    if args and torch.device(args[0]).type not in ("cpu", "meta"):
                        self.begin(stage() if callable(stage) else stage)
                    return move(*args, **options)

                setattr(module, name, moved)

        def on_call(owner: Any, name: str, stage: str) -> None:
            call = getattr(owner, name)

            def called(*args: Any, **options: Any) -> Any:
                nonlocal denoised
                denoised = denoised or stage == "denoise"
                self.begin(stage)
                if stage == "decode":
                    self.latents = args[0][0].detach().cpu().clone()
                if stage == "denoise" and meta:
                    options["t"] = options["t"].to(args[0][0].device)
                return call(*args, **options)

            setattr(owner, name, called)

        on_move(pipeline.text_encoder.model, "text")
        on_move(pipeline.vae.model, latent_stage)
        on_move(pipeline.model, "denoise")
        on_call(pipeline.model, "forward", "denoise")
        on_call(pipeline.vae, "encode", "encode")
        on_call(pipeline.vae, "decode", "decode")
        if hasattr(pipeline, "clip"):
            on_move(pipeline.clip.model, "image")
            on_call(pipeline.clip, "visual", "image")

    def report(self, out_of_memory: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.gpu is None:
            return {}
        self.end()
        return {
            "peak_bytes": max(self.peaks.values()),
            "stages": {stage: self.peaks[stage] for stage in STAGES if stage in self.peaks},
            "peak_reserved": max(self.reserved.values()),
            "reserved": {stage: self.reserved[stage] for stage in STAGES if stage in self.reserved},
            "out_of_memory": out_of_memory,
            "live_bytes": self.gpu.live,
        }


class CudaMemory:
    """The counters that Watch reads of a virtual GPU, for the CUDA device."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.reset_peak()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @property
    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved()

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def requested_bytes(error: Any) -> int:
    """What an out-of-memory error asked for: the virtual GPU says it, PyTorch's text has it in rounded units."""
    if hasattr(error, "requested"):
        return error.requested
    number, unit = re.search(r"allocate ([\d.]+) (\w+)", str(error)).groups()
    return round(float(number) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit])
