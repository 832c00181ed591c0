"""The image encoder: the image tower of CLIP ViT-H/14, loaded from Wan2.1's file."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..configs.encoders import VIT_H_14
from ..weights.filling import load_weights

__all__ = ["CLIPModel"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Names in the file -> names in the library's module; those of a block without their prefix and ".weight", ".bias".
OUTER_NAMES = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding.weight": "embeddings.patch_embedding.weight",
    "visual.pre_norm.weight": "pre_layrnorm.weight",
    "visual.pre_norm.bias": "pre_layrnorm.bias",
}
BLOCK_NAMES = {
    "norm1": ["layer_norm1"],
    "attn.to_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.out_proj"],
    "norm2": ["layer_norm2"],
    "mlp.0": ["mlp.fc1"],
    "mlp.2": ["mlp.fc2"],
}


def _library_names(stored_name: str, num_layers: int) -> str | list[str] | None:
    """The module's names for a tensor of the file, None for what is not built: the text tower, the heads, and the
    last block. A name that is not known stays, for the loader to report.
    """
    if stored_name.startswith(("textual.", "log_scale", "visual.head", "visual.post_norm.")):
        return None
    block = re.fullmatch(r"visual\.transformer\.(\d+)\.(.+)\.(weight|bias)", stored_name)
    if not block or block[2] not in BLOCK_NAMES:
        return OUTER_NAMES.get(stored_name, stored_name)
    if int(block[1]) == num_layers:
        return None
    return [f"encoder.layers.{block[1]}.{owner}.{block[3]}" for owner in BLOCK_NAMES[block[2]]]


def _reshaped(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    return nn.Parameter(parameter.reshape(shape), requires_grad=False)


class Float32LayerNorm(nn.LayerNorm):
    """Layer normalization that computes in fp32 and rounds once, whatever the type of its weights and input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def _norms_in_float32(model: nn.Module) -> None:
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(owner, name, Float32LayerNorm(child.normalized_shape, child.eps))


class CLIPModel:
    """Image features for image-conditioned video: the hidden states before the last block of the image tower.

    `model` is the library's vision model without the last block and without what comes after it; the text tower
    is neither built nor loaded. It runs in `dtype`, its norms and softmax computing in fp32.

    Args:
        dtype: type of the weights and of the result.
        device: where the weights go once loaded.
        checkpoint_path: Wan2.1's CLIP file. None leaves the weights on the meta device, without storage.
        tokenizer_path: the text tower's tokenizer; not read.
        config: fields of `CLIPVisionConfig` that differ from ViT-H/14's; `num_hidden_layers` counts the last block.

    Raises:
        InputError: a missing, damaged or unfitting checkpoint.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        checkpoint_path: str | Path | None,
        tokenizer_path: str | Path | None,
        *,
        config: dict[str, Any] | None = None,
    ):
        self.dtype = dtype
        self.device = device
        self.checkpoint_path = checkpoint_path
        self.tokenizer_path = tokenizer_path

        sizes = VIT_H_14 | (config or {})
        num_layers = sizes["num_hidden_layers"] - 1
        sizes = CLIPVisionConfig(**sizes | {"num_hidden_layers": num_layers}, attn_implementation="sdpa")
        with torch.device("meta"):
            model = CLIPVisionModel(sizes)
            model.post_layernorm = nn.Identity()
            _norms_in_float32(model)
        self.model = model.to(dtype).eval().requires_grad_(False)
        # A buffer that no file holds: it must not stay on the meta device.
        model.embeddings.position_ids = torch.arange(model.embeddings.num_positions)[None]
        if checkpoint_path is not None:
            self._load(checkpoint_path, num_layers)
            model.to(device)

    def _load(self, checkpoint_path: str | Path, num_layers: int) -> None:
        """Fills the model; the file keeps leading dimensions of 1 where the library has none."""
        embeddings = self.model.embeddings
        positions = embeddings.position_embedding
        shapes = embeddings.class_embedding.shape, positions.weight.shape
        embeddings.class_embedding = _reshaped(embeddings.class_embedding, 1, 1, *shapes[0])
        positions.weight = _reshaped(positions.weight, 1, *shapes[1])
        names = partial(_library_names, num_layers=num_layers)
        load_weights(self.model, checkpoint_path, names=names, dtype=lambda name: self.dtype)
        embeddings.class_embedding = _reshaped(embeddings.class_embedding, *shapes[0])
        positions.weight = _reshaped(positions.weight, *shapes[1])

    def visual(self, videos: Sequence[torch.Tensor]) -> torch.Tensor:
        """Encodes every frame of some videos.

        Args:
            videos: list of [3, T, H, W] in [-1, 1], of any size, on the model's device; not changed.

        Returns:
            [frames of all videos, tokens, width] of type `dtype`: one class token, then one per patch, row by row
            (257 tokens, 1280 wide for ViT-H/14).
        """
        size = (self.model.config.image_size,) * 2
        images = torch.cat(
            [
                F.interpolate(video.transpose(0, 1), size=size, mode="bicubic", align_corners=False)
                for video in videos
            ]
        )
        mean, std = images.new_tensor(MEAN)[:, None, None], images.new_tensor(STD)[:, None, None]
        images = (images * 0.5 + 0.5 - mean) / std
        return self.model(pixel_values=images).last_hidden_state
