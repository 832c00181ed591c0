"""The trained toys' checkpoints: what the package ships of them, and their unpacking to the real file layout.

Shipped, in half precision, is what was trained. The encoders of text and images and what reads the image encoder are
frozen random numbers, as the random toys': they are made when a checkpoint is unpacked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from easydict import EasyDict
from safetensors.torch import load_file, save_file

from .. import tiny
from ..configs.toy import TOY_CONFIGS
from ..utils.errors import InputError
from ..utils.files import user_cache
from .clips import words

VERSION = 1  # of the contents; a change of any tensor or file needs a new one
SHIPPED = Path(__file__).parent / "weights"
# The files that a task's DiT is made of; of what two hold, the later one's.
DITS = {
    "t2v-toy": ("t2v",),
    "t2i-toy": ("t2v",),
    "i2v-toy": ("image",),
    "flf2v-toy": ("image",),
    "vace-toy": ("t2v", "vace"),
}

Weights = dict[str, torch.Tensor]


def checkpoint(task: str) -> Path:
    """The directory of a toy task's checkpoint, unpacked on first use into `$XDG_CACHE_HOME/wan-toy`, or ~/.cache.

    Raises InputError: unknown task, or a cache directory that cannot be written.
    """
    if task not in TOY_CONFIGS:
        raise InputError(f"no toy task, choose from {', '.join(TOY_CONFIGS)}", "task", task)
    directory = user_cache("wan-toy") / f"v{VERSION}" / task
    return tiny.cached(directory, lambda folder: tiny.write_whole(folder, lambda new: unpack(new, task)))


def unpack(folder: Path, task: str, shipped: Path = SHIPPED) -> None:
    """Writes a task's files, fp32, into a folder, from the trained weights in another."""
    config = TOY_CONFIGS[task]
    dit = untrained(config)
    for name in DITS[task]:
        dit |= load_weights(shipped, name)
    tiny.write_dit(folder, config, {name: dit[name] for name in sorted(dit)})
    torch.save(load_weights(shipped, "vae"), folder / config.vae_checkpoint)
    write_encoders(folder, config)


def write_encoders(folder: Path, config: EasyDict) -> None:
    """The encoders' files: random weights, and a tokenizer that knows the words of the captions."""
    tokenizer = tiny.train_tokenizer(config.t5_config["vocab_size"], " ".join(words()))
    tiny.write_encoders(folder, config, 0, tokenizer)


def untrained(config: EasyDict) -> Weights:
    """A DiT's tensors, of which only the image branch is to stay: random, but for values that are zero.

    So the image's tokens say nothing, and the model goes by the latents that it is given.
    """
    weights = tiny.dit_weights(config)
    for name, tensor in weights.items():
        if "v_img" in name or name.endswith("emb_pos"):
            tensor.zero_()
    return weights


def load_weights(folder: Path, name: str) -> Weights:
    """Trained tensors, fp32."""
    return {key: tensor.float() for key, tensor in load_file(folder / f"{name}.safetensors").items()}


def save_weights(folder: Path, name: str, weights: Weights) -> None:
    """Trained tensors, in half precision."""
    halves = {key: tensor.detach().half().contiguous() for key, tensor in weights.items()}
    save_file(halves, folder / f"{name}.safetensors", metadata={"format": "pt"})
