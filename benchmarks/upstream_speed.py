"""Times passes of upstream's DiT, whose package has the name of ours, in a process that benchmarks.speed starts.

The argument is a JSON object: tree, config (of the DiT), latent_shape, tokens, device, dtype. For every line that
comes in, a line goes out: [seconds, peak bytes] of one pass, or null if the device has not the room. In between,
nothing stays on the device: the model is built anew, on the device, with the weights that upstream starts from.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # after upstream's tree: both have a package `wan`
from upstream_driver import stand_ins, surroundings  # noqa: E402


def load_model_class(tree: str, kind: str) -> Any:
    """Upstream's WanModel for a kind of device, with PyTorch's attention if flash-attn is missing."""
    if kind != "cuda":
        return surroundings.load_tree(tree, kind).modules.model.WanModel
    stand_ins.install()
    sys.path.insert(0, tree)
    sys.dont_write_bytecode = True
    models: Any = importlib.import_module("wan.modules.model")
    if not any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface")):
        models.flash_attention = surroundings.attention
    return models.WanModel


def time_pass(model_class: Any, job: dict[str, Any], device: torch.device) -> tuple[float, int] | None:
    """(seconds, peak bytes) of one pass as upstream's pipeline makes it: fp32 weights, cast as they are used."""
    dtype = getattr(torch, job["dtype"])
    backend = None if device.type == "cpu" else torch.get_device_module(device)
    with device:
        model = model_class(**job["config"]).eval().requires_grad_(False)
        latent = torch.randn(job["latent_shape"])
        context = torch.randn(512, 4096, dtype=dtype)
        t = torch.tensor([999])
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        if backend:
            backend.reset_peak_memory_stats(device)
            backend.synchronize(device)
        start = time.perf_counter()
        model([latent], t=t, context=[context], seq_len=job["tokens"])
        if backend:
            backend.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds, backend.max_memory_allocated(device) if backend else 0


def main() -> None:
    job, out = json.loads(sys.argv[1]), sys.stdout
    kind = job["device"].partition(":")[0]
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        model_class = load_model_class(job["tree"], kind)
        device = torch.device(job["device"])  # after load_model_class, which registers the virtual GPU
        if kind == "vgpu":
            from virtual_gpu import VirtualGPU

            stack.enter_context(VirtualGPU())
        for _ in sys.stdin:
            try:
                answer = time_pass(model_class, job, device)
            except torch.OutOfMemoryError:
                answer = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
