"""Where a checkpoint is: a folder, or a repository on the Hugging Face hub, fetched once into the hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from leanwan.errors import InputError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_checkpoint(name: str) -> None:
    """Raises InputError unless `name` is a folder or may be a name on the hub."""
    if not os.path.isdir(name) and (not _HUB_NAME.fullmatch(name) or os.path.exists(name)):
        raise InputError("no such directory, give the folder with the Wan2.1 checkpoint", "ckpt_dir", name)


def find_checkpoint(name: str, config: Any) -> Path:
    """The folder of a checkpoint.

    Args:
        name: a folder, or a repository on the hub, such as "Wan-AI/Wan2.1-T2V-1.3B", of which the files that the
            model needs are downloaded; an interrupted download goes on where it was.
        config: an entry of WAN_CONFIGS.

    Raises:
        InputError: neither a folder nor to be had from the hub.
    """
    check_checkpoint(name)
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_files(config)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            "no such directory, and it could not be fetched from the Hugging Face hub; download it there and give "
            f"the folder ({reason})",
            "ckpt_dir",
            name,
        ) from error


def _files(config: Any) -> list[str]:
    """Patterns of the files of a repository that a model needs."""
    names = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json"]
    names += [config.t5_checkpoint, f"{config.t5_tokenizer}/*", config.vae_checkpoint]
    if "clip_checkpoint" in config:
        names += [config.clip_checkpoint, f"{config.clip_tokenizer}/*"]
    return names
