"""Runs one pipeline of a tree of upstream's; in this process `wan` is upstream's package.

    python -m upstream_driver.process --tree UPSTREAM --task t2v --checkpoint DIR --out FILE [--device vgpu ...]

With `--meta` full-size models are built and nothing is read from a checkpoint: bytes are counted. On the virtual GPU
they have no storage and nothing is computed; on CUDA they are in memory that nobody has written.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from .driver import PIPELINES
from .models import fit_sizes, task_config, without_weights
from .surroundings import load_tree
from .watch import CudaMemory, Watch, requested_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", required=True)
    parser.add_argument("--task", required=True, choices=PIPELINES)
    parser.add_argument("--checkpoint")
    parser.add_argument("--config")
    parser.add_argument("--device", choices=("cpu", "vgpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--granularity", type=int)
    parser.add_argument("--expandable_segments", action="store_true")
    parser.add_argument("--find_least", action="store_true")
    parser.add_argument("--meta", action="store_true")
    parser.add_argument("--init", type=json.loads, default={})
    parser.add_argument("--call", type=json.loads, default={})
    parser.add_argument("--inputs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from safetensors.torch import load_file, save_file

    inputs = load_file(args.inputs) if args.inputs else None
    wan = load_tree(args.tree, args.device, args.meta)
    config = task_config(wan, args.task, getattr(torch, args.dtype), args.config)
    if args.meta:
        without_weights(wan, config, args.task, storage=args.device == "cuda")
    else:
        fit_sizes(wan, args.checkpoint, config)
    with ExitStack() as stack:
        gpu = stack.enter_context(_virtual_gpu(args)) if args.device == "vgpu" else None
        if args.device == "cuda":
            gpu = CudaMemory()
        watch = Watch(gpu)
        out_of_memory = video = None
        try:
            pipeline = build(wan, args.task, config, args.checkpoint, **args.init)
            watch.attach(pipeline, args.meta and args.device != "cuda")
            watch.begin("text")
            video = generate(wan, pipeline, args.task, args.call, inputs).cpu()
        except torch.OutOfMemoryError as error:
            out_of_memory = {"stage": watch.stage, "requested": requested_bytes(error)}
        report = watch.report(out_of_memory)
        if args.find_least and out_of_memory is None:
            report["least_capacity"] = _least_capacity(gpu)
    tensors = {}
    if video is not None and not args.meta:
        tensors = {"video": video.contiguous(), "latents": watch.latents.contiguous()}
    save_file(tensors, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(report))
    print(json.dumps(report))


def build(wan: Any, task: str, config: Any, checkpoint: str | Path, **init: Any) -> Any:
    """Builds the pipeline of a task."""
    return getattr(wan, PIPELINES[task])(config=config, checkpoint_dir=str(checkpoint), **init)


def generate(
    wan: Any, pipeline: Any, task: str, call: dict[str, Any], inputs: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Calls a pipeline's generate(); returns the video. call, inputs: see driver.run()."""
    from PIL import Image

    defaults: dict[str, Any] = {"input_prompt": "a red ball rolls to the right", "seed": 0}
    call = defaults | call
    if "size" in call:
        call["size"] = tuple(call["size"])
    for key in ("img", "first_frame", "last_frame"):
        if key in call:
            image = call[key]
            blank = isinstance(image, (list, tuple))
            call[key] = Image.new("RGB", tuple(image)) if blank else Image.open(image).convert("RGB")
    if task == "flf2v":
        wan.first_last_frame2video.torch.frame_num = call.get("frame_num", 81)
    if task == "vace":
        if inputs is None:
            shape = (call.get("frame_num", 81), *call["size"][::-1])
            inputs = {"frames": torch.zeros(3, *shape), "mask": torch.ones(1, *shape)}
        # As generate.py has it: a VAE that works in tiles takes its sources from the CPU.
        device = torch.device("cpu") if getattr(pipeline.vae, "tile", 0) else pipeline.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        references = [inputs[name] for name in sorted(inputs) if name.startswith("ref_")]
        call |= {
            "input_frames": [inputs["frames"]],
            "input_masks": [inputs["mask"]],
            "input_ref_images": [references or None],
        }
    return pipeline.generate(**call)


def _virtual_gpu(args: argparse.Namespace) -> Any:
    from virtual_gpu import VirtualGPU

    finer = {} if args.granularity is None else {"granularity": args.granularity}
    finer |= {"expandable_segments": args.expandable_segments, "record_requests": args.find_least}
    return VirtualGPU(args.capacity, args.meta, **finer)


def _least_capacity(gpu: Any) -> int:
    from virtual_gpu import least_capacity

    return least_capacity(gpu.allocator)


if __name__ == "__main__":
    main()
