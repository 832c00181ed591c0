"""Image to video, 14B parameters."""

import torch

from .shared_config import model_config, wan_shared_cfg

i2v_14B = model_config(
    "Wan I2V 14B",
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    clip_model="clip_xlm_roberta_vit_h_14",
    clip_dtype=torch.float16,
    clip_checkpoint="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    clip_tokenizer="xlm-roberta-large",
    sample_neg_prompt="镜头晃动，" + wan_shared_cfg.sample_neg_prompt,
)
