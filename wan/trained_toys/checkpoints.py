"""The checkpoints of the trained toys: trained weights, shipped in half precision, and frozen random numbers for the
encoders of text and images and for the layers of the DiT that read the image encoder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from easydict import EasyDict
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from leanwan.errors import InputError

from .. import random_models
from ..configs.toy import TOY_CONFIGS
from ..utils.files import user_cache
from .captions import words

Weights = dict[str, torch.Tensor]

SHIPPED = Path(__file__).parent / "weights"
# The files in SHIPPED with the trained tensors of each DiT; those of a later file replace those of an earlier one.
DITS = {
    "t2v-toy": ("t2v",),
    "t2i-toy": ("t2v",),
    "i2v-toy": ("t2v", "image"),
    "flf2v-toy": ("t2v", "image"),
    "vace-toy": ("vace",),
}


def checkpoint(task: str) -> Path:
    """The directory of a trained toy's checkpoint, written on first use into the user's cache.

    The cache is `$XDG_CACHE_HOME/wan-toy`, or `~/.cache/wan-toy` without it; other weights have another directory.

    Raises:
        InputError: unknown task, weights that are missing or damaged, or a cache directory that cannot be written.
    """
    if task not in TOY_CONFIGS:
        raise InputError(f"no trained toy, choose from {', '.join(TOY_CONFIGS)}", "task", task)
    files = {name: _read(name) for name in ("vae", *DITS[task])}
    version = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
    directory = user_cache("wan-toy") / f"v{random_models.VERSION}" / f"{task}-{version}"

    def write(folder: Path) -> None:
        config = TOY_CONFIGS[task]
        learned = {name: _unpacked(name, data) for name, data in files.items()}
        vae = learned.pop("vae")
        weights = untrained(config)
        for tensors in learned.values():
            weights |= tensors
        random_models.write_dit(folder, config, weights)
        torch.save(vae, folder / config.vae_checkpoint)
        write_encoders(folder, config)

    return random_models.cached(directory, lambda directory: random_models.write_whole(directory, write))


def _read(name: str) -> bytes:
    try:
        return _path(name).read_bytes()
    except OSError as error:
        raise InputError(
            f"{_path(name)}: the trained toys' weights are missing, install the package anew"
        ) from error


def _unpacked(name: str, data: bytes) -> Weights:
    """The tensors of a shipped file, fp32."""
    try:
        return {key: tensor.float() for key, tensor in load(data).items()}
    except SafetensorError as error:
        raise InputError(
            f"{_path(name)}: the trained toys' weights are damaged, install the package anew"
        ) from error


def _path(name: str) -> Path:
    return SHIPPED / f"{name}.safetensors"


def write_encoders(folder: Path, config: EasyDict) -> None:
    """Writes the encoders' files: random weights, and a tokenizer that knows the words of the captions."""
    tokenizer = random_models.train_tokenizer(config.t5_config["vocab_size"], " ".join(words()))
    random_models.write_encoders(folder, config, 0, tokenizer)


def untrained(config: EasyDict) -> Weights:
    """A DiT's tensors before training, of which only the image branch stays: random, but its values are zero.

    So the image's tokens contribute nothing, and the model goes by the latents that it is given.
    """
    weights = random_models.dit_weights(config)
    for name, tensor in weights.items():
        if "v_img" in name or name.endswith("emb_pos"):
            tensor.zero_()
    return weights


def save_weights(folder: Path, name: str, weights: Weights) -> None:
    """Writes trained tensors in half precision."""
    halves = {key: tensor.detach().half().contiguous() for key, tensor in weights.items()}
    save_file(halves, folder / f"{name}.safetensors", metadata={"format": "pt"})
