"""Stand-ins for libraries that upstream imports and that this project does not need.

Each does what upstream asks of the library and no more, after the library's documented behaviour.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

Contents = dict[str, dict[str, Any]]  # a library's modules by suffix ("" or ".name"), and the names in each


def install() -> None:
    """Makes torchvision, decord, dashscope and cv2 importable where they are missing."""
    is_torchvision_available()  # transformers caches the answer, before a stand-in could mislead it
    libraries: dict[str, Contents] = {
        "torchvision": _torchvision(),
        "decord": _decord(),
        "dashscope": {"": {}},
        "cv2": {"": {}},
    }
    for name, modules in libraries.items():
        if importlib.util.find_spec(name) is None:
            for suffix, contents in modules.items():
                _add(f"{name}{suffix}", contents)


def _add(name: str, contents: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


# torchvision


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[C, H, W] in [0, 1] from an 8-bit PIL image."""
    pixels = torch.from_numpy(np.array(image, copy=True))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return pixels.permute(2, 0, 1).contiguous().float().div(255)


def center_crop(image: torch.Tensor, output_size: tuple[int, int]) -> torch.Tensor:
    """Crops [..., H, W] to (height, width) about the centre; what is too small is padded with zeros first."""
    height, width = output_size
    missing_y, missing_x = max(height - image.shape[-2], 0), max(width - image.shape[-1], 0)
    padding = (missing_x // 2, (missing_x + 1) // 2, missing_y // 2, (missing_y + 1) // 2)
    image = torch.nn.functional.pad(image, padding)
    top = round((image.shape[-2] - height) / 2.0)
    left = round((image.shape[-1] - width) / 2.0)
    return image[..., top : top + height, left : left + width]


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, dtype=image.dtype, device=image.device) for v in (self.mean, self.std))
        return (image - mean[:, None, None]) / std[:, None, None]


class _NotNeeded:
    def __init__(self, *args: Any, **kwargs: Any):
        pass


def make_grid(
    images: torch.Tensor,
    nrow: int = 8,
    normalize: bool = False,
    value_range: tuple[float, float] | None = None,
) -> torch.Tensor:
    """One image of a batch of one, brought from value_range to [0, 1]."""
    if images.size(0) != 1 or not normalize:
        raise NotImplementedError("only a batch of one, normalized")
    low, high = value_range
    return ((images.clamp(low, high) - low) / max(high - low, 1e-5))[0]


def save_image(images: torch.Tensor, path: str, **grid: Any) -> None:
    pixels = make_grid(images, **grid).mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8)
    Image.fromarray(pixels.cpu().numpy()).save(path)


def _torchvision() -> Contents:
    return {
        "": {},
        ".io": {},
        ".utils": {"make_grid": make_grid, "save_image": save_image},
        ".transforms": {
            "Compose": Compose,
            "InterpolationMode": types.SimpleNamespace(BICUBIC="bicubic"),
            "Normalize": Normalize,
            "Resize": _NotNeeded,
            "ToTensor": _NotNeeded,
        },
        ".transforms.functional": {"to_tensor": to_tensor, "center_crop": center_crop},
    }


# decord


class VideoReader:
    """All frames of a video file, uint8 [H, W, 3]."""

    def __init__(self, path: str):
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.rate = float(stream.average_rate)
            decoded = list(container.decode(stream))
            self.times = [float(frame.pts * stream.time_base) for frame in decoded]
            self.frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded]
        self.position = 0

    def __len__(self) -> int:
        return len(self.frames)

    def get_avg_fps(self) -> float:
        return self.rate

    def get_frame_timestamp(self, index: int) -> np.ndarray:
        return np.array([self.times[index], self.times[index] + 1 / self.rate], dtype=np.float32)

    def next(self) -> torch.Tensor:
        self.position += 1
        return self.frames[self.position - 1]

    def get_batch(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([self.frames[index] for index in indices])


def _decord() -> Contents:
    return {"": {"VideoReader": VideoReader}, ".bridge": {"set_bridge": lambda name: None}}
