"""What a toy's checkpoint is made of: what was trained, in half precision, and what is frozen random numbers, which are
the encoders of text and images and what reads the image encoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from easydict import EasyDict
from safetensors.torch import save_file

from .. import tiny
from .clips import words

Weights = dict[str, torch.Tensor]


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


def save_weights(folder: Path, name: str, weights: Weights) -> None:
    """Trained tensors, in half precision."""
    halves = {key: tensor.detach().half().contiguous() for key, tensor in weights.items()}
    save_file(halves, folder / f"{name}.safetensors", metadata={"format": "pt"})
