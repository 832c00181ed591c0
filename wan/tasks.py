"""The table of tasks: the pipeline, inputs and defaults of each. All that depends on the task is read from here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configs import SUPPORTED_SIZES, WAN_CONFIGS

_HERE = Path(__file__).parent
# The folder is inside the package if that is installed, and beside it in a checkout.
EXAMPLES = _HERE / "examples" if (_HERE / "examples").is_dir() else _HERE.parent / "examples"


@dataclass(frozen=True)
class Task:
    """A task: what it makes, with which pipeline and model.

    Attributes:
        pipeline: "module:class" in this package, imported when used.
        title: the task in a few words.
        config: of the model, an entry of WAN_CONFIGS.
        sizes: "width*height" that the model was trained at.
        free_size: whether other sizes are allowed, too.
        size: the default size.
        prompt: an example prompt.
        inputs: the options that name input files, each with its example's file names, or None for no example.
        all_inputs: whether every one of these options is required.
        area_only: whether a size gives the area alone, the aspect being that of the input picture.
        still: whether it makes one picture instead of a video.
        toy: of a toy task, "module:function" that takes its name and returns its checkpoint's directory; else empty.
        frame_num, least_frames: default and least number of frames.
        sample_steps, sample_shift, sample_guide_scale: default solver steps, shift and strength of guidance.
        shift_at: default shifts at sizes where they differ from sample_shift.
        dit: entries of the DiT's config.json beside the sizes in `config`.
    """

    pipeline: str
    config: Any
    sizes: tuple[str, ...]
    size: str
    prompt: str
    title: str = ""
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    all_inputs: bool = False
    area_only: bool = False
    free_size: bool = False
    still: bool = False
    toy: str = ""
    frame_num: int = 81
    least_frames: int = 1
    sample_steps: int = 50
    sample_shift: float = 5.0
    sample_guide_scale: float = 5.0
    shift_at: Mapping[str, float] = field(default_factory=dict)
    dit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipeline_class(self) -> type:
        """The pipeline, imported."""
        return _imported(self.pipeline)

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields that a run requires: the prompt, and the inputs if all are required."""
        return ("prompt", *(self.inputs if self.all_inputs else ()))

    @property
    def dit_config(self) -> dict[str, Any]:
        """The contents of the DiT's config.json, as published."""
        if "dit_config" in self.config:
            return dict(self.config.dit_config)
        sizes = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
        return {name: self.config[name] for name in sizes} | dict(self.dit)

    def toy_checkpoint(self, name: str) -> Path:
        """The directory of a toy task's own checkpoint; name: the task's name."""
        return _imported(self.toy)(name)

    def shift(self, size: str) -> float:
        """The default shift at a size."""
        return self.shift_at.get(size, self.sample_shift)


