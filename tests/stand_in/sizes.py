"""Runs at full size without values: what PyTorch's allocator holds and reserves, beside what the planner predicts.

    python -m stand_in_driver --no_values --capacity 80 python tests/stand_in/sizes.py TASK SIZE [--low_vram]
    python -m stand_in_driver --no_values --capacity 8 python tests/stand_in/sizes.py TASK SIZE --plan 8

Prints as JSON {"out_of_memory": null or where, "stages": {name: {"live", "predicted", "reserved", "to be reserved"}}},
in bytes, and "options", those of the plan.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import memory
from leanwan.budget import Budget
from leanwan.options import LOW_VRAM, MemoryOptions
from wan.planning.rates import usual
from wan.run.plan_request import card_of, planner_of
from wan.run.request import Request
from wan.tasks import TASKS

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("size")
    parser.add_argument("--frame_num", type=int)
    parser.add_argument("--low_vram", action="store_true")
    parser.add_argument(
        "--plan", type=float, metavar="GIB", help="the options are those planned for a card of so much"
    )
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    options = MemoryOptions(**(LOW_VRAM if args.low_vram else {}) | args.options)
    width, height = map(int, args.size.split("*"))
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            task=args.task, prompt="a red ball", size=args.size, frame_num=args.frame_num, memory=options,
            ckpt_dir=".", sample_steps=memory.STEPS, vram_limit=args.plan or "auto",
            **pictures(args.task, Path(folder), width, height),
        )  # fmt: skip
        told = compared(args, request)
    print(json.dumps(told))


def pictures(task: str, folder: Path, width: int, height: int) -> dict[str, str]:
    """Inputs as the benchmark makes them: black pictures of the video's size, one reference."""
    file = folder / "black.png"
    Image.new("RGB", (width, height)).save(file)
    names = [name for name, example in TASKS[task].inputs.items() if example is not None]
    return dict.fromkeys(names, str(file))


def compared(args: argparse.Namespace, request: Request) -> dict[str, Any]:
    grows = "expandable_segments:False" not in os.environ.get("PYTORCH_ALLOC_CONF", "")
    options = request.memory
    rates, card = usual((args.plan or 80) * GIB), card_of(request, torch.device("cuda", 0))
    planner = planner_of(request, rates, expandable=grows, card=card)
    if args.plan:
        options = planner.plan(Budget(args.plan * GIB, request.vram_fraction).room).options
    predicted = planner.of(options)
    run = memory.Run(args.task, request.pixels, request.frame_num, options)
    report = memory.measure(run, expandable_segments=grows)
    stages = {
        name: {
            "live": live,
            "predicted": predicted.stages[name].bytes,
            "reserved": report.reserved[name],
            "to be reserved": predicted.stages[name].reserved,
        }
        for name, live in report.stages.items()
    }
    return {"out_of_memory": report.out_of_memory, "stages": stages, "options": asdict(options)}


if __name__ == "__main__":
    main()
