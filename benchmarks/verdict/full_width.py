"""Streams layers of full width, and keeps activations in RAM: the bits must be the same however late copies come."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import random_weights
from benchmarks.speed import pass_inputs
from leanwan.activations import ActivationOffload
from leanwan.dit.ahead import streamed_ahead
from leanwan.residency import Component
from leanwan.streaming import Streamer
from virtual_gpu import DEVICE, VirtualGPU
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel

from .checks import Bench

LAYERS = 2
LATENT, REHEARSED_LATENT = (16, 3, 30, 52), (16, 2, 8, 12)
BUFFERS, SHARES = (2, 3, 4), (0, 0.5, 1)
HEADS, CHUNK = (1, 4), 64  # of activations in RAM: heads of a group, tokens of a piece
DELAYS = ("no delay", "late copies", "busy device")
PASSES = 2  # so that every buffer is used again
LONGEST = 0.01  # seconds that a copy is late, at most
STALL = 5_000_000  # clock cycles for which the device is kept busy, a few milliseconds


def streamed(bench: Bench, task: str) -> None:
    """Streams with every number of buffers and every resident share, with and without delays."""
    if bench.rehearse:
        task = "t2v-tiny"
    bench.needs(4, 8)
    with bench.folder() as folder:
        expected = _reference(bench, task, folder / "expected.safetensors")
    model, inputs = _model_and_inputs(bench, task)
    given = (model, bench.device, [inputs["t"]], inputs["context"], None, model.compute_dtype)
    runs = list(itertools.product(BUFFERS, SHARES, DELAYS))
    wrong = []
    for buffers, share, delay in runs:
        kind = partial(_LateStreamer, bench.chance) if delay == "late copies" else Streamer

        def make_streamer(groups: Sequence[nn.Module], device: torch.device) -> Streamer:
            total = Streamer(groups, device, buffers=len(groups)).device_bytes
            return kind(groups, device, buffers=buffers, resident_bytes=int(share * total))  # noqa: B023

        streaming = streamed_ahead(*given, make_streamer)
        with torch.no_grad(), streaming as ahead, _busy(bench, model, delay):
            outputs = [model(**inputs, conditions=[ahead(0, 0)])[0].cpu() for _ in range(PASSES)]
        if not all(torch.equal(output, expected) for output in outputs):
            wrong.append(f"{buffers} buffers, {share:.0%} resident, {delay}")
    bench.note("runs", len(runs))
    bench.note("different", len(wrong))
    bench.expect(_picture(expected), "the reference is no picture")
    bench.expect(not wrong, f"not the bits of resident weights with: {'; '.join(wrong)}")


def offloaded(bench: Bench, task: str) -> None:
    """Activations in RAM, with and without delays: the bits must be those of copies made on the compute stream."""
    if bench.rehearse:
        task = "t2v-tiny"
    bench.needs(4, 8)
    model, inputs = _model_and_inputs(bench, task)
    inputs["t"] = inputs["t"].expand(PASSES)
    inputs |= {name: inputs[name] * PASSES for name in ("x", "context")}
    model.to(bench.device)

    def flows(place: ActivationOffload, together: bool) -> list[torch.Tensor]:
        with torch.no_grad(), place:
            found = model(**inputs, chunk=CHUNK, place=place, together=together)
            return [flow.cpu() for flow in found]

    runs, wrong = 0, []
    for heads, together in itertools.product(HEADS, (False, True)):
        expected = flows(_OneStream(bench.device, CHUNK, heads), together)
        bench.expect(_picture(expected[0]), f"{heads} heads: the reference is no picture")
        for delay in DELAYS:
            late = delay == "late copies"
            place = _LatePlace(bench, heads) if late else ActivationOffload(bench.device, CHUNK, heads)
            with _busy(bench, model, delay):
                found = flows(place, together)
            runs += 1
            if not all(map(torch.equal, found, expected)):
                wrong.append(f"{heads} heads, {'together' if together else 'apart'}, {delay}")
    bench.note("runs", runs)
    bench.note("different", len(wrong))
    bench.expect(not wrong, f"not the bits of copies in order with: {'; '.join(wrong)}")


def _picture(flow: torch.Tensor) -> bool:
    return bool(flow.isfinite().all() and flow.std() > 0)


class _LateStreamer(Streamer):
    """A Streamer whose copies start after a random delay."""

    def __init__(self, chance: Random, *args: Any, **options: Any):
        self.chance = chance
        super().__init__(*args, **options)

    def _copy(self, group: Any, slot: Any, released: list[Any]) -> Any:
        time.sleep(self.chance.uniform(0, LONGEST))
        return super()._copy(group, slot, released)


class _OneStream(ActivationOffload):
    """An ActivationOffload whose copies are on the compute stream, in its order."""

    def __enter__(self) -> _OneStream:
        super().__enter__()
        self.coming = self.going = self.compute_stream()
        return self


class _LatePlace(ActivationOffload):
    """An ActivationOffload whose copies, in or out, are late at random."""

    def __init__(self, bench: Bench, heads: int):
        self.bench = bench
        super().__init__(bench.device, CHUNK, heads)

    def take(self, *args: Any) -> Any:
        with self.backend.stream(self.bench.chance.choice([self.coming, self.going])):
            _stall(self.bench)
        return super().take(*args)


def _stall(bench: Bench) -> None:
    """Delays the current stream."""
    if bench.device.type == "cuda":
        torch.cuda._sleep(STALL)
    else:
        time.sleep(bench.chance.uniform(0, LONGEST / 10))


@contextlib.contextmanager
def _busy(bench: Bench, model: WanModel, delay: str) -> Iterator[None]:
    """Inside, the device computes late if `delay` is "busy device"."""
    blocks = model.blocks if delay == "busy device" else []
    stalls = [block.self_attn.q.register_forward_hook(lambda *_: _stall(bench)) for block in blocks]
    try:
        yield
    finally:
        for stall in stalls:
            stall.remove()


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
    """The flow with resident weights, from a process in which each kernel launch waits for the device."""
    job = {"task": task, "rehearse": bench.rehearse, "path": str(path)}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.verdict.full_width", json.dumps(job)],
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
