"""Sizes of the text and the image encoder of all Wan2.1 models: fields of transformers' configs, and token counts."""

from typing import Any

UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
VIT_H_14: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_TOKENS = 512  # to which a prompt is padded
IMAGE_TOKENS = (
    1 + (VIT_H_14["image_size"] // VIT_H_14["patch_size"]) ** 2
)  # of a picture, 257: the class token, then the patches
