"""Writing tensors into files of safetensors' format (https://huggingface.co/docs/safetensors)."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a new file, with the system's mode for new files instead of the library's.

    Raises OSError: no room, or no right to write.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except safetensors.SafetensorError as error:  # how it tells of a full disk
        raise OSError(" ".join(str(error).split())[:160]) from error
    path.chmod(mode)
