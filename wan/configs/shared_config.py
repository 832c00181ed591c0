"""The config entries that all Wan2.1 models share: files, types, patch and latent strides."""

from typing import Any

import torch
from easydict import EasyDict

from .encoders import TEXT_TOKENS

# If the solver's history is in RAM, a latent's frames are split into at most so many groups that take a step in turn.
SOLVER_PIECES = 8

wan_shared_cfg = EasyDict(
    # text encoder
    t5_model="umt5_xxl",
    t5_dtype=torch.bfloat16,
    text_len=TEXT_TOKENS,
    t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
    t5_tokenizer="google/umt5-xxl",
    # VAE
    vae_checkpoint="Wan2.1_VAE.pth",
    vae_stride=(4, 8, 8),
    # DiT
    param_dtype=torch.bfloat16,
    patch_size=(1, 2, 2),
    freq_dim=256,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
    # sampling
    num_train_timesteps=1000,
    sample_fps=16,
    # The negative prompt published with the models.
    sample_neg_prompt=(
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
        "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
    ),
)


def model_config(name: str, **entries: Any) -> EasyDict:
    """The shared entries and a model's own."""
    return EasyDict({**wan_shared_cfg, **entries}, __name__=f"Config: {name}")
