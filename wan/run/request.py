"""What is asked for: everything that decides what a run makes, and how."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ..configs import SIZE_CONFIGS
from ..memory.options import MemoryOptions
from ..tasks import DEFAULT_TASK, EXAMPLES, TASKS, Task
from ..utils.errors import InputError
from ..utils.flags import check_options, option
from ..weights.hub import check_checkpoint
from ..weights.lora import parse_lora

SOURCES = "inputs"
PROMPT_EXTENSION = "prompt extension"
GPUS = "several GPUs (not supported yet)"


@dataclass(frozen=True)
class Request:
    """A run. What is None takes the task's default, and what the task has no default for is None.

    Attributes are those of the command line, under the same names, and `memory`.

    Raises InputError, naming the field, for what cannot work.
    """

    task: str = option(DEFAULT_TASK, "What to make, and with which model.", choices=TASKS)
    size: str | None = option(
        None,
        "Width*height of the video. Tasks that start from an image take its area and keep the image's aspect.",
        choices=tuple(SIZE_CONFIGS),
        shown_default="1280*720",
    )
    frame_num: int | None = option(None, "Frames, 4n+1 (default 81; 1 for pictures, 17 for toy tasks).")
    ckpt_dir: str | None = option(
        None,
        "Folder of the checkpoint, or its name on the Hugging Face hub, such as Wan-AI/Wan2.1-T2V-1.3B. "
        "Toy tasks make their own.",
    )
    save_file: str | None = option(None, "Where to save the result (.mp4, or .png for pictures).")
    prompt: str | None = option(None, "What to show.")
    base_seed: int = option(-1, "Seed of the noise; negative for a random one.", at_most=sys.maxsize)
    sample_solver: str = option("unipc", "Solver.", choices=("unipc", "dpm++", "euler"))
    sample_steps: int | None = option(
        None, "Solver steps (default 50; 40 for image to video, 10 for toy tasks).", at_least=1, at_most=1000
    )
    sample_shift: float | None = option(
        None,
        "Shift of the noise schedule (default 5; 3 for image to video at 480p, 16 for first and last frame and VACE).",
        above=0,
        at_most=100,
    )
    sample_guide_scale: float = option(
        5.0,
        "Strength of classifier-free guidance. 1 is none, with one pass per step instead of two.",
        at_least=0,
        at_most=1000,
    )
    lora: tuple[str, ...] = option(
        (),
        "LoRA to merge into the model, its strength 1 unless given; repeat it for several.",
        repeat=True,
        metavar="FILE[:STRENGTH]",
    )
    lora_skip_unknown: bool = option(False, "Go on without what a LoRA changes and the model does not have.")
    image: str | None = option(None, "First frame of image to video.", group=SOURCES)
    first_frame: str | None = option(None, "First frame of first and last frame to video.", group=SOURCES)
    last_frame: str | None = option(None, "Last frame of first and last frame to video.", group=SOURCES)
    src_video: str | None = option(None, "Source video of VACE.", group=SOURCES)
    src_mask: str | None = option(
        None, "Mask video of VACE, white where the source video is to be made anew.", group=SOURCES
    )
    src_ref_images: str | None = option(None, "Reference images of VACE, separated by commas.", group=SOURCES)
    use_prompt_extend: bool = option(
        False, "Let a language model write the prompt out.", group=PROMPT_EXTENSION
    )
    prompt_extend_method: str = option(
        "local_qwen", "Who extends the prompt.", choices=("dashscope", "local_qwen"), group=PROMPT_EXTENSION
    )
    prompt_extend_model: str | None = option(None, "Model that extends the prompt.", group=PROMPT_EXTENSION)
    prompt_extend_target_lang: str = option(
        "zh", "Language of the extended prompt.", choices=("zh", "en"), group=PROMPT_EXTENSION
    )
    device: str | None = option(
        None, "Where to compute: cuda, cuda:N, xpu, mps or cpu (default: the accelerator that is there)."
    )
    exact: bool = option(
        False,
        "Rule out what makes a GPU's results depend on shapes: TF32, split sums, kernels chosen by timing (slower).",
    )
    save_latents: str | None = option(None, "Save the latents, too, before they are decoded.", metavar="FILE")
    decode_latents: str | None = option(
        None, "Only decode latents that were saved, and save the video.", metavar="FILE"
    )
    ulysses_size: int = option(1, "Ulysses parallelism of the DiT.", group=GPUS)
    ring_size: int = option(1, "Ring attention of the DiT.", group=GPUS)
    t5_fsdp: bool = option(False, "FSDP for the text encoder.", group=GPUS)
    dit_fsdp: bool = option(False, "FSDP for the DiT.", group=GPUS)
    memory: MemoryOptions = field(default_factory=MemoryOptions)

    def __post_init__(self) -> None:
        check_options(self)
        self._fill_in()
        check_options(self)
        self._check()

    @property
    def facts(self) -> Task:
        """The task's entry in TASKS."""
        return TASKS[self.task]

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height) of `size`."""
        width, height = SIZE_CONFIGS[self.size]
        return width, height

    @property
    def references(self) -> list[str] | None:
        """The paths in `src_ref_images`."""
        return self.src_ref_images.split(",") if self.src_ref_images else None

    @property
    def loras(self) -> list[tuple[str, float]]:
        """(file, strength) of each entry of `lora`."""
        return [parse_lora(text) for text in self.lora]

    def _fill_in(self) -> None:
        task = self.facts
        size = self.size or task.size
        self._set(
            size=size,
            lora=tuple(self.lora),
            frame_num=task.frame_num if self.frame_num is None else self.frame_num,
            sample_steps=task.sample_steps if self.sample_steps is None else self.sample_steps,
            sample_shift=task.shift(size) if self.sample_shift is None else self.sample_shift,
            base_seed=random.randint(0, sys.maxsize) if self.base_seed < 0 else self.base_seed,
        )
        if not self.decode_latents:
            none_given = all(getattr(self, name) is None for name in task.inputs)
            if none_given and (self.prompt is None or task.all_inputs):
                self._set(**{name: _example(names) for name, names in task.inputs.items()})
            if self.prompt is None:
                self._set(prompt=task.prompt)
        if self.save_file is None:
            self._set(save_file=self._default_name())

    def _check(self) -> None:
        task = self.facts
        if self.size not in task.sizes:
            raise InputError(f"{self.task} supports {', '.join(task.sizes)}", "size", self.size)
        if self.frame_num < 1 or self.frame_num % 4 != 1:
            raise InputError("give 4n+1 frames, such as 81", "frame_num", self.frame_num)
        if task.still and self.frame_num != 1:
            raise InputError(
                f"{self.task} makes one image, leave it out or give 1", "frame_num", self.frame_num
            )
        if self.frame_num < task.least_frames:
            raise InputError(f"{self.task} needs at least {task.least_frames}", "frame_num", self.frame_num)
        if self.ulysses_size != 1 or self.ring_size != 1 or self.t5_fsdp or self.dit_fsdp:
            raise InputError(
                "several GPUs are not supported yet, leave them out",
                ("ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp"),
            )
        for other in TASKS.values():
            for name in other.inputs:
                if name not in task.inputs and getattr(self, name) is not None:
                    owners = dict.fromkeys(n.split("-")[0] for n, t in TASKS.items() if name in t.inputs)
                    raise InputError(
                        f"belongs to {', '.join(owners)} tasks, leave it out for {self.task}", name
                    )
        given = [getattr(self, name) is not None for name in task.inputs]
        if task.all_inputs and not all(given) and not self.decode_latents:
            raise InputError("give both" if len(given) > 1 else "give it", tuple(task.inputs))
        if self.ckpt_dir is None and not task.toy:
            raise InputError(
                f"give the directory of the {self.task} checkpoint, or its name on the hub", "ckpt_dir"
            )
        for file, _ in self.loras:
            if not Path(file).is_file():
                raise InputError("no such file", "lora", file)
        if self.ckpt_dir is not None:
            check_checkpoint(self.ckpt_dir)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _default_name(self) -> str:
        prompt = (self.prompt or "latents").replace(" ", "_").replace("/", "_")[:50]
        size = self.size.replace("*", "x") if sys.platform == "win32" else self.size
        time = datetime.now().strftime("%Y%m%d_%H%M%S")
        return f"{self.task}_{size}_{prompt}_{time}.{'png' if self.facts.still else 'mp4'}"


def _example(names: str | None) -> str | None:
    """Paths of examples, given by their names."""
    return ",".join(str(EXAMPLES / name) for name in names.split(",")) if names else None