def _imported(place: str) -> Any:
    """The object that "module:name" names in this package."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


_TEXT: dict[str, Any] = {
    "title": "Text to video",
    "pipeline": "text2video:WanT2V",
    "prompt": "A red paper boat sails down a rainy street at dusk, lamps mirrored in the water.",
    "free_size": True,
}
_STILL: dict[str, Any] = {
    "title": "Text to picture",
    "pipeline": "text2video:WanT2V",
    "prompt": "A lighthouse above a calm sea in the first light of the morning, soft colours.",
    "still": True,
    "frame_num": 1,
}
_IMAGE: dict[str, Any] = {
    "title": "Image to video",
    "pipeline": "image2video:WanI2V",
    "prompt": "A white paper boat drifts across a calm lake at sunset, small waves lap around it.",
    "inputs": {"image": "i2v_input.png"},
    "all_inputs": True,
    "area_only": True,
    "sample_steps": 40,
    "shift_at": {"832*480": 3.0, "480*832": 3.0},
    "dit": {"model_type": "i2v", "in_dim": 36},
}
_FIRST_LAST: dict[str, Any] = {
    "title": "First and last frame to video",
    "pipeline": "first_last_frame2video:WanFLF2V",
    "prompt": "Noon turns to dusk over a little house with a red roof; the sun sinks, stars come out, "
    "the windows light up.",
    "inputs": {"first_frame": "flf2v_first_frame.png", "last_frame": "flf2v_last_frame.png"},
    "all_inputs": True,
    "area_only": True,
    "least_frames": 5,
    "sample_shift": 16.0,
    "dit": {"model_type": "flf2v", "in_dim": 36},
}
_EDIT: dict[str, Any] = {
    "title": "Edit and reference (VACE)",
    "pipeline": "vace:WanVace",
    "prompt": "A red paper boat sails past a red and white striped lighthouse on a bright day.",
    "free_size": True,
    "inputs": {"src_video": None, "src_mask": None, "src_ref_images": "vace_ref_1.png,vace_ref_2.png"},
    "sample_shift": 16.0,
}


def _vace_blocks(layers: int, step: int) -> dict[str, Any]:
    """The `dit` entry of a model of `layers` blocks, every `step`-th of which has a VACE block."""
    return {"dit": {"model_type": "vace", "vace_in_dim": 96, "vace_layers": list(range(0, layers, step))}}


def _random_toy(facts: dict[str, Any]) -> dict[str, Any]:
    return {"frame_num": 17} | facts | {"sample_steps": 10, "toy": "random_models:checkpoint"}


# The sampling settings at which the trained toys follow most prompts.
_TOY_SAMPLING = {"sample_steps": 20, "sample_shift": 3.0, "sample_guide_scale": 2.0, "shift_at": {}}


def _trained_toy(facts: dict[str, Any], prompt: str, **inputs: str | None) -> dict[str, Any]:
    return (
        {"frame_num": 17}
        | facts
        | _TOY_SAMPLING
        | {"prompt": prompt, "inputs": inputs, "toy": "trained_toys.checkpoints:checkpoint"}
    )


# The default size is that of the published program or, if the task does not support it, the nearest.
def _task(name: str, facts: dict[str, Any]) -> Task:
    sizes = SUPPORTED_SIZES[name]
    size = next(size for size in ("1280*720", "832*480", "128*96", "80*48") if size in sizes)
    return Task(config=WAN_CONFIGS[name], sizes=sizes, size=size, **facts)


DEFAULT_TASK = "t2v-14B"
TASKS = {
    name: _task(name, facts)
    for name, facts in {
        "t2v-14B": _TEXT,
        "t2v-1.3B": _TEXT,
        "i2v-14B": _IMAGE,
        "t2i-14B": _STILL,
        "flf2v-14B": _FIRST_LAST,
        "vace-1.3B": _EDIT | _vace_blocks(30, 2),
        "vace-14B": _EDIT | _vace_blocks(40, 5),
        "t2v-toy": _trained_toy(_TEXT, "a red ball rolls to the right on a white ground"),
        "t2i-toy": _trained_toy(_STILL, "a turquoise triangle on a black ground"),
        "i2v-toy": _trained_toy(
            _IMAGE, "a blue square slides to the right on a white ground", image="toy_image.png"
        ),
        "flf2v-toy": _trained_toy(
            _FIRST_LAST,
            "a pink triangle slides to the left on a black ground",
            first_frame="toy_first.png",
            last_frame="toy_last.png",
        ),
        "vace-toy": _trained_toy(
            _EDIT,
            "a yellow triangle slides to the left on a grey ground",
            src_video="toy_video.mp4",
            src_mask="toy_mask.mp4",
            src_ref_images=None,
        ),
        "t2v-tiny": _random_toy(_TEXT),
        "t2i-tiny": _random_toy(_STILL),
        "i2v-tiny": _random_toy(_IMAGE),
        "flf2v-tiny": _random_toy(_FIRST_LAST),
        "vace-tiny": _random_toy(_EDIT),
    }.items()
}
