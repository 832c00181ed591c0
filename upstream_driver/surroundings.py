"""Imports upstream's package with replacements around it; only for a process of its own.

These are replaced, all from outside:

- missing libraries, by the stand-ins of stand_ins.py;
- `cuda:N`, by the CPU or by the virtual GPU (`vgpu`); noise is drawn on the CPU for both. With `cuda` it stays;
- flash attention, by scaled-dot-product attention over the valid keys, in the type of the values;
- `torch.cuda.amp.autocast`, by the autocast of the device in use for bfloat16 and float16; float32 turns it off;
- the mask of first-last-frame, which upstream builds for 81 frames only, by one of the right length.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import stand_ins


def load_tree(tree: str | Path, device: str = "cpu", meta: bool = False) -> Any:
    """Imports upstream's package, once per process, and returns it.

    device: cpu or vgpu, which replace its cuda:N; or cuda, which leaves it.
    """
    stand_ins.install()
    if device == "vgpu":
        from virtual_gpu import register

        register()
    if device != "cuda":
        torch.cuda.current_device = lambda: 0
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.empty_cache = torch.vgpu.empty_cache if device == "vgpu" else lambda: None
    torch.cuda.amp.autocast = partial(_Autocast, device)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    wan: Any = importlib.import_module("wan")
    if Path(wan.__file__).parents[1].resolve() != Path(tree).resolve():
        raise RuntimeError(f"{tree}: not a tree of upstream, its package came from {wan.__file__}")
    wan.modules.model.flash_attention = wan.modules.clip.flash_attention = attention
    if device == "cuda":
        return wan
    facade = _Torch(device, meta)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "wan" and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = facade
    wan.first_last_frame2video.torch = _FirstLastTorch(device, meta)
    return wan


class _Autocast(torch.autocast):
    """torch.cuda.amp.autocast for the device in use."""

    def __init__(
        self,
        device: str,
        enabled: bool = True,
        dtype: torch.dtype = torch.float16,
        cache_enabled: bool = True,
    ):
        narrow = dtype in (torch.bfloat16, torch.float16)
        super().__init__(
            device,
            dtype=dtype if narrow else torch.bfloat16,
            enabled=enabled and narrow,
            cache_enabled=cache_enabled,
        )


class _DeviceType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.device)


class _Torch:
    """The torch module as upstream's modules see it: cuda is replaced by another device, the rest is the same."""

    def __init__(self, device: str, meta: bool):
        def mapped(value: Any) -> torch.device:
            return torch.device(device) if torch.device(value).type == "cuda" else torch.device(value)

        self.device = _DeviceType("device", (), {"__new__": lambda cls, *args: mapped(*args)})
        self._meta = meta

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Generator(self, device: Any = "cpu") -> torch.Generator:
        return torch.Generator()

    def randn(self, *shape: Any, device: Any = None, **options: Any) -> torch.Tensor:
        noise = torch.randn(*shape, **options)
        return noise if device is None else noise.to(device)

    def load(self, *args: Any, **options: Any) -> Any:
        return None if self._meta else torch.load(*args, **options)


class _FirstLastTorch(_Torch):
    frame_num = 81

    def ones(self, *shape: int, **options: Any) -> torch.Tensor:
        if shape[:2] == (1, 81):
            shape = (1, self.frame_num, *shape[2:])
        return torch.ones(*shape, **options)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None = None,
    k_lens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **unused: Any,
) -> torch.Tensor:
    """Flash attention's arguments and result: q, k, v [B, L, heads, C], k_lens [B], result in q's type."""
    if q_lens is not None or tuple(window_size) != (-1, -1):
        raise NotImplementedError("q_lens and windows are not used by upstream's models")
    out_dtype = q.dtype
    q, k = q.to(v.dtype), k.to(v.dtype)
    lengths = [k.size(1)] * k.size(0) if k_lens is None else k_lens.tolist()
    samples = [
        F.scaled_dot_product_attention(
            q[i : i + 1].transpose(1, 2),
            k[i : i + 1, :length].transpose(1, 2),
            v[i : i + 1, :length].transpose(1, 2),
            is_causal=causal,
            scale=softmax_scale,
        ).transpose(1, 2)
        for i, length in enumerate(lengths)
    ]
    return (samples[0] if len(samples) == 1 else torch.cat(samples)).to(out_dtype)
