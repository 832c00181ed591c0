"""Peak device memory of a whole run, stage by stage: counted on a virtual GPU, or measured on a real one.

    python -m benchmarks.memory --task t2v-1.3B --size "832*480" --capacity 11.49 --offload_model True --vae_cpu

The pipeline's own code runs at full size, constructor and generate(), on weights that nobody trained. On the virtual
GPU nothing is computed, but everything that would be on the device is counted: this takes seconds and no memory. On
CUDA it is computed and measured.

Images are plain, a prompt is as long as can be. VACE gets a source video, its mask and one reference image (an
upstream tree: no reference). Of the sampling steps, the first ones only fill what the solver remembers.

Live bytes are those in tensors. A card needs what the allocator reserves for them, or a little less, as it gives back
what it has cached when it runs out: --least_capacity tells how much. Beside that CUDA itself takes 0.35 to 0.45 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from benchmarks import random_weights
from leanwan.accelerator import configure_allocator, initialise
from leanwan.budget import hold_to
from leanwan.errors import InputError
from leanwan.flags import add_flags, boolean
from leanwan.options import MemoryOptions, add_low_vram, set_low_vram
from upstream_driver import driver
from upstream_driver.watch import requested_bytes
from virtual_gpu import LACK, VirtualGPU, least_capacity
from wan.run.request import pixels
from wan.tasks import TASKS, Task

GIB = 2**30
PROMPT = "word " * 600  # fills the 512 tokens that a prompt may have
REFERENCES = 1
STEPS = 3  # from the third step on, a solver's history does not grow


@dataclass(frozen=True)
class Run:
    """A run to measure.

    Attributes:
        memory: the pipeline's memory options.
        layers: of the DiT, None for the task's.
        steps, solver, guide_scale: of sampling, as generate()'s.
        every_pass: run every pass of the DiT; else only the last step's, which need at least as much memory as others.
    """

    task: str
    size: tuple[int, int]  # width, height
    frame_num: int = 81
    memory: MemoryOptions = MemoryOptions()
    layers: int | None = None
    steps: int = STEPS
    solver: str = "unipc"
    guide_scale: float = 5.0
    every_pass: bool = False

    @property
    def facts(self) -> Task:
        return TASKS[self.task]

    @property
    def skipped(self) -> int:
        """Calls of the DiT to skip: those before the last step, unless every_pass. A step has one or two calls."""
        calls = 1 if self.memory.guidance_together or self.guide_scale == 1 else 2
        return 0 if self.every_pass else calls * (self.steps - 1)


@dataclass
class MemoryReport:
    """Peak bytes of a run.

    Attributes:
        peak_bytes: in tensors, of the whole run, loading included.
        stages: in tensors, of each stage that was reached, in order.
        reserved: what the allocator took from the driver, of each stage.
        out_of_memory: None, or {"stage": its name, "requested": bytes}.
        least_capacity: the least memory that serves all requests of the run, if asked for.
    """

    peak_bytes: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    out_of_memory: dict | None = None
    least_capacity: int | None = None

    def json(self) -> str:
        return json.dumps(vars(self))


def count(
    run: Run, capacity: int | None = None, expandable_segments: bool = True, find_least: bool = False
) -> MemoryReport:
    """The MemoryReport of a run on a virtual GPU of `capacity` bytes, None for no limit."""
    options: dict[str, Any] = {"expandable_segments": expandable_segments, "record_requests": find_least}
    with VirtualGPU(capacity, True, **options) as gpu, random_weights.weights_from(random_weights.untouched):
        report = report_on(run, gpu.device)
    if find_least and report.out_of_memory is None:
        report.least_capacity = least_capacity(gpu.allocator)
    return report


def measure(run: Run, capacity: int | None = None, expandable_segments: bool = True) -> MemoryReport:
    """The MemoryReport of a run on the CUDA device, of which `capacity` bytes are used, None for all."""
    device = torch.device("cuda:0")
    if expandable_segments:
        configure_allocator(device)
    if capacity is not None:
        hold_to(device, capacity)
    with random_weights.weights_from(random_weights.untouched):
        return report_on(run, device)


def count_upstream(
    run: Run,
    tree: str | Path,
    capacity: int | None = None,
    expandable_segments: bool = True,
    find_least: bool = False,
    device: str = "vgpu",
) -> MemoryReport:
    """The MemoryReport of a run of upstream's own code, patched or not.

    Args:
        tree: upstream's checkout. Memory options that differ from their defaults are given to its pipeline.
        capacity, expandable_segments, find_least: of the virtual GPU; the rest is PyTorch's to say on "cuda".

    Raises:
        InputError: the tree does not know an option.
    """
    defaults = vars(MemoryOptions())
    call: dict[str, Any] = {
        "frame_num": run.frame_num,
        "sampling_steps": run.steps,
        "offload_model": run.memory.offload_model,
    }
    if run.facts.area_only:
        names = ["img" if name == "image" else name for name in run.facts.inputs]
        call |= dict.fromkeys(names, run.size) | {"max_area": run.size[0] * run.size[1]}
    else:
        call |= {"size": run.size}
    try:
        report = driver.run(
            tree,
            driver.kind_of(run.task),
            init={
                name: value
                for name, value in vars(run.memory).items()
                if value != defaults[name] and name != "offload_model"
            },
            call=call,
            device=device,
            dtype="bfloat16",
            config=run.task,
            capacity=capacity,
            expandable_segments=expandable_segments,
            find_least=find_least,
            meta=True,
            timeout=None,
        ).report
    except RuntimeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown:
            raise
        raise InputError(f"--{unknown[1]}: {tree} has no such option, apply the patches to it") from error
    stages, reserved = (
        {k: v for k, v in report[name].items() if k != "load"} for name in ("stages", "reserved")
    )
    least = report.get("least_capacity")
    return MemoryReport(report["peak_bytes"], stages, reserved, report["out_of_memory"], least)


def report_on(run: Run, device: torch.device) -> MemoryReport:
    """The MemoryReport of a run on a device; the caller decides where weights come from."""
    backend, report, pipeline = torch.get_device_module(device), MemoryReport(), None
    initialise(device)
    backend.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as directory:
        random_weights.write_checkpoint(directory, run.task, run.layers)
        try:
            make, config = run.facts.pipeline_class, run.facts.config
            pipeline = make(config, directory, device=device, on_event=_ignored, **vars(run.memory))
            pipeline.load()
            report.peak_bytes = backend.max_memory_allocated(device)
            counted = device.type != "cuda"
            if counted and run.memory.t5_cpu:  # what the CPU computes takes no memory of the device
                pipeline.text_encoder = _NoText(run.facts.config)
            if run.skipped:
                _skip_calls(pipeline.model, run.skipped)
            _generate(pipeline, run, torch.device("meta" if counted else "cpu"))
        except torch.OutOfMemoryError as error:
            stage = (pipeline and pipeline.stages.current) or "load"
            report.out_of_memory = {"stage": stage, "requested": requested_bytes(error)}
    for stage in pipeline.stages.history if pipeline else ():
        report.stages[stage.name] = max(stage.allocated, report.stages.get(stage.name, 0))
        report.reserved[stage.name] = max(stage.reserved, report.reserved.get(stage.name, 0))
    report.peak_bytes = max(report.peak_bytes, *report.stages.values(), backend.max_memory_allocated(device))
    return report


def _ignored(event: Any) -> None:
    pass


class _NoText:
    """A text encoder that computes nothing and returns zeros."""

    model = SimpleNamespace(block=[])

    def __init__(self, config: Any):
        width = config.get("t5_config", {}).get("d_model", 4096)
        self.like = torch.empty(config.text_len, width, dtype=config.t5_dtype, device="meta")

    def __call__(self, texts: list[str], device: Any) -> list[torch.Tensor]:
        return [torch.zeros_like(self.like, device="cpu") for _ in texts]


def _skip_calls(model: Any, calls: int) -> None:
    """Makes the first `calls` calls of a DiT return zeros."""
    forward, left = model.forward, calls

    def skipping(x: list[torch.Tensor], *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        nonlocal left
        left -= 1
        return forward(x, *args, **kwargs) if left < 0 else [torch.zeros_like(latent) for latent in x]

    model.forward = skipping


def _generate(pipeline: Any, run: Run, source_device: torch.device) -> torch.Tensor:
    """Calls generate() of the task; VACE's sources are made on `source_device`."""
    width, height = run.size
    arguments: dict[str, Any] = {"size": run.size}
    if run.facts.area_only:
        names = ["img" if name == "image" else name for name in run.facts.inputs]
        arguments = {name: Image.new("RGB", run.size) for name in names} | {"max_area": width * height}
    elif run.facts.inputs:

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, height, width, device=source_device)

        references = [zeros(3, 1) for _ in range(REFERENCES)]
        arguments |= {
            "input_frames": [zeros(3, run.frame_num)],
            "input_masks": [zeros(1, run.frame_num)],
            "input_ref_images": [references],
        }
    arguments |= {"sampling_steps": run.steps, "sample_solver": run.solver, "guide_scale": run.guide_scale}
    return pipeline.generate(PROMPT, **arguments, frame_num=run.frame_num, seed=0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, also if the run was out of memory; 2 for bad input."""
    try:
        args = parse_arguments(argv)
        with contextlib.redirect_stdout(sys.stderr):
            report, counted = _run(args)
    except InputError as error:
        print(f"benchmarks.memory: {error.told('--')}", file=sys.stderr)
        return 2
    print(report.json() if args.json else _table(args, report, counted))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="t2v-1.3B", choices=list(TASKS))
    add("--size", default="832*480", metavar="W*H", help="default 832*480")
    add("--frame_num", type=int, help="default 81, 1 for t2i")
    add(
        "--capacity",
        type=float,
        metavar="GIB",
        help="memory of the device (default: no limit, or all there is)",
    )
    add("--device", default="virtual", choices=["virtual", "cuda"])
    add(
        "--tree",
        nargs="?",
        const=os.environ.get("WAN_UPSTREAM", ""),
        metavar="PATH",
        help="run this checkout of upstream, patched or not, instead of our pipelines (no PATH: WAN_UPSTREAM)",
    )
    add(
        "--expandable_segments",
        type=boolean,
        default=True,
        metavar="BOOL",
        help="how CUDA's allocator reserves memory (default True, as generate.py has it where the platform can)",
    )
    add("--least_capacity", action="store_true", help="also find the least memory that the virtual GPU needs")
    add("--compare", action="store_true", help="with --device cuda: how far the virtual GPU is from it")
    add("--json", action="store_true", help="print one JSON object")
    add_flags(parser, MemoryOptions)
    add_low_vram(parser)
    set_low_vram(parser, argv)
    args = parser.parse_args(argv)
    args.memory = MemoryOptions(**{field.name: getattr(args, field.name) for field in fields(MemoryOptions)})
    task = TASKS[args.task]
    args.pixels = pixels(task, args.size)
    if args.frame_num is None:
        args.frame_num = task.frame_num
    if args.capacity is not None and not args.capacity > 0:
        raise InputError(f"--capacity {args.capacity}: give the device's memory in GiB")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here, use --device virtual")
    if args.tree is not None and not (Path(args.tree) / "wan" / "text2video.py").is_file():
        raise InputError(f"--tree {args.tree}: no checkout of upstream is there")
    if args.tree is not None and args.device == "cuda" and (args.capacity is not None or args.compare):
        given = "--compare" if args.compare else "--capacity"
        raise InputError(
            f"{given}: not with --tree and --device cuda, where the original has all of the card"
        )
    if args.least_capacity and args.device != "virtual":
        raise InputError("--least_capacity: only with --device virtual")
    if args.compare and args.device != "cuda":
        raise InputError("--compare: needs --device cuda to compare with")
    if LACK and (args.device == "virtual" or args.compare):
        raise InputError(f"--device {args.device}{' --compare' if args.compare else ''}: {LACK}")
    return args


def _run(args: argparse.Namespace) -> tuple[MemoryReport, MemoryReport | None]:
    """The MemoryReport asked for, and with --compare also the virtual GPU's."""
    run = Run(args.task, args.pixels, args.frame_num, args.memory)
    capacity = None if args.capacity is None else int(args.capacity * GIB)
    expandable = args.expandable_segments
    if args.tree is not None:
        device = "cuda" if args.device == "cuda" else "vgpu"
        return count_upstream(run, args.tree, capacity, expandable, args.least_capacity, device), None
    if args.device == "virtual":
        return count(run, capacity, expandable, args.least_capacity), None
    return measure(run, capacity, expandable), count(run, capacity, expandable) if args.compare else None


def _table(args: argparse.Namespace, report: MemoryReport, counted: MemoryReport | None) -> str:
    """The report as text; `counted` is the virtual GPU's, to be compared, or None."""
    of = f" of {args.capacity} GiB" if args.capacity else ""
    lines = [f"{args.task}, {args.size}, {args.frame_num} frames, {args.device} device{of}", ""]
    head = f"{'stage':8}{'GiB':>8}{'reserved':>10}"
    lines.append(head + (f"{'virtual':>9}{'deviation':>11}" if counted else ""))
    for stage, peak in report.stages.items():
        line = f"{stage:8}{peak / GIB:8.3f}{report.reserved[stage] / GIB:10.3f}"
        if counted and stage in counted.stages:
            line += f"{counted.stages[stage] / GIB:9.3f}{counted.stages[stage] / peak - 1:+11.1%}"
        lines.append(line)
    lines.append(f"{'peak':8}{report.peak_bytes / GIB:8.3f}  ({report.peak_bytes} bytes)")
    if report.least_capacity is not None:
        lines.append(f"{'least':8}{report.least_capacity / GIB:8.3f}  (capacity that this run needs)")
    if report.out_of_memory:
        lines += [
            "",
            "Out of memory in stage {stage}, where {requested} bytes were needed.".format(
                **report.out_of_memory
            ),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    sys.exit(main())
