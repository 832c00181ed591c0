"""Configs of the trained toys: models that show what the prompt says, on a CPU in seconds. Keys as in tiny.py."""

from typing import Any

from easydict import EasyDict

from .tiny import CLIP, tiny_config
from .wan_i2v_14B import i2v_14B
from .wan_t2v_1_3B import t2v_1_3B

TEXT_LEN, TEXT_DIM = 32, 64
T5 = {"vocab_size": 640, "d_model": TEXT_DIM, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
DIT = {
    "dim": 128,
    "ffn_dim": 384,
    "num_heads": 8,
    "num_layers": 4,
    "text_len": TEXT_LEN,
    "text_dim": TEXT_DIM,
}


def _toy(base: EasyDict, task: str, dit: dict[str, Any], **encoders: Any) -> EasyDict:
    config = tiny_config(base, task, DIT | dit, t5=T5, **encoders)
    config.__name__ = f"Config: Wan {task} toy"
    config.text_len = TEXT_LEN
    config.sample_neg_prompt = ""  # in training, an empty caption takes the place of one left out
    return config


def _image(task: str) -> EasyDict:
    return _toy(i2v_14B, task, {"model_type": task, "in_dim": 36}, clip=CLIP)


TOY_CONFIGS = {
    "t2v-toy": _toy(t2v_1_3B, "t2v", {}),
    "t2i-toy": _toy(t2v_1_3B, "t2i", {}),
    "i2v-toy": _image("i2v"),
    "flf2v-toy": _image("flf2v"),
    "vace-toy": _toy(
        t2v_1_3B,
        "vace",
        {"_class_name": "VaceWanModel", "model_type": "vace", "vace_layers": [0, 2], "vace_in_dim": 96},
    ),
}
