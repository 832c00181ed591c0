"""Describes the machine, and measures the rates of its buses and matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch

from .checks import GIB, Bench

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "flash_attn", "flash_attn_3")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
COPY_BYTES, REHEARSED_BYTES = 256 << 20, 1 << 16
SIDE, REHEARSED_SIDE = 8192, 64
ROUNDS = 5


def describe(bench: Bench) -> None:
    """Notes versions, card and settings. Fails if a matrix product on the device differs from the CPU's."""
    bench.note("system", f"{platform.platform()}, Python {platform.python_version()}")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    bench.note("packages", versions)
    memory = psutil.virtual_memory()
    bench.note(
        "host", {"cores": psutil.cpu_count(), "RAM GiB": memory.total / GIB, "free": memory.available / GIB}
    )
    if bench.device.type == "cuda":
        _describe_cuda(bench)
    else:
        bench.note("card", str(bench.device))
    bench.note(
        "settings",
        {
            "cuDNN TF32": torch.backends.cudnn.allow_tf32,
            "products": torch.get_float32_matmul_precision(),
            "allocator": next((os.environ[name] for name in ALLOCATOR if name in os.environ), "default"),
        },
    )
    free, total = bench.backend.mem_get_info(bench.device)
    bench.note("memory", {"GiB": total / GIB, "free": free / GIB})
    rows, columns = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    product = (rows.to(bench.device) @ columns.to(bench.device)).cpu()
    bench.expect(torch.allclose(product, rows @ columns, atol=1e-3), "a product of matrices is wrong")


def _describe_cuda(bench: Bench) -> None:
    properties = torch.cuda.get_device_properties(bench.device)
    bench.note(
        "card",
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "bf16": torch.cuda.is_bf16_supported(),
        },
    )
    bench.note(
        "CUDA",
        {
            "toolkit": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cuDNN": torch.backends.cudnn.version(),
            "driver": _smi("driver_version"),
        },
    )
    kernels = torch.backends.cuda
    bench.note(
        "attention kernels",
        {
            "flash": kernels.flash_sdp_enabled(),
            "memory-efficient": kernels.mem_efficient_sdp_enabled(),
            "cuDNN": kernels.cudnn_sdp_enabled(),
        },
    )
    used = _smi("memory.used")
    bench.note("used on the card, this process and others", used if used == "unknown" else f"{used} MiB")


def _smi(field: str) -> str:
    """The value of nvidia-smi's `field` for the first card, or "unknown"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def rates(bench: Bench) -> None:
    """Notes GB/s between host and device, and tera-operations per second of matrix products."""
    nbytes = REHEARSED_BYTES if bench.rehearse else COPY_BYTES
    there = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
    for name, pinned in (("pageable", False), ("page-locked", True)):
        here = torch.ones(nbytes, dtype=torch.uint8)
        if pinned:
            try:
                here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(1)
            except RuntimeError as error:
                bench.note(name, f"none to be had: {str(error).splitlines()[0]}")
                continue
        there.copy_(here)
        bench.expect(bool((there.cpu() == 1).all()), f"{name} memory did not arrive as it was")
        to = _seconds(bench, partial(there.copy_, here, non_blocking=True))
        back = _seconds(bench, partial(here.copy_, there, non_blocking=True))
        bench.note(name, {"GB/s to the device": nbytes / to / 1e9, "back": nbytes / back / 1e9})
    side = REHEARSED_SIDE if bench.rehearse else SIDE
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, before),
        ("fp32", torch.float32, "highest"),
        ("TF32", torch.float32, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.ones(side, side, dtype=dtype, device=bench.device) for _ in range(2))
        seconds = _seconds(bench, partial(torch.matmul, a, b))
        bench.note(name, {"TFLOPS": 2 * side**3 / seconds / 1e12})
    torch.set_float32_matmul_precision(before)


def _seconds(bench: Bench, work: Callable[[], Any]) -> float:
    """The median time of ROUNDS calls, after one that is not counted."""
    times = []
    for _ in range(1 + ROUNDS):
        bench.backend.synchronize(bench.device)
        start = time.perf_counter()
        work()
        bench.backend.synchronize(bench.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
