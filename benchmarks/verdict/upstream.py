"""Compares latents and peak memory with upstream's own pipelines, on toy weights, in fp32 with TF32 off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import wan
from leanwan.accelerator import exact_arithmetic
from upstream_driver import driver
from wan import random_models
from wan.configs import WAN_CONFIGS

from .checks import GIB, Bench, SkippedError

LIMIT = 1e-4  # of the largest value
PIPELINES = {"t2v": "WanT2V", "i2v": "WanI2V", "vace": "WanVace"}
CALL = {"input_prompt": "a red ball rolls to the right", "frame_num": 5, "sampling_steps": 3, "seed": 5}
SIZE = (96, 128)


def compare(bench: Bench) -> None:
    """Runs a text, an image and a VACE task through both."""
    if bench.tree is None:
        raise SkippedError("no --tree was given")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for upstream's process; this one has read it already
    for kind, name in PIPELINES.items():
        checkpoint = random_models.checkpoint(f"{kind}-tiny")
        call, inputs = dict(CALL), None
        call |= {"max_area": SIZE[0] * SIZE[1]} if kind == "i2v" else {"size": SIZE}
        theirs = dict(call)
        if kind == "i2v":
            picture = _picture()
            with bench.folder() as folder:
                picture.save(folder / "image.png")
                result = driver.run(
                    bench.tree, kind, checkpoint, call=theirs | {"img": str(folder / "image.png")},
                    device=bench.device.type,
                )  # fmt: skip
            call["img"] = picture
        else:
            if kind == "vace":
                random = torch.Generator().manual_seed(1)
                frames = torch.rand(3, CALL["frame_num"], SIZE[1], SIZE[0], generator=random) * 2 - 1
                mask = (torch.rand(1, *frames.shape[1:], generator=random) > 0.5).float()
                inputs = {"frames": frames, "mask": mask}
                call |= {"input_frames": [frames], "input_masks": [mask], "input_ref_images": [None]}
            result = driver.run(
                bench.tree, kind, checkpoint, call=theirs, inputs=inputs, device=bench.device.type
            )
        latents, peak = _ours(bench, name, kind, checkpoint, call)
        difference = float((latents - result.latents).abs().max() / result.latents.abs().max())
        bench.note(
            kind,
            {
                "difference": difference,
                "their peak GiB": result.report["peak_bytes"] / GIB,
                "our peak GiB": peak / GIB,
            },
        )
        bench.expect(
            difference <= LIMIT, f"{kind}: latents are {difference:.1e} from upstream's, more than {LIMIT}"
        )


def _ours(bench: Bench, name: str, kind: str, checkpoint: Path, call: dict[str, Any]) -> Any:
    """The latents of our pipeline and its peak bytes."""
    latents = []
    with exact_arithmetic():
        bench.backend.reset_peak_memory_stats(bench.device)
        pipeline = getattr(wan, name)(WAN_CONFIGS[f"{kind}-tiny"], checkpoint, device=bench.device)
        pipeline.generate(**call, on_latents=lambda latent: latents.append(latent.cpu()))
    return latents[0], bench.backend.max_memory_allocated(bench.device)


def _picture() -> Image.Image:
    """A picture of soft colours, the same everywhere."""
    rows, columns = torch.meshgrid(torch.linspace(0, 6, 90), torch.linspace(0, 9, 120), indexing="ij")
    colours = torch.stack([rows.sin() * columns.cos(), (rows + columns).sin(), columns.sin()], dim=-1)
    return Image.fromarray(((colours + 1) * 127.5).to(torch.uint8).numpy())
