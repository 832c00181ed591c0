"""The request: everything that decides what a run makes, and how."""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from leanwan.errors import InputError
from leanwan.flags import check_options, option
from leanwan.options import MemoryOptions

from ..kernels import check_speed
from ..modules.attention import CHOICES as ATTENTION_CHOICES
from ..tasks import DEFAULT_TASK, EXAMPLES, TASKS, Task
from ..utils.files import user_cache
from ..weights.hub import check_checkpoint
from ..weights.lora import parse_lora

log = logging.getLogger(__name__)

SOURCES = "inputs"
SPEED = "speed (not the same bits)"
KEEPING = "files, and what is kept"
PLANNING = "memory plan"
PROMPT_EXTENSION = "prompt extension"
ON_ONE_GPU = {"ulysses_size": 1, "ring_size": 1, "t5_fsdp": False, "dit_fsdp": False}
GPUS = "several GPUs (torchrun --nproc_per_node N; the same video)"
# In pixels. The rotary embedding has 1024 positions: of 16 pixels each in space, of 4 frames each in time.
SIDE_STEP = 16
LONGEST_SIDE = 8192
NO_CACHE = "off"
ANY_CHECKPOINT = "Wan-AI/any"  # a hub name that stands for a checkpoint that is not read
# Memory options that the planner chooses unless they are given.
PLANNED = (
    *("t5_stream", "vae_cpu", "vae_tile", "dit_stream", "dit_chunk"),
    *("activation_offload", "guidance_together"),
)
LEAST_FRACTION = 0.5  # the least value of --vram_fraction
NAME_BYTES = 120  # of the prompt in a result's file name; file systems allow 255 for the whole
# Fields that hold the path of one file.
PATHS = (
    *("save_file", "save_latents", "decode_latents", "resume"),
    *("image", "first_frame", "last_frame", "src_video", "src_mask"),
)


