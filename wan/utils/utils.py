"""Saving results and reading flags, under the names and call signatures of programs written for Wan2.1."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from leanwan.flags import boolean

from .video import save_image, save_video

__all__ = ["cache_image", "cache_video", "rand_name", "str2bool"]

PADDING = 2  # pixels of black around each sample of a grid


def rand_name(length: int = 8, suffix: str = "") -> str:
    """A random file name of 2 `length` hexadecimal digits; the suffix with or without its dot."""
    dot = "." if suffix and not suffix.startswith(".") else ""
    return f"{secrets.token_hex(length)}{dot}{suffix}"


def str2bool(v: str | bool) -> bool:
    """A flag's text as True or False; a bool stays as it is. Raises argparse.ArgumentTypeError for other text."""
    return v if isinstance(v, bool) else boolean(v)


def cache_video(
    tensor: torch.Tensor,
    save_file: str | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: Sequence[float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Saves a video, or several as a grid, and returns the path.

    Args:
        tensor: [B, 3, F, H, W], in `value_range`.
        save_file: the path; default: a random name in the directory for temporary files.
        fps: frames per second.
        suffix: of the random name.
        nrow: samples in a row of the grid.
        normalize: scale `value_range` to the range of pixels; else values are in [0, 1] already.
        value_range: smallest and largest value; values beyond are clamped.
        retry: no effect; a file is written whole or not at all.

    Raises:
        OSError: the file could not be written.
    """
    path = save_file or os.path.join(tempfile.gettempdir(), rand_name(suffix=suffix))
    save_video(_grid(_symmetric(tensor, normalize, value_range), nrow), path, fps=fps)
    return path


def cache_image(
    tensor: torch.Tensor,
    save_file: str,
    nrow: int = 8,
    normalize: bool = True,
    value_range: Sequence[float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Saves pictures [B, 3, H, W], several as a grid; arguments and result as cache_video's."""
    frames = _symmetric(tensor, normalize, value_range).unsqueeze(2)
    save_image(_grid(frames, nrow), save_file)
    return save_file


def _symmetric(tensor: torch.Tensor, normalize: bool, value_range: Sequence[float]) -> torch.Tensor:
    """Values clamped to value_range, then scaled to [-1, 1]: from value_range if `normalize`, else from [0, 1]."""
    low, high = value_range
    tensor = tensor.clamp(low, high)
    if not normalize:
        low, high = 0, 1
    return tensor if (low, high) == (-1, 1) else (tensor - low) / (high - low) * 2 - 1


def _grid(videos: torch.Tensor, nrow: int) -> torch.Tensor:
    """[B, 3, F, H, W] in [-1, 1] as one video [3, F, H', W'], rows of `nrow` samples framed in black."""
    if len(videos) == 1:
        return videos[0]
    columns = min(nrow, len(videos))
    rows = -(-len(videos) // columns)
    framed = F.pad(videos, (0, PADDING, 0, PADDING), value=-1)
    missing = framed.new_full((rows * columns - len(videos), *framed.shape[1:]), -1)
    framed = torch.cat([framed, missing]).unflatten(0, (rows, columns))
    joined = torch.cat([torch.cat(list(row), dim=3) for row in framed], dim=2)
    return F.pad(joined, (PADDING, 0, PADDING, 0), value=-1)
