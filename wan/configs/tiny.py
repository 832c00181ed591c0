"""Configs of the `-tiny` tasks: random weights that take every path of the program, on a CPU in seconds.

Beside the keys of the other configs they hold the sizes that the code of the real models has built in:

- `dit_config`: the contents of the DiT's config.json.
- `t5_config`: fields of transformers' UMT5Config. T5 is the largest component, as in the real models.
- `vae_dim`: width of the VAE's first level.
- `clip_config` (i2v, flf2v): fields of transformers' CLIPVisionConfig. The width stays 1280, which the DiT's image
  embedding takes.
"""

import copy
from typing import Any

import torch
from easydict import EasyDict

from .encoders import TEXT_TOKENS
from .wan_i2v_14B import i2v_14B
from .wan_t2v_1_3B import t2v_1_3B

T5 = {"vocab_size": 512, "d_model": 4096, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
DIT = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 64,
    "eps": 1e-6,
    "ffn_dim": 128,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 2,
    "num_layers": 3,
    "out_dim": 16,
    "text_len": TEXT_TOKENS,
}
CLIP = {"num_hidden_layers": 2, "intermediate_size": 128}


def tiny_config(
    base: EasyDict,
    task: str,
    dit: dict[str, Any],
    t5: dict[str, Any] | None = None,
    clip: dict[str, Any] | None = None,
) -> EasyDict:
    config = copy.deepcopy(base)
    config.__name__ = f"Config: Wan {task} tiny"
    config.t5_dtype = config.param_dtype = torch.float32
    config.dit_config = DIT | dit
    config.t5_config = T5 | (t5 or {})
    config.vae_dim = 8
    if clip:
        config.clip_dtype = torch.float32
        config.clip_config = clip
    for key in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps"):
        config[key] = config.dit_config[key]
    return config


def _image(task: str, also_negative: str = "") -> EasyDict:
    config = tiny_config(i2v_14B, task, {"model_type": task, "in_dim": 36}, t5={"num_layers": 6}, clip=CLIP)
    config.sample_neg_prompt = also_negative + config.sample_neg_prompt
    return config


TINY_CONFIGS = {
    "t2v-tiny": tiny_config(t2v_1_3B, "t2v", {}),
    "t2i-tiny": tiny_config(t2v_1_3B, "t2i", {}),
    "i2v-tiny": _image("i2v"),
    "flf2v-tiny": _image("flf2v", also_negative="镜头切换，"),  # as for the 14B model
    "vace-tiny": tiny_config(
        t2v_1_3B,
        "vace",
        {
            "_class_name": "VaceWanModel",
            "model_type": "vace",
            "num_layers": 4,
            "vace_layers": [0, 2],
            "vace_in_dim": 96,
        },
    ),
}
