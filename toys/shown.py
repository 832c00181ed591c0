"""Random requests to the trained toys, and the toys that answer them: for tests and contact sheets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from wan.tasks import TASKS

from .clips import FRAMES, HEIGHT, WIDTH, Clip, random_clip
from .lessons import hole_about, masked, reference, referring

HELD_OUT = 2**20  # part of every request's seed; lessons have small seeds, so that none is the same
_WHOLE = {"max_area": WIDTH * HEIGHT, "frame_num": FRAMES}


@dataclass(frozen=True)
class Asked:
    """A request: a prompt, and the inputs given beside it.

    Attributes:
        given: the pipeline's own arguments.
        clip: the clip that the result is to show, if known.
        pictures: that show the inputs, [3, H, W] each.
        source, mask: of a fill: the video before, [3, F, H, W], and where it is made anew, [1, F, H, W].
    """

    prompt: str
    given: dict[str, Any]
    clip: Clip | None = None
    pictures: tuple[np.ndarray, ...] = ()
    source: np.ndarray | None = None
    mask: np.ndarray | None = None


def text(prompt: str, clip: Clip | None = None, frames: int = FRAMES) -> Asked:
    """A request with a prompt alone."""
    return Asked(prompt, {"size": (WIDTH, HEIGHT), "frame_num": frames}, clip)


def _text(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    return text(clip.caption(), clip)


def _still(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    return text(clip.caption(still=True), clip, 1)


def _image(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    first = clip.video(1)[:, 0]
    return Asked(clip.caption(), {"img": picture(first)} | _WHOLE, clip, (first,))


def _first_last(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    first, last = clip.video()[:, [0, -1]].swapaxes(0, 1)
    given = {"first_frame": picture(first), "last_frame": picture(last)}
    return Asked(clip.caption(), given | _WHOLE, clip, (first, last))


def _fill(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    other = random_clip(rng, ground=clip.ground)
    source = other.video()
    kept, _, mask = masked(source, hole_about(clip, other))
    return Asked(clip.caption(), _source(source, mask), clip, (source[:, 0], kept[:, 0]), source, mask)


def _reference(rng: np.random.Generator) -> Asked:
    clip = random_clip(rng)
    nothing: np.ndarray = np.zeros((3, FRAMES, HEIGHT, WIDTH), np.float32)
    shown = reference(clip.shape, clip.colour)
    given = _source(nothing, np.ones_like(nothing[:1]), torch.from_numpy(shown))
    return Asked(referring(clip), given, clip, (shown[:, 0],))


def _source(video: np.ndarray, mask: np.ndarray, *references: torch.Tensor) -> dict[str, Any]:
    return {
        "input_frames": [torch.from_numpy(video)],
        "input_masks": [torch.from_numpy(mask)],
        "input_ref_images": [list(references) or None],
    }


# By kind of request: the task, and a function that draws a request at random.
KINDS: dict[str, tuple[str, Callable[[np.random.Generator], Asked]]] = {
    "text": ("t2v-toy", _text),
    "still": ("t2i-toy", _still),
    "image": ("i2v-toy", _image),
    "first-last": ("flf2v-toy", _first_last),
    "fill": ("vace-toy", _fill),
    "reference": ("vace-toy", _reference),
}


def asked(kind: str, number: int) -> Asked:
    """The request number `number` of a kind; no lesson is drawn from the same seed."""
    return KINDS[kind][1](np.random.default_rng([HELD_OUT, number]))


def picture(frame: np.ndarray) -> Image.Image:
    """A frame [3, H, W] in [-1, 1] as an 8-bit picture."""
    return Image.fromarray(((frame.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))


class Toy:
    """A trained toy, loaded."""

    def __init__(self, task: str, **memory: Any):
        """memory: fields of leanwan.options.MemoryOptions."""
        facts = TASKS[task]
        self._settings = {
            "sampling_steps": facts.sample_steps,
            "shift": facts.sample_shift,
            "guide_scale": facts.sample_guide_scale,
        }
        self._pipeline = facts.pipeline_class(
            facts.config, facts.toy_checkpoint(task), device="cpu", on_event=lambda event: None, **memory
        )

    def show(self, asked: Asked, seed: int, **settings: Any) -> np.ndarray:
        """A request's result, [3, F, H, W] in [-1, 1]; settings: of generate(), in place of the task's defaults."""
        given = asked.given | self._settings | settings
        return self._pipeline.generate(asked.prompt, seed=seed, **given).numpy()
