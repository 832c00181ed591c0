"""Toy tasks through the command line, with and without --low_vram: the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
from wan.tasks import TASKS
from wan.utils.video import VideoFile

from .checks import Bench


def compare(bench: Bench, task: str) -> None:
    """--low_vram must not change a bit: a toy video fits one tile and one chunk, so that it only places weights."""
    few = ["--frame_num", "5", "--sample_steps", "2"] if bench.rehearse else ["--sample_steps", "4"]
    if TASKS[task].still:
        few = few[-2:]
    with bench.folder() as folder:
        plain = _run(bench, folder / "plain", task, few)
        saving = _run(bench, folder / "low_vram", task, [*few, "--low_vram"])
        if plain is None or saving is None:
            return
        same = all(map(torch.equal, plain, saving))
        bench.note("largest difference", float((plain[0] - saving[0]).abs().max()))
        bench.note("the same frames", torch.equal(plain[1], saving[1]))
        bench.expect(bool(plain[0].isfinite().all()), "the latents are not finite")
        if not same:
            again = _run(bench, folder / "again", task, few)
            repeatable = again is not None and all(map(torch.equal, plain, again))
            cause = (
                "the same command without it repeats itself"
                if repeatable
                else "but neither does it repeat itself"
            )
            bench.expect(False, f"--low_vram changes the video; {cause}")


def _run(bench: Bench, stem: Path, task: str, options: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The latents and the frames of the file that the command line makes, or None if it fails."""
    image = TASKS[task].still
    video, latents = stem.with_suffix(".png" if image else ".mp4"), stem.with_suffix(".safetensors")
    arguments = ["--task", task, "--base_seed", "5", *options]
    arguments += ["--save_file", str(video), "--save_latents", str(latents)]
    code = generate.main([*arguments, "--device", str(bench.device)])
    bench.expect(code == 0, f"generate.py {' '.join(arguments)}: exit code {code}")
    if code:
        return None
    (latent,) = load_file(latents).values()
    if image:
        return latent.float(), torch.from_numpy(np.array(Image.open(video)))
    return latent.float(), torch.from_numpy(np.stack(list(VideoFile(video).frames())))
