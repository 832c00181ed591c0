"""Finished latents in files, with what is needed to make the video of them later."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from .errors import InputError
from .files import replacing

FORMAT = "wan-latents-1"


def save_latents(
    path: str | os.PathLike[str],
    latents: torch.Tensor,
    metadata: Mapping[str, Any],
    field: str = "save_latents",
) -> None:
    """Writes latents [C, F, h, w] as a safetensors file, whole or not at all.

    Args:
        path: replaced if it exists.
        latents: on any device; kept as fp32.
        metadata: dict; names and values are stored as strings.
        field: named by the error.

    Raises:
        InputError: the file cannot be written, such as on a full disk.
    """
    tensors = {"latents": latents.detach().to("cpu", torch.float32).contiguous()}
    texts = {"format": FORMAT} | {name: str(value) for name, value in metadata.items()}
    try:
        with replacing(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, texts)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot be written ({_one_line(error)}); make room for it", field, path) from error


def load_latents(
    path: str | os.PathLike[str], expected: Mapping[str, Any], field: str = "decode_latents"
) -> tuple[torch.Tensor, dict[str, str]]:
    """Reads latents and their metadata.

    Args:
        path: file that save_latents wrote.
        expected: dict of metadata that must agree, such as task and size. A name may stand for an option.
        field: named by the errors.

    Returns:
        (latents [C, F, h, w] fp32 on the CPU, metadata as dict of strings).

    Raises:
        InputError: no such file, truncated, no latents of this program, or made with other values than `expected`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", field, path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            ours = metadata.get("format") == FORMAT and names == ["latents"]
            latents = file.get_tensor("latents") if ours else None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"damaged or not a file of latents ({_one_line(error)})", field, path) from error
    if not ours or latents.dim() != 4 or latents.dtype != torch.float32:
        raise InputError("not latents that --save_latents wrote", field, path)
    for name, value in expected.items():
        if metadata.get(name) != str(value):
            raise InputError(_disagreement(name, metadata.get(name), value), field, path)
    return latents, metadata


def _disagreement(name: str, found: Any, wanted: Any) -> str:
    if name == "vae":
        return "was made with another VAE; give the --ckpt_dir that made it"
    return f"was made with --{name} {found}, not {wanted}; give --{name} {found}"


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
