"""Models of full size without their checkpoints: the sizes of a task, and weights that nobody trained.

The pipelines run as they are; only the function that reads weight files is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import wan.modules.clip
import wan.modules.model
import wan.modules.t5
import wan.modules.vae
from wan.configs import WAN_CONFIGS
from wan.random_models import train_tokenizer
from wan.tasks import TASKS

LOADERS: tuple[Any, ...] = (wan.modules.model, wan.modules.t5, wan.modules.clip, wan.modules.vae)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_checkpoint(directory: str | Path, task: str, layers: int | None = None) -> None:
    """Writes the files that a pipeline reads beside weights: config.json with the task's sizes, and a small tokenizer.

    The weight files exist, but are empty.

    layers: of the DiT, instead of the task's.
    """
    config = WAN_CONFIGS[task]
    directory = Path(directory)
    (directory / "config.json").write_text(json.dumps(dit_config(task, layers)))
    names = [config.t5_checkpoint, config.vae_checkpoint, config.get("clip_checkpoint"), WEIGHTS]
    for name in filter(None, names):
        (directory / name).touch()
    train_tokenizer(512).save_pretrained(directory / config.t5_tokenizer)


def dit_config(task: str, layers: int | None = None) -> dict[str, Any]:
    """The contents of the config.json of a task's DiT, as published, or with fewer `layers`."""
    config = TASKS[task].dit_config
    if layers:
        config |= {"num_layers": layers}
        if "vace_layers" in config:
            config["vace_layers"] = [layer for layer in config["vace_layers"] if layer < layers]
    return config


@contextlib.contextmanager
def weights_from(make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> Iterator[None]:
    """Inside, models that are built get their weights from `make(shape, dtype)` instead of from files.

    `dtype` is the type that the weight has in a file, see wan.weights.filling.load_weights.
    """

    def load_weights(
        module: torch.nn.Module, path: Any, *, names: Any = None, dtype: Any = None, merge: Any = None
    ) -> None:
        weights = {
            name: make(tuple(tensor.shape), dtype(name)) for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(weights, strict=True, assign=True)
        module.eval().requires_grad_(False)

    before = [module.load_weights for module in LOADERS]
    for module in LOADERS:
        module.load_weights = load_weights
    try:
        yield
    finally:
        for module, original in zip(LOADERS, before):
            module.load_weights = original


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that take no memory until they are written to; on Linux reading takes none either."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@functools.cache
def _block(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers on the CPU, as small as trained weights: one block of them over and over, which is fast."""
    block = _block(dtype)
    weights = torch.empty(shape, dtype=dtype)
    for piece in weights.view(-1).split(block.numel()):
        piece.copy_(block[: piece.numel()])
    return weights
