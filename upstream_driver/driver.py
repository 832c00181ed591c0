"""Starts runs of upstream's code, unpatched or patched, on a machine without a GPU, and reads back their results.

Upstream's package has the name of ours, so a tree runs in a process of its own (upstream_driver.process). Several
trees can be compared that way in one test run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PIPELINES = {"t2v": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}


@dataclass
class Outcome:
    """The result of a run of upstream's code.

    video: [3, F, H, W] fp32 in [-1, 1], latents: [16, F', H', W'] fp32; None if it ran out of memory or counted.
    report: {"peak_bytes", "stages": {name: peak bytes}, "peak_reserved", "reserved": {name: peak bytes},
        "out_of_memory": None or {"stage", "requested"}, "live_bytes"} on the virtual GPU and on CUDA, else {};
        "least_capacity" if find_least.
    """

    video: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    report: dict[str, Any] = field(default_factory=dict)


def run(
    tree: str | Path,
    task: str,
    checkpoint: str | Path | None = None,
    *,
    init: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    config: str | None = None,
    capacity: int | None = None,
    expandable_segments: bool = False,
    granularity: int | None = None,
    find_least: bool = False,
    meta: bool = False,
    timeout: float | None = 600,
) -> Outcome:
    """Runs one pipeline of the upstream tree in a process of its own.

    Args:
        tree: upstream's checkout, patched or not.
        task: t2v, i2v, flf2v or vace.
        checkpoint: checkpoint directory; None in meta mode.
        init: further arguments of the pipeline's constructor, e.g. {"t5_cpu": True}.
        call: arguments of its generate(). Images (img, first_frame, last_frame) are paths, or [width, height] for
            black ones.
        inputs: VACE: {"frames": [3, F, H, W], "mask": [1, F, H, W], "ref_0": [3, 1, H, W], ...}; None for a blank
            video that is all to be made.
        device: cpu, vgpu or cuda.
        dtype: of the DiT's autocast and of T5: float32 (CLIP's too) or bfloat16 (CLIP's is float16).
        config: upstream's config to start from, a key of its WAN_CONFIGS.
        capacity, expandable_segments, granularity: of the virtual GPU; None: its defaults.
        find_least: report the least capacity that serves all requests of the run.
        meta: count bytes at full size, without computing.
        timeout: seconds; None for as long as it takes.

    Raises RuntimeError with the end of its error output if the process fails, UnsupportedError if there can be no
    virtual GPU.
    """
    from safetensors.torch import load_file, save_file

    if device == "vgpu":
        from virtual_gpu import require

        require()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.safetensors"
        command = [
            sys.executable,
            "-m",
            "upstream_driver.process",
            "--tree",
            str(tree),
            "--task",
            task,
            "--out",
            str(out),
        ]
        command += ["--device", device, "--dtype", dtype]
        command += ["--init", json.dumps(init or {}), "--call", json.dumps(call or {})]
        if checkpoint is not None:
            command += ["--checkpoint", str(checkpoint)]
        if config is not None:
            command += ["--config", config]
        if capacity is not None:
            command += ["--capacity", str(capacity)]
        if granularity is not None:
            command += ["--granularity", str(granularity)]
        if find_least:
            command += ["--find_least"]
        if expandable_segments:
            command += ["--expandable_segments"]
        if meta:
            command += ["--meta"]
        if inputs is not None:
            save_file(
                {name: t.contiguous() for name, t in inputs.items()}, Path(folder) / "inputs.safetensors"
            )
            command += ["--inputs", str(Path(folder) / "inputs.safetensors")]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
            env=environment(),
        )
        if done.returncode:
            raise RuntimeError(f"upstream's run failed:\n{done.stderr[-4000:]}")
        tensors = load_file(out)
        report = json.loads((Path(folder) / "out.json").read_text())
    return Outcome(tensors.get("video"), tensors.get("latents"), report)


def kind_of(task: str) -> str:
    """The key in PIPELINES for one of this project's tasks; pictures from text are videos of one frame."""
    kind = task.split("-")[0]
    return kind if kind in PIPELINES else "t2v"


def read_configs(tree: str | Path) -> dict[str, Any]:
    """Upstream's WAN_CONFIGS as JSON gives it: tuples are lists, types are their names."""
    code = (
        "import json, sys; from upstream_driver.surroundings import load_tree; wan = load_tree(sys.argv[1]); "
        "print(json.dumps(wan.configs.WAN_CONFIGS, default=str))"
    )
    command = [sys.executable, "-c", code, str(tree)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """The environment of a process that can import these modules; paths that it inserts itself come first."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
