"""Teaches a DiT where each token is in the video, which it must know before it can learn which way something moves.

Wan's positions are relative: rotary embeddings turn queries and keys (Su et al., 2021). In noise, which looks the same
everywhere, only a missing neighbour tells a token that it is in the first frame, or at an edge. Left to itself a small
model learns what moves and how it looks, but not in which order. So each head begins by looking at one neighbour; and
in training a linear layer after the first BLOCKS blocks predicts every token's frame, row and column: a companion
objective (Lee et al., Deeply-Supervised Nets, 2015), whose layer is not part of the trained model.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from wan.modules.model import WanModel

BLOCKS = 2  # after which tokens are to know their place
MOST = (6, 3, 5)  # at most so many frames (one of them a reference's), rows, columns
LOOKS = ((0, 1), (0, -1), (2, 1), (2, -1), (1, 1), (1, -1), (0, 2), (0, -2))  # (axis, offset) of a neighbour
SHARP, BLUNT = 5.0, 1.5  # by how much a score falls within a radian, along a head's own axis and along others
BIAS, CONTENT = 2.0, 0.3  # of the channels that look around: their bias, and how much else moves them


class Places(nn.Linear):
    """Predicts the places of tokens [B, L, dim]."""

    def __init__(self, dim: int):
        super().__init__(dim, sum(MOST))

    def loss(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Cross entropy of frame, row and column, added up; grid: frames, rows and columns of the tokens."""
        places = torch.cartesian_prod(*(torch.arange(length) for length in grid))
        read = self(F.layer_norm(tokens, tokens.shape[-1:])).split(MOST, dim=-1)
        asked = places.expand(len(tokens), -1, -1).unbind(-1)
        return torch.stack([F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(read, asked)]).sum()


@torch.no_grad()
def look_around(model: WanModel) -> None:
    """Initialises every head to look at one neighbour: scores fall with the distance from it, whatever the tokens are.

    It uses those pairs of a head's channels that turn by one radian with each step along an axis.
    """
    width = model.dim // model.num_heads
    pairs = width // 2
    turning = (0, pairs - 2 * (pairs // 3), pairs - pairs // 3)
    heads = itertools.product(model.blocks, range(model.num_heads))
    for (block, head), (axis, way) in zip(heads, itertools.cycle(LOOKS)):
        for other, pair in enumerate(turning):
            sharp, step = (SHARP, way) if other == axis else (BLUNT, 0)
            _look(block.self_attn, head * width + 2 * pair, step, sharp * math.sqrt(width))


def _look(attention: nn.Module, channel: int, step: float, product: float) -> None:
    """Makes a pair of channels add product * cos(distance - step) to the products of queries and keys."""
    pair = slice(channel, channel + 2)
    attention.q.bias[pair] = BIAS * torch.tensor([1.0, 0.0])
    attention.k.bias[pair] = BIAS * torch.tensor([math.cos(step), -math.sin(step)])
    gain = 1.25 * math.sqrt(product) / BIAS  # a quarter for the norm, which counts the biases
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight[pair] = gain
    for layer in (attention.q, attention.k):
        layer.weight[pair] *= CONTENT
