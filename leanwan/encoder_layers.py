"""The layers of text and image encoders in the order of their calls, by the names of Wan's tree and of transformers.

Text encoders: Wan's `T5Encoder` (`token_embedding`, `blocks`) and transformers' UMT5 stack (`embed_tokens`, `block`).
Image encoders: Wan's CLIP (`visual.transformer`, of which the last block is not called) and transformers'
`CLIPVisionModel` (`encoder.layers`).
"""

from __future__ import annotations

from torch import nn


def token_table(model: nn.Module) -> nn.Module:
    """The table of tokens of a text encoder."""
    return model.token_embedding if hasattr(model, "token_embedding") else model.embed_tokens


def text_encoder_groups(model: nn.Module) -> list[nn.Module]:
    """The layer groups of a text encoder: one layer or a few of a block each, the largest layers alone."""
    groups = []
    for block in model.blocks if hasattr(model, "blocks") else model.block:
        if hasattr(block, "attn"):
            groups += _of_wan(block.attn, block.ffn)
            continue
        attention, ffn = block.layer
        own, dense = attention.SelfAttention, ffn.DenseReluDense
        groups += [
            [attention.layer_norm, own.q, own.k],
            [own.v, own.relative_attention_bias, own.o],
            [ffn.layer_norm, dense.wi_0],
            [dense.wi_1],
            [dense.wo],
        ]
    return [nn.ModuleList(group) for group in groups]


def _of_wan(attention: nn.Module, ffn: nn.Module) -> list[list[nn.Module]]:
    named = [[(attention, "q"), (attention, "k")], [(attention, "v"), (attention, "o")]]
    named += [[(ffn, name)] for name in ("fc1", "gate", "fc2")]
    if all(hasattr(owner, name) for group in named for owner, name in group):
        return [[getattr(owner, name) for owner, name in group] for group in named]
    return [[attention], [ffn]]  # in a tree whose layers have other names


def image_tower(model: nn.Module) -> nn.Module:
    """The part of an image encoder that is called: Wan's CLIP has a text tower beside it."""
    return getattr(model, "visual", model)


def image_encoder_groups(model: nn.Module) -> list[nn.Module]:
    """The blocks of an image encoder that are called."""
    tower = image_tower(model)
    return list(tower.transformer)[:-1] if hasattr(tower, "transformer") else list(tower.encoder.layers)


def not_called(model: nn.Module) -> list[nn.Module]:
    """The layers of an image encoder after its second-to-last hidden states, which are the features used here."""
    tower = image_tower(model)
    return [tower.transformer[-1], tower.post_norm] if hasattr(tower, "transformer") else []
