"""Layers of full width that stream: bit for bit what they give where they stay, however late copies come."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import random_weights
from benchmarks.speed import pass_inputs
from virtual_gpu import DEVICE, VirtualGPU
from wan.configs import WAN_CONFIGS
from wan.memory.residency import Component, visit_when_called
from wan.memory.streaming import Streamer
from wan.modules.model import WanModel

from .checks import Bench

LAYERS = 2
LATENT, REHEARSED_LATENT = (16, 3, 30, 52), (16, 2, 8, 12)
BUFFERS, SHARES = (2, 3, 4), (0, 0.5, 1)
PASSES = 2  # while attached, so that every buffer is used again
LONGEST = 0.01  # seconds that a copy is late, at most
STALL = 5_000_000  # clock cycles that the device is kept busy with nothing, a few milliseconds


def streamed(bench: Bench, task: str) -> None:
    """Streams in every number of buffers, with every share resident, with and without delays."""
    if bench.rehearse:
        task = "t2v-tiny"
    bench.needs(4, 8)
    with bench.folder() as folder:
        expected = _reference(bench, task, folder / "expected.safetensors")
    model, inputs = _model_and_inputs(bench, task)
    groups, embeddings = model.layer_groups(), model.embedding_layers()
    for embedding in embeddings:
        visit_when_called(embedding, bench.device)
    total = Streamer(groups, bench.device, buffers=len(groups)).device_bytes
    runs = list(itertools.product(BUFFERS, SHARES, ("no delay", "late copies", "busy device")))
    wrong = []
    for buffers, share, delay in runs:
        kind = partial(_Late, bench.chance) if delay == "late copies" else Streamer
        streamer = kind(groups, bench.device, buffers=buffers, resident_bytes=int(share * total))
        component = Component([model], bench.device, [*groups, *embeddings], streamer)
        stalls = _stalled(bench, model) if delay == "busy device" else []
        try:
            with torch.no_grad(), component.on_device():
                outputs = [model(**inputs)[0].cpu() for _ in range(PASSES)]
        finally:
            for stall in stalls:
                stall.remove()
        if not all(torch.equal(output, expected) for output in outputs):
            wrong.append(f"{buffers} buffers, {share:.0%} resident, {delay}")
    bench.note("runs", len(runs))
    bench.note("different", len(wrong))
    bench.expect(bool(expected.isfinite().all() and expected.std() > 0), "the reference is no picture")
    bench.expect(not wrong, f"not the bits of resident weights with: {'; '.join(wrong)}")


class _Late(Streamer):
    """Its copies start when it pleases them."""

    def __init__(self, chance: Random, *args: Any, **options: Any):
        self.chance = chance
        super().__init__(*args, **options)

    def _copy(self, group: Any, slot: Any, released: list[Any]) -> Any:
        time.sleep(self.chance.uniform(0, LONGEST))
        return super()._copy(group, slot, released)


def _stalled(bench: Bench, model: WanModel) -> list[Any]:
    """Makes the device fall behind what it is told to do: undone by remove() of each of the hooks."""

    def stall(*_: Any) -> None:
        if bench.device.type == "cuda":
            torch.cuda._sleep(STALL)
        else:
            time.sleep(bench.chance.uniform(0, LONGEST / 10))

    return [block.self_attn.q.register_forward_hook(stall) for block in model.blocks]


def build(task: str, dtype: torch.dtype) -> WanModel:
    """A text-to-video DiT of few layers of a task's width, on the CPU; no two of its weights are alike."""
    number = itertools.count()

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        weight = random_weights.random(shape, torch.float32).mul_(1 + next(number) / 64)
        return (weight + 1 if len(shape) == 1 else weight).to(dtype)

    with tempfile.TemporaryDirectory() as folder, random_weights.weights_from(make):
        random_weights.write_checkpoint(folder, task, LAYERS)
        return WanModel.from_pretrained(folder, dtype=dtype)


def inputs_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the DiT for a latent of `shape`: the same numbers on every device."""
    torch.manual_seed(0)
    tokens = shape[1] * shape[2] * shape[3] // 4
    inputs = pass_inputs(shape, tokens, torch.device("cpu"), dtype)
    for name, value in inputs.items():
        if isinstance(value, list):
            inputs[name] = [tensor.to(device) for tensor in value]
        elif isinstance(value, torch.Tensor):
            inputs[name] = value.to(device)
    return inputs


def _model_and_inputs(bench: Bench, task: str) -> tuple[WanModel, dict[str, Any]]:
    dtype = WAN_CONFIGS[task].param_dtype
    shape = REHEARSED_LATENT if bench.rehearse else LATENT
    return build(task, dtype), inputs_on(bench.device, shape, dtype)


def _reference(bench: Bench, task: str, path: Path) -> torch.Tensor:
    """The flow with resident weights, from a process whose launches each wait for the device."""
    job = {"task": task, "rehearse": bench.rehearse, "path": str(path)}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.verdict.placement", json.dumps(job)],
        check=True,
        env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )
    return load_file(path)["flow"]


def write_reference(bench: Bench, task: str, path: str) -> None:
    model, inputs = _model_and_inputs(bench, task)
    with torch.no_grad(), Component([model], bench.device).on_device():
        save_file({"flow": model(**inputs)[0].cpu().contiguous()}, path)


def main(job: dict[str, Any]) -> None:
    if not job["rehearse"]:
        return write_reference(Bench(torch.device("cuda:0")), job["task"], job["path"])
    torch.set_num_threads(1)
    with VirtualGPU():
        return write_reference(Bench(DEVICE, rehearse=True), job["task"], job["path"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