def parse_limit(text: str) -> float | str:
    """The text of --vram_limit as "auto" or a number of GiB; raises argparse.ArgumentTypeError for other text."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of GiB") from None


@dataclass(frozen=True)
class Request:
    """The settings of a run. A field that is None takes the task's default, and stays None if the task has none.

    The fields are the command line's flags, under the same names, and the memory options in `memory`. `planned` names
    the memory options that are chosen when the request runs on an accelerator, see wan.run.plan_request.

    Raises InputError, naming the field, for values that cannot work.
    """

    task: str = option(DEFAULT_TASK, "What to make, and with which model.", choices=TASKS)
    size: str | None = option(
        None,
        "Width*height of the video, in multiples of 16. Tasks that start from an image choose from the sizes of their "
        "model, take the area and keep the image's aspect.",
        metavar="W*H",
        shown_default="1280*720",
    )
    frame_num: int | None = option(
        None, "Frames, 4n+1 (default 81; 1 for pictures, 17 for toy tasks).", at_least=1, at_most=4001
    )
    ckpt_dir: str | None = option(
        None,
        "Folder of the checkpoint, or its name on the Hugging Face hub, such as Wan-AI/Wan2.1-T2V-1.3B. "
        "Toy tasks make their own.",
    )
    save_file: str | None = option(None, "Where to save the result (.mp4, or .png for pictures).")
    prompt: str | None = option(None, "What to show.", empty=True)
    negative_prompt: str | None = option(None, "What to avoid (default: what the model was published with).")
    base_seed: int = option(-1, "Seed of the noise; negative for a random one.", at_most=sys.maxsize)
    sample_solver: str = option("unipc", "Solver.", choices=("unipc", "dpm++", "euler"))
    sample_steps: int | None = option(
        None,
        "Solver steps (default 50; 40 for image to video, 20 for trained toys, 10 for random ones).",
        at_least=1,
        at_most=1000,
    )
    sample_shift: float | None = option(
        None,
        "Shift of the noise schedule (default 5; 3 for image to video at 480p and trained toys, 16 for first and last "
        "frame and VACE).",
        above=0,
        at_most=100,
    )
    sample_guide_scale: float | None = option(
        None,
        "Strength of classifier-free guidance (default 5; 2 for trained toys). 1 is none, with one pass per step, not "
        "two.",
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
    attention: str = option(
        "auto",
        "Attention of the DiT: sdpa for PyTorch's, flash for flash-attn, which differ in rounding; sage for "
        "SageAttention, which computes in 8 bits and changes the picture; auto for flash-attn where it is installed "
        "and runs, else PyTorch's (default).",
        choices=ATTENTION_CHOICES,
        group=SPEED,
    )
    compile: bool = option(
        False,
        "Compile the DiT's blocks: faster steps after a slow first one, and another rounding. Not with --dit_stream, "
        "--dit_chunk, --activation_offload, --low_vram or --exact.",
        group=SPEED,
    )
    overwrite: bool = option(False, "Replace what is at --save_file and --save_latents.", group=KEEPING)
    save_latents: str | None = option(
        None, "Save the latents, too, before they are decoded.", group=KEEPING, metavar="FILE"
    )
    decode_latents: str | None = option(
        None, "Only decode latents that were saved, and save the video.", group=KEEPING, metavar="FILE"
    )
    save_every: float = option(
        5.0,
        "Minutes between two writings of the run's state, from which --resume goes on (default 5).",
        at_least=0,
        group=KEEPING,
        metavar="MINUTES",
    )
    resume: str | None = option(
        None,
        "Go on from the state of a run that stopped. It knows all other settings; memory options, --device, "
        "--ckpt_dir and those of files may be given anew.",
        group=KEEPING,
        metavar="STATE",
    )
    preview: str | None = option(
        None,
        "Show in DIR what is coming: a small moving picture of the clean latent that a step predicts.",
        group=KEEPING,
        metavar="DIR",
    )
    preview_every: int = option(
        1, "Steps between two previews (default 1).", at_least=1, group=KEEPING, metavar="STEPS"
    )
    prompt_cache: str | None = option(
        None,
        "Keep encoded prompts in DIR, so that they need no text encoder again (default wan-prompts in the user's "
        "cache; toy tasks keep none); off keeps none.",
        group=KEEPING,
        metavar="DIR",
    )
    ulysses_size: int = option(
        1,
        "Ranks that share a pass of the DiT; times --ring_size all that are started.",
        at_least=1,
        group=GPUS,
    )
    ring_size: int = option(
        1,
        "As --ulysses_size: all exchange heads for tokens, which is exact. Ring attention is not built.",
        at_least=1,
        group=GPUS,
    )
    t5_fsdp: bool = option(False, "Share the text encoder's weights out over the ranks (FSDP).", group=GPUS)
    dit_fsdp: bool = option(False, "Share the DiT's weights out over the ranks (FSDP).", group=GPUS)
    vram_limit: float | str = option(
        "auto",
        "GiB of the card for this run, CUDA's own among them; auto for what is free (default). Memory options that are "
        "not given are chosen so that it fits, and finishes soonest.",
        parse=parse_limit,
        group=PLANNING,
        metavar="GIB",
    )
    vram_fraction: float = option(
        1.0,
        f"Share of that to be used, {LEAST_FRACTION} to 1 (default 1).",
        at_least=LEAST_FRACTION,
        at_most=1,
        group=PLANNING,
    )
    memory_mode: str = option(
        "hybrid",
        "Where weights and activations may be while a model works: on the GPU alone, wherever that is fastest "
        "(default), or in RAM as far as can be.",
        choices=("gpu_only", "hybrid", "cpu_only"),
        group=PLANNING,
    )
    planned: tuple[str, ...] = ()
    memory: MemoryOptions = field(default_factory=MemoryOptions)

    def __post_init__(self) -> None:
        check_options(self, PATHS)
        if not isinstance(self.memory, MemoryOptions):
            raise InputError("give MemoryOptions", "memory", self.memory)
        if not isinstance(self.planned, (list, tuple)) or any(name not in PLANNED for name in self.planned):
            raise InputError(f"give a list of {', '.join(PLANNED)}", "planned", self.planned)
        self._fill_in()
        self._check()

    @property
    def facts(self) -> Task:
        """The task's entry in TASKS."""
        return TASKS[self.task]

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height) of `size`."""
        return pixels(self.facts, self.size)

    @property
    def over_ranks(self) -> bool:
        """Whether the request asks for several processes."""
        return self.ulysses_size != 1 or self.ring_size != 1 or self.t5_fsdp or self.dit_fsdp

    @property
    def references(self) -> list[str] | None:
        """The paths in `src_ref_images`."""
        return self.src_ref_images.split(",") if self.src_ref_images else None

    @property
    def prompt_folder(self) -> Path | None:
        """The folder of the cache of encoded prompts; None for no cache."""
        if self.prompt_cache is None:
            return None if self.facts.toy else user_cache("wan-prompts")
        return None if self.prompt_cache == NO_CACHE else Path(self.prompt_cache)

    def to_json(self) -> dict[str, Any]:
        """The request as JSON values, its paths absolute."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in PATHS:
            if values[name] is not None:
                values[name] = os.path.abspath(values[name])
        if self.ckpt_dir is not None and os.path.isdir(self.ckpt_dir):
            values["ckpt_dir"] = os.path.abspath(self.ckpt_dir)
        if self.references:
            values["src_ref_images"] = ",".join(map(os.path.abspath, self.references))
        if self.preview:
            values["preview"] = os.path.abspath(self.preview)
        if self.prompt_cache not in (None, NO_CACHE):
            values["prompt_cache"] = os.path.abspath(self.prompt_cache)
        folder = self.memory.offload_folder
        memory = vars(self.memory) | {"offload_folder": os.path.abspath(folder) if folder else None}
        lora = [f"{os.path.abspath(file)}:{strength}" for file, strength in self.loras]
        return values | {"memory": memory, "lora": lora}

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
            planned=tuple(self.planned),
            frame_num=task.frame_num if self.frame_num is None else self.frame_num,
            sample_steps=task.sample_steps if self.sample_steps is None else self.sample_steps,
            sample_shift=task.shift(size) if self.sample_shift is None else self.sample_shift,
            sample_guide_scale=(
                task.sample_guide_scale if self.sample_guide_scale is None else self.sample_guide_scale
            ),
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
        pixels(task, self.size)
        limit = self.vram_limit
        if limit != "auto" and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
            raise InputError("give auto or a number of GiB, such as 8", "vram_limit", limit)
        if self.frame_num < 1 or self.frame_num % 4 != 1:
            raise InputError("give 4n+1 frames, such as 81", "frame_num", self.frame_num)
        if task.still and self.frame_num != 1:
            raise InputError(
                f"{self.task} makes one image, leave it out or give 1", "frame_num", self.frame_num
            )
        if self.frame_num < task.least_frames:
            raise InputError(f"{self.task} needs at least {task.least_frames}", "frame_num", self.frame_num)
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
        check_speed(self.attention, self.compile, self.memory, self.exact)
        for file, _ in self.loras:
            if not os.path.isfile(file):
                raise InputError("no such file", "lora", file)
        if self.ckpt_dir is not None:
            check_checkpoint(self.ckpt_dir)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _default_name(self) -> str:
        prompt = re.sub(r'[\s/\\:*?"<>|]|[^ -~\w]', "_", self.prompt or "latents")[:50]
        prompt = prompt.encode()[:NAME_BYTES].decode(errors="ignore")
        size = self.size.replace("*", "x") if sys.platform == "win32" else self.size
        time = datetime.now().strftime("%Y%m%d_%H%M%S")
        return f"{self.task}_{size}_{prompt}_{time}.{'png' if self.facts.still else 'mp4'}"


