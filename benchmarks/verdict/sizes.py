"""Whole runs at full size: their device memory compared with what the virtual GPU counts, and runs under a cap."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks import memory, random_weights
from leanwan.accelerator import LIBRARY_BYTES
from leanwan.budget import CONTEXT
from leanwan.options import LOW_VRAM, MemoryOptions
from virtual_gpu import VirtualGPU
from wan.configs import SIZE_CONFIGS

from .checks import GIB, Bench

WHOLE: dict[str, Any] = {
    "t5_stream": True,
    "vae_cpu": True,
    "vae_tile": 0,
}  # neither the DiT nor the video is cut
TOLERANCE = 0.05
CONVOLUTIONS = ("encode", "decode")  # stages that also take cuDNN's workspaces, which are not counted
BESIDE = CONTEXT + LIBRARY_BYTES  # bytes of CUDA's context and libraries, beside the run
MARGIN = 64 << 20  # bytes that a cap adds to the count, for small workspaces
ROUNDING = 1.05  # by which a cap multiplies the count, for gaps between tensors
INTERVAL = 0.02  # seconds between two looks at the driver's free memory
REHEARSED: dict[str, Any] = {"size": (128, 96), "frame_num": 9}


def counted(bench: Bench, task: str, size: str, layers: int | None = None, whole: bool = False) -> None:
    """Bytes in tensors must be those that the virtual GPU counts, stage by stage, within 5%."""
    run = _run(bench, task, size, layers, MemoryOptions(**(WHOLE if whole else LOW_VRAM)))
    count = _count(bench, run)
    bench.needs((count.peak_bytes * 1.3 + BESIDE) / GIB, 8)
    workspace = _workspace(bench)
    with _least_free(bench) as least_free:
        report = _measure(bench, run)
    for stage, peak in report.stages.items():
        live, expected = peak - workspace, count.stages.get(stage, 0)
        deviation = live / expected - 1 if expected else float("inf")
        numbers = {"live GiB": live / GIB, "counted": expected / GIB, "deviation": deviation}
        numbers["reserved GiB"] = report.reserved[stage] / GIB
        if stage in count.reserved:
            numbers["reserved, counted"] = count.reserved[stage] / GIB
        bench.note(stage, numbers)
        most = float("inf") if stage in CONVOLUTIONS and bench.device.type == "cuda" else TOLERANCE
        bench.expect(
            -TOLERANCE <= deviation <= most,
            f"{stage}: {live} bytes in tensors, {expected} counted ({deviation:+.1%})",
        )
    bench.expect(
        set(report.stages) == set(count.stages), f"stages {list(report.stages)}, not {list(count.stages)}"
    )
    bench.note("cuBLAS workspace GiB", workspace / GIB)
    bench.note("taken from the driver GiB", least_free.taken / GIB)
    bench.expect(report.out_of_memory is None, f"out of memory: {report.out_of_memory}")


def capped(bench: Bench, task: str, size: str, layers: int | None = None) -> None:
    """With --low_vram a run must fit a cap of the counted bytes, and not a quarter of it, or the cap has no effect."""
    options: dict[str, Any] = LOW_VRAM
    run = _run(bench, task, size, layers, MemoryOptions(**options))
    count = _count(bench, run)
    peak = max(count.peak_bytes, *count.reserved.values())
    room = int(ROUNDING * peak) + _workspace(bench) + (0 if bench.rehearse else MARGIN)
    bench.needs((room + BESIDE) / GIB, 8)
    report = _measure(bench, run, room)
    bench.note("cap GiB", room / GIB)
    bench.note("reserved GiB", max(report.reserved.values(), default=0) / GIB)
    bench.expect(report.out_of_memory is None, f"out of memory in {room} bytes: {report.out_of_memory}")
    beyond = [stage for stage, taken in report.reserved.items() if taken > room]
    bench.expect(not beyond, f"took more than the cap of {room} bytes in: {', '.join(beyond)}")
    bench.backend.empty_cache()
    quarter = room // 4  # in half of it, the VAE's tiles would become smaller
    refused = _measure(bench, run, quarter).out_of_memory is not None
    bench.note("in a quarter of it", "out of memory" if refused else "goes through")
    bench.expect(refused, f"goes through in {quarter} bytes, a quarter of what it needs")


def _run(bench: Bench, task: str, size: str, layers: int | None, options: MemoryOptions) -> memory.Run:
    if bench.rehearse:
        return memory.Run(f"{task.split('-')[0]}-tiny", **REHEARSED, memory=options, layers=layers)
    width, height = SIZE_CONFIGS[size]
    return memory.Run(task, (width, height), memory=options, layers=layers)


def _count(bench: Bench, run: memory.Run) -> memory.MemoryReport:
    """What the virtual GPU counts; in a process of its own where a card is measured, see backend.register()."""
    if bench.device.type != "cuda":
        return memory.count(run)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(memory.count, run).result()


def _measure(bench: Bench, run: memory.Run, capacity: int | None = None) -> Any:
    if bench.device.type == "cuda":
        return memory.measure(run, capacity)
    _, total = bench.backend.mem_get_info(bench.device)
    with VirtualGPU(capacity or total), random_weights.weights_from(random_weights.untouched):
        return memory.report_on(run, bench.device)


def _workspace(bench: Bench) -> int:
    """Bytes that cuBLAS keeps for itself from its first products on, which count as memory in tensors."""
    if bench.device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(1024, 1024, device=bench.device, dtype=dtype).requires_grad_(False)
        x = torch.ones(1024, 1024, device=bench.device, dtype=dtype)
        layer(x).matmul(x)
        del layer, x
    torch.cuda.synchronize(bench.device)
    return torch.cuda.memory_allocated(bench.device) - before


@contextlib.contextmanager
def _least_free(bench: Bench) -> Iterator[_Watch]:
    """Yields a watch; afterwards its `taken` is by how many bytes the driver's free memory fell at most meanwhile."""
    watch = _Watch(bench)
    watch.thread.start()
    try:
        yield watch
    finally:
        watch.done.set()
        watch.thread.join()


class _Watch:
    def __init__(self, bench: Bench):
        self.bench, self.done, self.taken = bench, threading.Event(), 0
        self.before = self._free()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _free(self) -> int:
        return self.bench.backend.mem_get_info(self.bench.device)[0]

    def _look(self) -> None:
        while not self.done.wait(INTERVAL):
            self.taken = max(self.taken, self.before - self._free())