def tell_examples(request: Request, given: Mapping[str, Any], whose: str = "") -> None:
    """Logs each example of the task that a request uses because its field was not given.

    Args:
        request: made from `given`.
        given: the fields that were given.
        whose: prefix of each line.
    """
    for name in ("prompt", *request.facts.inputs):
        value = getattr(request, name)
        if given.get(name) is None and value is not None:
            log.info(f"{whose}--{name} is not given, an example is taken: {value}")


def pixels(task: Task, size: str) -> tuple[int, int]:
    """(width, height) of "width*height". Raises InputError for a size that the task cannot make."""
    found = re.fullmatch(r"([0-9]{1,5})\*([0-9]{1,5})", size)
    width, height = map(int, found.groups()) if found else (0, 0)
    if size not in task.sizes:
        if not task.free_size:
            raise InputError(f"choose one of {', '.join(task.sizes)}", "size", size)
        if not all(0 < side <= LONGEST_SIDE and side % SIDE_STEP == 0 for side in (width, height)):
            raise InputError(
                f"give width*height in multiples of {SIDE_STEP} up to {LONGEST_SIDE}, such as {task.size}",
                "size",
                size,
            )
    return width, height


def _example(names: str | None) -> str | None:
    """The paths of example files, joined by commas as their names are."""
    return ",".join(str(EXAMPLES / name) for name in names.split(",")) if names else None
